"""Floor 3: which images, which labels, which split: class folders and CSV lists. No torch here."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from glsim.images import EXTENSIONS, BadImage, as_shown, is_file, open_image
from glsim.sources import SPLIT_NAMES, is_shards, located, read_shards
from glsim.types import ConfigError, DataError

SPLITS = ("train", "val", "test")
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
    source: str | Path, *, classes: Sequence[str] | None = None, seed: int = 0, test_fraction: float = 0.2
) -> dict[str, ImageList]:
    """Read the images and labels of a data set; returns the splits that exist, in the order of `SPLITS`.

    `source` is, the first that fits: a folder with train.csv (or train_val.csv), val.csv, test.csv; a folder
    train|val|test/CLASS/...; a folder CLASS/...; a CSV file with the header `path,label[,split]` (paths relative to its
    folder) or `dir,class_id` (names in classid_classname.csv beside it); `hf:..` and `wds:..` name a data set of
    Hugging Face and a folder of WebDataset shards (`glsim.sources`). Where nothing says the split, `test_fraction`
    of each class goes to "test", drawn by a hash of `seed` and path: the same on every machine. train_val.csv,
    where it exists, is the train split, as the field's protocol has it; val.csv, which is a part of it, is left out.

    All splits share one class order: `classes` where given (the list stored with a model), else that of the train
    split, by class_id or by name. Raises DataError for anything missing or contradictory, naming file, line and class.
    """
    rows = _rows(source)
    if rows[0].split is None:
        held = _held_out(((row.key, row.label) for row in rows), test_fraction, seed)
        rows = [row._replace(split="test" if row.key in held else "train") for row in rows]
    return _number(rows, classes)


def is_split(source: str | Path) -> bool:
    """Whether a data set says itself which image is in which split; where not, `read_data` draws them."""
    return _rows(source)[0].split is not None


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


def find_images(inputs: Sequence[str | Path] | str | Path) -> list[Path]:
    """Find the images to predict: each input is a file, a folder (read recursively) or a glob ("**" too). Sorted within
    each input; a file given twice comes once. Raises DataError naming the first input that yields nothing."""
    found: dict[Path, Path] = {}
    for given in [inputs] if isinstance(inputs, str | Path) else inputs:
        if is_file(given):
            matches = [Path(given)]
        else:
            # Path.glob takes no absolute pattern.
            tops = [given] if Path(given).exists() else glob.glob(str(given), recursive=True)  # noqa: PTH207
            matches = sorted(path for top in tops for path in _images_in(Path(top)))
        if not matches:
            raise DataError(f"{given}: no image found; wanted an image, a folder with images or a 'pattern/**/*.jpg'")
        for path in matches:
            found.setdefault(path.absolute(), path)
    return list(found.values())


# --- reading folders and lists ----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    path: Path
    key: str  # the path below the source, with "/": what the seeded split is drawn from
    label: str
    where: str  # for messages: the file and line, or the folder
    split: str | None = None  # None: to be drawn
    class_id: int = 0  # classes are ordered by (class_id, label)


def _rows(given: str | Path) -> list[_Row]:
    source = located(given)
    if is_shards(given):
        found = read_shards(given)
        return [_Row(i.path, i.path.relative_to(source).as_posix(), i.label, str(i.path), i.split) for i in found]
    if not source.exists():
        raise DataError(f"{source}: does not exist; {LAYOUTS}")
    return _rows_of_list(source) if source.is_file() else _rows_of_lists(source) or _rows_of_folders(source)


def _rows_of_lists(folder: Path) -> list[_Row]:
    lists = {split: folder / f"{split}.csv" for split in SPLITS}
    if (folder / "train_val.csv").is_file():
        lists = {"train": folder / "train_val.csv", "test": folder / "test.csv"}
    present = {split: file for split, file in lists.items() if file.is_file()}
    return [row._replace(split=split) for split, file in present.items() for row in _rows_of_list(file)]


def _rows_of_folders(folder: Path) -> list[_Row]:
    tops: dict[str | None, Path] = {}
    for inside in _folders(folder):
        split = SPLIT_NAMES.get(inside.name.lower())
        if split in tops:
            raise DataError(f"{tops[split]} and {inside} are both the {split!r} split; keep one of them")
        if split:
            tops[split] = inside
    rows: list[_Row] = []
    for split, top in (tops or {None: folder}).items():
        images = {inside: _images_in(inside) for inside in _folders(top)}
        if not any(images.values()):
            raise DataError(f"{top}: no images in class folders; {LAYOUTS}")
        for inside, paths in images.items():
            if not paths and split in (None, "train"):
                raise DataError(f"{inside}: no image to train class {inside.name!r} on; add some or remove the folder")
            rows += [_Row(p, p.relative_to(folder).as_posix(), inside.name, str(inside), split) for p in paths]
    return rows


def _rows_of_list(file: Path) -> list[_Row]:
    (path_column, class_column), table = _read_table(file, ("path", "label"), ("dir", "class_id"))
    folder, published = file.parent, class_column == "class_id"
    names = _class_names(folder / "classid_classname.csv") if published else {}
    rows = []
    for where, cells in table:
        label, class_id, split = cells[class_column], 0, None
        if published:
            class_id = _class_id(label, where)
            if names and class_id not in names:
                raise DataError(f"{where}: class_id {class_id} is not among the {len(names)} of classid_classname.csv")
            label = names.get(class_id, str(class_id))
        if "split" in cells:
            split = SPLIT_NAMES.get(cells["split"].lower())
            if split is None:
                raise DataError(f"{where}: unknown split {cells['split']!r}; use train, val or test")
        key = PurePosixPath(cells[path_column].replace("\\", "/")).as_posix()
        rows.append(_Row(folder / key, key, label, where, split, class_id))
    # The published lists name files below their own folder or one in it (data/, images/), and do not say which.
    inside = _folders(folder) if published else []
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
    for where, cells in _read_table(file, ("class_id", "class_name"))[1] if file.is_file() else ():
        class_id, name = _class_id(cells["class_id"], where), cells["class_name"]
        if class_id in names or name in names.values():
            raise DataError(f"{where}: class_id {class_id} or class_name {name!r} comes twice; both must be unique")
        names[class_id] = name
    return names


def _class_id(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: class_id must be an integer, got {text!r}") from None


def _read_table(file: Path, *layouts: tuple[str, ...]) -> tuple[tuple[str, ...], list[tuple[str, dict[str, str]]]]:
    """Return the first of `layouts` (column names) that the header of a CSV file holds, and (where, cells) per row."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = text.lstrip().partition("\n")[0]
        reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not readable as a CSV file in UTF-8 ({error}); {LAYOUTS}") from error
    header = [cell.lower() for cell in lines[0][1]] if lines else []
    layout = next((layout for layout in layouts if set(layout) <= set(header)), None)
    if layout is None:
        wanted = " or ".join(",".join(layout) for layout in layouts)
        raise DataError(f"{file}: the first line must name the columns {wanted} (or with ; or tab), got {first[:80]!r}")
    table = []
    for number, values in lines[1:]:
        where = f"{file}, line {number}"
        if any(values[len(header) :]):
            raise DataError(f"{where}: {len(values)} values for {len(header)} columns; quote values that hold commas")
        cells = dict(zip(header, values + [""] * len(header), strict=False))
        for column in layout:
            if not cells[column]:
                raise DataError(f"{where}: empty {column}; every row needs {' and '.join(layout)}")
        table.append((where, cells))
    if not table:
        raise DataError(f"{file}: no rows below the header")
    return layout, table


def _number(rows: list[_Row], classes: Sequence[str] | None) -> dict[str, ImageList]:
    known = tuple(classes or ())
    if classes is None:
        basis = [row for row in rows if row.split == "train"] or rows
        known = tuple(label for _, label in sorted({(row.class_id, row.label) for row in basis}))
    index = {label: i for i, label in enumerate(known)}
    seen: dict[Path, _Row] = {}
    for row in rows:
        if row.label not in index:
            whose = "of the train split" if classes is None else "given (the model's)"
            some = ", ".join(known[:5] + ("...",) * (len(known) > 5))
            raise DataError(f"{row.where}: class {row.label!r} is not one of the {len(known)} classes {whose}: {some}")
        other = seen.setdefault(row.path, row)
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


def _folders(folder: Path) -> list[Path]:
    return sorted(inside for inside in folder.iterdir() if inside.is_dir() and not inside.name.startswith("."))


def _images_in(top: Path) -> list[Path]:
    """Return the image files below `top`, or `top` if it is one, sorted; links are followed, a folder is read once."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    found, seen = [top] if top.is_file() else [], set()
    for here, folders, files in os.walk(top, followlinks=True, onerror=unreadable) if top.is_dir() else ():
        new = os.path.realpath(here) not in seen
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        found += [Path(here, name) for name in files if new]
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


class ImageDataset:
    """Map-style data set: item i is (transform(image i), its label).

    `images` may also be paths and PIL images without labels; then every label is -1. A bad file raises BadImage; with
    `keep_bad` the BadImage is the item, for the collate function to deal with.
    """

    def __init__(
        self,
        images: ImageList | Sequence[str | Path | Image.Image],
        transform: Callable[[Image.Image], Any],
        keep_bad: bool = False,
    ) -> None:
        self.images = images.paths if isinstance(images, ImageList) else tuple(images)
        self.labels = images.labels if isinstance(images, ImageList) else (-1,) * len(self.images)
        self.transform, self.keep_bad = transform, keep_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int] | BadImage:
        try:
            given = self.images[index]
            image = as_shown(given) if isinstance(given, Image.Image) else open_image(given)
        except BadImage as error:
            if self.keep_bad:
                return error.with_traceback(None)
            raise
        return self.transform(image), self.labels[index]
