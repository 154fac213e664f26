"""`glsim predict`: the classes of images, by a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from glsim.cli.options import BoxLoading, Images, SkipBad, Source, setting, show_skipped
from glsim.cli.output import put
from glsim.data.image_files import LISTS
from glsim.data.uri import is_uri
from glsim.files import printable
from glsim.inference.formats import FORMATS, format_of
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.predictor import Predictions

PURPOSE = "Answer"
CALL = "glsim.inference.predictor:predict_images"
RAW = True


class Options(SkipBad, BoxLoading, Images, Source):
    """Name what is in images: top-k classes with probabilities, and the crop box."""

    top_k: int = setting(5, "answers per image", least=1)
    flip: bool = setting(False, "average the logits of each image and its mirror image")
    reject: bool = setting(False, "answer unknown below the threshold that calibrate --max-error found")
    taxonomy: str | None = setting(
        None,
        "CSV label,genus,.. from fine to coarse: with --reject, answer with a coarser level where that is sure",
        path="reads",
    )
    only: str | None = setting(
        None, "file with a label a line, of all that can occur: no other is answered", path="reads"
    )
    place: str | None = setting(None, "with --only TABLE.csv of the columns place,label: whose labels count")
    class_names: str | None = setting(
        None, "CSV label,name,scientific_name,taxon_id: names that people use; default: the bundle's", path="reads"
    )
    embedding: Literal["global", "crop", "fused"] | None = setting(
        None, "write this vector too (jsonl): of the image, of the crop, or what the head reads"
    )
    format: Literal["text", "jsonl", "csv", "parquet", "megadetector", "coco", "camtrap_dp"] | None = setting(
        None, "default: by the ending of --out, else text; the last four with --boxes and --out"
    )
    out: str | None = setting(None, "write there instead of printing", path="file")
    sort_into: str | None = setting(
        None, "folder to file copies of the images in, by their answers; nothing is overwritten", path="folder"
    )
    links: bool = setting(False, "with --sort-into: links in place of copies")

    def check(self) -> None:
        """The format follows from the file; an embedding needs a format that has a place for it."""
        super().check()
        if self.taxonomy is not None and not self.reject:
            raise ConfigError(f"taxonomy={self.taxonomy}: it is for what is unsure; add --reject")
        if remote := [one for one in self.images if is_uri(one) or one.lower().endswith(LISTS)]:
            raise ConfigError(f"images={remote[0]}: lists and object stores need glsim predict bulk, and --out FOLDER")
        if self.place is not None and self.only is None:
            raise ConfigError(f"place={self.place}: it needs the table of places and labels; add --only TABLE.csv")
        if self.links and self.sort_into is None:
            raise ConfigError("links: they are for --sort-into FOLDER")
        if self.format is None:
            self.fill(format=format_of(self.out))
        if self.format not in FORMATS and (self.boxes is None or self.out is None):
            raise ConfigError(f"format={self.format}: it is a file of boxes; add --boxes FILE and --out FILE")
        if self.embedding is not None and self.out is not None and self.format != "jsonl":
            raise ConfigError(f"embedding={self.embedding}: format {self.format} has no place for it; take jsonl")


def show(r: Predictions, options: Options) -> str:
    """The answers in the format asked for; what was left out goes to stderr."""
    told = show_skipped(r.skipped)
    if r.second_pass_share is not None:
        told.append(f"second pass for {r.second_pass_share:.1%} of the images")
    for line in told:
        put(printable(line), sys.stderr)
    if r.sorted is not None:
        put(printable(f"{r.sorted} images are new in {options.sort_into}"), sys.stderr)
    if options.out is not None:
        return printable(f"written: {options.out}")
    return FORMATS[str(options.format)](r.predictions, r.class_names or {}).rstrip("\n")
