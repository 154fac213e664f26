"""CSV lists of images and labels, our own and those that the field publishes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from glsim.data.image_files import Labelled, LeftOut, folders_in
from glsim.data.names import clean_label, holds_val, one_of_each_split, resembles_split, split_of
from glsim.files import is_junk, read_table, shorten
from glsim.types import DataError

READ = (".csv", ".tsv")  # endings of lists that are read
TABLES = (*READ, ".txt", ".parquet", ".xlsx", ".xls", ".ods", ".json", ".jsonl")  # and of what may be meant as one
LAYOUTS = (
    "what works: a folder train/CLASS/x.jpg with val/ or test/ beside train/; a folder CLASS/x.jpg; a CSV file with "
    "the header path,label or path,label,split; a folder that holds train.csv and test.csv; hf:NAME; wds:FOLDER"
)


def read_lists(folder: Path, left: LeftOut) -> list[Labelled]:
    """The images of train.csv (or train_val.csv), val.csv, test.csv in a folder; [] where there are none of them."""
    with os.scandir(folder) as entries:  # which knows what is a folder without looking at each file
        inside = sorted(entry.name for entry in entries if not is_junk(entry.name) and not entry.is_dir())
    tables = [folder / name for name in inside if Path(name).suffix.lower() in TABLES]
    known = [file for file in tables if file.suffix.lower() in READ and split_of(file.stem)]
    lists = one_of_each_split(known, lambda f: f.stem)
    if whole := [file for file in lists.values() if holds_val(file.stem)]:
        lists = {"train": whole[0], **{split: file for split, file in lists.items() if split == "test"}}
    if others := [file.name for file in tables if file not in known and resembles_split(file.stem)]:
        left.said.append(f"left out {', '.join(others[:5])}: no list (.csv, .tsv) by the name of a split")
    if not lists:
        return []
    beside = [other for other in folders_in(folder, LeftOut()) if split_of(other.name)]
    try:
        rows = [row._replace(split=split) for split, file in lists.items() for row in read_list(file)]
    except DataError as error:
        if not beside:
            raise
        names, files = (", ".join(path.name for path in paths) for paths in (beside, lists.values()))
        raise DataError(f"{error}\nor move {files} away: the folders beside ({names}) will do without") from error
    for other in beside:
        if split_of(other.name) not in lists and not any(row.path.is_relative_to(other) for row in rows):
            left.said.append(f"left out {other}, as {', '.join(f.name for f in lists.values())} say what is read")
    return rows


def read_list(file: Path) -> list[Labelled]:
    """The images of one list, in its order; DataError for what it lacks, and for images that are not there."""
    (path_column, class_column), table = read_columns(file, ("path", "label"), ("dir", "class_id"))
    folder, published = file.parent, class_column == "class_id"
    names = _class_names(folder / "classid_classname.csv") if published else {}
    rows = []
    for line, cells in table:
        where = f"{file}, line {line}"
        label, class_id, split = cells[class_column], 0, None
        if published:
            class_id = _class_id(label, where)
            if names and class_id not in names:
                raise DataError(f"{where}: class_id {class_id} is not among the {len(names)} of classid_classname.csv")
            label = names.get(class_id, str(class_id))
        if "split" in cells:
            split = split_of(cells["split"])
            if split is None:
                raise DataError(f"{where}: unknown split {cells['split']!r}; use train, val or test")
        key = as_listed(cells[path_column])
        rows.append(Labelled(folder / key, key, label, where, split, class_id))
    if not rows:
        raise DataError(f"{file}: no rows below the header")
    # The published lists name files below their own folder or one in it (data/, images/), and do not say which.
    inside = folders_in(folder, LeftOut()) if published else []
    bases = [folder, *(base for base in inside if any((base / row.key).is_file() for row in rows[:20]))]
    missing = {base: [row for row in rows if not (base / row.key).is_file()] for base in bases}
    base = min(bases, key=lambda base: len(missing[base]))
    if missing[base]:
        looked = f"{folder} and the folders in it" if published else str(folder)
        raise DataError(
            f"{file}: {len(missing[base])} of {len(rows)} images are missing below {looked}; first:",
            details=[f"{row.where}: {row.key}" for row in missing[base][:5]],
        )
    return [row._replace(path=base / row.key) for row in rows]


def _class_names(file: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for line, cells in read_columns(file, ("class_id", "class_name"))[1] if os.path.lexists(file) else ():
        where = f"{file}, line {line}"
        class_id, name = _class_id(cells["class_id"], where), clean_label(cells["class_name"])
        if class_id in names or name in names.values():
            raise DataError(f"{where}: class_id {class_id} or class_name {name!r} comes twice; both must be unique")
        names[class_id] = name
    return names


def _class_id(text: str, where: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise DataError(f"{where}: class_id must be an integer, got {shorten(text, 40)!r}")
    return int(text)


def read_columns(
    file: str | Path, *layouts: tuple[str, ...], stream: BinaryIO | None = None, wanted: str = LAYOUTS
) -> tuple[tuple[str, ...], Iterator[tuple[int, dict[str, str]]]]:
    """The first of `layouts` (column names) that the header of a list holds, and (line number, cells by column) of each
    row, one by one. Raises DataError as `read_table` does, and for rows that are too long or lack a cell."""
    header, rows = read_table(file, wanted, stream)
    layout = next((layout for layout in layouts if set(layout) <= set(header)), None)
    if layout is None:
        wanted = " or ".join(",".join(layout) for layout in layouts)
        got = ",".join(header)[:80]
        raise DataError(f"{file}: the first line must name the columns {wanted} (or with ; or tab), got {got!r}")

    def cells_of_rows() -> Iterator[tuple[int, dict[str, str]]]:
        for line, values in rows:
            where = f"{file}, line {line}"
            if any(values[len(header) :]):
                n = len(values)
                raise DataError(f"{where}: {n} values for {len(header)} columns; quote values that hold commas")
            cells = dict(zip(header, values + [""] * (len(header) - len(values)), strict=False))
            for column in layout:
                if not cells[column]:
                    raise DataError(f"{where}: empty {column}; every row needs {' and '.join(layout)}")
            yield line, cells

    return layout, cells_of_rows()


def as_listed(path: str) -> str:
    """A path out of a list, with "/" between its parts."""
    return PurePosixPath(path.replace("\\", "/")).as_posix()
