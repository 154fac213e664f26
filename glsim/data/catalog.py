"""The catalog of named data sets. No torch here.

`SETS` is the one table, catalog.csv: counts, licence, protocol, the settings that hold unless one gives others.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from glsim.data.names import SPLITS
from glsim.data.publishers import LAYOUTS, Row
from glsim.files import read_lines
from glsim.types import DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A data set of the field.

    `read` turns the publisher's folder into rows; where it is None, the set is known by the field's lists (train.csv,
    test.csv, ..), which `glsim.data.readers` reads. `marker` is a file (or pattern) that tells the layout. `counts` is
    empty where nobody states them. `split_hash` is None until somebody has read the publisher's own files with
    this code.
    """

    title: str
    classes: int
    counts: dict[str, int]
    licence: str
    homepage: str
    protocol: str
    extras: str  # what rides along
    marker: str
    read: Callable[[Path], Iterable[Row]] | None
    download: tuple[tuple[str, dict[str, Any]], ...]  # torchvision's classes, and their arguments
    split_hash: str | None
    top_o: int  # of GLSim
    top_k: int  # of FFVT
    resize_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def options(self, method: str) -> dict[str, Any]:
        """The options of a method that depend on the data set."""
        return {"glsim": {"top_o": self.top_o}, "ffvt": {"top_k": self.top_k}}.get(method, {})


def prepared(data: str | Path, dataset: str | None) -> Path:
    """What `read_data` has to read: `data`, or in that folder the list of `dataset`. DataError when it is not there."""
    file = Path(data) / f"{dataset}.csv"
    if dataset is None or Path(data).is_file():
        return Path(data)
    if not file.is_file():
        raise DataError(f"{file} is not there; make it with: glsim datasets prepare {dataset} --root {data}")
    return file


def _named_set(row: dict[str, str]) -> NamedSet:
    """A line of the table: `layout` is one of `LAYOUTS`, `download` torchvision's classes with their `version` behind a
    colon, `scaling` of the pixels imagenet or half."""
    marker, read = LAYOUTS[row["layout"]]
    mean, std = {"imagenet": IMAGENET, "half": HALF}[row["scaling"]]
    versions = (word.partition(":") for word in row["download"].split())
    texts: dict[str, Any] = {name: row[name] for name in ("title", "licence", "homepage", "protocol", "extras")}
    return NamedSet(
        **texts,
        classes=int(row["classes"]),
        counts={split: int(row[split]) for split in SPLITS if row[split]},
        marker=marker,
        read=read,
        download=tuple((name, {"version": version} if version else {}) for name, _, version in versions),
        split_hash=row["split_hash"] or None,
        top_o=int(row["top_o"]),
        top_k=int(row["top_k"]),
        resize_ratio=float(Fraction(row["resize_ratio"])),
        mean=mean,
        std=std,
    )


SETS = {row["name"]: _named_set(row) for row in csv.DictReader(read_lines(Path(__file__).with_suffix(".csv")))}
