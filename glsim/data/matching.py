"""Images and the paths that a list has for them, matched by the ends of paths."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from glsim.data.uri import is_uri
from glsim.types import DataError


def match_paths(images: Sequence[str | Path], keys: Iterable[str], source: str | Path) -> dict[int, str]:
    """The listed path of each image that has one, by the number of the image.

    An image is listed by the end of its path, as long as may be, with its ending before without (which only one listed
    path may then be). Raises DataError, naming the list, where two images have the same.
    """
    stems = dict[str, str | None]()
    whole = {key.lstrip("/"): key for key in keys}
    for name, listed in whole.items():
        stem = posixpath.splitext(name)[0]
        stems[stem] = None if stem in stems else listed
    found, taken = dict[int, str](), dict[str, int]()
    for number, path in enumerate(images):
        for end in _ends(path):
            stem = posixpath.splitext(end)[0]
            key = whole.get(end) or whole.get(stem) or stems.get(stem)
            if key is None:
                continue
            if key in taken:
                raise DataError(
                    f"{source}: {key} is {images[taken[key]]} and {path}; list images with the folders they are in"
                )
            found[number], taken[key] = key, number
            break
    return found


def _ends(path: str | Path) -> Iterator[str]:
    """Every end of a path, the longest first: how it stands below each folder that holds it."""
    parts = str(path).split("/") if is_uri(path) else Path(path).absolute().parts
    above = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] == ".."), 0)
    return ("/".join(parts[i:]) for i in range(above + 1, len(parts)))
