"""Reader of data sets: chooses by source (class folders, list, shards, Hugging Face); images and labels by split."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

from glsim.data.class_folders import read_class_folders
from glsim.data.image_files import Labelled, LeftOut
from glsim.data.lists import LAYOUTS, read_list, read_lists
from glsim.data.names import SPLITS, clean_label
from glsim.data.regions import file_of
from glsim.data.shards import read_shards
from glsim.data.sources import located, parse
from glsim.types import ConfigError, DataError, DataWarning


@dataclass(frozen=True)
class ImageList:
    """One split: `paths` and `labels` of equal length; a label is an index into `classes`."""

    paths: Sequence[Path]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    drawn: bool = False  # the data does not say itself which image is in which split

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, keep: Iterable[bool]) -> ImageList:
        """The images for which `keep` says so."""
        keep = list(keep)
        return replace(self, paths=tuple(compress(self.paths, keep)), labels=tuple(compress(self.labels, keep)))


def read_data(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    left: LeftOut | None = None,
) -> dict[str, ImageList]:
    """Read the images and labels of a data set.

    train_val.csv, where it exists, is the train split, as the field's protocol has it; val.csv, which is a part of it,
    is left out. Labels are compared and returned as `clean_label` makes them. What is left out is told by a
    DataWarning.

    Args:
        source: the first that fits: a folder with train.csv (or train_val.csv), val.csv, test.csv; a folder
            train|val|test/CLASS/...; a folder CLASS/...; a CSV file with the header `path,label[,split]` (paths
            relative to its folder) or `dir,class_id` (names in classid_classname.csv beside it). `hf:..` and `wds:..`
            name a data set of Hugging Face and a folder of WebDataset shards (`glsim.data.sources`).
        classes: the class order of all splits (the list stored with a model), returned as given; default: that of the
            train split, by class_id or by name.
        seed: of the drawing.
        test_fraction: share of each class that goes to "test" where nothing says the split, drawn by a hash of `seed`
            and path: the same on every machine.
        left: takes what is left out, in place of the warning.

    Returns:
        The splits that exist, in the order of `SPLITS`.

    Raises:
        DataError: for anything missing or contradictory, naming file, line and class, and for folders that may be
            read as classes and as splits.
    """
    told = LeftOut() if left is None else left
    rows = _rows(source, told, classes)
    if left is None:
        told.tell(source)
    rows = _with_clean_labels(rows, source)
    drawn = rows[0].split is None
    if drawn:
        first: dict[str, str] = {}  # an image that is listed twice is drawn once, however it is spelt
        rows = [row._replace(key=first.setdefault(_place(row.path), row.key)) for row in rows]
        held = held_out(((row.key, row.label) for row in rows), test_fraction, seed)
        rows = [row._replace(split="test" if row.key in held else "train") for row in rows]
    return _number(rows, classes, drawn)


def hold_out_val(splits: dict[str, ImageList], fraction: float, seed: int) -> dict[str, ImageList]:
    """The splits with `fraction` of train held out as val (`hold_out`): the same ones where they have a val split or no
    train split, and where no class has an image to spare."""
    if not fraction or "train" not in splits or "val" in splits:
        return splits
    kept, held = hold_out(splits["train"], fraction, seed)
    return {**splits, "train": kept, "val": held} if held else splits


def hold_out(images: ImageList, fraction: float, seed: int) -> tuple[ImageList, ImageList]:
    """Split into (kept, held out), `fraction` of each class held out: at least one image, but never a class's last one.

    Drawn by a hash of `seed` and the path below the folder common to all images: the same wherever that folder lies.
    All regions of an image go the same way.
    """
    paths = [file_of(path).absolute() for path in images.paths]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    keys = [path.relative_to(common).as_posix() for path in paths]
    held = held_out(zip(keys, images.labels, strict=True), fraction, seed)
    return images.only(key not in held for key in keys), images.only(key in held for key in keys)


def split_hash(splits: dict[str, ImageList], root: str | Path) -> str:
    """Return the sha256 (64 hex digits) of which image of which class is in which split. Paths count relative to `root`
    (a folder, or a CSV file for its folder), so the hash stays the same when the folder moves to another machine."""
    root = located(root)
    root = root.parent if root.is_file() else root
    return hash_rows(
        (split, Path(os.path.relpath(path, root)).as_posix(), images.classes[label])
        for split, images in splits.items()
        for path, label in zip(images.paths, images.labels, strict=True)
    )


def hash_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    """The `split_hash` of images by their split, path (with "/") and class."""
    return _sha256("\n".join(sorted(unicodedata.normalize("NFC", "\t".join(row)) for row in rows)))


def _rows(given: str | Path, left: LeftOut, classes: Sequence[str] | None = None) -> list[Labelled]:
    parsed, source = parse(given), located(given)
    if parsed is not None and parsed.kind == "wds":
        return read_shards(given, source, parsed.options.get("label"), left)
    if not source.exists():
        raise DataError(f"{source}: does not exist; {LAYOUTS}")
    if not source.is_file() and not source.is_dir():
        raise DataError(f"{source}: not a regular file; {LAYOUTS}")
    if source.is_file():
        return read_list(source)
    return read_lists(source, left) or read_class_folders(source, left, classes)


def _with_clean_labels(rows: list[Labelled], source: object) -> list[Labelled]:
    """The rows with each label as `clean_label` makes it; warns where that makes one class of several spellings."""
    clean: dict[str, str] = {}
    for row in rows:
        if row.label not in clean:
            clean[row.label] = clean_label(row.label)
            if not clean[row.label]:
                raise DataError(f"{row.where}: the class has an empty name, {row.label!a}")
    spelt: dict[str, list[str]] = {}
    for label, cleaned in clean.items():
        spelt.setdefault(cleaned, []).append(label)
    for label, several in spelt.items():
        if len(several) > 1:
            spellings = ", ".join(map(ascii, several))
            warnings.warn(f"{source}: {spellings} are read as one class, {label!r}", DataWarning, stacklevel=3)
    return [row if row.label == clean[row.label] else row._replace(label=clean[row.label]) for row in rows]


@lru_cache(maxsize=4096)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)


def _place(path: Path) -> str:
    """A file by its place, however its folder is spelt; a link to a file counts as a file."""
    return f"{_real(path.parent)}/{path.name}"


def _number(rows: list[Labelled], classes: Sequence[str] | None, drawn: bool) -> dict[str, ImageList]:
    known = tuple(classes or ())
    if classes is None:
        basis = [row for row in rows if row.split == "train"] or rows
        known = tuple(label for _, label in sorted({(row.class_id, row.label) for row in basis}))
    index: dict[str, int] = {}
    for i, label in enumerate(known):
        if index.setdefault(clean_label(label), i) != i:
            first = known[index[clean_label(label)]]
            raise DataError(
                f"{first!a} and {label!a} are two classes of the model, but one name in two spellings; train it anew"
            )
    seen: dict[str, Labelled] = {}
    for row in rows:
        if row.label not in index:
            whose = "of the train split" if classes is None else "given (the model's)"
            some = ", ".join(known[:5] + (("...",) if len(known) > 5 else ()))
            raise DataError(f"{row.where}: class {row.label!r} is not one of the {len(known)} classes {whose}: {some}")
        other = seen.setdefault(_place(row.path), row)
        if (other.split, other.label) != (row.split, row.label):
            raise DataError(
                f"{row.where}: {row.key} is class {row.label!r} in {row.split!r} here, but class {other.label!r} in "
                f"{other.split!r} at {other.where}; an image belongs to one class and one split"
            )
    parts = {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {
        split: ImageList(tuple(row.path for row in part), tuple(index[row.label] for row in part), known, drawn)
        for split, part in parts.items()
        if part
    }


def held_out(images: Iterable[tuple[str, Any]], fraction: float, seed: int) -> set[str]:
    """Return the keys held out of (key, class) pairs. The order by hash moves few images when some are added."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"the fraction held out must be at least 0 and less than 1, got {fraction}")
    by_class: dict[Any, set[str]] = {}
    for key, label in images:
        by_class.setdefault(label, set()).add(key)
    held: set[str] = set()
    for keys in by_class.values():
        count = min(max(round(len(keys) * fraction), 1 if fraction else 0), len(keys) - 1)
        held.update(sorted(keys, key=lambda key: _sha256(f"{seed}:{key}"))[:count])
    for keys in by_class.values():
        if keys <= held:  # an image with boxes of several classes was held out for another one
            held.discard(min(keys))
    return held


def _sha256(text: str) -> str:
    # File names may be spelt with combined or separate accents (macOS) and need not be UTF-8 at all (Linux).
    return hashlib.sha256(unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")).hexdigest()
