"""Options that several verbs share, as dataclasses to inherit from, and texts that several print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from glsim.data.box_options import BoxExamples
from glsim.data.catalog import SETS
from glsim.data.limits import MAX_MEGAPIXELS
from glsim.models import METHODS
from glsim.settings import Settings, Size, positional, required, setting


class Device(Settings):
    """Where a model runs."""

    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")


class Decoding(Settings):
    """How images are decoded."""

    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded", above=0
    )


class SkipBad(Decoding):
    """What becomes of images that cannot be read."""

    skip_bad: bool = setting(False, "leave unreadable images out and list them")


class Loading(Decoding, Device):
    """How images are loaded, in batches."""

    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(2, "processes that load images", least=0)


class Source(Settings):
    """A model, with options of its method to change."""

    source: str = positional("bundle, hf-hub:owner/name, official .pth or exported .onnx", path="reads")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.margin null")


class BoxLoading(BoxExamples, Loading):
    """Images, or boxes of images, that are loaded in batches."""


class Images(Settings):
    """Images to answer."""

    images: list[str] = positional("files, folders or globs", path="reads")


class DataSplit(Settings):
    """Images with labels: one split of a data set."""

    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    dataset: str | None = setting(None, "name of a data set prepared in DATA", choices=SETS)
    split: Literal["train", "val", "test", "all"] = setting("test", "which images; all: every one there is")


class PlannedModel(Settings):
    """A model that is yet to be built."""

    method: str = setting("glsim", f"one of: {', '.join(METHODS)}", choices=METHODS)
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    options: dict[str, Any] = setting({}, "options of the method, as --options.top_o 16 --options.metric gls_l2")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")


Lines = Iterator[str]  # of what a verb prints for people


def show_skipped(skipped: list[str], what: str = "unreadable images") -> list[str]:
    """Lines that count and list what was left out."""
    return [f"skipped {len(skipped)} {what}:", *(f"  {bad}" for bad in skipped)] if skipped else []
