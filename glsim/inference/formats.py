"""Text forms of predictions: lines for people, JSON lines, and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glsim.files import csv_text, printable, to_json

if TYPE_CHECKING:
    from glsim.inference.predictor import Prediction


def as_text(predictions: Sequence[Prediction]) -> str:
    """A line an image: path, then classes with probabilities, then the box; a verdict before them, if there is one."""
    lines = []
    for a in predictions:
        answers = ", ".join(f"{printable(name)} {p:.1%}" for name, p in zip(a.labels, a.probabilities, strict=True))
        if a.verdict is not None:
            sure = f"{a.verdict.level} {a.verdict.label} {a.verdict.probability:.1%}"
            answers = f"{printable(sure if a.verdict.level else a.verdict.label)} ({answers})"
        lines.append(f"{printable(a.path)}: {answers}" + (f"  crop {','.join(map(str, a.box))}" if a.box else ""))
    return "".join(line + "\n" for line in lines)


def as_jsonl(predictions: Sequence[Prediction]) -> str:
    """One JSON object a line."""
    return "".join(to_json(a.as_dict()) + "\n" for a in predictions)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """One row an image and rank, as `csv_text` writes it: path, rank, label, probability, left, top, right, bottom.

    Where the method chooses, also second_pass (true or false); where there are verdicts, also verdict, level and
    verdict_probability.
    """
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


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"text": as_text, "jsonl": as_jsonl, "csv": as_csv}


def format_of(file: str | Path | None) -> str:
    """The name of the form that the ending of `file` stands for; text for any other, and for no file."""
    ending = Path(file).suffix.lstrip(".").lower() if file is not None else ""
    return ending if ending in FORMATS else "text"
