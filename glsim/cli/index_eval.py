"""`glsim index eval`: recall and accuracy of an index beside the softmax head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.options import BoxLoading, DataSplit, Lines, SkipBad, positional, required, setting, show_skipped

if TYPE_CHECKING:
    from glsim.inference.index_evaluation import IndexEvaluation

PURPOSE = "Answer"
CALL = "glsim.inference.index_evaluation:evaluate_index"


class Options(SkipBad, BoxLoading, DataSplit):
    """Measure an index beside the softmax head: recall, accuracy, what is unknown."""

    index: str = positional("folder of glsim index build", path="reads")
    data: str = required(
        "folder, CSV, hf:NAME or wds:FOLDER, as for train; classes not in the index count as unknown", path="reads"
    )
    split: Literal["train", "val", "test"] = setting("test", "which images")
    neighbours: int = setting(5, "nearest images that vote", least=1)
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")


def show(r: IndexEvaluation, options: Options) -> Lines:
    """Recall, accuracies beside the head, and the unknown."""
    ways = {"prototypes": r.prototypes, "neighbours": r.neighbours, "head": r.head}
    yield f"{r.split}: {r.count} images of the {r.classes} classes of the index, {r.embedding} embedding"
    yield "recall: " + "   ".join(f"@{k} {x:.2%}" for k, x in r.recall.items())
    yield "top-1:  " + "   ".join(f"{way} {a.top1:.2%}" for way, a in ways.items())
    if any(a.top1_added is not None for a in ways.values()):
        said = "   ".join(f"{way} {percent(a.top1_old)}, {percent(a.top1_added)}" for way, a in ways.items())
        yield f"  of classes that the head knows, of classes added: {said}"
    if r.unknown is not None:
        auroc = "   ".join(f"{name} {value:.3f}" for name, value in vars(r.unknown.auroc).items())
        yield f"unknown: {r.unknown.count} images; AUROC {auroc}"
        kept = f"  --below {r.unknown.threshold:.3f} keeps 95 % of the known images"
        yield f"{kept} and {r.unknown.passed:.1%} of the unknown"
    yield from show_skipped(r.skipped)


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"
