"""Images sorted into folders by their answers, as copies or links; nothing is overwritten."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from glsim.files import make_folder, printable
from glsim.types import GlsimError


def sort_into(folder: str | Path, answered: Iterable[tuple[str, str]], links: bool = False) -> int:
    """File images under `folder`/LABEL/; returns how many are new there.

    An image is filed once for each of its labels. Where its name is taken by another image, a number is added to it; an
    image that is there already stays as it is.

    Args:
        folder: made where it is not there.
        answered: path and label of each image, or of each box of one.
        links: symbolic links in place of copies.

    Raises:
        GlsimError: where the system refuses.
    """
    top, new = make_folder(folder), 0
    for path, label in dict.fromkeys(answered):
        place = top / _folder_name(label)
        try:
            place.mkdir(exist_ok=True)
            new += _file(Path(path).absolute(), place, links)
        except OSError as error:
            raise GlsimError(f"{path} cannot be filed in {place}: {error.strerror or error}") from error
    return new


def _folder_name(label: str) -> str:
    """A label as the name of a folder, on any system."""
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", printable(label)).strip(". ")
    return name or "_"


def _file(path: Path, place: Path, links: bool) -> bool:
    """Whether the image was not there yet. The file appears whole, under a name that nothing has."""
    for number in range(1, 10**6):
        target = place / (path.name if number == 1 else f"{path.stem}_{number}{path.suffix}")
        if os.path.lexists(target):
            if target.exists() and (target.samefile(path) or filecmp.cmp(path, target, shallow=False)):
                return False
            continue
        temporary = place / f".{target.name}.{os.getpid()}.tmp"
        try:
            if links:
                temporary.symlink_to(path)
            else:
                shutil.copy2(path, temporary)
            os.link(temporary, target, follow_symlinks=False)  # unlike a renaming, it replaces nothing
            return True
        except FileExistsError:
            continue  # somebody else was here first
        finally:
            temporary.unlink(missing_ok=True)
    return False
