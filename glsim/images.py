"""Floor 1: image files of every kind, whole or damaged, alone or inside tar archives, as RGB pictures.

One guard stands before every decoder: a limit on pixels and sides that the header alone is held to, and a bound on the
memory of all images that are decoded at the same time. Whatever one image raises is a BadImage that names it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import math
import os
import re
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, wraps
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from glsim.files import one_line, open_regular
from glsim.stores import is_uri, open_uri
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
# Only these decoders are tried, whatever a file is called: another one of Pillow's starts an outside program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


# --- limits -----------------------------------------------------------------------------------------------------------

MAX_MEGAPIXELS = 110.0  # of an image, unless told otherwise; cameras of 100 megapixels write 102
LONGEST_SIDE = 65_500  # pixels; a JPEG has no longer one
BYTES = 8  # a pixel takes: four as it is decoded, four as it is shown
SCANS = 50  # of a progressive JPEG; each is a pass over the whole image, and costs a file ten bytes
IN_PYTHON = {"bmp_rle": 64, "ppm": 440, "ppm_plain": 440}  # what Pillow decodes in Python: bytes that stand for seconds
_max_pixels = round(MAX_MEGAPIXELS * 1e6)


@contextlib.contextmanager
def pixel_limit(megapixels: float) -> Iterator[None]:
    """Inside, no image of more than so many megapixels is decoded, wherever in this process; the verbs' option
    --max-megapixels. Processes that load images get it by `sharing`. Raises ConfigError for what is no such number."""
    global _max_pixels
    if not 0 < megapixels < math.inf:
        raise ConfigError(f"max_megapixels={megapixels}: a number above 0 is needed")
    before, _max_pixels = _max_pixels, max(1, round(megapixels * 1e6))
    try:
        yield
    finally:
        _max_pixels = before


def limited(verb: Callable[..., T]) -> Callable[..., T]:
    """A verb, run inside the `pixel_limit` of its settings."""

    @wraps(verb)
    def inside(settings: Any, *args: Any, **options: Any) -> T:
        with pixel_limit(settings.max_megapixels):
            return verb(settings, *args, **options)

    return inside


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Room:
    """Memory for decoded images, shared by threads, or with a `context` of multiprocessing by processes.

    `size` bytes in all (default: 48 MiB a core, 512 MiB at least); a larger image waits until it is alone.
    """

    def __init__(self, size: int | None = None, context: Any = None) -> None:
        self.size = size or max(512, 48 * cores()) * 2**20
        self.changed = (context or threading).Condition()
        self.taken = context.Value("q", 0, lock=False) if context is not None else _Number()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Inside, `size` bytes are taken; waits for them, but not in a thread that holds some already."""
        size = 0 if getattr(_holding, "any", False) else min(size, self.size)
        if not size:
            yield
            return
        with self.changed:
            while self.taken.value + size > self.size:
                self.changed.wait()
            self.taken.value += size
        _holding.any = True
        try:
            yield
        finally:
            _holding.any = False
            if size > self.size // 8:
                _give_back_memory()
            with self.changed:
                self.taken.value -= size
                self.changed.notify_all()


class _Number:
    value = 0


def _give_back_memory() -> None:
    # glibc keeps what was freed, in each thread apart: four threads held four large images when none was left.
    with contextlib.suppress(Exception):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


_room, _holding = Room(), threading.local()


def sharing(method: str | None = None) -> Callable[..., None]:
    """What a process that loads images, started by `method` of multiprocessing, has to call first, with any arguments:
    it keeps to the limit of this one, and all that get the same share one `Room`."""
    return partial(_share, _max_pixels, Room(context=get_context(method)))


def _share(max_pixels: int, room: Room, *_: object) -> None:
    global _max_pixels, _room
    _max_pixels, _room = max_pixels, room


class _Refused(ValueError):
    """What is told of an image, word for word."""


def _check(image: Image.Image, file: BinaryIO, max_pixels: int) -> int:
    """Bytes that decoding takes. Raises _Refused where the header tells of more than is allowed."""
    each = BYTES
    codec = next((tile[0] for tile in getattr(image, "tile", ())), "")
    if image.format in ("WEBP", "AVIF", "HEIF"):
        each = 16  # their decoders hold one to three whole pictures of their own
    elif image.format == "TIFF":
        each = max(BYTES, 4 + math.ceil(sum(image.tag_v2.get(258, (1,))) / 8))  # type: ignore[attr-defined]
    elif "progressive" in image.info:
        each = 4 + 2 * len(image.getbands())  # its coefficients
        place = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(place)
        if scans > SCANS:
            raise _Refused(f"too large: {scans} passes of a progressive JPEG, limit {SCANS}")
    elif codec in IN_PYTHON:
        each = IN_PYTHON[codec]
    width, height = image.size
    if max(width, height) > LONGEST_SIDE:
        raise _Refused(f"too large: {width} x {height} pixels, limit of a side {LONGEST_SIDE:,}")
    limit = max_pixels * BYTES // max(each, BYTES)
    if width * height > limit:
        kind = f" for this kind of {image.format}" if each > BYTES else ""
        raise _Refused(_too_many(width * height, limit, kind))
    return width * height * each


def _too_many(pixels: int, limit: int, kind: str = "") -> str:
    digits = next((n for n in range(6) if round(pixels / 1e6, n) > round(limit / 1e6, n)), 6)
    most = f"{limit / 1e6:.6f}".rstrip("0").rstrip(".")
    return f"too large: {pixels / 1e6:.{digits}f} megapixels, limit {most}{kind} (--max-megapixels)"


# --- reading ----------------------------------------------------------------------------------------------------------


def open_image(path: str | Path, content: bytes | None = None, max_pixels: int | None = None) -> Image.Image:
    """Return the image as a viewer shows it, colour profiles apart: RGB, 8 bit, upright (EXIF), on white where it is
    transparent, numbers scaled (`as_shown`), the first frame of an animation. `SHARD.tar/NAME` is a file in a tar.
    With `content`, the bytes of a file, nothing is read from disk and `path` is only its name.

    Raises BadImage for everything else: missing, no regular file, empty, truncated, damaged, not an image, a side of
    more than LONGEST_SIDE, or more than `max_pixels` (default: `pixel_limit`; of WebP, AVIF and HEIC half as many),
    which is known before any pixel is decoded.
    """
    return read_image(path, _itself, content, max_pixels)


def read_image(
    path: str | Path, use: Callable[[Image.Image], T], content: bytes | None = None, max_pixels: int | None = None
) -> T:
    """Return what `use` makes of the image of `open_image`, at a time when there is room for it.

    Its `info` tells how it is stored: "format" is that of the content (JPEG, PNG, ..; the name of the file may claim
    another), "mode" is Pillow's (RGB, L, CMYK, ..). What `use` raises is the image's error too, a BadImage, but for a
    GlsimError, which passes.
    """

    def shown(image: Image.Image) -> T:
        flat, orientation = _flat(image), _orientation(image)
        stored = str(image.format), image.mode
        image.close()  # before it is turned: two pictures in memory are enough
        flat = _upright(flat, orientation)
        flat.info["format"], flat.info["mode"] = stored
        return _prepared(use, flat)

    return _read(path, shown, content, max_pixels)


def read_stored(path: str | Path, use: Callable[[Image.Image], T], formats: tuple[str, ...] = _FORMATS) -> T:
    """Return what `use` makes of the image in a file as it is stored, in any mode, not turned; as `read_image`."""
    return _read(path, partial(_prepared, use), formats=formats)


def read_any(image: str | Path | Image.Image, use: Callable[[Image.Image], T]) -> T:
    """`read_image` of a path, `prepare` of an image in memory."""
    return prepare(image, use, "the image") if isinstance(image, Image.Image) else read_image(image, use)


def prepare(image: Image.Image, use: Callable[[Image.Image], T], name: str) -> T:
    """Return what `use` makes of an image in memory, as it is shown; what is raised is a BadImage of this `name`."""
    try:
        return _prepared(use, as_shown(image))
    except GlsimError:
        raise
    except Exception as error:
        reason = _reason(error, b"", _max_pixels)
    raise BadImage(name, reason)


def _itself(image: Image.Image) -> Image.Image:
    return image


def _prepared(use: Callable[[Image.Image], T], image: Image.Image) -> T:
    try:
        return use(image)
    except (GlsimError, MemoryError):
        raise
    except Exception as error:
        what = f"{image.width} x {image.height} pixels: {type(error).__name__}: {one_line(error)}"
        raise _Refused(f"cannot be prepared: {what}") from None


def _read(
    path: str | Path,
    use: Callable[[Image.Image], T],
    content: bytes | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = _FORMATS,
) -> T:
    start, limit = bytearray(), _max_pixels if max_pixels is None else max_pixels
    with (
        contextlib.ExitStack() as room
    ):  # left when nothing holds on to the pixels any more, an error's traceback neither
        try:
            return _decode(path, use, content, limit, formats, start, room)
        except GlsimError:
            raise
        except Exception as error:  # damaged files raise nearly anything: struct.error, zlib.error, IndexError, ...
            reason = _reason(error, bytes(start), limit)
    raise BadImage(path, reason)  # out here, so that it has no context


def _decode(
    path: str | Path,
    use: Callable[[Image.Image], T],
    content: bytes | None,
    limit: int,
    formats: tuple[str, ...],
    start: bytearray,
    room: contextlib.ExitStack,
) -> T:
    with _pillow_quiet(limit), open_file(path) if content is None else io.BytesIO(content) as file:
        start += file.read(16)
        with _open(file, bytes(start), formats) as image:
            room.enter_context(_room.hold(_check(image, file, limit)))
            image.load()
            return use(image)


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
        raise _Refused("HEIC, which needs the library pillow-heif: pip install 'glsim[heif]'") from None
    file.seek(0)
    return HeifImageFile(file)


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; `SHARD.tar/NAME` is the file NAME inside an archive, s3://BUCKET/NAME one in a
    store.

    Raises OSError and TarError, ValueError for a store that is not known.
    """
    if is_uri(path):
        try:
            return open_uri(str(path))
        except ConfigError as error:
            raise _Refused(f"cannot be read: {error}") from error
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
    with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
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
            read_image(path, lambda image: None)
        except BadImage as error:
            return error.with_traceback(None)
        return None

    pool = ThreadPoolExecutor(workers or None)
    try:
        return [bad for bad in progress(pool.map(check, paths)) if bad]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for every file


def fit_size(size: tuple[int, int], longest: float) -> tuple[int, int]:
    """Width and height of an image of `size` whose longer side becomes `longest` pixels: one at least, however thin."""
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height


# --- showing ----------------------------------------------------------------------------------------------------------


def as_shown(image: Image.Image) -> Image.Image:
    """Return a decoded image of any mode the way a viewer shows it: RGB, 8 bit, upright, on white.

    Numbers are scaled so that 0 is black and the top of their range white: 65535 for 16 bits; for 32-bit integers the
    first of 255, 65535, 2^31 - 1, 2^32 - 1 that holds all values; for floats the first of 1, 255, 65535, else the
    highest value. What is below 0, not a number or infinite is black.

    Raises ValueError where no value can be seen: all are below 0, not a number or infinite.
    """
    return _upright(_flat(image), _orientation(image))


BAND = 2**20  # pixels


def _flat(image: Image.Image) -> Image.Image:
    """The same picture in RGB, as it lies in the file."""
    if image.mode.startswith("I;16"):
        return _scaled(image, 65535)
    if image.mode == "I":
        sixteen = image.format == "PPM"  # Pillow has scaled it to 16 bits
        return _scaled(image, *(() if sixteen else (255,)), 65535, 2**31 - 1, 2**32 - 1)
    if image.mode == "F":
        return _scaled(image, 1, 255, 65535)
    if not image.has_transparency_data:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size)
    for box in bands(image):
        part = image.crop(box)
        part = part.convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box)
    return flat


def _scaled(image: Image.Image, *tops: int) -> Image.Image:
    """Scale [0, top] to [0, 255] for the first of `tops` that holds all values, give or take a resize's overshoot."""

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        part = np.asarray(image.crop(box))
        if unsigned:
            part = part.view(np.uint32)
        return np.nan_to_num(part.astype(np.float32), nan=-1, posinf=-1, neginf=-1)

    # Pillow reads unsigned integers of 32 bits as signed ones.
    unsigned = image.mode == "I" and getattr(image, "tag_v2", {}).get(339) == (1,)
    highest = max(float(values(box).max()) for box in bands(image))
    if highest < 0:
        raise _Refused("no value can be seen: all are below 0, not a number or infinite")
    top = next((top for top in tops if highest <= 1.1 * top), highest)
    flat = Image.new("RGB", image.size)
    for box in bands(image):
        grey = (values(box) / top * 255).clip(0, 255).round().astype(np.uint8)
        flat.paste(Image.fromarray(grey).convert("RGB"), box)
    return flat


def bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of some whole rows each, from top to bottom, for what takes more memory a pixel than the image."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # a damaged EXIF block: viewers show the picture as it is stored
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _upright(shown: Image.Image, orientation: int) -> Image.Image:
    # With the rest of the EXIF block there, exif_transpose would write it anew, and fail on tags of no concern here.
    shown.info = {}
    shown.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(shown, in_place=True)
    return shown


def _reason(error: Exception, start: bytes, limit: int) -> str:
    text = one_line(error)
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged at its start: {start!r}" if start else "empty file (0 bytes)"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):  # before there was an image whose size could be seen
        return _too_many(int(re.findall(r"\d+", text)[0]), limit)
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
