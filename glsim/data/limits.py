"""Limits of image files: pixels and sides by the header, and the memory of all that are decoded at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, BinaryIO

from PIL import Image

from glsim.types import ConfigError

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
        self.taken = context.Value("q", 0, lock=False) if context is not None else SimpleNamespace(value=0)

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


def _give_back_memory() -> None:
    # glibc keeps what was freed, in each thread apart: four threads held four large images when none was left.
    with contextlib.suppress(Exception):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


_room, _holding = Room(), threading.local()


def max_pixels() -> int:
    """Pixels that an image of this process may have."""
    return _max_pixels


def room() -> Room:
    """The memory for decoded images of this process."""
    return _room


def sharing(method: str | None = None) -> Callable[..., None]:
    """What a process that loads images, started by `method` of multiprocessing, has to call first, with any arguments:
    it keeps to the limit of this one, and all that get the same share one `Room`."""
    return partial(_share, _max_pixels, Room(context=get_context(method)))


def _share(max_pixels: int, room: Room, *_: object) -> None:
    global _max_pixels, _room
    _max_pixels, _room = max_pixels, room


class Refused(ValueError):
    """An image that is not shown; its text is what is told of it, word for word."""


def bytes_to_decode(image: Image.Image, file: BinaryIO, max_pixels: int) -> int:
    """Bytes that decoding an opened image takes. Raises Refused where the header tells of more than is allowed."""
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
            raise Refused(f"too large: {scans} passes of a progressive JPEG, limit {SCANS}")
    elif codec in IN_PYTHON:
        each = IN_PYTHON[codec]
    width, height = image.size
    if max(width, height) > LONGEST_SIDE:
        raise Refused(f"too large: {width} x {height} pixels, limit of a side {LONGEST_SIDE:,}")
    limit = max_pixels * BYTES // max(each, BYTES)
    if width * height > limit:
        kind = f" for this kind of {image.format}" if each > BYTES else ""
        raise Refused(too_many_pixels(width * height, limit, kind))
    return width * height * each


def too_many_pixels(pixels: int, limit: int, kind: str = "") -> str:
    """What is told of an image of more pixels than `limit`."""
    digits = next((n for n in range(6) if round(pixels / 1e6, n) > round(limit / 1e6, n)), 6)
    most = f"{limit / 1e6:.6f}".rstrip("0").rstrip(".")
    return f"too large: {pixels / 1e6:.{digits}f} megapixels, limit {most}{kind} (--max-megapixels)"
