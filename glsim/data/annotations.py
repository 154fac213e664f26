"""Boxes and points of images as annotators or a detector list them, brought to the pixels of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from glsim.data.annotation_formats import SHARES, WANTED, Mark, Size, read_marks, read_voc_marks, voc_files
from glsim.data.images import read_image
from glsim.types import DataError


@dataclass(frozen=True)
class Annotation:
    """What is known of one image, in pixels of `size`."""

    where: str
    size: Size | Path | None = None  # a file: the image that it was drawn on; None: not told
    boxes: list[Mark] = field(default_factory=list)
    points: list[Mark] = field(default_factory=list)
    changes: tuple[str, ...] = ()  # what `fit` did: "scaled", "cut"

    def visible(self) -> dict[tuple[str, int], tuple[float, ...]]:
        """The visible points, x, y, by name and number: an image may have several of a name, from 0."""
        seen, found = Counter[str](), {}
        for mark in self.points:
            if mark.visible:
                found[mark.name, seen[mark.name]] = mark.sides
                seen[mark.name] += 1
        return found


def fit(annotation: Annotation, size: Size) -> Annotation:
    """An annotation in the pixels of its upright image of `size`.

    One that was drawn on a copy in another size is scaled; what of a box is outside of the image is cut off. Raises
    DataError where the sizes are no copies of each other, and for a box that is empty, a box or visible point outside.
    """
    told = annotation.size
    wide, high = read_image(told, lambda image: image.size) if isinstance(told, Path) else told or size
    width, height = size
    if (
        told != SHARES and min(abs(width - wide * height / high), abs(height - high * width / wide)) > 1
    ):  # sides of copies are rounded
        raise DataError(f"{annotation.where} is of {wide} x {high} pixels, its image of {width} x {height} (upright)")
    factors = (width / wide, height / high) * 2
    outside = f"lies outside of {width} x {height} pixels"
    if told is None:
        outside += " (width and height of the image that it was drawn on are not told)"

    def scale(marks: list[Mark]) -> list[Mark]:
        return [m._replace(sides=tuple(side * f for side, f in zip(m.sides, factors, strict=False))) for m in marks]

    boxes, points, reach = [], scale(annotation.points), 0.0
    for mark in scale(annotation.boxes):
        left, top, right, bottom = mark.sides
        if left >= right or top >= bottom:
            raise DataError(f"{mark.where} is empty or turned round")
        inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise DataError(f"{mark.where} {outside}")
        reach = max(reach, *(abs(a - b) for a, b in zip(inside, mark.sides, strict=True)))
        boxes.append(mark._replace(sides=inside))
    for mark in points:
        if mark.visible and not all(-1 <= side <= end + 1 for side, end in zip(mark.sides, size, strict=True)):
            raise DataError(f"{mark.where} {outside}")
    changes = tuple(
        name for name, did in (("scaled", told != SHARES and (wide, high) != size), ("cut", reach > 1)) if did
    )
    return replace(annotation, size=size, boxes=boxes, points=points, changes=changes)


def read_annotations(
    source: str | Path, min_confidence: float = 0.0, categories: Collection[str] | None = None
) -> dict[str, Annotation | Path]:
    """The annotations in a file or folder, by the path of their image as it is listed.

    Files of PASCAL VOC are named by their own path without its ending, and read when `read_voc` is asked to. Boxes of
    less than `min_confidence`, and of other `categories` where some are given, are left out.

    Raises DataError naming file and line of what is no annotation, and where there is none.
    """
    if files := voc_files(Path(source)):
        return dict(files)
    found: dict[str, Annotation | Path] = {}
    for key, size, mark in read_marks(source):
        annotation = found.setdefault(key, Annotation(f"{source}: {key}", size))
        assert isinstance(annotation, Annotation)
        if annotation.size != size:
            raise DataError(f"{mark.where}: {size} for width and height, but {annotation.size} before")
        if mark.name:
            annotation.points.append(mark)
        elif is_wanted(mark, min_confidence, categories):
            annotation.boxes.append(mark)
    if not found:
        raise DataError(f"{source}: no annotation in it; {WANTED}")
    return found


def is_wanted(mark: Mark, min_confidence: float, categories: Collection[str] | None) -> bool:
    """Whether a box is sure enough (or nothing is told of that), and of one of `categories`, by its label too."""
    sure = mark.confidence is None or mark.confidence >= min_confidence
    return sure and (categories is None or mark.category in categories or mark.label in categories)


def read_voc(file: Path) -> Annotation:
    """The boxes of a PASCAL VOC file, whose first pixel is (1, 1) and whose last one belongs to the box."""
    return Annotation(str(file), *read_voc_marks(file))
