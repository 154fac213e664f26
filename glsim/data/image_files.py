"""Image files below folders and globs, without junk and what glsim wrote."""

from __future__ import annotations

import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from glsim.data.images import EXTENSIONS
from glsim.data.uri import is_file, is_uri
from glsim.files import MARKER, is_junk
from glsim.types import DataError, DataWarning

LISTS = (".csv", ".tsv", ".parquet")  # tables of images, which `predict bulk` takes


class Labelled(NamedTuple):
    """An image as a data set has it: where it lies, its class and split."""

    path: Path
    key: str  # the path below the source, with "/": what the seeded split is drawn from
    label: str
    where: str  # for messages: the file and line, or the folder
    split: str | None = None  # None: to be drawn
    class_id: int = 0  # classes are ordered by (class_id, label)


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


def count_endings(names: Iterable[str]) -> str:
    """Files by their ending, most frequent first: "12 files: 7 .txt, 5 without an ending"."""
    counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
    total, kinds = sum(counts.values()), sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{n:,} {ending or 'without an ending'}" for ending, n in kinds[:8]]
    shown += [f"{sum(n for _, n in kinds[8:]):,} others"] if len(kinds) > 8 else []
    return f"{total:,} file{'s' if total > 1 else ''}: {', '.join(shown)}"


def find_images(inputs: Sequence[str | Path] | str | Path) -> list[Path]:
    """Find the images to predict.

    Args:
        inputs: each a file, a folder (read recursively) or a glob ("**" too).

    Returns:
        Their paths, sorted within each input; a file given twice comes once. What is left out is told by a DataWarning.

    Raises:
        DataError: naming the first input that yields nothing, and for a list of images or a URI.
    """
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
    left.tell(", ".join(map(str, given_all[:3])) + (", .." if len(given_all) > 3 else ""))
    return list(found.values())


def _passed(match: str | Path, pattern: str | Path) -> bool:
    """Whether what a pattern found is junk or lies in a folder that glsim wrote, other than one that it names."""
    named, path = Path(pattern).parts, Path(match)
    found = [top for top in (path, *path.parents) if top.name and top.name not in named]
    return any(is_junk(top.name) or (top / MARKER).exists() for top in found)


def folders_in(folder: Path, left: LeftOut) -> list[Path]:
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


def loose_images(folder: Path) -> Iterator[Path]:
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
