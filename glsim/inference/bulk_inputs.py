"""Images of a bulk job: files and folders, object stores by URI, and lists of paths (CSV, Parquet)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from glsim.data.image_files import LISTS, find_images, is_image
from glsim.data.images import EXTENSIONS
from glsim.data.lists import as_listed, read_columns
from glsim.data.uri import is_uri, locate, open_uri
from glsim.files import one_line, open_regular
from glsim.types import DataError

LIST = "a list needs a column path"


def find_paths(inputs: Sequence[str]) -> list[str]:
    """The images: files, folders, globs, URIs of files or folders, and lists (CSV, Parquet) with a column `path`, whose
    relative paths count from the list's folder. Each comes once, local ones as absolute paths.

    Raises DataError naming the first input that yields nothing.
    """
    found: dict[str, None] = {}
    for given in inputs:
        if given.lower().endswith(LISTS):
            paths = read_list(given)
        elif is_uri(given):
            paths = images_below(given)
        else:
            paths = [str(path.absolute()) for path in find_images(given)]
        if not paths:
            raise DataError(f"{given}: no image found; known endings: {' '.join(EXTENSIONS)}")
        found |= dict.fromkeys(paths)
    return list(found)


def read_list(file: str) -> list[str]:
    """The column `path` of a list (CSV as `glsim.files:read_table` takes it, or Parquet), local or by URI."""
    uri = is_uri(file)
    try:
        stream = open_uri(file) if uri else open_regular(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
    if file.lower().endswith(".parquet"):
        paths = _parquet_paths(file, stream)
    else:
        (column,), rows = read_columns(file, ("path",), ("dir",), stream=stream, wanted=LIST)
        paths = [cells[column] for _, cells in rows]
    paths = [p if is_uri(p) else as_listed(p) for p in paths]
    if uri:
        return [p if is_uri(p) else f"{file.rpartition('/')[0]}/{p}" for p in paths]
    return [p if is_uri(p) else str((Path(file).parent / p).absolute()) for p in paths]


def _parquet_paths(file: str, stream: BinaryIO) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        with stream:
            paths = parquet.read_table(stream, columns=["path"]).column("path").to_pylist()
    except (OSError, ArrowException, KeyError) as error:
        raise DataError(f"{file}: not readable as a Parquet file ({one_line(error)}); {LIST}") from error
    for row, path in enumerate(paths, start=1):
        if not isinstance(path, str) or not path:
            raise DataError(f"{file}: row {row} has no path")
    return paths


def images_below(uri: str) -> list[str]:
    """The image files in a folder of a store, or the file itself, as URIs, sorted."""
    from pyarrow.fs import FileSelector, FileType

    try:
        system, path = locate(uri)
        info = system.get_file_info(path.rstrip("/"))
        if info.type == FileType.File:
            return [uri]
        inside = system.get_file_info(FileSelector(path.rstrip("/"), recursive=True))
    except OSError as error:
        raise DataError(f"{uri}: {one_line(error)}") from error
    files = [f.path for f in inside if f.type == FileType.File]
    below = [f[len(path.rstrip("/")) :] for f in files]
    return sorted(uri.rstrip("/") + f for f in below if is_image(f))
