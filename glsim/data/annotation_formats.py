"""Formats of boxes and points: MegaDetector, COCO, CSV, PASCAL VOC, CUB-200-2011 and NABirds, mark by mark.

A reader yields the path of an image as it is listed, the size it was drawn on, and a mark in it. None holds a file as
objects: a million boxes are read one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glsim.data.lists import as_listed, read_columns
from glsim.data.names import clean_label
from glsim.data.publishers import find, xml_boxes
from glsim.files import is_junk, json_parts, read_lines, shorten
from glsim.types import DataError

LARGEST_BOXES = 2**30  # bytes; the largest of COCO itself, instances_train2017.json, has 448 million
BOX, POINT = ("left", "top", "right", "bottom"), ("x", "y")
WANTED = (
    "wanted a CSV file with the columns path,left,top,right,bottom or path,part,x,y, MegaDetector's results or a COCO "
    "file (.json), a PASCAL VOC file (.xml) or a folder of them, or the folder of CUB-200-2011 or NABirds that holds "
    "images.txt"
)
Size = tuple[int, int]  # width, height
SHARES = 1, 1  # the size of images whose boxes are told in shares of width and height
MOST_SHARE = 1.5  # a side beyond it is of pixels


class Mark(NamedTuple):
    """A box, or a point with its name."""

    where: str  # for messages: the file, the place in it, and the numbers as they stand there
    sides: tuple[float, ...]  # left, top, right, bottom (the last two exclusive), or x, y, in pixels from 0
    name: str = ""  # of a point
    visible: bool = True
    category: str = ""  # of a box: what the detector, or COCO, calls it
    confidence: float | None = None  # of the detector; None: not told
    label: str = ""  # class of what is in the box, where the list tells one
    record: tuple[int, int] = (0, 0)  # its numbers in the file: line, 0; annotation, -1; image and detection


Row = tuple[str, Size | Path | None, Mark]


def read_marks(source: str | Path) -> Iterator[Row]:
    """Every box and point in a file or folder, one by one, in its order.

    Raises DataError naming file and record of what is no annotation.
    """
    path = Path(source)
    if files := voc_files(path):
        voc = ((key, *read_voc_marks(file)) for key, file in files.items())
        return ((key, size, mark) for key, size, marks in voc for mark in marks)
    if path.is_dir() and (listing := find(path, "images.txt")):
        return _cub(listing.parent)
    if path.suffix.lower() != ".json":
        return _csv(path)
    return _megadetector(path) if is_megadetector(path) else _coco(path)


def voc_files(path: Path) -> dict[str, Path]:
    """The files of PASCAL VOC at a path, by the path of their image below it without its ending; {} of another kind."""
    if path.is_dir() and not find(path, "images.txt"):
        files = [file for file in sorted(path.rglob("*")) if not is_junk(file.name) and file.is_file()]
        xml = [f for f in files if f.suffix.lower() == ".xml"] or [f for f in files if not f.suffix]  # Stanford Dogs
        if not xml:
            raise DataError(f"{path}: no annotation in this folder; {WANTED}")
        return {file.relative_to(path).with_suffix("").as_posix(): file for file in xml}
    return {path.stem: path} if path.suffix.lower() == ".xml" else {}


def read_voc_marks(file: Path) -> tuple[Size | None, list[Mark]]:
    """The boxes of a PASCAL VOC file, whose first pixel is (1, 1) and whose last one belongs to the box."""
    size, boxes = xml_boxes(file)
    if not boxes:
        raise DataError(f"{file}: no bndbox in it, as the format of PASCAL VOC has for every object")
    marks = [
        Mark(f"{file}: box {x},{y},{right},{bottom}", (x - 1, y - 1, right, bottom)) for x, y, right, bottom in boxes
    ]
    return size, marks


def _csv(file: Path) -> Iterator[Row]:
    in_shares = _is_in_shares(file)
    layout, lines = read_columns(file, ("path", *BOX), ("path", "part", *POINT), wanted=WANTED)
    names = BOX if layout[1:] == BOX else POINT
    for line, cells in lines:
        where = f"{file}, line {line}"
        sides = _numbers([cells[name] for name in names], names, where)
        told = [cells.get(name, "") for name in ("width", "height")]
        size = SHARES if in_shares else _size(told, where) if any(told) else None
        mark = _mark(where, sides, cells.get("part", "") if names == POINT else "", cells.get("visible", "") != "0")
        sure = next((cells[name] for name in ("confidence", "conf", "score") if cells.get(name)), None)
        yield (
            as_listed(cells["path"]),
            size,
            mark._replace(
                category=cells.get("category", ""),
                label=clean_label(cells.get("label", "")),
                confidence=None if sure is None else _numbers([sure], ("confidence",), where)[0],
                record=(line, 0),
            ),
        )


def _is_in_shares(file: Path) -> bool:
    """Whether the boxes of a list are told in shares: no side of any is above MOST_SHARE."""
    layout, lines = read_columns(file, ("path", *BOX), ("path", "part", *POINT), wanted=WANTED)
    rows = (_numbers([cells[n] for n in BOX], BOX, f"{file}, line {line}") for line, cells in lines)
    return layout[1:] == BOX and all(max(box) <= MOST_SHARE for box in rows)


def is_megadetector(file: str | Path) -> bool:
    """Whether a JSON file has the layout of MegaDetector's results: images with detections; COCO's have file names."""
    for key, number, value in json_parts(file, ("images", "annotations"), LARGEST_BOXES):
        if key in ("annotations", "detection_categories"):
            return key == "detection_categories"
        if key == "images" and number == 0:
            return isinstance(value, dict) and "file" in value
    return False


def _megadetector(file: Path) -> Iterator[Row]:
    heads = json_parts(file, ("images",), LARGEST_BOXES)
    names = next((value for key, _, value in heads if key == "detection_categories"), None)
    for key, number, image in json_parts(file, ("images",), LARGEST_BOXES):
        if key == "images":
            yield from _detections(image, number, names, f"{file}, images[{number}]")


def _detections(image: Any, number: int, names: Any, where: str) -> Iterator[Row]:
    try:
        key = as_listed(image["file"])
        for i, given in enumerate(image.get("detections") or ()):
            where_i = f"{where}.detections[{i}]"
            x, y, width, height = _numbers(given["bbox"], ("x", "y", "width", "height"), where_i)
            confidence, category = _numbers([given["conf"]], ("conf",), where_i)[0], str(given["category"])
            if names is not None and category not in names:
                continue  # by the format's rule, what is in no category is no detection
            mark = _mark(where_i, (x, y, x + width, y + height))
            name = category if names is None else str(names[category])
            yield key, SHARES, mark._replace(category=name, confidence=confidence, record=(number, i))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: not as MegaDetector's results have file and detections ({type(error).__name__}: {error})"
        ) from error


def _coco(file: Path) -> Iterator[Row]:
    where, heads = str(file), {"images": dict[Any, Any](), "categories": dict[Any, Any]()}
    try:
        seen = set[str]()
        for key, number, value in json_parts(file, ("images", "annotations", "categories"), LARGEST_BOXES):
            seen.add(key)
            if key in heads:
                where = str(file) if number < 0 else f"{file}, {key}[{number}]"
                heads[key][value["id"]] = _of_coco(value)
        where = str(file)
        if missing := [key for key in ("images", "annotations") if key not in seen]:
            raise KeyError(missing[0])
        for key, number, given in json_parts(file, ("images", "annotations", "categories"), LARGEST_BOXES):
            if key == "annotations":
                where = f"{file}, annotations[{number}]"
                yield from _coco_marks(given, number, heads["images"], heads["categories"], where)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not as COCO has images and annotations ({type(error).__name__}: {error})") from error


def _of_coco(value: dict[str, Any]) -> tuple[Any, ...]:
    """What is needed of an image or a category: name, width and height, or names of keypoints."""
    if "file_name" in value:
        return as_listed(value["file_name"]), value.get("width"), value.get("height")
    return str(value.get("name", value["id"])), value.get("keypoints", [])


def _coco_marks(given: Any, number: int, images: Any, categories: Any, where: str) -> Iterator[Row]:
    key, *told = images[given["image_id"]]
    size = _size(told, where) if any(told) else None
    name, names = categories.get(given.get("category_id"), ("", []))
    x, y, width, height = _numbers(given["bbox"], ("x", "y", "width", "height"), where)
    sure = None if given.get("score") is None else _numbers([given["score"]], ("score",), where)[0]
    mark = _mark(where, (x, y, x + width, y + height))
    yield key, size, mark._replace(category=name, label=clean_label(name), confidence=sure, record=(number, -1))
    values = given.get("keypoints", [])
    if values and len(values) != 3 * len(names):
        raise DataError(f"{where}: {len(values)} numbers for {len(names)} keypoints of 3 each")
    for point, at in zip(names, range(0, len(values), 3), strict=False):
        *place, visibility = _numbers(values[at : at + 3], (*POINT, "visibility"), where)
        if visibility:  # 0: not labelled
            yield key, size, _mark(where, place, str(point), visibility == 2)


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
