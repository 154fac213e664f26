"""`glsim predict bulk`: the classes of very many images, by Ray Data, as Parquet files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from glsim.cli.options import Decoding, Device, Source, positional, required, setting
from glsim.cli.output import put
from glsim.data.box_options import BoxExamples
from glsim.files import printable

if TYPE_CHECKING:
    from glsim.inference.ray_bulk import BulkPrediction

PURPOSE = "Answer"
CALL = "glsim.inference.ray_bulk:predict_bulk"
RAW = True


class Options(BoxExamples, Decoding, Device, Source):
    """Name what is in very many images with Ray: lists and object stores too, Parquet out. Needs glsim[scale].

    The same command goes on where a job stopped. An image that cannot be read is a row that says why.
    """

    source: str = positional("bundle, hf-hub:owner/name, official .pth or exported .onnx", path="reads")
    images: list[str] = positional(
        "files, folders, globs, URIs (s3://..), or lists (.csv, .parquet) with a column path", path="reads"
    )
    out: str = required("folder or s3://.. for the Parquet files", path="folder")
    top_k: int = setting(5, "answers per image", least=1)
    flip: bool = setting(False, "average the logits of each image and its mirror image")
    embedding: Literal["global", "crop", "fused"] | None = setting(
        None, "write this vector too: of the image, of the crop, or what the head reads"
    )
    address: str | None = setting(None, "cluster to join, as auto or ray://HOST:10001; default: this machine")
    part_size: int = setting(1000, "images in each Parquet file", least=1)
    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(2, "workers, each with the model and one core", least=1)


def show(r: BulkPrediction, options: Options) -> str:
    """How many answers there are, and how fast they came; what was made again goes to stderr."""
    for name, why in r.parts_again.items():
        put(printable(f"{name} was made again: {why}"), sys.stderr)
    text = f"{r.out}: {r.images} images in {r.parts} parts; {r.answered} answered, {r.errors} could not be read; "
    text += f"{r.seconds} s, {r.images_per_second} images/s"
    if r.steady_images_per_second:
        text += f" ({r.steady_images_per_second} once started)"
    if r.parts_before:
        text += f", {r.parts_before} of {r.parts} parts were there"
    return printable(text)
