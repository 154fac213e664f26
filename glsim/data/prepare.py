"""Preparation of named data sets: the list of them, the synthetic one drawn, a publisher's files as our list."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glsim.data import synthetic
from glsim.data.catalog import SETS, NamedSet
from glsim.data.names import SPLITS
from glsim.data.publishers import Row, find
from glsim.data.readers import hash_rows, read_data
from glsim.files import check_regular, document, real, replacing, write_json
from glsim.types import ConfigError, DataError, choose, optional

SYNTHETIC = "birds drawn from a seed, told apart by one small part each, with masks of part and body; no download"
LOOSE = (".mat", ".json", ".txt", ".csv")  # files that publishers give away beside their archives
SIDES = ("left", "top", "right", "bottom")
COLUMNS = ("path", "label", "split", *SIDES, "mask")  # of the list; box and mask where there are any


@dataclass(frozen=True, kw_only=True)
class DataSetInfo:
    """A data set by name. What is stated by its publisher is None for the synthetic one.

    Of one that was prepared, `classes` and `counts` are as they are there now, and what follows `root` is told.
    """

    name: str
    about: str | None = optional()
    classes: int | None = optional()
    counts: dict[str, int] | None = optional()  # images by split; {} where nobody states them
    licence: str | None = optional()
    homepage: str | None = optional()
    protocol: str | None = optional()
    extras: str | None = optional()  # what rides along: boxes, masks
    download: bool | None = optional()  # whether `prepare_dataset` can download it
    defaults: dict[str, Any] | None = optional()  # settings of `train` that it changes; its options by method
    root: str | None = optional()
    csv: str | None = optional()  # the list; None for the synthetic data set, which is a folder of class folders
    split_hash: str | None = optional()
    partial: bool | None = optional()
    source: list[str] | None = optional()  # where its files came from


def list_datasets() -> list[DataSetInfo]:
    """The data sets that `prepare_dataset` takes."""
    return [DataSetInfo(name="synthetic", about=SYNTHETIC), *(_about(name) for name in SETS)]


def prepare_dataset(
    name: str,
    root: str | Path,
    *,
    source: Sequence[str | Path] | None = None,
    partial: bool = False,
    **drawing: Any,
) -> DataSetInfo:
    """Draw the synthetic data set into `root`, or write the list of a published one, `root`/NAME.csv.

    The list has the columns path, label, split; box and mask where there are any. What is returned stands beside it in
    NAME.json. The publisher's files are, the first that fits: the folder `source` names; its archives, unpacked into
    `root`; what lies in `root` already; what torchvision downloads into it.

    Args:
        name: "synthetic", or one of `glsim.data.catalog:SETS`.
        root: folder to make, or to fill.
        source: the publisher's archives, or the folder they were unpacked in.
        partial: leave out images that are listed but not there, and accept other counts.
        drawing: of the synthetic data set: classes, train, val, test, size, part_scale, clutter, bird_scale and seed,
            as `glsim.data.synthetic:write` takes them.

    Raises:
        ConfigError: for a name or number that does not fit.
        DataError: when files are missing, damaged, or counts are not the publisher's; no list is written then.
    """
    choose(name, {"synthetic": None, **SETS}, "data set")
    if name != "synthetic":
        return prepare_published(name, Path(root), [Path(path) for path in source or ()], partial)
    try:
        drawn = synthetic.write(root, **drawing)
    except (ValueError, FileExistsError) as error:
        raise ConfigError(str(error)) from error
    counts = {split: drawn[split] * drawn["classes"] for split in SPLITS if drawn[split]}
    return DataSetInfo(name=name, root=str(root), classes=drawn["classes"], counts=counts)


def prepare_published(name: str, root: Path, sources: list[Path], partial: bool = False) -> DataSetInfo:
    """`prepare_dataset` of a data set of the catalog."""
    known = SETS[name]
    root.mkdir(parents=True, exist_ok=True)
    folder = _gather(name, root, sources)
    rows = _read(known, folder)
    if partial:
        rows = [row for row in rows if row.path.is_file()]
        if not rows:
            raise DataError(f"{folder}: none of the images listed is there")
    images, file = Counter(row.split for row in rows), root / f"{name}.csv"
    made = replace(
        _about(name),
        classes=len({row.label for row in rows}),
        counts={split: images[split] for split in SPLITS if images[split]},
        root=str(root),
        csv=str(file),
        # The publisher's own names of the images: it does not depend on where they lie.
        split_hash=hash_rows((row.split, row.key, row.label) for row in rows),
        partial=partial,
        source=[str(source) for source in sources] or [known.homepage],
    )
    with replacing(file) as fresh:
        fresh.write_text(_table(rows, root), encoding="utf-8")
        splits = read_data(fresh)  # DataError where an image is missing or comes twice
        if not partial:
            _check(made, known, len(splits["train"].classes))
    write_json(file.with_suffix(".json"), document(made))
    return made


def _about(name: str) -> DataSetInfo:
    known = SETS[name]
    options = {method: known.options(method) for method in ("glsim", "ffvt")}
    return DataSetInfo(
        name=name,
        about=known.title,
        classes=known.classes,
        counts=known.counts,
        licence=known.licence,
        homepage=known.homepage,
        protocol=known.protocol,
        extras=known.extras,
        download=bool(known.download),
        defaults={"options": options, "resize_ratio": known.resize_ratio, "mean": known.mean, "std": known.std},
    )


def _gather(name: str, root: Path, sources: list[Path]) -> Path:
    """The folder with the publisher's files."""
    known = SETS[name]
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: does not exist; --source takes {known.title}'s archives or the folder of them")
        if source.is_dir() and len(sources) > 1:
            raise DataError(f"{source}: one of {len(sources)} sources is a folder; give one folder, or archives only")
    if sources and sources[0].is_dir():
        return sources[0]
    for source in sources:
        _unpack(source, root)
    if not sources and find(root, known.marker) is None and not _has_lists(root):
        _download(name, root)
    return root


def _unpack(source: Path, root: Path) -> None:
    try:
        check_regular(source)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    try:
        if tarfile.is_tarfile(source):
            with tarfile.open(source) as tar:
                tar.extractall(root, filter="data")  # refuses what would land outside root
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                archive.extractall(root)
        elif source.suffix in LOOSE:
            if real(source).parent != real(root):
                shutil.copy(source, root)
        else:
            raise DataError(f"{source}: neither tar nor zip; unpack it, and give the folder")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source}: the archive is damaged ({error}); download it again") from error


def _download(name: str, root: Path) -> None:
    known = SETS[name]
    by_hand = f"get it from {known.homepage}, then: glsim datasets prepare {name} --root {root} --source PATH .."
    if not known.download:
        raise DataError(f"{root}: {known.marker} is not there, and no program downloads {known.title}; {by_hand}")
    from torchvision import datasets

    for published, arguments in known.download:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # older versions print to where our JSON goes
                getattr(datasets, published)(str(root), download=True, **arguments)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{known.title} could not be downloaded ({error}); {by_hand}") from error


def _has_lists(folder: Path) -> bool:
    train, joined, test = ((folder / f"{part}.csv").is_file() for part in ("train", "train_val", "test"))
    return (train or joined) and test


def _read(known: NamedSet, folder: Path) -> list[Row]:
    if known.read is not None and (find(folder, known.marker) is not None or not _has_lists(folder)):
        try:
            return list(known.read(folder))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: not laid out as {known.title}'s publisher does ({error!r})") from error
    if not _has_lists(folder):
        raise DataError(f"{folder}: train.csv (or train_val.csv) and test.csv, {known.title}'s lists, are not there")
    return [
        Row(path, _relative(path, folder), images.classes[label], split)
        for split, images in read_data(folder).items()
        for path, label in zip(images.paths, images.labels, strict=True)
    ]


def _table(rows: list[Row], root: Path) -> str:
    cells: list[dict[str, Any]] = [{"path": _relative(r.path, root), "label": r.label, "split": r.split} for r in rows]
    for row, cell in zip(rows, cells, strict=True):
        cell |= zip(SIDES, row.box, strict=True) if row.box else ()
        cell |= {"mask": _relative(row.mask, root)} if row.mask else {}
    columns = [name for name in COLUMNS if any(name in cell for cell in cells)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _check(made: DataSetInfo, known: NamedSet, trained: int) -> None:
    """DataError where images, classes (`trained`: those of train) or the split are other ones than the publisher's."""
    hint = "--partial accepts what is there"
    if known.counts and made.counts != known.counts:
        raise DataError(f"{made.name}: got {made.counts} images, {known.title} has {known.counts}; {hint}")
    if made.classes != known.classes or trained != made.classes:
        raise DataError(f"{made.name}: got {made.classes} classes, {known.title} has {known.classes}; {hint}")
    if known.split_hash not in (None, made.split_hash):
        raise DataError(f"{made.name}: the split is {made.split_hash}, the publisher's is {known.split_hash}; {hint}")
