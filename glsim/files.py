"""Files and the text in them: opened only where they are regular, written whole or not at all, safe to show."""

from __future__ import annotations

import base64
import codecs
import csv
import dataclasses
import errno
import io
import json
import math
import mimetypes
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glsim.types import ConfigError, DataError, GlsimError

if TYPE_CHECKING:
    from PIL import Image

LARGEST_TEXT = 2**31  # bytes of any file that is read whole
LARGEST_JSON = 2**24  # bytes: the config of a model of 100,000 classes has a third of it
JSON_DEPTH = 64  # lists and objects inside each other; Python's own limit ends in a RecursionError far from the file
ERROR_LENGTH = 500  # characters that a library's error may add to a message
# C0 and C1 controls, line separators, marks that reorder the text around them, and what has no width
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_WORKER = "Original Traceback (most recent call last):"
_FORMULA = re.compile(r"'*\s*[=+\-@\uff1d\uff0b\uff0d\uff20\t\r\n]")  # as spreadsheets read the start of a cell
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def expand(path: str) -> str:
    """A path with `~` (or `~user`) at its start as the home folder, also behind `hf:`, `wds:` and `local-dir:`."""
    kind, home, rest = re.fullmatch(r"((?:hf:|wds:|local-dir:)?)(~?)(.*)", path, re.DOTALL).groups()  # type: ignore[union-attr]
    return kind + os.path.expanduser(home + rest) if home else path  # noqa: PTH111 (which raises for no such user)


def real(path: str | Path) -> Path:
    """A path with every link in it followed; of a link that leads back to itself, the link. Raises nothing."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError there


BUNDLE = ("config.json", "model.safetensors", "metrics.json", "README.md")  # the files of a model's folder
MARKER = ".glsim"  # a file in each folder that was made for what glsim writes
_JUNK = {  # what systems put beside people's files: NAS boxes, Windows, macOS, Linux, Python
    *("@synoeastream", "@synoresource", "@appstore", "@database", "@sharebin", "@snapshots", "_gsdata_"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot"),
    *("$recycle.bin", "recycler", "recycled", "found.000", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("__macosx", "network trash folder", "temporary items", "icon\r", "lost+found", "__pycache__"),
}
_FOREIGN = {  # how a file in another encoding than UTF-8 begins
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\0\0\xfe\xff": "UTF-32",
}


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name was put there by a system and not by a person; hidden ones are."""
    if name in (".", ".."):
        return False
    return name.startswith((".", "~$", "SYNOPHOTO_THUMB")) or name.casefold() in _JUNK or ".sync-conflict-" in name


# --- reading ----------------------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. A FIFO, a device, a socket or a folder is an OSError and is never waited for."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from error
    _check_mode(found.st_mode, path)  # opening alone can act on a device, and lets go who waits at a FIFO
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        about = os.fstat(number)
        _check_mode(about.st_mode, path)  # it may be another one by now
        if not about.st_size:
            os.read(number, 1)  # some files of the system have nothing yet, and would be waited for
            os.lseek(number, 0, os.SEEK_SET)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError):
            raise OSError(errno.EINVAL, "a file of the system, with nothing to read yet", str(path)) from None
        raise
    return os.fdopen(number, "rb")


def check_regular(path: str | Path) -> None:
    """Raise OSError, as `open_regular` does, for what is no regular file: before a library that opens paths itself."""
    open_regular(path).close()


def _check_mode(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | Path, most: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file; OSError as `open_regular`, and for one of more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {most:,} that such a file may have", str(path))
        return file.read(most + 1)  # files of the system say that they hold nothing


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8, without their ends. Nothing else than a line feed ends one."""
    return [line.removesuffix("\r") for line in read_text(path).rstrip("\n").split("\n")]


def read_text(path: str | Path, encoding: str = "utf-8-sig", most: int = LARGEST_TEXT) -> str:
    """The text of a regular file; OSError as `read_bytes`, UnicodeDecodeError where it is in another encoding."""
    return read_bytes(path, most).decode(encoding)


def read_json(path: str | Path, kind: type | None = dict, most: int = LARGEST_JSON) -> Any:
    """The value in a JSON file, of type `kind` (None: any).

    Raises FileNotFoundError where there is no file, and DataError naming it for all else: not a regular file, more than
    `most` bytes, not JSON, another type at the top, NaN or infinity (which JSON has not), more than JSON_DEPTH levels.
    """
    try:
        return parse_json(read_bytes(path, most), kind)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} is damaged or cannot be read: {why}") from error


def parse_json(text: str | bytes, kind: type | None = dict) -> Any:
    """The value of a JSON text, held to what `read_json` says; ValueError tells what is wrong."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_number)
        deep = _is_deeper(value, JSON_DEPTH)
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"more than {JSON_DEPTH} levels of lists and objects")
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"wanted {'an object' if kind is dict else f'a {kind.__name__}'}, got {shorten(text)}")
    return value


def json_parts(path: str | Path, lists: Collection[str], most: int = LARGEST_JSON) -> Iterator[tuple[str, int, Any]]:
    """The keys and values of the object in a JSON file, one by one: (key, -1, value). A list under a key of `lists` is
    not made: each item of it comes with its number, from 0, so that a large file is never held as objects.

    Raises as `read_json`, where the damage is reached.
    """
    try:
        yield from _json_parts(read_text(path, most=most), lists)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        why = f"more than {JSON_DEPTH} levels of lists and objects" if isinstance(error, RecursionError) else why
        raise DataError(f"{path} is damaged or cannot be read: {why}") from error


def _json_parts(text: str, lists: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    space, decoder = re.compile(r"[ \t\n\r]*"), json.JSONDecoder(parse_constant=_no_number, parse_float=_number)

    def beyond(at: int, marks: str) -> tuple[str, int]:
        """One of `marks`, which has to come next, and where what follows begins."""
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if at >= len(text) or text[at] not in marks:
            raise ValueError(f"one of {' '.join(marks)} is needed at character {at:,}, got {text[at : at + 20]!r}")
        return text[at], space.match(text, at + 1).end()  # type: ignore[union-attr]

    mark, at = beyond(0, "{")
    if text[at : at + 1] == "}":
        mark = "}"
    while mark != "}":
        key, at = decoder.raw_decode(text, at)
        _, at = beyond(at, ":")
        if key in lists and text[at : at + 1] == "[":
            inner, at = beyond(at, "[")
            number = 0
            if text[at : at + 1] == "]":
                inner, at = beyond(at, "]")
            while inner != "]":
                value, at = decoder.raw_decode(text, at)
                if _is_deeper(value, JSON_DEPTH):
                    raise RecursionError
                yield key, number, value
                inner, at = beyond(at, ",]")
                number += 1
        else:
            value, at = decoder.raw_decode(text, at)
            yield key, -1, value
        mark, at = beyond(at, ",}")


def _no_number(constant: str) -> Any:
    raise ValueError(f"{shorten(constant, 20)} is no JSON")


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether more than so many lists and objects lie inside each other."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return not levels or any(_is_deeper(one, levels - 1) for one in inside)


def read_table(
    file: str | Path, wanted: str, stream: BinaryIO | None = None
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """A list (CSV with commas, semicolons or tabs, in UTF-8): its header in lower case, and (line number, cells) of
    each row that is not empty, read one by one. Spaces around cells are taken off. With `stream`, that is read, and
    `file` is only its name.

    Raises DataError naming the file, with `wanted` (what would work) where it is no text, no CSV or not a regular file.
    """
    rows = _table_rows(file, wanted, stream)
    header = [cell.lower() for cell in next(rows, (0, []))[1]]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{file}: the column {twice[0]} comes twice in the first line; {wanted}")
    return header, rows


def _table_rows(file: str | Path, wanted: str, stream: BinaryIO | None) -> Iterator[tuple[int, list[str]]]:
    what = f"{file}: not readable as a CSV file in UTF-8"
    encode = "what works: save it as UTF-8 (in a spreadsheet: 'CSV UTF-8')"
    try:
        with stream or open_regular(file) as data:
            start = data.read(4096)
            if foreign := [name for mark, name in _FOREIGN.items() if start.startswith(mark)]:
                raise DataError(f"{what} (it is in {foreign[0]}); {encode}")
            if b"\0" in start:
                raise DataError(f"{what} (it holds zero bytes, as UTF-16 and files of no text do); {encode}")
            data.seek(0)
            text, before = io.TextIOWrapper(data, "utf-8-sig", newline=""), 0
            first, delimiter = next(text, ""), ""
            while first and not first.strip():
                first, before = next(text, ""), before + 1
            if hint := re.fullmatch("sep=(.)", first.strip().lower()):  # a spreadsheet's way to tell
                first, before, delimiter = next(text, ""), before + 1, hint[1]
            delimiter = delimiter or max(",;\t", key=first.count)
            reader = csv.reader(chain([first], text), delimiter=delimiter)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells):
                    yield before + reader.line_num, cells
    except UnicodeDecodeError as error:
        behind = error.object[max(error.start - 40, 0) : error.start].decode("utf-8", "replace")
        behind = printable(behind.splitlines()[-1] if behind.strip() else "")
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{what} ({byte} behind {behind!r} is of another encoding); {encode}") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{what} ({one_line(error)}); {wanted}") from error


# --- writing ----------------------------------------------------------------------------------------------------------


def make_folder(path: str | Path) -> Path:
    """Make a folder for what glsim writes, with those above it. Each that is new, and `path` where it is empty, gets a
    MARKER, by which readers of data know that nothing in it is data."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.iterdir()):
        (folder / MARKER).touch()
    make_parent(folder / MARKER)
    return folder


def make_parent(path: str | Path) -> None:
    """Make the folder of a file that glsim will write, with those above it. Each that is new gets a MARKER."""
    fresh = [place for place in real(path).parents if not place.exists()]  # of `new/..`, neither
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for place in fresh:
        (place / MARKER).touch()


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Hold that a file (or a `folder`) can be written at `path`, below folders that may still have to be made.

    Nothing is left behind. Raises ConfigError where something else is there: for a folder with somebody's images, among
    which what is written would be taken for theirs, and for a file that is an image or part of a model. GlsimError
    where the system refuses.
    """
    import tempfile  # slow, and not needed to say what is wrong with an option

    path = Path(path)
    try:
        there, is_folder = path.exists(), path.is_dir()
        faults = {
            "is a link to what is not there; name another": path.is_symlink() and not there,
            "is a file; name a folder": folder and there and not is_folder,
            "is a folder; name a file": not folder and is_folder,
            "is not a regular file; name another": not folder and there and not path.is_file(),
            "holds images that glsim did not write; name another folder": folder and is_folder and _holds_images(path),
            "is an image, and would be replaced; name another": not folder and there and _is_image(path.name),
            "is part of a model, and would be replaced; name another": not folder and there and _is_part(path),
        }
        for fault, found in faults.items():
            if found:
                raise ConfigError(f"{path} {fault}")
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise ConfigError(f"{path} lies below {place}, which is a file; name another")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise GlsimError(f"{path} cannot be written: {error.strerror or one_line(error)}; name another") from error


def _is_image(name: str) -> bool:
    return (mimetypes.guess_type(f"x{Path(name).suffix}", strict=False)[0] or "").startswith("image/")


def _holds_images(folder: Path) -> bool:
    """Whether images of somebody else lie in a folder: what is written beside them would be taken for theirs."""
    if (folder / MARKER).exists() or (folder / BUNDLE[0]).exists():
        return False
    return any(_is_image(path.name) for path in folder.iterdir() if not is_junk(path.name))


def _is_part(file: Path) -> bool:
    """Whether a file is one of those of a model, which no output may replace."""
    return file.name in BUNDLE and (file.parent / BUNDLE[0]).exists()


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


def to_json(value: Any, indent: int | None = None, ascii: bool = False) -> str:  # noqa: A002
    """A value as a JSON text; with `ascii`, in nothing else.

    Numbers that JSON has not (NaN, infinity) become null, and what is unseen in a text is escaped.
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=ascii, allow_nan=False)
    return _UNSEEN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


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
    """What an exception says, on one line of at most ERROR_LENGTH characters; its type where it says nothing.

    One that comes from a worker process of torch holds the worker's traceback: what was said there is its end.
    """
    text = str(error)
    if _WORKER in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
        text = text.splitlines()[-1] if _WORKER in text else text
    first = next((line for line in text.splitlines() if line.strip()), "")
    return printable(shorten(first.strip())) if first else type(error).__name__


def shown(value: Any) -> Any:
    """A value with every text in it, keys too, as `printable` shows it; dataclasses and tuples keep their type."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {shown(key): shown(inside) for key, inside in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: shown(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(shown, value))
    return type(value)(map(shown, value)) if type(value) in (list, tuple) else value


def document(value: Any) -> Any:
    """A result as what JSON has: dataclasses and named tuples become objects, paths texts.

    A field that was declared with `glsim.types:optional` is left out where it, or the field it names, is None. What has
    a method `as_dict` is what that returns.
    """
    if callable(as_dict := getattr(value, "as_dict", None)):
        value = as_dict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        decides = {f.name: f.metadata.get("optional") for f in dataclasses.fields(value)}
        kept = [k for k, by in decides.items() if not by or getattr(value, k if by is True else by) is not None]
        value = {name: getattr(value, name) for name in kept}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: document(inside) for key, inside in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [document(inside) for inside in value] if isinstance(value, list | tuple) else value


def data_url(picture: Image.Image, kind: str = "JPEG", quality: int = 75) -> str:
    """A picture inside of a page, as a data URL; `kind` is Pillow's name of the format."""
    file = io.BytesIO()
    picture.save(file, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV for people and their spreadsheets: texts `printable`, and with an apostrophe before what a
    spreadsheet would take for a formula. Numbers stay as they are. `csv_plain` takes the apostrophe off again."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_cell(cell) for cell in row] for row in rows)
    return file.getvalue()


def csv_plain(cell: str) -> str:
    """A cell of `csv_text` without the apostrophe that keeps it from being a formula."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _cell(cell: object) -> object:
    if cell is None or isinstance(cell, bool | int | float):
        return cell
    text = printable(cell)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def markdown(text: object) -> str:
    """A text on one line of Markdown, in which nothing is markup."""
    marked = re.sub(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)", r"\\\g<0>", printable(text))
    return re.sub(r"^(\s*\d*)([-+#=]|(?<=\d)[.)])(?=[\s=#+-]|$)", r"\1\\\2", marked)


def code_span(text: object) -> str:
    """A text on one line of Markdown as code, whatever backticks it holds."""
    inside = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", inside)), default=0))
    return f"{fence} {inside} {fence}" if len(fence) > 1 else f"`{inside}`"
