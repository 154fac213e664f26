"""`glsim index build`: the images of a data set as an index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.options import BoxLoading, DataSplit, SkipBad, positional, required, setting, show_skipped

if TYPE_CHECKING:
    from glsim.inference.index import IndexSize

PURPOSE = "Answer"
CALL = "glsim.inference.index:build_index"


class Options(SkipBad, BoxLoading, DataSplit):
    """Keep the images of a data set as vectors, so that more classes can be added without training."""

    source: str = positional("bundle, hf-hub:owner/name or official .pth", path="reads")
    out: str = required("folder to make, say RUN/index", path="folder")
    split: Literal["train", "val", "test"] = setting("train", "which images")
    embedding: Literal["global", "crop", "fused"] | None = setting(
        None, "vector of the image, of the crop, or what the head reads; default: what the head reads"
    )


def show(r: IndexSize, options: Options) -> str:
    """What the index holds now."""
    return "\n".join([show_size(r), *show_skipped(r.skipped)])


def show_size(r: IndexSize) -> str:
    """Images, classes and embedding of an index."""
    return f"{r.index}: {r.images} images of {r.classes} classes, {r.embedding} embedding"
