"""Boxes of a detector or of annotators as columns, and as paths of regions: one box of one image is an example.

Columns hold a box in 60 bytes. Paths are made when they are asked for, ordered by image, so that a batch decodes each
of its images once.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from glsim.data.annotation_formats import WANTED, Mark, Size, read_marks
from glsim.data.annotations import is_wanted
from glsim.data.box_options import Boxed
from glsim.data.image_files import find_images
from glsim.data.images import read_image
from glsim.data.matching import match_paths
from glsim.data.regions import Region
from glsim.data.uri import is_uri
from glsim.types import DataError, DataWarning

NAMED = 5  # records that a note names


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes of a file: n boxes of m images, in the order of the file."""

    source: str
    images: list[str]  # (m) their paths as listed
    sizes: dict[int, Size]  # of images whose size is told, or of the ones that their boxes were drawn on
    image: np.ndarray  # (n,) int32 number of the image
    sides: np.ndarray  # (n, 4) float64 left, top, right, bottom as listed: pixels, or shares where the size is SHARES
    confidence: np.ndarray  # (n,) float64 of the detector; NaN: not told
    category: np.ndarray  # (n,) int32 number in `categories`
    categories: list[str]
    label: np.ndarray  # (n,) int32 number in `labels`; 0: not told
    labels: list[str]  # the first is ""
    record: np.ndarray  # (n, 2) int32 numbers of the record, as in `Mark`

    def __len__(self) -> int:
        return len(self.image)

    @property
    def labelled(self) -> bool:
        """Whether boxes have labels of their own. A single category of COCO says where something is, not what it is."""
        return len(self.labels) > (2 if self.record[0, 1] < 0 else 1)

    def where(self, row: int) -> str:
        """The record of a box, as messages name it."""
        return _where(self.source, self.record[row])

    def category_of(self, row: int) -> str:
        """What the detector calls a box; "" where it does not say."""
        return self.categories[self.category[row]]

    def confidence_of(self, row: int) -> float | None:
        """The detector's confidence; None where it is not told."""
        confidence = float(self.confidence[row])
        return None if math.isnan(confidence) else confidence

    def take(self, rows: np.ndarray) -> Detections:
        """Some of the boxes."""
        columns = ("image", "sides", "confidence", "category", "label", "record")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})


def _where(source: str, record: Iterable[int]) -> str:
    first, second = map(int, record)
    if not source.lower().endswith(".json"):
        return f"{source}, line {first}" if first else source
    return f"{source}, {f'images[{first}].detections[{second}]' if second >= 0 else f'annotations[{first}]'}"


def read_detections(
    source: str | Path, min_confidence: float = 0.0, categories: Sequence[str] | None = None
) -> Detections:
    """The boxes in a file that `glsim.data.annotation_formats:read_marks` reads, in one pass.

    Those of less than `min_confidence`, and of other `categories` (or labels) where some are given, are left out. Empty
    ones are left out too, and named by a DataWarning with the numbers of their records; so are those outside of their
    image, where its size is told.

    Raises DataError naming file and record of what is no box, and where no box is left.
    """
    numbers: dict[str, dict[str, int]] = {"image": {}, "category": {}, "label": {"": 0}}
    columns = {name: array("i") for name in (*numbers, "record")}
    sides, confidence, sizes = array("d"), array("d"), dict[int, Size]()
    empty, total, names = list[str](), 0, set[str]()
    told = dict[int, Size | Path | None]()
    for key, size, mark in read_marks(source):
        if mark.name:
            continue
        total += 1
        names.update((mark.category, mark.label))
        if not is_wanted(mark, min_confidence, categories):
            continue
        if fault := _fault(mark, size):
            empty.append(f"{mark.where.removeprefix(f'{source}, ')} {fault}")
            continue
        values = {"image": key, "category": mark.category, "label": mark.label}
        for name, value in values.items():
            columns[name].append(numbers[name].setdefault(value, len(numbers[name])))
        image = columns["image"][-1]
        if told.setdefault(image, size) != size:
            raise DataError(f"{mark.where}: {size} for width and height, but {told[image]} before")
        if size is not None and image not in sizes:
            sizes[image] = read_image(size, lambda opened: opened.size) if isinstance(size, Path) else size
        columns["record"].extend(mark.record)
        sides.extend(mark.sides)
        confidence.append(np.nan if mark.confidence is None else mark.confidence)
    if not total:
        raise DataError(f"{source}: no box in it; {WANTED}")
    if categories is not None and (unknown := [name for name in categories if name not in names]):
        there = ", ".join(sorted(names - {""})[:20]) or "none"
        raise DataError(f"{source}: no box is of category {unknown[0]!r}; its categories are: {there}")
    if empty:
        more = ", .." if len(empty) > NAMED else ""
        warnings.warn(
            f"{source}: left out {len(empty):,} of {total:,} boxes: {'; '.join(empty[:NAMED])}{more}", DataWarning, 2
        )
    if not len(sides):
        raise DataError(
            f"{source}: none of its {total:,} boxes is left with min_confidence={min_confidence:g}, "
            f"categories={', '.join(categories or ['all'])}"
        )
    rows = {name: np.frombuffer(column, np.int32) for name, column in columns.items()}
    return Detections(
        str(source),
        list(numbers["image"]),
        sizes,
        rows["image"],
        np.frombuffer(sides).reshape(-1, 4),
        np.frombuffer(confidence),
        rows["category"],
        list(numbers["category"]),
        rows["label"],
        list(numbers["label"]),
        rows["record"].reshape(-1, 2),
    )


def _fault(mark: Mark, size: Size | Path | None) -> str:
    """What is wrong with a box, as far as is known; "" where nothing is."""
    left, top, right, bottom = mark.sides
    if left >= right or top >= bottom:
        return "is empty or turned round"
    if right <= 0 or bottom <= 0 or (isinstance(size, tuple) and (left >= size[0] or top >= size[1])):
        return "lies outside of its image"
    return ""


class BoxPaths(Sequence[Path]):
    """The paths of the regions that boxes are, made when they are asked for.

    Args:
        boxes: ordered by image.
        given: paths of images.
        image: (n,) which of them each box is of.
        margin, square: of `glsim.data.regions:Region`.
    """

    def __init__(
        self, boxes: Detections, given: Sequence[str | Path], image: np.ndarray, margin: float, square: bool
    ) -> None:
        self.boxes, self.given, self.image, self.margin, self.square = boxes, given, image, margin, square

    def __len__(self) -> int:
        return len(self.image)

    @overload
    def __getitem__(self, row: int) -> Path: ...

    @overload
    def __getitem__(self, row: slice) -> BoxPaths: ...

    def __getitem__(self, row: int | slice) -> Path | BoxPaths:
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        name: Any = f"{self.given[self.image[row]]}{self.region(row).fragment}"
        return name if is_uri(name) else Path(name)

    def __iter__(self) -> Iterator[Path]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: np.ndarray) -> BoxPaths:
        """Some of the paths."""
        return BoxPaths(self.boxes.take(rows), self.given, self.image[rows], self.margin, self.square)

    def region(self, row: int) -> Region:
        """The region that a box is; in shares where the size of its image is told, which may be a copy in another."""
        sides: Any = self.boxes.sides[row].tolist()
        size = self.boxes.sizes.get(int(self.boxes.image[row]))
        if size is None:
            left, top, right, bottom = sides
            return Region(left, top, right, bottom, False, self.margin, self.square)
        left, top, right, bottom = (side / size[i % 2] for i, side in enumerate(sides))
        return Region(left, top, right, bottom, True, self.margin, self.square)


def read_chosen(boxed: Boxed) -> Detections:
    """The boxes that the options choose; raises DataError as `read_detections`."""
    source = boxed.get("boxes")
    assert source is not None
    return read_detections(source, boxed.get("min_confidence", 0.0), boxed.get("categories"))


def find_boxes(images: Sequence[str | Path], boxed: Boxed, boxes: Detections | None = None) -> BoxPaths:
    """The boxes of some images as paths of regions, ordered by image.

    Images that the file has no box of are left out; a DataWarning counts them. Raises DataError as `read_detections`,
    and where no image has a box. `boxes` are those of `read_chosen`, where they were read already.
    """
    boxes = boxes or read_chosen(boxed)
    source = boxes.source
    listed = match_paths(images, boxes.images, source)
    if not listed:
        raise DataError(
            f"{source}: no box of any of the {len(images):,} images: none of their paths, as {images[0]}, ends in what "
            f"it has boxes of, as {boxes.images[0]}"
        )
    if without := len(images) - len(listed):
        first = next(path for number, path in enumerate(images) if number not in listed)
        warnings.warn(f"{source}: no box of {without:,} of {len(images):,} images, as {first}", DataWarning, 2)
    number = {key: i for i, key in enumerate(boxes.images)}
    given_of = np.full(len(boxes.images), -1, np.int32)
    given_of[[number[key] for key in listed.values()]] = list(listed)
    image = given_of[boxes.image]
    rows = np.argsort(image, kind="stable")[int((image < 0).sum()) :]
    return BoxPaths(boxes.take(rows), images, image[rows], boxed.get("margin", 0.1), boxed.get("square", False))


def find_examples(images: Sequence[str | Path], boxed: Boxed) -> Sequence[Path]:
    """The images in files, folders and globs, or where `boxed` names a file of boxes, their boxes."""
    paths = find_images(images)
    return find_boxes(paths, boxed) if boxed.get("boxes") is not None else paths
