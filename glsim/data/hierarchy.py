"""Hierarchies of classes (genus, family; make), for answers where the class itself is unsure."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glsim.data.names import clean_label
from glsim.files import read_table
from glsim.types import DataError

LAYOUT = "the first line names the levels from fine to coarse: label,genus,family or label,make"


class Taxonomy(NamedTuple):
    """The groups of C classes at each level, from fine to coarse; the finest level is the classes themselves."""

    levels: tuple[str, ...]  # their names
    groups: tuple[tuple[str, ...], ...]  # the names of each level's groups
    of: Tensor  # (levels, C) int64: which group of the level a class is in

    def best(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, C), each level's likeliest group and its probability, the sum of its classes': both (B, levels)."""
        found = []
        for groups, of in zip(self.groups, self.of.to(probabilities.device), strict=True):
            sums = probabilities.new_zeros(len(probabilities), len(groups)).index_add_(1, of, probabilities)
            found.append(sums.max(dim=1))
        return torch.stack([f.indices for f in found], dim=1), torch.stack([f.values for f in found], dim=1)

    def classes_of_groups(self) -> dict[str, list[int]]:
        """The classes of each group of the coarser levels, by its name."""
        found: dict[str, list[int]] = {}
        for names, of in zip(self.groups[1:], self.of[1:].tolist(), strict=True):
            for number, group in enumerate(of):
                found.setdefault(names[group], []).append(number)
        return found

    def truth(self, labels: Tensor) -> Tensor:
        """The groups that classes (B,) are in (B, levels)."""
        return self.of.T[labels]


def flat(labels: Sequence[str] | range) -> Taxonomy:
    """Classes that have nothing in common: a single level."""
    return Taxonomy(("label",), (tuple(map(str, labels)),), torch.arange(len(labels))[None])


def decide(probabilities: Tensor, threshold: float) -> Tensor:
    """The finest level whose probability (B, levels) reaches `threshold`, -1 where none does: (B,)."""
    reached = probabilities.double() >= threshold
    return torch.where(reached.any(dim=1), reached.long().argmax(dim=1), -1)


def read_taxonomy(file: str | Path, labels: Sequence[str]) -> Taxonomy:
    """The taxonomy of the classes `labels` from a CSV: `label`, then a column for each coarser level.

    Names are compared as `clean_label` makes them.

    Raises DataError naming file, line and label where it cannot be read, a cell is empty, a label comes twice, is not
    among `labels` or is missing, or a group lies in two groups of a coarser level.
    """
    header, lines = read_table(file, LAYOUT)
    if header[:1] != ["label"] or len(header) < 2 or not all(header):
        raise DataError(f"{file}: {LAYOUT}; got {', '.join(map(repr, header)) or 'nothing'}")
    rows = [(line, [clean_label(cell) for cell in cells]) for line, cells in lines]
    known, seen = {clean_label(name) for name in labels}, dict[str, int]()
    for line, cells in rows:
        where, label = f"{file}, line {line}", cells[0]
        if len(cells) != len(header) or not all(cells):
            raise DataError(f"{where}: label {label!r}: wanted {', '.join(header)}, got {', '.join(map(repr, cells))}")
        if label in seen:
            raise DataError(f"{where}: label {label!r} stands in line {seen[label]} already; keep one of them")
        if label not in known:
            close = get_close_matches(label, labels, n=3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise DataError(f"{where}: the model has no label {label!r}{hint}")
        seen[label] = line
    if missing := [name for name in labels if clean_label(name) not in seen]:
        shown = ", ".join(map(repr, missing[:5])) + (", .." if len(missing) > 5 else "")
        raise DataError(
            f"{file}: {len(missing)} of the model's {len(labels)} labels are missing: {shown}; add a line each"
        )
    for level in range(1, len(header) - 1):
        parents: dict[str, tuple[str, int]] = {}
        for line, cells in rows:
            parent, first = parents.setdefault(cells[level], (cells[level + 1], line))
            if parent != cells[level + 1]:
                raise DataError(
                    f"{file}, line {line}: label {cells[0]!r}: {header[level]} {cells[level]!r} is in "
                    f"{header[level + 1]} {cells[level + 1]!r} here and in {parent!r} in line {first}"
                )
    of_label = {cells[0]: cells for _, cells in rows}
    columns = list(zip(*(of_label[clean_label(name)] for name in labels), strict=True))
    columns[0] = tuple(labels)
    groups = [*columns[:1], *(tuple(dict.fromkeys(column)) for column in columns[1:])]
    of = [[names.index(cell) for cell in column] for names, column in zip(groups, columns, strict=True)]
    return Taxonomy(tuple(header), tuple(groups), torch.tensor(of))
