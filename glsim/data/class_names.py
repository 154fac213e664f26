"""Names that people use for classes: common and scientific name and taxon id, beside the label, which stays the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from glsim.data.lists import read_columns
from glsim.data.names import clean_label
from glsim.types import DataError

WANTED = "wanted the columns label, and of name, scientific_name, taxon_id those that are known"


class ClassName(NamedTuple):
    """How people call a class; "" for what is not told."""

    name: str = ""
    scientific_name: str = ""
    taxon_id: str = ""

    def __str__(self) -> str:
        if self.name and self.scientific_name:
            return f"{self.name} ({self.scientific_name})"
        return self.name or self.scientific_name


ClassNames = Mapping[str, ClassName]  # by label


def read_class_names(file: str | Path, labels: Sequence[str]) -> dict[str, ClassName]:
    """The names of the classes `labels` from a CSV with the column label (a folder's name) and those of `ClassName`.

    Rows of other labels are left out, so that one file serves several models. Raises DataError naming file and line
    where it cannot be read or a label comes twice, and where no label is one of `labels`.
    """
    _, rows = read_columns(file, ("label",), wanted=WANTED)
    known, lines, found = {clean_label(label): label for label in labels}, dict[str, int](), dict[str, ClassName]()
    for line, cells in rows:
        label = clean_label(cells["label"])
        if label in lines:
            raise DataError(f"{file}, line {line}: label {label!r} stands in line {lines[label]} already")
        lines[label] = line
        if label in known:
            found[known[label]] = ClassName(*(clean_label(cells.get(field, "")) for field in ClassName._fields))
    if not any(map(str, found.values())):
        raise DataError(f"{file}: no name of any of the {len(labels)} classes, as {labels[0]!r}; {WANTED}")
    return found


def shown_label(label: str, names: ClassNames) -> str:
    """A label with the name that people use, where there is one."""
    name = str(names.get(label, ""))
    return f"{label} = {name}" if name else label
