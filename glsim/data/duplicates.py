"""Duplicate and near-duplicate images, found by hashes in one pass over the files.

Reading is done in processes of their own, which import this file: no torch here.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from glsim.data.images import BadImage, by_file, read_regions
from glsim.data.limits import cores, sharing
from glsim.data.rgb import bands
from glsim.types import GlsimError

HASH_SIDE = 16  # a hash has 16 x 16 bits; with the usual 8 x 8, views of different cars are as near as duplicates
ONE_COLOUR = 2.0  # standard deviation of the grey values (0 to 255) below which a hash says nothing
PAIRS = 100_000  # the search for near duplicates stops at so many; nobody would look at more


class Photo(NamedTuple):
    """What one reading of an image file tells."""

    size: tuple[int, int]  # width, height, upright
    format: str  # of the content
    mode: str
    pixels: str  # sha256 of size and pixels: equal for the same picture, whatever its file and metadata
    hash: bytes | None  # perceptual hash, 32 bytes; None for pictures of nearly one colour, which have none


class Entry(NamedTuple):
    """Where an image stands in the data set."""

    path: str
    split: str
    label: str


class Item(NamedTuple):
    """One finding of an audit: the images it is about, none where it is not about a file, and a remark."""

    images: Sequence[Entry]
    note: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def look_at(paths: Sequence[str | Path]) -> list[Photo | BadImage]:
    """Read and decode one file, once, and look at these regions of it."""
    return read_regions(paths, _photo)


def _photo(image: Image.Image) -> Photo:
    pixels = hashlib.sha256(repr(image.size).encode())
    for box in bands(image):  # a copy of all of it at once takes as much memory as the image
        pixels.update(image.crop(box).tobytes())
    grey = image.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0).convert("L")
    bits = None
    if np.asarray(grey, np.float32).std() >= ONE_COLOUR:
        bits = np.packbits(imagehash.phash(grey, hash_size=HASH_SIDE).hash).tobytes()
    return Photo(image.size, image.info["format"], image.info["mode"], pixels.hexdigest(), bits)


def look_at_all(paths: Sequence[str | Path], workers: int | None = None) -> Iterator[Photo | BadImage]:
    """What `look_at` finds of every path, in order, in `workers` processes (None: one a core; 0: in this one).

    Raises GlsimError when a process dies, which a decoder's crash or a lack of memory can do.
    """
    if workers is None:
        workers = cores() if len(paths) > 500 else 0  # to start a process costs as much as some hundred small images
    if not workers:
        yield from chain.from_iterable(map(look_at, by_file(paths)))
        return
    # Not forked: this process has run torch, whose threads a fork would leave behind with their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (sharing("spawn"),))
    try:
        yield from chain.from_iterable(pool.map(look_at, by_file(paths), chunksize=16))
    except BrokenProcessPool as error:
        raise GlsimError(
            "a process that read images died: a decoder crashed or memory ran out; --workers 1 needs the least memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(share: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    share()


# --- comparing --------------------------------------------------------------------------------------------------------


def find_near(photos: dict[Entry, Photo], most: int) -> list[tuple[list[Entry], list[Entry], int]]:
    """Pairs of different pictures whose hashes differ in at most `most` bits, nearest first.

    A picture stands for all its exact duplicates: one entry for every split and label it is found under.
    """
    holders: dict[str, dict[tuple[str, str], Entry]] = {}
    hashes: dict[str, bytes] = {}
    for entry, photo in photos.items():
        if photo.hash is not None:
            holders.setdefault(photo.pixels, {}).setdefault((entry.split, entry.label), entry)
            hashes[photo.pixels] = photo.hash
    owners = [list(holders[pixels].values()) for pixels in hashes]
    table = np.frombuffer(b"".join(hashes.values()), np.uint64).reshape(len(hashes), HASH_SIDE**2 // 64)
    return [(owners[i], owners[j], distance) for i, j, distance in near_pairs(table, most, PAIRS)]


def near_pairs(hashes: np.ndarray, most: int, limit: int, rows: int = 32) -> list[tuple[int, int, int]]:
    """All (i, j, distance) with i < j whose 256 bits, `hashes` (n, 4) uint64, differ in at most `most`, nearest first.

    Every pair is compared (half a million images: 125 thousand million pairs), by the first 128 bits, then, for the few
    that are left, by all. Stops at `limit` pairs.
    """
    first, second = np.ascontiguousarray(hashes[:, 0]), np.ascontiguousarray(hashes[:, 1])

    def block(top: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for left in range(top, len(hashes), 4096):
            down, across = slice(top, top + rows), slice(left, left + 4096)
            differ = np.bitwise_count(first[down, None] ^ first[None, across])
            differ += np.bitwise_count(second[down, None] ^ second[None, across])
            i, j = np.nonzero(differ <= most)
            i, j = i + top, j + left
            i, j = i[i < j], j[i < j]
            distance = np.bitwise_count(hashes[i] ^ hashes[j]).sum(axis=1)
            near = distance <= most
            found += zip(i[near].tolist(), j[near].tolist(), distance[near].tolist(), strict=True)
            if len(found) >= limit:
                break
        return found

    pool = ThreadPoolExecutor(cores())  # NumPy lets go of the interpreter
    try:
        blocks = pool.map(block, range(0, len(hashes), rows))
        pairs = list(islice((pair for found in blocks for pair in found), limit))
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(pairs, key=lambda pair: (pair[2], pair))


def find_duplicates(
    photos: dict[Entry, Photo], pairs: Iterable[tuple[list[Entry], list[Entry], int]]
) -> dict[str, list[Item]]:
    """Exact duplicates in groups and near ones in pairs, by what is wrong with them: leak, clash, else duplicate."""
    groups: dict[str, list[Entry]] = {}
    for entry, photo in photos.items():
        groups.setdefault(photo.pixels, []).append(entry)
    alike = [("", Item(group)) for group in groups.values() if len(group) > 1]
    for ours, others, distance in pairs:
        note = f"{distance} of {HASH_SIDE**2} bits differ"
        alike += [("near_", Item(pair, note)) for pair in product(ours, others)]
    found: dict[str, list[Item]] = {}
    for near, item in alike:
        _, splits, labels = map(set, zip(*item.images, strict=True))
        kinds = [kind for kind, values in (("leak", splits), ("clash", labels)) if len(values) > 1]
        for kind in kinds or ["duplicate"]:
            found.setdefault(near + kind, []).append(item)
    return found
