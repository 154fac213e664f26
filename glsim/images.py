"""Floor 1: image files of every kind, whole or damaged, alone or inside tar archives, as RGB pictures."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from glsim.stores import is_uri, open_uri
from glsim.types import DataError


class BadImage(DataError):
    """An image file that cannot be shown: `.path` says which, `.reason` why."""

    # torch rebuilds the exception of a DataLoader worker from its text alone. Were `reason` required, that would fail
    # and the main process would see a RuntimeError, which no longer says that the data is at fault.
    def __init__(self, path: str | Path, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else str(self.path)


EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
# Only these decoders are tried, whatever a file is called: another one of Pillow's starts an outside program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def open_image(path: str | Path, content: bytes | None = None, max_pixels: int | None = None) -> Image.Image:
    """Return the image as a viewer shows it, colour profiles apart: RGB, 8 bit, upright (EXIF), on white where it is
    transparent, 16-bit and float values scaled, the first frame of an animation. `SHARD.tar/NAME` is a file in a tar.
    With `content`, the bytes of a file, nothing is read from disk and `path` is only its name.

    Raises BadImage for everything else: missing, empty, truncated, damaged, not an image, or more pixels than
    `max_pixels` (default: 2 * PIL.Image.MAX_IMAGE_PIXELS), which is known before any pixel is decoded.
    """
    return open_as_stored(path, content, max_pixels)[0]


def open_as_stored(
    path: str | Path, content: bytes | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, str, str]:
    """Return the image of `open_image`, and how it is stored: the format its content has (JPEG, PNG, ..; the name of
    the file may claim another) and Pillow's mode (RGB, L, CMYK, ..). Raises BadImage as `open_image` does."""
    start = b""
    try:
        with _pillow_warnings_off(), open_file(path) if content is None else io.BytesIO(content) as file:
            start = file.read(16)
            with Image.open(file, formats=_FORMATS) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
                image.load()
                return as_shown(image), str(image.format), image.mode
    except Exception as error:  # damaged files raise nearly anything: struct.error, zlib.error, IndexError, ...
        reason = _reason(error, start, max_pixels)
    # Raised out here so that it does not hold on to the first error, whose traceback keeps the pixels in memory.
    raise BadImage(path, reason)


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading; `SHARD.tar/NAME` is the file NAME inside an archive, s3://BUCKET/NAME one in a store.

    Raises OSError and TarError.
    """
    if is_uri(path):
        return open_uri(str(path))
    path = Path(path)
    try:
        return path.open("rb")
    except (NotADirectoryError, FileNotFoundError):
        if (shard := _shard(path)) is None:
            raise
    name = path.relative_to(shard).as_posix()
    if name not in members(shard):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    start, length = members(shard)[name]
    with shard.open("rb") as file:
        file.seek(start)
        return io.BytesIO(file.read(length))


def is_file(path: str | Path) -> bool:
    """Whether `open_file` finds something there."""
    path = Path(path)
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
    with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = {PurePosixPath(m.name).as_posix(): (m.offset_data, m.size) for m in tar if m.isreg()}
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes anything but a header for the end
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    return found


def _shard(path: Path) -> Path | None:
    return next((top for top in path.parents if top.suffix.lower() == ".tar" and top.is_file()), None)


def find_bad(
    paths: Iterable[str | Path],
    workers: int | None = None,
    progress: Callable[[Iterator[BadImage | None]], Iterable[BadImage | None]] = iter,
) -> list[BadImage]:
    """Decode every file fully, in `workers` threads (0 or None: as many as suit the machine); returns the bad ones, in
    the order of `paths`. `progress` wraps the iterator over the results, one per path, as tqdm does."""

    def check(path: str | Path) -> BadImage | None:
        try:
            open_image(path)
        except BadImage as error:
            return error.with_traceback(None)
        return None

    pool = ThreadPoolExecutor(workers or None)
    try:
        return [bad for bad in progress(pool.map(check, paths)) if bad]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for every file


def as_shown(image: Image.Image) -> Image.Image:
    """Return a decoded image of any mode the way a viewer shows it: RGB, 8 bit, upright, on white."""
    orientation = 1
    with contextlib.suppress(Exception):  # a damaged EXIF block: viewers show the picture as it is stored
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode.startswith("I;16"):
        shown = _to_8_bit(image, 65535)
    elif image.mode == "I":
        shown = _to_8_bit(image, 65535, 2**31 - 1)
    elif image.mode == "F":
        shown = _to_8_bit(image, 1, 255, 65535)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        shown = image.convert("RGB")
    # With the rest of the EXIF block there, exif_transpose would write it anew, and fail on tags of no concern here.
    shown.info = {}
    shown.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(shown, in_place=True)
    return shown


def _to_8_bit(image: Image.Image, *tops: int) -> Image.Image:
    """Scale [0, top] to [0, 255] for the first of `tops` that holds all values, give or take a resize's overshoot."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0, posinf=0, neginf=0)
    highest = values.max()
    top = next((top for top in tops if highest <= 1.1 * top), highest)
    return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _reason(error: Exception, start: bytes, max_pixels: int | None) -> str:
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged at its start: {start!r}" if start else "empty file (0 bytes)"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, Image.DecompressionBombError):
        pixels = [int(number) for number in re.findall(r"\d+", text)]
        if max_pixels is not None:
            return f"too large: {pixels[0]:,} pixels, limit {max_pixels:,}"
        megapixels = [f"{number / 1e6:.0f} megapixels" for number in pixels]
        return f"too large: {', limit '.join(megapixels)} (2 * PIL.Image.MAX_IMAGE_PIXELS)"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return f"truncated: {text}"
    return f"damaged: {type(error).__name__}: {text}"


_filters_lock = threading.Lock()
_filters_users: list[warnings.catch_warnings] = []  # one per thread inside; the first is the one that saved the filters


@contextlib.contextmanager
def _pillow_warnings_off() -> Iterator[None]:
    # Pillow warns of large images and odd metadata. Warning filters belong to the process, not the thread: the first
    # thread in sets them, the last one out puts them back.
    saved = warnings.catch_warnings()
    with _filters_lock:
        _filters_users.append(_filters_users[0] if _filters_users else saved)
        if len(_filters_users) == 1:
            saved.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _filters_lock:
            last = _filters_users.pop()
            if not _filters_users:
                last.__exit__(None, None, None)
