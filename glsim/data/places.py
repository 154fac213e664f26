"""Labels that can occur at a place: a list of them, or a table of places and their labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from glsim.data.class_names import ClassName
from glsim.data.lists import read_columns
from glsim.data.names import clean_label
from glsim.files import one_line, read_lines
from glsim.types import DataError, DataWarning

SHOWN = 5  # labels that a note names


def read_allowed(
    file: str | Path,
    labels: Sequence[str],
    place: str | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    names: Mapping[str, ClassName] | None = None,
) -> list[int]:
    """The numbers of the classes `labels` that can occur.

    Args:
        file: a label a line; with `place` a CSV with the columns place and label.
        labels: the model's, in the order of its classes.
        place: whose labels are taken.
        groups: the classes of each group of a taxonomy: a genus in the file allows all of its species.
        names: how people call the classes: a common or scientific name in the file is as good as the label.

    Raises:
        DataError: where the file cannot be read, has no such place, or nothing in it is a class of the model. What else
            the model does not know is counted by a DataWarning: lists of a region name more than a model was taught.
    """
    allowed = _of_place(file, place) if place is not None else _of_list(file)
    known = {group: list(members) for group, members in (groups or {}).items()}
    for number, label in enumerate(labels):
        told = (names or {}).get(label, ClassName())
        for name in filter(None, (told.scientific_name, told.name)):
            known.setdefault(name, []).append(number)
    known |= {clean_label(label): [number] for number, label in enumerate(labels)}
    unknown = [label for label in allowed if label not in known]
    if len(unknown) == len(allowed):
        close = get_close_matches(allowed[0], list(known), n=3) if allowed else []
        hint = f"; close to {allowed[0]!r}: {', '.join(close)}" if close else ""
        raise DataError(f"{file}: none of its {len(allowed)} labels is one of the model's {len(labels)}{hint}")
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (", .." if len(unknown) > SHOWN else "")
        what = f"{len(unknown)} of {len(allowed)} labels are none of the model's"
        warnings.warn(f"{file}: {what}: {shown}", DataWarning, stacklevel=2)
    return sorted({number for label in allowed for number in known.get(label, ())})


def _of_list(file: str | Path) -> list[str]:
    try:
        return [label for line in read_lines(file) if (label := clean_label(line))]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a list of labels ({one_line(error)}); a label a line") from error


def _of_place(file: str | Path, place: str) -> list[str]:
    _, rows = read_columns(file, ("place", "label"), wanted="wanted a CSV file with the columns place,label")
    found: dict[str, list[str]] = {}
    for _, cells in rows:
        found.setdefault(clean_label(cells["place"]), []).append(clean_label(cells["label"]))
    if clean_label(place) not in found:
        raise DataError(f"{file}: no place {place!r}; there are: {', '.join(sorted(found)[:20]) or 'none'}")
    return found[clean_label(place)]
