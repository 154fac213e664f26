"""Files by path, inside tar archives (SHARD.tar/NAME), and by URI (s3://.., gs://..) through pyarrow."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from glsim.data.regions import file_of
from glsim.files import one_line, open_regular, read_bytes
from glsim.types import ConfigError


def is_uri(path: object) -> bool:
    """Whether `path` names a file by scheme://."""
    return isinstance(path, str) and "://" in path


def locate(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of `uri` and the path in it, which need not be percent-encoded.

    Raises ConfigError without pyarrow and for a scheme it does not know, OSError for a store that cannot be reached.
    """
    scheme, _, rest = uri.partition("://")
    host, _, path = rest.partition("/")
    system, base = _system(f"{scheme}://{host}/")
    return system, f"{base.rstrip('/')}/{path}"


@cache
def _system(root: str) -> tuple[Any, str]:
    try:
        import pyarrow
        from pyarrow.fs import FileSystem
    except ImportError as error:
        raise ConfigError(f"{root} needs the library pyarrow ({error}): pip install 'glsim[scale]'") from error
    try:
        return FileSystem.from_uri(quote(root, safe=":/@?&="))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{root}: {one_line(error)}; s3://, gs://, abfs://, hdfs:// and file:/// work") from error


def open_uri(uri: str) -> BinaryIO:
    """The whole file in memory. Raises OSError, and ConfigError as `locate` does."""
    system, path = locate(uri)
    if system.type_name == "local":
        return io.BytesIO(read_bytes(path))
    with system.open_input_stream(path) as stream:
        return io.BytesIO(stream.read())


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; `SHARD.tar/NAME` is the file NAME inside an archive, s3://BUCKET/NAME one in a
    store; of a region of an image (`glsim.data.regions`), its file.

    Raises OSError and TarError, and ConfigError as `locate` does.
    """
    path = file_of(path)
    if is_uri(path):
        return open_uri(str(path))
    path = Path(path)
    try:
        return open_regular(path)
    except (NotADirectoryError, FileNotFoundError):
        if (shard := _shard(path)) is None:
            raise
    name = path.relative_to(shard).as_posix()
    if name not in members(shard):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    start, length = members(shard)[name]
    with open_regular(shard) as file:
        file.seek(start)
        return io.BytesIO(file.read(length))


def is_file(path: str | Path) -> bool:
    """Whether `open_file` finds something there."""
    path = Path(file_of(path))
    shard = None if path.is_file() else _shard(path)
    return path.is_file() if shard is None else path.relative_to(shard).as_posix() in members(shard)


def members(shard: Path) -> dict[str, tuple[int, int]]:
    """Where each file in a tar archive lies: name -> (first byte, number of bytes), in the order of the archive.

    The headers are read once, and again when the archive was written anew. Raises tarfile.TarError for an archive that
    is compressed, damaged or cut off.
    """
    stat = shard.stat()
    return _members(shard, stat.st_mtime_ns, stat.st_size)


@cache
def _members(shard: Path, *_: int) -> dict[str, tuple[int, int]]:
    with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = {PurePosixPath(m.name).as_posix(): (m.offset_data, m.size) for m in tar if m.isreg()}
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes anything but a header for the end
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    return found


def _shard(path: Path) -> Path | None:
    return next((top for top in path.parents if top.suffix.lower() == ".tar" and top.is_file()), None)
