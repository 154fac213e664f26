"""Options that several verbs share, as dataclasses to inherit from, and texts that several print."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, Literal

from glsim.data.catalog import SETS
from glsim.data.limits import MAX_MEGAPIXELS
from glsim.models import METHODS
from glsim.settings import Settings, Size, positional, required, setting
from glsim.types import ConfigError

__all__ = ["MISSING", "Settings", "Size", "dataclass", "positional", "required", "setting"]


@dataclass(frozen=True, kw_only=True)
class Device(Settings):
    """Where a model runs."""

    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")


@dataclass(frozen=True, kw_only=True)
class Decoding(Settings):
    """How images are decoded."""

    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded"
    )

    def check(self) -> None:
        """A limit above 0."""
        super().check()
        if not self.max_megapixels > 0:
            raise ConfigError(f"max_megapixels={self.max_megapixels}: a number above 0 is needed")


@dataclass(frozen=True, kw_only=True)
class SkipBad(Decoding):
    """What becomes of images that cannot be read."""

    skip_bad: bool = setting(False, "leave unreadable images out and list them")


@dataclass(frozen=True, kw_only=True)
class Loading(Decoding, Device):
    """How images are loaded, in batches."""

    batch_size: int = setting(32, "images at a time", least=1)
    workers: int = setting(2, "processes that load images", least=0)


@dataclass(frozen=True, kw_only=True)
class Source(Settings):
    """A model, with options of its method to change."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name, official .pth or exported .onnx", path="reads")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.margin null")


@dataclass(frozen=True, kw_only=True)
class Images(Settings):
    """Images to answer."""

    images: list[str] = positional(MISSING, "files, folders or globs", path="reads")


@dataclass(frozen=True, kw_only=True)
class DataSplit(Settings):
    """Images with labels: one split of a data set."""

    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    dataset: str | None = setting(None, "name of a data set prepared in DATA", choices=SETS)
    split: Literal["train", "val", "test", "all"] = setting("test", "which images; all: every one there is")


@dataclass(frozen=True, kw_only=True)
class PlannedModel(Settings):
    """A model that is yet to be built."""

    method: str = setting("glsim", f"one of: {', '.join(METHODS)}", choices=METHODS)
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    options: dict[str, Any] = setting({}, "options of the method, as --options.top_o 16 --options.metric gls_l2")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")


def show_skipped(skipped: list[str], what: str = "unreadable images") -> list[str]:
    """Lines that count and list what was left out."""
    return [f"skipped {len(skipped)} {what}:", *(f"  {bad}" for bad in skipped)] if skipped else []
