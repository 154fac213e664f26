"""Regions of images by name: `photo.jpg#xywh=10,20,30,40` is that box of photo.jpg, as W3C's Media Fragments name it.

`percent:` before the numbers counts in hundredths of width and height; `&margin=0.1` and `&square` widen what is cut
out. A region stands wherever an image may stand: so that one box of one image is an example like any other.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from glsim.data.limits import Refused

Name = TypeVar("Name", bound=str | Path)
Size = tuple[int, int]  # width, height
MARK = "#xywh="
_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"
_NAMED = re.compile(rf"(.+){MARK}(percent:|pixel:)?{','.join([_NUMBER] * 4)}(?:&margin={_NUMBER})?(&square)?", re.S)
_ALMOST = 1e-6  # of a pixel: what shares lose on their way to pixels


class Region(NamedTuple):
    """A box of an upright image, and how much around it is cut out with it."""

    left: float
    top: float
    right: float  # exclusive, as `bottom`
    bottom: float
    shares: bool = False  # of the image's width and height; else pixels
    margin: float = 0.0  # on each side, in widths and heights of the box
    square: bool = False  # as wide as high, by the longer side; moved inside where it would stick out

    @property
    def fragment(self) -> str:
        """What stands behind the name of the file."""
        numbers = self.left, self.top, self.right - self.left, self.bottom - self.top
        shown = ",".join(f"{100 * n if self.shares else n:.10g}" for n in numbers)
        margin = f"&margin={self.margin:.10g}" if self.margin else ""
        return f"{MARK}{'percent:' if self.shares else ''}{shown}{margin}{'&square' if self.square else ''}"

    def within(self, size: Size) -> tuple[float, float, float, float]:
        """The box in pixels of an image of `size`, what is outside cut off. Raises Refused where nothing is left."""
        wide, high = size if self.shares else (1, 1)
        left, top, right, bottom = self.left * wide, self.top * high, self.right * wide, self.bottom * high
        if left >= right or top >= bottom:
            raise Refused("the box is empty or turned round")
        inside = max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise Refused(f"the box lies outside of {size[0]} x {size[1]} pixels")
        return inside

    def view(self, size: Size) -> tuple[int, int, int, int]:
        """What is cut out of an image of `size`, in whole pixels: the box with its margin, or the square around it."""
        left, top, right, bottom = self.within(size)
        spans = (left, right), (top, bottom)
        wider = [(a - self.margin * (b - a), b + self.margin * (b - a)) for a, b in spans]
        side = max(b - a for a, b in wider)
        ends = []
        for (a, b), most in zip(wider, size, strict=True):
            if self.square:
                length = min(math.ceil(side - _ALMOST), most)
                start = min(max(round((a + b - length) / 2), 0), most - length)
                ends.append((start, start + length))
            else:
                start = min(max(math.floor(a + _ALMOST), 0), most - 1)
                ends.append((start, max(min(math.ceil(b - _ALMOST), most), start + 1)))
        return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


class Cut(NamedTuple):
    """Where a picture lies in its upright image."""

    whole: Size  # of the image
    view: tuple[int, int, int, int]  # of the picture: left, top, right, bottom
    box: tuple[float, float, float, float] | None = None  # without margin; None: the picture is the image itself

    @property
    def size(self) -> Size:
        """Width and height of the picture."""
        left, top, right, bottom = self.view
        return right - left, bottom - top


def whole(size: Size) -> Cut:
    """The cut of an image that is all shown."""
    return Cut(size, (0, 0, *size))


def cut_of(picture: Image.Image) -> Cut:
    """Where a picture of `cut_out` lies."""
    return picture.info.get("cut") or whole(picture.size)


def split_region(path: str | Path) -> tuple[str, Region | None]:
    """The name of a file, and the region of it that `path` names; None: all of it."""
    name = str(path)
    if MARK not in name or not (found := _NAMED.fullmatch(name)):
        return name, None
    file, unit, *numbers, margin, square = found.groups()
    try:
        left, top, width, height = (float(n) / (100 if unit == "percent:" else 1) for n in numbers)
        return file, Region(left, top, left + width, top + height, unit == "percent:", float(margin or 0), bool(square))
    except ValueError:  # two dots in a number
        return name, None


def file_of(path: Name) -> Name:
    """The file of a region, or of an image the same path."""
    file, region = split_region(path)
    return path if region is None else type(path)(file)


def stem_of(path: Path) -> str:
    """The name of an image without its ending, to name a picture of it by; of a region with its numbers."""
    file, region = split_region(path)
    if region is None:
        return path.stem
    numbers = (100 * side if region.shares else side for side in region[:4])
    return "_".join([Path(file).stem, *(f"{number:.1f}".removesuffix(".0") for number in numbers)])


def cut_out(image: Image.Image, region: Region | None) -> Image.Image:
    """The picture of a region of an upright image; without a region the image itself."""
    if region is None:
        return image
    box = region.within(image.size)
    view = region.view(image.size)
    picture = image.crop(view)
    picture.info = {**image.info, "cut": Cut(image.size, view, box)}
    return picture
