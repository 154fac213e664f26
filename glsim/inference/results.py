"""Files of results that other tools read: MegaDetector's, COCO's, Camtrap DP's observations, Parquet.

What a file of boxes holds beside its boxes is kept: MegaDetector's and COCO's are read again while the results are
written, and a box keeps its numbers as they stood there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glsim.data.annotation_formats import LARGEST_BOXES, is_megadetector
from glsim.data.class_names import ClassName
from glsim.data.images import taken_at
from glsim.data.lists import as_listed
from glsim.data.matching import match_paths
from glsim.files import csv_text, json_parts, read_text, replacing, to_json, write_text
from glsim.inference.formats import box_columns
from glsim.types import ConfigError, DataWarning

if TYPE_CHECKING:
    from glsim.inference.predictor import Prediction

CAMTRAP_FIELDS = Path(__file__).with_name("camtrap_dp.csv")  # of observations.csv in version 1.0, from its schema
TYPES = {"person": "human", "human": "human", "vehicle": "vehicle", "animal": "animal"}  # by a detector's category


class About(NamedTuple):
    """What a file of results tells beside the answers."""

    boxes: str  # the file of boxes
    classifier: str
    labels: Sequence[str]
    time: str  # of the classification: ISO 8601 with its zone
    names: Mapping[str, ClassName] = {}
    images: Sequence[str | Path] = ()  # that were given, with a box or without
    min_confidence: float = 0.0


def write_megadetector(out: Path, predictions: Sequence[Prediction], about: About) -> None:
    """MegaDetector's results with `classifications` of each box that was answered; all else as it was in the file."""
    head = {"info": {"format_version": "1.5"}, "detection_categories": {}, **_head(about.boxes)}
    old = head.get("classification_categories") or {}
    ids = {name: number for number, name in old.items()}
    free = 1 + max((int(number) for number in old if number.isdigit()), default=-1)
    for number, label in enumerate([label for label in about.labels if label not in ids], start=free):
        ids[label] = str(number)
    head["info"] = {
        **head["info"],
        "classifier": about.classifier,
        "classification_completion_time": about.time[:19].replace("T", " "),
    }
    head["classification_categories"] = {number: name for name, number in ids.items()}
    described = head.get("classification_category_descriptions") or {}
    if described or about.names:
        told = {number: str(about.names.get(name, "")) or name for name, number in ids.items()}
        head["classification_category_descriptions"] = told | described
    images = _megadetector_images(predictions, about, head["detection_categories"])
    answers = {p.detection.record: p for p in predictions if p.detection is not None}

    def classified() -> Iterator[dict[str, Any]]:
        for number, image in images:
            for i, found in enumerate(image.get("detections") or ()):
                if answer := answers.get(found.pop("record", (number, i))):
                    pairs = zip(answer.labels, answer.probabilities, strict=True)
                    found["classifications"] = [[ids[label], p] for label, p in pairs]
                    if answer.otherwise is not None:
                        found["otherwise"] = [ids[answer.otherwise.label], answer.otherwise.probability]
            yield image

    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        shown = [f"{to_json(key)}: {to_json(value)}" for key, value in head.items()]
        file.write("{" + ",\n".join([*shown, '"images": [\n']))
        for number, image in enumerate(classified()):
            file.write((",\n" if number else "") + to_json(image))
        file.write("\n]}\n")


def _head(boxes: str) -> dict[str, Any]:
    """What MegaDetector's results tell beside the images."""
    if not _is_megadetector(boxes):
        return {}
    return {key: value for key, number, value in json_parts(boxes, ("images",), LARGEST_BOXES) if key != "images"}


def _is_megadetector(boxes: str) -> bool:
    return boxes.lower().endswith(".json") and is_megadetector(boxes)


def _images_of(boxes: str) -> Iterator[dict[str, Any]]:
    """The images of MegaDetector's results."""
    return (value for key, _, value in json_parts(boxes, ("images",), LARGEST_BOXES) if key == "images")


def _megadetector_images(
    predictions: Sequence[Prediction], about: About, categories: dict[str, str]
) -> Iterable[tuple[int, dict[str, Any]]]:
    """The images of MegaDetector's results with their numbers; of another file, made of the answered boxes."""
    if _is_megadetector(about.boxes):
        return enumerate(_images_of(about.boxes))
    images: dict[str, list[dict[str, Any]]] = {}
    ids: dict[str, str] = {}
    for p in predictions:
        if (d := p.detection) is not None:
            x, y, width, height = _shares(d.box, d.size)
            kind = ids.setdefault(d.category or "object", str(len(ids) + 1))
            box = {"category": kind, "conf": 1.0 if d.confidence is None else d.confidence}
            images.setdefault(d.listed, []).append({**box, "bbox": [x, y, width, height], "record": d.record})
    categories.update({number: name for name, number in ids.items()})
    return ((-1, {"file": listed, "detections": found}) for listed, found in images.items())


def _shares(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in pixels as x, y, width, height in shares of the image."""
    left, top, right, bottom = (side / size[i % 2] for i, side in enumerate(box))
    return left, top, right - left, bottom - top


def write_coco(out: Path, predictions: Sequence[Prediction], about: About) -> None:
    """COCO's results: image_id, category_id, bbox and score of each box, and the label as category_name.

    Of a COCO file the ids of its images and categories and its boxes as they stand there; else an image's id is its
    path as listed, a category's its place among the labels, from 1.
    """
    answers = {p.detection.record: p for p in predictions if p.detection is not None}
    ids: dict[str, Any] = {}
    rows: Iterable[tuple[Prediction, dict[str, Any]]]
    if about.boxes.lower().endswith(".json") and not is_megadetector(about.boxes):
        parts = list(_coco_records(about.boxes, answers, ids))
        rows = [(answers[record], told) for record, told in parts]
    else:
        rows = [
            (p, {"image_id": d.listed, "bbox": [d.box[0], d.box[1], d.box[2] - d.box[0], d.box[3] - d.box[1]]})
            for p in answers.values()
            if (d := p.detection) is not None
        ]
    free = 1 + max((number for number in ids.values() if isinstance(number, int)), default=0)
    for number, label in enumerate([label for label in about.labels if label not in ids], start=free):
        ids[label] = number
    results = [
        {**told, "category_id": ids[p.labels[0]], "score": p.probabilities[0], "category_name": p.labels[0]}
        for p, told in rows
    ]
    write_text(out, "[" + ",\n".join(map(to_json, results)) + "]\n")


def _coco_records(
    boxes: str, answers: Mapping[tuple[int, int], Any], ids: dict[str, Any]
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Image and box of the annotations that were answered; `ids` takes those of the categories, by name."""
    for key, number, value in json_parts(boxes, ("images", "annotations", "categories"), LARGEST_BOXES):
        if key == "categories":
            ids[str(value.get("name", value["id"]))] = value["id"]
        elif key == "annotations" and (number, -1) in answers:
            yield (number, -1), {"image_id": value["image_id"], "bbox": value["bbox"]}


# --- Camtrap DP -------------------------------------------------------------------------------------------------------


def camtrap_fields() -> list[str]:
    """The columns of observations.csv, in their order."""
    return [line.partition(",")[0] for line in read_text(CAMTRAP_FIELDS).splitlines()[1:]]


def write_camtrap(out: Path, predictions: Sequence[Prediction], about: About) -> None:
    """`observations.csv` of Camtrap DP 1.0 (https://camtrap-dp.tdwg.org/data/): a row a box.

    The deployment of an image is its folder as listed. Of MegaDetector's results, boxes of people and vehicles that
    were not answered are rows too, and an image without a box is a blank one. A DataWarning counts rows without a time,
    which the format requires, and those whose EXIF tells no time zone and that are taken to be in UTC.
    """
    rows = [_observation(p, about) for p in predictions if p.detection is not None]
    if _is_megadetector(about.boxes):
        answered = {p.detection.record for p in predictions if p.detection is not None}
        rows += _others(about, answered)
    fields = camtrap_fields()
    without = sum(not row["eventStart"] for row in rows)
    if without:
        said = f"{without:,} of {len(rows):,} observations have no time, which Camtrap DP requires: no EXIF"
        warnings.warn(f"{out}: {said}", DataWarning, 2)
    if unzoned := sum(row.pop("unzoned", False) for row in rows):
        said = f"the times of {unzoned:,} observations are taken to be in UTC: their EXIF has no time zone"
        warnings.warn(f"{out}: {said}", DataWarning, 2)
    write_text(out, csv_text([fields, *([row.get(field, "") for field in fields] for row in rows)]))


def _observation(p: Prediction, about: About) -> dict[str, Any]:
    d = p.detection
    assert d is not None
    kind, label, probability = TYPES.get(d.category.lower(), "animal"), p.labels[0], p.probabilities[0]
    if p.verdict is not None:
        label, probability = p.verdict.label if p.verdict.level else "", p.verdict.probability
    if not label and kind == "animal" and not d.category:
        kind = "unknown"
    name = about.names.get(label, ClassName()).scientific_name or label
    comments = "" if p.otherwise is None else f"without the list: {p.otherwise.label} {p.otherwise.probability:.4f}"
    tags = f"label:{label}" if label and name != label else ""
    row = _row(d.listed, d.record, d.time, kind, _shares(d.box, d.size))
    return row | {
        "scientificName": name if kind == "animal" else "",
        "classifiedBy": about.classifier,
        "classificationTimestamp": about.time,
        "classificationProbability": f"{probability:.6f}",
        "observationTags": tags,
        "observationComments": comments,
    }


def _row(
    listed: str, record: tuple[int, int], time: str | None, kind: str, box: Sequence[float] | None
) -> dict[str, Any]:
    zoned = time if time is None or len(time) > 19 else f"{time}Z"
    row = {
        "observationID": f"{listed}#{record[0]}.{record[1]}",
        "deploymentID": listed.rpartition("/")[0] or ".",
        "mediaID": listed,
        "eventStart": zoned or "",
        "eventEnd": zoned or "",
        "observationLevel": "media",
        "observationType": kind,
        "classificationMethod": "machine",
        "unzoned": zoned != time,
    }
    if box is not None:
        left, top = (min(max(side, 0.0), 1.0) for side in box[:2])
        right, bottom = (min(max(start + length, 0.0), 1.0) for start, length in zip(box[:2], box[2:], strict=True))
        row |= {"bboxX": left, "bboxY": top, "bboxWidth": right - left, "bboxHeight": bottom - top}
    return row | ({} if kind == "blank" else {"count": 1})


def _others(about: About, answered: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Rows of what MegaDetector's results tell of the images, apart from the boxes that were answered."""
    head = _head(about.boxes)
    names, detector = head.get("detection_categories", {}), str((head.get("info") or {}).get("detector", ""))
    keys = (as_listed(image["file"]) for image in _images_of(about.boxes))
    files = {key: about.images[i] for i, key in match_paths(about.images, keys, about.boxes).items()}
    for number, image in enumerate(_images_of(about.boxes)):
        listed = as_listed(image["file"])
        if listed not in files or image.get("failure") or image.get("detections") is None:
            continue
        time, seen = taken_at(files[listed]), 0
        for i, found in enumerate(image["detections"]):
            kind = TYPES.get(names.get(str(found["category"]), "").lower(), "unclassified")
            if (number, i) in answered:
                seen += 1
            elif found["conf"] >= about.min_confidence and str(found["category"]) in names:
                seen += 1
                x, y, width, height = found["bbox"]
                if width > 0 and height > 0:
                    row = _row(listed, (number, i), time, kind, (x, y, width, height))
                    yield row | {"classifiedBy": detector, "classificationProbability": found["conf"]}
        if not seen:
            yield _row(listed, (number, -1), time, "blank", None) | {"classifiedBy": detector}


def write_parquet(out: Path, predictions: Sequence[Prediction], about: About) -> None:
    """The rows of the CSV as a Parquet file. Raises ConfigError where pyarrow is not installed."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"format=parquet needs pyarrow ({error}): pip install 'glsim[scale]'") from error
    columns = box_columns(predictions, about.names)
    with replacing(out) as temporary:
        parquet.write_table(pa.table(columns), temporary)


WRITERS: dict[str, Callable[[Path, Sequence[Prediction], About], None]] = {
    "megadetector": write_megadetector,
    "coco": write_coco,
    "camtrap_dp": write_camtrap,
    "parquet": write_parquet,
}
