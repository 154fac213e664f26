"""Text forms of predictions: lines for people, JSON lines, and CSV; the columns of a row a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glsim.data.class_names import ClassName, ClassNames, shown_label
from glsim.files import csv_text, printable, to_json

if TYPE_CHECKING:
    from glsim.inference.predictor import Prediction

NO_NAMES: ClassNames = {}


def as_text(predictions: Sequence[Prediction], names: ClassNames = NO_NAMES) -> str:
    """A line an image or a box of one: path, then classes with probabilities, then the crop.

    A verdict stands before them, if there is one, and the names that people use beside the labels.
    """
    lines = []
    for a in predictions:
        pairs = zip((shown_label(label, names) for label in a.labels), a.probabilities, strict=True)
        answers = ", ".join(f"{printable(name)} {p:.1%}" for name, p in pairs)
        if a.otherwise is not None:
            answers += f"; of all classes {printable(a.otherwise.label)} {a.otherwise.probability:.1%}"
        if a.verdict is not None:
            sure = f"{a.verdict.level} {a.verdict.label} {a.verdict.probability:.1%}"
            answers = f"{printable(sure if a.verdict.level else a.verdict.label)} ({answers})"
        box = f" [{','.join(f'{side:.0f}' for side in a.detection.box)}]" if a.detection is not None else ""
        lines.append(f"{printable(a.path)}{box}: {answers}" + (f"  crop {','.join(map(str, a.box))}" if a.box else ""))
    return "".join(line + "\n" for line in lines)


def as_jsonl(predictions: Sequence[Prediction], names: ClassNames = NO_NAMES) -> str:
    """One JSON object a line."""
    return "".join(to_json(a.as_dict()) + "\n" for a in predictions)


def box_columns(predictions: Sequence[Prediction], names: ClassNames = NO_NAMES) -> dict[str, list[Any]]:
    """The columns of a table with a row a box, which `--boxes` reads again; pixels of the upright image.

    Columns that nothing is told in are left out: level of the taxonomy, what the detector said, time by EXIF, what the
    model would have said of all classes, names that people use.
    """
    rows: list[dict[str, Any]] = []
    for a in predictions:
        d, sure = a.detection, a.verdict
        label = a.labels[0] if sure is None else sure.label
        name = names.get(label, ClassName())
        box = (None,) * 4 if d is None else d.box
        rows.append(
            {
                "path": a.path,
                **dict(zip(("left", "top", "right", "bottom"), box, strict=True)),
                "label": label,
                "confidence": a.probabilities[0] if sure is None else sure.probability,
                "level": None if sure is None else sure.level or "",
                "detector_category": (d.category if d is not None else "") or None,
                "detector_confidence": None if d is None else d.confidence,
                "time": None if d is None else d.time,
                "otherwise": None if a.otherwise is None else a.otherwise.label,
                "otherwise_confidence": None if a.otherwise is None else a.otherwise.probability,
                **{field: value or None for field, value in name._asdict().items()},
            }
        )
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    needed = ("path", "left", "top", "right", "bottom", "label", "confidence")
    return {key: column for key, column in columns.items() if key in needed or any(v is not None for v in column)}


def as_csv(predictions: Sequence[Prediction], names: ClassNames = NO_NAMES) -> str:
    """One row a box, of `box_columns`; without boxes one row an image and rank, as `csv_text` writes it.

    The columns of that are path, rank, label, probability, left, top, right, bottom. Where the method chooses,
    also second_pass (true or false); where there are verdicts, also verdict, level and verdict_probability.
    """
    if any(a.detection is not None for a in predictions):
        columns = box_columns(predictions, names)
        return csv_text([list(columns), *zip(*columns.values(), strict=True)])
    header = ["path", "rank", "label", "probability", "left", "top", "right", "bottom"]
    if any(a.second_pass is not None for a in predictions):
        header.append("second_pass")
    if any(a.verdict is not None for a in predictions):
        header += ["verdict", "level", "verdict_probability"]
    rows: list[list[object]] = [list(header)]
    for a in predictions:
        said: list[object] = []
        if a.second_pass is not None:
            said.append(str(a.second_pass).lower())
        if a.verdict is not None:
            said += [a.verdict.label, a.verdict.level or "", f"{a.verdict.probability:.6f}"]
        for rank, (name, p) in enumerate(zip(a.labels, a.probabilities, strict=True), start=1):
            rows.append([a.path, rank, name, f"{p:.6f}", *(a.box or ("",) * 4), *said])
    return csv_text(rows)


FORMATS: dict[str, Callable[..., str]] = {"text": as_text, "jsonl": as_jsonl, "csv": as_csv}


def format_of(file: str | Path | None) -> str:
    """The name of the form that the ending of `file` stands for; text for any other, and for no file."""
    ending = Path(file).suffix.lstrip(".").lower() if file is not None else ""
    return ending if ending in (*FORMATS, "parquet") else "text"
