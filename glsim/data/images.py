"""Image files of every kind, whole or damaged, as RGB pictures.

Before every decoder stand the limits of `glsim.data.limits`. Whatever one image raises is a BadImage that names it.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from glsim.data import limits
from glsim.data.limits import Refused
from glsim.data.regions import cut_out, file_of, split_region
from glsim.data.rgb import as_shown, orientation_of, to_rgb, upright
from glsim.data.uri import open_file
from glsim.files import one_line
from glsim.types import ConfigError, DataError, GlsimError

T = TypeVar("T")


class BadImage(DataError):
    """An image file that cannot be shown: `.path` says which, `.reason` why."""

    # torch rebuilds the exception of a DataLoader worker from its text alone. Were `reason` required, that would fail
    # and the main process would see a RuntimeError, which no longer says that the data is at fault.
    def __init__(self, path: str | Path, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else str(self.path)


HEIF = (".heic", ".heif", ".hif")  # read with the library pillow-heif
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"),
    *HEIF,
)
LARGEST_FILE = 1024  # MiB, in which 110 megapixels of 16 bits fit uncompressed
LARGEST_FILES = {b"GIF8": 32, b"WEBP": 128, b"ftyp": 128}  # MiB of those that are read whole before their size is known
# Only these decoders are tried, whatever a file is called: another one of Pillow's starts an outside program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def open_image(path: str | Path, content: bytes | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read an image as a viewer shows it, colour profiles apart.

    Args:
        path: of the file; `SHARD.tar/NAME` is a file in a tar, `NAME#xywh=..` a region (`glsim.data.regions`).
        content: the bytes of a file: nothing is read from disk then, and `path` is only its name.
        max_pixels: default: `pixel_limit`; of WebP, AVIF and HEIC half as many.

    Returns:
        RGB, 8 bit, upright (EXIF), on white where it is transparent, numbers scaled (`as_shown`), the first frame of an
        animation.

    Raises:
        BadImage: for everything else: missing, no regular file, empty, truncated, damaged, not an image, a side of more
            than LONGEST_SIDE, or more than `max_pixels`, which is known before any pixel is decoded.
    """
    return read_image(path, lambda image: image, content, max_pixels)


def read_image(
    path: str | Path, use: Callable[[Image.Image], T], content: bytes | None = None, max_pixels: int | None = None
) -> T:
    """Return what `use` makes of the image of `open_image`, at a time when there is room for it.

    Its `info` tells how it is stored: "format" is that of the content (JPEG, PNG, ..; the name of the file may claim
    another), "mode" is Pillow's (RGB, L, CMYK, ..); of a region, "cut" is where it lies. What `use` raises is the
    image's error too, a BadImage, but for a GlsimError, which passes.
    """
    region = split_region(path)[1]
    return _read(path, lambda image: _use(use, cut_out(_shown(image), region)), content, max_pixels)


def read_regions(
    paths: Sequence[str | Path], use: Callable[[Image.Image], T], max_pixels: int | None = None
) -> list[T | BadImage]:
    """`read_image` of several regions of one file, which is decoded once; a BadImage is in the place of a bad one."""

    def each(image: Image.Image) -> list[T | BadImage]:
        whole, found = _shown(image), list[T | BadImage]()
        for path in paths:
            try:
                found.append(_use(use, cut_out(whole, split_region(path)[1])))
            except Refused as error:
                found.append(BadImage(path, str(error)))
        return found

    try:
        return _read(file_of(paths[0]), each, None, max_pixels)
    except BadImage as error:
        return [BadImage(path, error.reason) for path in paths]


def by_file(paths: Iterable[str | Path]) -> Iterator[list[str | Path]]:
    """Paths that follow each other and are of one file, together."""
    return (list(group) for _, group in groupby(paths, lambda path: str(file_of(path))))


def _shown(image: Image.Image) -> Image.Image:
    flat, orientation = to_rgb(image), orientation_of(image)
    stored = str(image.format), image.mode
    image.close()  # before it is turned: two pictures in memory are enough
    flat = upright(flat, orientation)
    flat.info["format"], flat.info["mode"] = stored
    return flat


def try_image(path: str | Path, use: Callable[[Image.Image], T]) -> T | BadImage:
    """`read_image` that returns the BadImage, without the traceback that would keep the pixels."""
    try:
        return read_image(path, use)
    except BadImage as error:
        return error.with_traceback(None)


def taken_at(path: str | Path) -> str | None:
    """When an image was taken, by its EXIF, as ISO 8601, with the time zone where that is told; nothing is decoded.

    None where it is not told, or the file cannot be read.
    """
    with contextlib.suppress(Exception), _pillow_quiet(limits.max_pixels()), _file(path, None) as file:
        with _open(file, file.read(16), _FORMATS) as image:
            about = image.getexif()
            more = about.get_ifd(ExifTags.IFD.Exif)
        told = more.get(ExifTags.Base.DateTimeOriginal) or about[ExifTags.Base.DateTime]
        zone = str(more.get(ExifTags.Base.OffsetTimeOriginal, "")).strip(" \0")
        return datetime.strptime(str(told).strip(" \0"), "%Y:%m:%d %H:%M:%S").isoformat() + zone
    return None


def read_stored(path: str | Path, use: Callable[[Image.Image], T], formats: tuple[str, ...] = _FORMATS) -> T:
    """Return what `use` makes of the image in a file as it is stored, in any mode, not turned; as `read_image`."""
    return _read(path, partial(_use, use), formats=formats)


def read_any(image: str | Path | Image.Image, use: Callable[[Image.Image], T]) -> T:
    """`read_image` of a path, `use_image` of an image in memory."""
    return use_image(image, use, "the image") if isinstance(image, Image.Image) else read_image(image, use)


def use_image(image: Image.Image, use: Callable[[Image.Image], T], name: str) -> T:
    """Return what `use` makes of an image in memory, as it is shown; what is raised is a BadImage of this `name`."""
    try:
        return _use(use, as_shown(image))
    except GlsimError:
        raise
    except Exception as error:
        reason = _reason(error, b"", limits.max_pixels())
    raise BadImage(name, reason)


def _use(use: Callable[[Image.Image], T], image: Image.Image) -> T:
    try:
        return use(image)
    except (GlsimError, MemoryError):
        raise
    except Exception as error:
        what = f"{image.width} x {image.height} pixels: {type(error).__name__}: {one_line(error)}"
        raise Refused(f"cannot be prepared: {what}") from None


def _read(
    path: str | Path,
    use: Callable[[Image.Image], T],
    content: bytes | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = _FORMATS,
) -> T:
    start, limit = bytearray(), limits.max_pixels() if max_pixels is None else max_pixels

    def decode() -> T:
        with _pillow_quiet(limit), _file(path, content) as file:
            start.extend(file.read(16))
            size = file.seek(0, io.SEEK_END)
            most = next((most for mark, most in LARGEST_FILES.items() if mark in start[:12]), LARGEST_FILE)
            if size > most * 2**20:
                raise Refused(f"{size / 2**20:,.0f} MiB, more than the {most} MiB that such a file may have")
            with _open(file, bytes(start), formats) as image:
                room.enter_context(limits.room().hold(limits.bytes_to_decode(image, file, limit)))
                image.load()
                return use(image)

    # Left when nothing holds on to the pixels any more, an error's traceback neither.
    with contextlib.ExitStack() as room:
        try:
            return decode()
        except GlsimError:
            raise
        except Exception as error:  # damaged files raise nearly anything: struct.error, zlib.error, IndexError, ...
            reason = _reason(error, bytes(start), limit)
    raise BadImage(path, reason)  # out here, so that it has no context


def _file(path: str | Path, content: bytes | None) -> BinaryIO:
    try:
        return open_file(path) if content is None else io.BytesIO(content)
    except ConfigError as error:
        raise Refused(f"cannot be read: {error}") from error


def _open(file: BinaryIO, start: bytes, formats: tuple[str, ...]) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        if start[4:8] != b"ftyp" or start[8:12] not in _HEIF_BRANDS or formats is not _FORMATS:
            raise
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        raise Refused("HEIC, which needs the library pillow-heif: pip install 'glsim[heif]'") from None
    file.seek(0)
    return HeifImageFile(file)


def find_bad(
    paths: Iterable[str | Path],
    workers: int | None = None,
    progress: Callable[[Iterator[BadImage | None]], Iterable[BadImage | None]] = iter,
) -> list[BadImage]:
    """Decode every file fully, in `workers` threads (0 or None: as many as suit the machine); returns the bad ones, in
    the order of `paths`. `progress` wraps the iterator over the results, one per path, as tqdm does."""

    pool = ThreadPoolExecutor(workers or None)
    try:
        found = pool.map(partial(read_regions, use=lambda image: None), by_file(paths))
        return [bad for bad in progress(bad for group in found for bad in group) if bad]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for every file


def _reason(error: Exception, start: bytes, limit: int) -> str:
    text = one_line(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged at its start: {start!r}" if start else "empty file (0 bytes)"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):  # before there was an image whose size could be seen
        return limits.too_many_pixels(int(re.findall(r"\d+", text)[0]), limit)
    if isinstance(error, MemoryError):
        return "too large: there is not enough memory for it"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return f"truncated: {text}"
    return f"damaged: {type(error).__name__}: {text}"


_quiet_lock = threading.Lock()
_quiet_users: list[tuple[warnings.catch_warnings, int | None]] = []  # one per thread inside; all hold the first one's


@contextlib.contextmanager
def _pillow_quiet(limit: int) -> Iterator[None]:
    # Pillow warns of large images and odd metadata, and has a limit of its own below which ours may not lie. Both
    # belong to the process, not the thread: the first thread in changes them, the last one out puts them back.
    saved = warnings.catch_warnings(), Image.MAX_IMAGE_PIXELS
    with _quiet_lock:
        _quiet_users.append(_quiet_users[0] if _quiet_users else saved)
        if len(_quiet_users) == 1:
            saved[0].__enter__()
            warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\b")
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    try:
        yield
    finally:
        with _quiet_lock:
            filters, pixels = _quiet_users.pop()
            if not _quiet_users:
                Image.MAX_IMAGE_PIXELS = pixels
                filters.__exit__(None, None, None)


def fit_size(size: tuple[int, int], longest: float) -> tuple[int, int]:
    """Width and height of an image of `size` whose longer side becomes `longest` pixels: one at least, however thin."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height
