"""Files and the text in them: opened only where they are regular, written whole or not at all, safe to show."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from glsim.types import DataError

JSON_DEPTH = 64  # lists and objects inside each other; Python's own limit ends in a RecursionError far from the file
ERROR_LENGTH = 500  # characters that a library's error may add to a message
# C0 and C1 controls, line separators, and marks that reorder the text around them
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


# --- reading ----------------------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. A FIFO, a device, a socket or a folder is an OSError and is never waited for."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file", str(path))
    return os.fdopen(number, "rb")


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path, encoding: str = "utf-8-sig") -> str:
    """The text of a regular file; OSError as `open_regular`, UnicodeDecodeError where it is in another encoding."""
    return read_bytes(path).decode(encoding)


def read_json(path: str | Path, kind: type | None = dict) -> Any:
    """The value in a JSON file, of type `kind` (None: any).

    Raises FileNotFoundError where there is no file, and DataError naming it for all else: not a regular file, not JSON,
    another type at the top, NaN or infinity (which JSON has not), more than JSON_DEPTH levels.
    """
    try:
        return parse_json(read_bytes(path), kind)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or cannot be read: {one_line(error)}") from error


def parse_json(text: str | bytes, kind: type | None = dict) -> Any:
    """The value of a JSON text, held to what `read_json` says; ValueError tells what is wrong."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{shorten(constant, 20)} is no JSON")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError(f"more than {JSON_DEPTH} levels of lists and objects") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [
            inside
            for value in level
            if isinstance(value, dict | list)
            for inside in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"more than {JSON_DEPTH} levels of lists and objects")
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"wanted {'an object' if kind is dict else f'a {kind.__name__}'}, got {shorten(text)}")
    return value


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary name beside it, renamed to `path` once the disk has it.

    Nothing is left behind where the block raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 as `replacing` does.

    Bytes of a file name that are no text are written as `\\udcff`, which JSON reads back as they were.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, indented, as `replacing` does; see `to_json`."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as a JSON text. Numbers that JSON has not (NaN, infinity) become null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- text for people --------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """A text on one line in which nothing acts on a terminal or is unseen: controls as `\\x1b`, line ends as `\\n`.

    Bytes of a file name that are no text are shown as `\\udcff`.
    """
    shown = _UNSEEN.sub(lambda found: ascii(found.group())[1:-1], str(text))
    return shown.encode("utf-8", "backslashreplace").decode()


def shorten(text: object, length: int = ERROR_LENGTH) -> str:
    """A text cut after `length` characters, saying how many were left out."""
    text = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else str(text)
    return text if len(text) <= length else f"{text[:length]} .. ({len(text) - length:,} more characters)"


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most ERROR_LENGTH characters; its type where it says nothing."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return printable(shorten(first.strip())) if first else type(error).__name__
