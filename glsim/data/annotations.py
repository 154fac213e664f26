"""Boxes and points of images as annotators list them: CSV, PASCAL VOC, COCO, CUB-200-2011 and NABirds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from glsim.data.images import read_image
from glsim.data.lists import as_listed, read_columns
from glsim.data.publishers import find, xml_boxes
from glsim.files import is_junk, read_json, read_lines, shorten
from glsim.types import DataError

LARGEST_COCO = 2**29  # bytes; the largest of COCO itself, instances_train2017.json, has 448 million
BOX, POINT = ("left", "top", "right", "bottom"), ("x", "y")
WANTED = (
    "wanted a CSV file with the columns path,left,top,right,bottom or path,part,x,y, a COCO file (.json), a PASCAL VOC "
    "file (.xml) or a folder of them, or the folder of CUB-200-2011 or NABirds that holds images.txt"
)
Size = tuple[int, int]  # width, height


class Mark(NamedTuple):
    """A box, or a point with its name."""

    where: str  # for messages: the file, the place in it, and the numbers as they stand there
    sides: tuple[float, ...]  # left, top, right, bottom (the last two exclusive), or x, y, in pixels from 0
    name: str = ""  # of a point
    visible: bool = True


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
    if min(abs(width - wide * height / high), abs(height - high * width / wide)) > 1:  # sides of copies are rounded
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
    changes = tuple(name for name, did in (("scaled", (wide, high) != size), ("cut", reach > 1)) if did)
    return replace(annotation, size=size, boxes=boxes, points=points, changes=changes)


# --- formats: each yields the path of an image as it is listed, the size it was drawn on, and a mark in it ------------

Row = tuple[str, Size | Path | None, Mark]


def read_annotations(source: str | Path) -> dict[str, Annotation | Path]:
    """The annotations in a file or folder, by the path of their image as it is listed.

    Files of PASCAL VOC are named by their own path without its ending, and read when `read_voc` is asked to.

    Raises DataError naming file and line of what is no annotation, and where there is none.
    """
    path = Path(source)
    if path.is_dir() and (listing := find(path, "images.txt")):
        rows = _cub(listing.parent)
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if not is_junk(file.name) and file.is_file()]
        xml = [f for f in files if f.suffix.lower() == ".xml"] or [f for f in files if not f.suffix]  # Stanford Dogs
        if not xml:
            raise DataError(f"{path}: no annotation in this folder; {WANTED}")
        return {file.relative_to(path).with_suffix("").as_posix(): file for file in xml}
    elif path.suffix.lower() == ".xml":
        return {path.stem: path}
    else:
        rows = _coco(path) if path.suffix.lower() == ".json" else _csv(path)
    found: dict[str, Annotation | Path] = {}
    for key, size, mark in rows:
        annotation = found.setdefault(key, Annotation(f"{source}: {key}", size))
        assert isinstance(annotation, Annotation)
        if annotation.size != size:
            raise DataError(f"{mark.where}: {size} for width and height, but {annotation.size} before")
        (annotation.points if mark.name else annotation.boxes).append(mark)
    if not found:
        raise DataError(f"{source}: no annotation in it; {WANTED}")
    return found


def read_voc(file: Path) -> Annotation:
    """The boxes of a PASCAL VOC file, whose first pixel is (1, 1) and whose last one belongs to the box."""
    size, boxes = xml_boxes(file)
    if not boxes:
        raise DataError(f"{file}: no bndbox in it, as the format of PASCAL VOC has for every object")
    marks = [
        Mark(f"{file}: box {x},{y},{right},{bottom}", (x - 1, y - 1, right, bottom)) for x, y, right, bottom in boxes
    ]
    return Annotation(str(file), size, marks)


def _csv(file: Path) -> Iterator[Row]:
    layout, lines = read_columns(file, ("path", *BOX), ("path", "part", *POINT), wanted=WANTED)
    names = BOX if layout[1:] == BOX else POINT
    for line, cells in lines:
        where = f"{file}, line {line}"
        sides = _numbers([cells[name] for name in names], names, where)
        told = [cells.get(name, "") for name in ("width", "height")]
        mark = _mark(where, sides, cells.get("part", "") if names == POINT else "", cells.get("visible", "") != "0")
        yield as_listed(cells["path"]), _size(told, where) if any(told) else None, mark


def _coco(file: Path) -> Iterator[Row]:
    content, where = read_json(file, most=LARGEST_COCO), str(file)
    try:
        images = {image["id"]: image for image in content["images"]}
        parts = {kind["id"]: kind.get("keypoints", []) for kind in content.get("categories", [])}
        for i, given in enumerate(content["annotations"]):
            where = f"{file}, annotations[{i}]"
            image = images[given["image_id"]]
            told = [image.get(name) for name in ("width", "height")]
            key, size = as_listed(image["file_name"]), _size(told, where) if any(told) else None
            x, y, width, height = _numbers(given["bbox"], ("x", "y", "width", "height"), where)
            yield key, size, _mark(where, (x, y, x + width, y + height))
            names, values = parts.get(given.get("category_id"), []), given.get("keypoints", [])
            if values and len(values) != 3 * len(names):
                raise DataError(f"{where}: {len(values)} numbers for {len(names)} keypoints of 3 each")
            for name, at in zip(names, range(0, len(values), 3), strict=False):
                *place, seen = _numbers(values[at : at + 3], (*POINT, "visibility"), where)
                if seen:  # 0: not labelled
                    yield key, size, _mark(where, place, str(name), seen == 2)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not as COCO has images and annotations ({type(error).__name__}: {error})") from error


def _cub(top: Path) -> Iterator[Row]:
    images = {key: as_listed(path) for _, key, path in _words(top / "images.txt", 2)}
    parts = {key: name for _, key, name in _words(top / "parts" / "parts.txt", 2)}
    sizes: dict[str, Size | Path] = {key: _size(told, where) for where, key, *told in _words(top / "sizes.txt", 3)}
    for key, path in images.items():
        if (original := top / "images" / path).is_file():
            sizes.setdefault(key, original)  # CUB tells no sizes: copies of another size are held against its images
    for name, sides in (("bounding_boxes.txt", ("x", "y", "width", "height")), ("parts/part_locs.txt", POINT)):
        for where, key, *words in _words(top / name, 5):
            if key not in images or (sides == POINT and words[0] not in parts):
                raise DataError(f"{where}: {key} is not in images.txt, or the part {words[0]} not in parts/parts.txt")
            if sides == POINT:
                mark = _mark(where, _numbers(words[1:3], sides, where), parts[words[0]], words[3] != "0")
            else:
                x, y, width, height = _numbers(words, sides, where)
                mark = _mark(where, (x, y, x + width, y + height))
            yield images[key], sizes.get(key), mark


def _words(file: Path, count: int) -> Iterator[list[str]]:
    """Where each line stands, and its words, of which the last may have spaces; nothing where there is no such file."""
    try:
        lines = read_lines(file) if file.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        words = line.split(maxsplit=count - 1)
        if words and len(words) < count:
            raise DataError(f"{file}, line {number}: {count} values are needed, got {shorten(line, 80)!r}")
        if words:
            yield [f"{file}, line {number}", *words]


def _mark(where: str, sides: Sequence[float], name: str = "", visible: bool = True) -> Mark:
    numbers = ",".join(f"{side:g}" for side in sides)
    return Mark(f"{where}: {f'point {name}' if name else 'box'} {numbers}", tuple(sides), name, visible)


def _numbers(values: Any, names: Sequence[str], where: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: wanted the numbers {','.join(names)}, got {shorten(values, 80)}")
    return numbers


def _size(told: Any, where: str) -> Size:
    width, height = _numbers(told, ("width", "height"), where)
    if min(width, height) < 1:
        raise DataError(f"{where}: {width:g} x {height:g} is no size of an image in pixels")
    return int(width), int(height)
