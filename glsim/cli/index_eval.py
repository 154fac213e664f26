"""`glsim index eval`: recall and accuracy of an index beside the softmax head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.options import (
    MISSING,
    DataSplit,
    Loading,
    SkipBad,
    dataclass,
    positional,
    required,
    setting,
    show_skipped,
)

if TYPE_CHECKING:
    from glsim.inference.index_evaluation import IndexEvaluation

PURPOSE = "Answer"


@dataclass(frozen=True, kw_only=True)
class Options(SkipBad, Loading, DataSplit):
    """Measure an index beside the softmax head: recall, accuracy, what is unknown."""

    index: str = positional(MISSING, "folder of glsim index build", path="reads")
    data: str = required(
        "folder, CSV, hf:NAME or wds:FOLDER, as for train; classes not in the index count as unknown", path="reads"
    )
    split: Literal["train", "val", "test"] = setting("test", "which images")
    neighbours: int = setting(5, "nearest images that vote", least=1)
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")


def run(options: Options, progress: bool) -> IndexEvaluation:
    """Measure it."""
    from glsim.inference.index_evaluation import evaluate_index

    return evaluate_index(**vars(options), progress=progress)


def show(r: IndexEvaluation, options: Options) -> str:
    """Recall, accuracies beside the head, and the unknown."""
    ways = {"prototypes": r.prototypes, "neighbours": r.neighbours, "head": r.head}
    lines = [
        f"{r.split}: {r.count} images of the {r.classes} classes of the index, {r.embedding} embedding",
        "recall: " + "   ".join(f"@{k} {x:.2%}" for k, x in r.recall.items()),
        "top-1:  " + "   ".join(f"{way} {a.top1:.2%}" for way, a in ways.items()),
    ]
    if any(a.top1_added is not None for a in ways.values()):
        said = "   ".join(f"{way} {percent(a.top1_old)}, {percent(a.top1_added)}" for way, a in ways.items())
        lines.append(f"  of classes that the head knows, of classes added: {said}")
    if r.unknown is not None:
        u, scores = r.unknown, r.unknown.auroc
        lines += [
            f"unknown: {u.count} images; AUROC prototypes {scores.prototypes:.3f}   softmax {scores.softmax:.3f}   "
            f"energy {scores.energy:.3f}",
            f"  --below {u.threshold:.3f} keeps 95 % of the known images and {u.passed:.1%} of the unknown",
        ]
    return "\n".join(lines + show_skipped(r.skipped))


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"
