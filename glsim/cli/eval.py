"""`glsim eval`: accuracy and confidence of a model on one split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import BoxLoading, DataSplit, Lines, SkipBad, Source, setting, show_skipped
from glsim.data.class_names import shown_label

if TYPE_CHECKING:
    from glsim.evaluation.evaluate import BundleEvaluation

PURPOSE = "Measure"
CALL = "glsim.evaluation.evaluate:evaluate_bundle"


class Options(SkipBad, BoxLoading, DataSplit, Source):
    """Measure a model on one split: top-1, top-5, mean over classes, exact counts; a page of the mistakes."""

    out: str | None = setting(
        None, "folder for evaluation.json, predictions.csv and the confusion matrix", path="folder"
    )
    errors: str | None = setting(
        None, "folder for index.html: the mistakes with pictures, most confident first", path="folder"
    )
    flip: bool = setting(False, "average the logits of each image and its mirror image")
    reject: bool = setting(False, "also measure the answers at or above the threshold that calibrate --max-error found")
    taxonomy: str | None = setting(None, "CSV label,genus,.. from fine to coarse: measure every level", path="reads")


def show(r: BundleEvaluation, options: Options) -> Lines:
    """Accuracies, class by class where there are few."""
    names = r.class_names or {}
    yield f"{r.split}: {r.count} images, {r.images_per_second} images/s"
    spread = f"mean over classes {r.per_class_mean:.2%}, standard deviation {r.per_class_std:.2%}"
    yield f"top-1 {r.top1:.2%} ({r.correct})   top-5 {r.top5:.2%} ({r.correct_top5})   {spread}"
    yield show_confidence(r.ece, r.aurc, r.risk_coverage)
    if r.answered:
        yield show_answered(r.answered.threshold, r.answered.coverage, r.answered.count, r.answered.correct)
    width = max((len(level.level) for level in r.levels or ()), default=0)
    for i, level in enumerate(r.levels or ()):
        answered = ""
        if r.answered:
            said = r.answered.levels[i]
            error = f", {said.error:.2%} of that wrong" if said.error is not None else ""
            answered = f"; answered {said.coverage:.1%}{error}"
        yield f"  {level.level:{width}}  {level.groups:5d} groups, top-1 {level.top1:.2%}{answered}"
    if r.second_pass_share is not None:
        yield f"second pass for {r.second_pass_share:.1%} of the images"
    if r.split_drawn:
        yield f"({r.data} has no splits of its own: these images were drawn; --split all measures every one)"
    if len(r.per_class) <= 30:
        shown = {label: shown_label(label, names) for label in r.per_class}
        width = max(map(len, shown.values()))
        yield from (f"  {shown[name]:{width}}  {right:4d} of {count}" for name, (right, count) in r.per_class.items())
    if r.confused:
        yield "most often confused:"
        for x in r.confused[:5]:
            one, other = (shown_label(label, names) for label in (x.label, x.prediction))
            yield f"  {one} taken for {other}: {x.count} of {x.of}"
    yield from show_skipped(r.skipped)
    if r.errors:
        yield f"mistakes: {r.errors}"
    if options.out is not None:
        missing = f" (confusion.csv, but no confusion.png: {len(r.per_class)} classes cannot be read in it)"
        yield f"written: {options.out}{'' if 'confusion.png' in r.written else missing}"


def show_confidence(ece: float, aurc: float, curve: list[dict[str, float]]) -> str:
    """Calibration error, and the error at some coverages."""
    points = [next((p for p in curve if p["coverage"] >= share - 1e-9), curve[-1]) for share in (0.5, 0.8, 0.9)]
    shown = ", ".join(f"{p['error']:.2%} of the surest {p['coverage']:.0%}" for p in points)
    return f"confidence: calibration error {ece:.2%}; wrong: {shown}; AURC {aurc:.4f}"


def show_answered(threshold: float, coverage: float, count: int, correct: int) -> str:
    """How much is answered at a threshold, and how wrongly."""
    wrong = f", {(count - correct) / count:.2%} of that wrong ({count - correct})" if count else ""
    return f"threshold {threshold:.4f}: {coverage:.1%} answered ({count}){wrong}, the rest unknown"
