"""Readers of class folders and CSV lists: which images, which labels, which split. No torch here."""

from __future__ import annotations

import glob
import hashlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from glsim.data.images import EXTENSIONS, BadImage, is_file, prepare, read_image
from glsim.data.sources import (
    KNOWN_SPLITS,
    SPLITS,
    clean_label,
    count_endings,
    holds_masks,
    holds_val,
    is_shards,
    located,
    read_shards,
    resembles_split,
    split_of,
    splits_named,
)
from glsim.data.uri import is_uri
from glsim.files import MARKER, is_junk, read_table
from glsim.types import ConfigError, DataError, DataWarning

FOR_CLASSES = "rename the folders, or give a list with the columns path,label"
LISTS = (".csv", ".tsv", ".parquet")  # tables of images, which `predict bulk` takes
LAYOUTS = (
    "what works: a folder train/CLASS/x.jpg with val/ or test/ beside train/; a folder CLASS/x.jpg; a CSV file with "
    "the header path,label or path,label,split; a folder that holds train.csv and test.csv; hf:NAME; wds:FOLDER"
)


@dataclass(frozen=True)
class ImageList:
    """One split: `paths` and `labels` of equal length; a label is an index into `classes`."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def read_data(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    left: LeftOut | None = None,
) -> dict[str, ImageList]:
    """Read the images and labels of a data set; returns the splits that exist, in the order of `SPLITS`.

    `source` is, the first that fits: a folder with train.csv (or train_val.csv), val.csv, test.csv; a folder
    train|val|test/CLASS/...; a folder CLASS/...; a CSV file with the header `path,label[,split]` (paths relative to its
    folder) or `dir,class_id` (names in classid_classname.csv beside it); `hf:..` and `wds:..` name a data set of
    Hugging Face and a folder of WebDataset shards (`glsim.data.sources`). Where nothing says the split, `test_fraction`
    of each class goes to "test", drawn by a hash of `seed` and path: the same on every machine. train_val.csv,
    where it exists, is the train split, as the field's protocol has it; val.csv, which is a part of it, is left out.

    All splits share one class order: `classes` where given (the list stored with a model), else that of the train
    split, by class_id or by name. Labels are compared and returned as `clean_label` makes them; those of `classes` are
    returned as given. Warns of what is left out (DataWarning), or puts it into `left`.

    Raises DataError for anything missing or contradictory, naming file, line and class, and for folders that may be
    read as classes and as splits.
    """
    told = LeftOut() if left is None else left
    rows = _rows(source, told, classes)
    if left is None:
        told.tell(source)
    rows = _with_clean_labels(rows, source)
    if rows[0].split is None:
        first: dict[str, str] = {}  # an image that is listed twice is drawn once, however it is spelt
        rows = [row._replace(key=first.setdefault(_place(row.path), row.key)) for row in rows]
        held = _held_out(((row.key, row.label) for row in rows), test_fraction, seed)
        rows = [row._replace(split="test" if row.key in held else "train") for row in rows]
    return _number(rows, classes)


def is_split(source: str | Path) -> bool:
    """Whether a data set says itself which image is in which split; where not, `read_data` draws them."""
    return _rows(source, LeftOut())[0].split is not None


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
    """
    paths = [path.absolute() for path in images.paths]
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    keys = [path.relative_to(common).as_posix() for path in paths]
    held = _held_out(zip(keys, images.labels, strict=True), fraction, seed)

    def part(out: bool) -> ImageList:
        chosen = [(key in held) == out for key in keys]
        return ImageList(tuple(compress(images.paths, chosen)), tuple(compress(images.labels, chosen)), images.classes)

    return part(False), part(True)


def split_hash(splits: dict[str, ImageList], root: str | Path) -> str:
    """Return the sha256 (64 hex digits) of which image of which class is in which split. Paths count relative to `root`
    (a folder, or a CSV file for its folder), so the hash stays the same when the folder moves to another machine."""
    root = located(root)
    root = root.parent if root.is_file() else root
    lines = [
        f"{split}\t{Path(os.path.relpath(path, root)).as_posix()}\t{images.classes[label]}"
        for split, images in splits.items()
        for path, label in zip(images.paths, images.labels, strict=True)
    ]
    return _sha256("\n".join(sorted(unicodedata.normalize("NFC", line) for line in lines)))


class LeftOut:
    """What a reader leaves out, to be told in one sentence each."""

    def __init__(self) -> None:
        self.files: set[str] = set()  # no ending of an image
        self.loose: set[str] = set()  # images in no class folder
        self.ours: set[str] = set()  # folders that glsim wrote
        self.said: list[str] = []

    def tell(self, source: object) -> None:
        """Warn of it (DataWarning)."""
        if self.files:
            self.said.append(f"left out {count_endings(self.files)}")
        if self.loose:
            self.said.append(f"left out {len(self.loose):,} images outside of class folders, as {min(self.loose)}")
        if self.ours:
            self.said.append(f"left out what glsim wrote: {', '.join(sorted(self.ours)[:5])}")
        for sentence in self.said:
            warnings.warn(f"{source}: {sentence}", DataWarning, stacklevel=3)


def find_images(inputs: Sequence[str | Path] | str | Path) -> list[Path]:
    """Find the images to predict: each input is a file, a folder (read recursively) or a glob ("**" too). Sorted within
    each input; a file given twice comes once. Warns of what is left out (DataWarning). Raises DataError naming the
    first input that yields nothing, and for a list of images or a URI."""
    found: dict[Path, Path] = {}
    left = LeftOut()
    given_all = [inputs] if isinstance(inputs, str | Path) else inputs
    for given in given_all:
        if is_uri(given) or Path(given).suffix.lower() in LISTS:
            what = "in a store" if is_uri(given) else "a list of images"
            raise DataError(f"{given} is {what}, which glsim predict bulk takes; wanted images or a folder")
        if is_file(given):
            matches = [Path(given)]
        else:
            # Path.glob takes no absolute pattern.
            tops = [given] if Path(given).exists() else glob.glob(str(given), recursive=True)  # noqa: PTH207
            matches = sorted(path for top in tops if not _passed(top, given) for path in images_in(Path(top), left))
        if not matches:
            raise DataError(f"{given}: no image found; wanted an image, a folder with images or a 'pattern/**/*.jpg'")
        for path in matches:
            found.setdefault(path.absolute(), path)
    left.tell(", ".join(map(str, given_all[:3])) + ", .." * (len(given_all) > 3))
    return list(found.values())


def _passed(match: str | Path, pattern: str | Path) -> bool:
    """Whether what a pattern found is junk or lies in a folder that glsim wrote, other than one that it names."""
    named, path = Path(pattern).parts, Path(match)
    found = [top for top in (path, *path.parents) if top.name and top.name not in named]
    return any(is_junk(top.name) or (top / MARKER).exists() for top in found)


# --- reading folders and lists ----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    path: Path
    key: str  # the path below the source, with "/": what the seeded split is drawn from
    label: str
    where: str  # for messages: the file and line, or the folder
    split: str | None = None  # None: to be drawn
    class_id: int = 0  # classes are ordered by (class_id, label)


def _rows(given: str | Path, left: LeftOut, classes: Sequence[str] | None = None) -> list[_Row]:
    source = located(given)
    if is_shards(given):
        found = read_shards(given)
        return [_Row(i.path, i.path.relative_to(source).as_posix(), i.label, str(i.path), i.split) for i in found]
    if not source.exists():
        raise DataError(f"{source}: does not exist; {LAYOUTS}")
    if not source.is_file() and not source.is_dir():
        raise DataError(f"{source}: not a regular file; {LAYOUTS}")
    if source.is_file():
        return _rows_of_list(source)
    return _rows_of_lists(source, left) or _rows_of_folders(source, left, classes)


def _rows_of_lists(folder: Path, left: LeftOut) -> list[_Row]:
    lists = _one_each([file for file in sorted(folder.glob("*.csv")) if split_of(file.stem)], lambda f: f.stem)
    if not lists:
        return []
    if whole := [file for file in lists.values() if holds_val(file.stem)]:
        lists = {"train": whole[0], **{split: file for split, file in lists.items() if split == "test"}}
    beside = [inside for inside in _folders(folder, LeftOut()) if split_of(inside.name)]
    try:
        rows = [row._replace(split=split) for split, file in lists.items() for row in _rows_of_list(file)]
    except DataError as error:
        if not beside:
            raise
        names, files = (", ".join(path.name for path in paths) for paths in (beside, lists.values()))
        raise DataError(f"{error}\nor move {files} away: the folders beside ({names}) will do without") from error
    for inside in beside:
        if split_of(inside.name) not in lists and not any(row.path.is_relative_to(inside) for row in rows):
            left.said.append(f"left out {inside}, as {', '.join(f.name for f in lists.values())} say what is read")
    return rows


def _one_each(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """The path of each split, in the order of SPLITS; DataError where two are of one. `train_val` is train, where val
    and train are there too."""
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (not holds_val(name_of(path)), path)):
        split = split_of(name_of(path))
        assert split is not None
        if split in found and not (split == "train" and path.suffix and holds_val(name_of(found[split]))):
            raise DataError(f"{found[split]} and {path} are both the {split!r} split; keep one of them")
        found.setdefault(split, path)
    return {split: found[split] for split in SPLITS if split in found}


def _rows_of_folders(folder: Path, left: LeftOut, classes: Sequence[str] | None) -> list[_Row]:
    tops = _split_folders(folder, left, classes)
    rows: list[_Row] = []
    for split, top in tops.items() or ((None, folder),):
        images = {inside: images_in(inside, left) for inside in _folders(top, left)}
        if not any(images.values()):
            raise DataError(f"{top}: no images in class folders; {LAYOUTS}")
        left.loose |= {str(path) for path in _loose_images(top)}
        for inside, paths in images.items():
            if not paths and split in (None, "train"):
                raise DataError(f"{inside}: no image to train class {inside.name!r} on; add some or remove the folder")
            rows += [_Row(p, p.relative_to(folder).as_posix(), inside.name, str(inside), split) for p in paths]
    return rows


class _Top(NamedTuple):
    """A folder at the top of a data set."""

    path: Path
    inside: set[str]  # names of the folders in it
    loose: bool  # whether images lie directly in it

    @property
    def nested(self) -> bool:
        """Whether it is built as a split is: folders, and no images beside them."""
        return bool(self.inside) and not self.loose


def _split_folders(folder: Path, left: LeftOut, classes: Sequence[str] | None) -> dict[str, Path]:
    """The folders of the splits in `folder`; {} where its folders are the classes.

    Raises DataError, naming both readings, where they may be either: names with the word of a split that are no split's
    (`train2`), a split's among those of classes (`bus`, `car`, `train`), splits by unknown names.
    """
    tops = [
        _Top(path, {inside.name for inside in _folders(path, LeftOut())}, any(_loose_images(path)))
        for path in _folders(folder, left)
    ]
    splits = [top for top in tops if split_of(top.path.name)]
    if not splits:
        _refuse_unknown_splits(folder, [top for top in tops if top.inside or top.loose], classes)
        return {}
    _refuse_doubtful_splits(folder, splits, [top for top in tops if top not in splits], left)
    found = _one_each([top.path for top in splits], lambda path: path.name)
    if "val" in found and "train" in found and holds_val(found["train"].name):
        raise DataError(f"{found['val']}: by its name a part of {found['train']}; keep one of them")
    return found


def _refuse_unknown_splits(folder: Path, tops: list[_Top], classes: Sequence[str] | None) -> None:
    """DataError where folders that have no split's name may be those of splits all the same, or hold them."""
    nested = [top for top in tops if top.nested]
    if len(tops) == 1 and nested:
        _refuse_wrapper(nested[0].path, classes)
    inner = [top for top in nested if any(map(split_of, top.inside))]
    if inner and (len(inner) == len(tops) or any(len({split_of(n) for n in top.inside} - {None}) > 1 for top in inner)):
        raise DataError(
            f"{folder}: folders of splits lie in those of classes, as in {inner[0].path}; what works: train/CLASS and "
            "test/CLASS, or a list with the columns path,label,split"
        )
    worded = [top for top in tops if splits_named(top.path.name)[0]]
    alike = [top for top in nested if resembles_split(top.path.name)]
    inside = [top.inside for top in tops]
    suspects = [top for top in worded if top.nested]
    if len(worded) == len(tops):
        suspects = worded
    elif any(a is not b and a.inside & b.inside for a in alike for b in nested) or len(alike) == len(tops):
        suspects = alike
    elif len(nested) == len(tops) and 1 < len(tops) < len(set().union(*inside)) and len(set.intersection(*inside)) > 1:
        suspects = nested  # a few folders with the same many in each of them
    if suspects:
        raise DataError(
            f"{folder}: {_names(suspects)} may be splits by names that are not known, or classes; known are "
            f"{KNOWN_SPLITS}. For splits, rename them so; for classes, {FOR_CLASSES}"
        )


def _refuse_doubtful_splits(folder: Path, splits: list[_Top], others: list[_Top], left: LeftOut) -> None:
    """DataError where what lies beside folders of splits may be meant as they are, or they as classes; what is neither
    is left out."""
    for top in splits:
        if top.nested and all(map(split_of, top.inside)):
            raise DataError(f"{top.path}: holds {', '.join(sorted(top.inside))}, not classes; move up what is in there")
    images = {top.path: images_in(top.path, LeftOut()) for top in others}
    others = [top for top in others if images[top.path] and not holds_masks(top.path.name)]
    inside = [name for top in splits for name in top.inside]
    certain = len(set(inside)) < len(inside)  # a class in two splits
    doubtful = [
        top
        for top in others
        if splits_named(top.path.name)[0]
        or (top.nested and resembles_split(top.path.name))
        or not (certain or top.inside & set(inside))
    ]
    if doubtful:
        raise DataError(
            f"{folder}: {_names(splits)} beside {_names(doubtful)} may be splits, or classes. For splits, move away or "
            f"rename {_names(doubtful)}; for classes, {FOR_CLASSES}"
        )
    left.said += [f"left out {top.path} ({len(images[top.path]):,} images), which is no split" for top in others]


def _refuse_wrapper(top: Path, classes: Sequence[str] | None) -> None:
    """DataError where the only folder is no class, but holds the data set."""
    wrapper = top
    while len(inside := _folders(wrapper, LeftOut())) == 1 and not any(_loose_images(wrapper)):
        if split_of(inside[0].name):
            break
        wrapper = inside[0]
    if any(_loose_images(wrapper)) or not inside:
        return
    known = {clean_label(name) for name in classes or ()}
    if any(split_of(path.name) for path in inside) or clean_label(top.name) not in known:
        raise DataError(f"{top.parent}: holds nothing but {top.name}/; the data set seems to be {wrapper}: name that")


def _names(tops: Sequence[_Top]) -> str:
    return ", ".join(f"{top.path.name}/" for top in tops[:5]) + ", .." * (len(tops) > 5)


def _rows_of_list(file: Path) -> list[_Row]:
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
        rows.append(_Row(folder / key, key, label, where, split, class_id))
    if not rows:
        raise DataError(f"{file}: no rows below the header")
    # The published lists name files below their own folder or one in it (data/, images/), and do not say which.
    inside = _folders(folder, LeftOut()) if published else []
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
    for line, cells in read_columns(file, ("class_id", "class_name"))[1] if file.is_file() else ():
        where = f"{file}, line {line}"
        class_id, name = _class_id(cells["class_id"], where), clean_label(cells["class_name"])
        if class_id in names or name in names.values():
            raise DataError(f"{where}: class_id {class_id} or class_name {name!r} comes twice; both must be unique")
        names[class_id] = name
    return names


def _class_id(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: class_id must be an integer, got {text!r}") from None


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
    return layout, _cells(file, header, layout, rows)


def _cells(
    file: str | Path, header: list[str], layout: tuple[str, ...], rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    for line, values in rows:
        where = f"{file}, line {line}"
        if any(values[len(header) :]):
            raise DataError(f"{where}: {len(values)} values for {len(header)} columns; quote values that hold commas")
        cells = dict(zip(header, values + [""] * (len(header) - len(values)), strict=False))
        for column in layout:
            if not cells[column]:
                raise DataError(f"{where}: empty {column}; every row needs {' and '.join(layout)}")
        yield line, cells


def as_listed(path: str) -> str:
    """A path out of a list, with "/" between its parts."""
    return PurePosixPath(path.replace("\\", "/")).as_posix()


def _with_clean_labels(rows: list[_Row], source: object) -> list[_Row]:
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


def _number(rows: list[_Row], classes: Sequence[str] | None) -> dict[str, ImageList]:
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
    seen: dict[str, _Row] = {}
    for row in rows:
        if row.label not in index:
            whose = "of the train split" if classes is None else "given (the model's)"
            some = ", ".join(known[:5] + ("...",) * (len(known) > 5))
            raise DataError(f"{row.where}: class {row.label!r} is not one of the {len(known)} classes {whose}: {some}")
        other = seen.setdefault(_place(row.path), row)
        if (other.split, other.label) != (row.split, row.label):
            raise DataError(
                f"{row.where}: {row.key} is class {row.label!r} in {row.split!r} here, but class {other.label!r} in "
                f"{other.split!r} at {other.where}; an image belongs to one class and one split"
            )
    parts = {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {
        split: ImageList(tuple(row.path for row in part), tuple(index[row.label] for row in part), known)
        for split, part in parts.items()
        if part
    }


def _held_out(images: Iterable[tuple[str, Any]], fraction: float, seed: int) -> set[str]:
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
    return held


def _sha256(text: str) -> str:
    # File names may be spelt with combined or separate accents (macOS) and need not be UTF-8 at all (Linux).
    return hashlib.sha256(unicodedata.normalize("NFC", text).encode("utf-8", "surrogateescape")).hexdigest()


def _folders(folder: Path, left: LeftOut) -> list[Path]:
    """The folders in a folder, sorted, without junk and those that glsim wrote."""
    with os.scandir(folder) as entries:  # which knows what is a folder without looking at each file
        inside = sorted(Path(entry.path) for entry in entries if not is_junk(entry.name) and entry.is_dir())
    ours = {path for path in inside if (path / MARKER).exists()}
    left.ours |= set(map(str, ours))
    return [path for path in inside if path not in ours]


def is_image(path: str) -> bool:
    """Whether a path (with "/", below the folder asked for) has an ending of an image, and no part of it is junk."""
    parts = PurePosixPath(path.lstrip("/")).parts
    return PurePosixPath(path).suffix.lower() in EXTENSIONS and not any(map(is_junk, parts))


def _loose_images(folder: Path) -> Iterator[Path]:
    """The images directly in a folder."""
    with os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if is_image(entry.name) and not entry.is_dir())


def images_in(top: Path, left: LeftOut) -> list[Path]:
    """The image files below `top`, or `top` if it is one, sorted; links are followed, a folder is read once.

    Junk and folders that glsim wrote are left out; other files go into `left`. Raises DataError for a folder that
    cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    found, seen = [top] if top.is_file() else [], set()
    for here, folders, files in os.walk(top, followlinks=True, onerror=unreadable) if top.is_dir() else ():
        new = os.path.realpath(here) not in seen
        seen.add(os.path.realpath(here))
        if MARKER in files and Path(here) != top:
            left.ours.add(here)
            new = False
        folders[:] = sorted(name for name in folders if new and not is_junk(name))
        found += [Path(here, name) for name in files if new]
    images = [path for path in found if is_image(path.name)]
    left.files.update(str(path) for path in found if not is_junk(path.name) and not is_image(path.name))
    return sorted(images)


class ImageDataset:
    """Map-style data set: item i is (transform(image i), its label).

    `images` may also be paths and PIL images without labels; then every label is -1. What cannot be read, or cannot be
    transformed, raises BadImage; with `keep_bad` the BadImage is the item, for the collate function to deal with.
    `max_pixels` is the limit of an image (None: `glsim.data.images:pixel_limit`).
    """

    def __init__(
        self,
        images: ImageList | Sequence[str | Path | Image.Image],
        transform: Callable[[Image.Image], Any],
        keep_bad: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        self.images = images.paths if isinstance(images, ImageList) else tuple(images)
        self.labels = images.labels if isinstance(images, ImageList) else (-1,) * len(self.images)
        self.transform, self.keep_bad, self.max_pixels = transform, keep_bad, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int] | BadImage:
        given = self.images[index]
        try:
            if isinstance(given, Image.Image):
                return prepare(given, self.transform, f"image {index}"), self.labels[index]
            return read_image(given, self.transform, max_pixels=self.max_pixels), self.labels[index]
        except BadImage as error:
            if self.keep_bad:
                return error.with_traceback(None)
            raise
