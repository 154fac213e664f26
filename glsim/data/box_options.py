"""Options of a file of boxes, whose boxes are examples: one box of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from glsim.settings import Settings, setting
from glsim.types import ConfigError


class Boxed(TypedDict, total=False):
    """Which boxes of which file are examples: keywords of all that takes them, whose defaults `BoxExamples` has."""

    boxes: str | Path | None  # file that `glsim.data.annotation_formats:read_marks` reads; None: images are examples
    min_confidence: float  # of the detector
    categories: Sequence[str] | None  # None: all
    margin: float  # around a box, on each side, in its widths and heights
    square: bool  # cut out as wide as high


class BoxFile(Settings):
    """A file of boxes, and which of them are taken."""

    boxes: str | None = setting(
        None,
        "boxes, each an example: MegaDetector's or COCO .json, or CSV (path,left,top,right,bottom)",
        path="reads",
    )
    min_confidence: float = setting(0.0, "leave out boxes that their detector is less sure of", least=0, most=1)
    categories: list[str] | None = setting(None, "only boxes of these categories, as animal; default: all")

    def check(self) -> None:
        """Nothing is chosen among boxes that are not there."""
        super().check()
        wanted = {"min_confidence": self.min_confidence, "categories": self.categories}
        for name, value in wanted.items():
            if value and self.boxes is None:
                raise ConfigError(f"{name}={value}: it chooses among boxes; add --boxes FILE")


class BoxExamples(BoxFile):
    """Boxes that are cut out of their images, each an example."""

    margin: float = setting(0.1, "cut out so much more on each side of a box, in its widths and heights", least=0)
    square: bool = setting(False, "cut out as much in height as in width, by the longer side of a box")


def take_boxed(options: Mapping[str, Any]) -> tuple[Boxed, dict[str, Any]]:
    """The keywords of `Boxed` among others, and the others."""
    names = Boxed.__annotations__
    boxed: Any = {name: value for name, value in options.items() if name in names}
    return boxed, {name: value for name, value in options.items() if name not in names}


def boxed_of(settings: Any) -> Boxed:
    """The keywords of `Boxed` among settings."""
    return take_boxed(vars(settings))[0]
