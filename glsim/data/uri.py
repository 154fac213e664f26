"""Files by URI (s3://bucket/x.jpg, gs://.., file:///..) through the file systems of pyarrow."""

from __future__ import annotations

import io
from functools import cache
from typing import Any, BinaryIO
from urllib.parse import quote

from glsim.files import one_line, read_bytes
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
