"""Data loaders: order of the images, batches, workers; the same at every resume.

The order of an epoch and every random choice in an image's augmentation follow from (seed, epoch, image). So they are
the same whatever the number of workers and processes, and a run can go on in the middle of an epoch.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from glsim.data.images import BadImage, read_image, read_regions, use_image
from glsim.data.limits import sharing
from glsim.data.readers import ImageList
from glsim.data.regions import split_region
from glsim.files import expand
from glsim.types import ConfigError

POSIX = hasattr(signal, "pthread_sigmask")  # not on Windows
STOPPING = {signal.SIGINT, signal.SIGTERM}


class ImageDataset:
    """Map-style data set: item i is (transform(image i), its label).

    `images` may also be paths and PIL images without labels; then every label is -1. What cannot be read, or cannot be
    transformed, raises BadImage; with `keep_bad` the BadImage is the item, for the collate function to deal with.
    `max_pixels` is the limit of an image (None: `glsim.data.limits:pixel_limit`).
    """

    def __init__(
        self,
        images: ImageList | Sequence[str | Path | Image.Image],
        transform: Callable[[Image.Image], Any],
        keep_bad: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        self.images = images.paths if isinstance(images, ImageList) else images
        self.labels = images.labels if isinstance(images, ImageList) else (-1,) * len(self.images)
        self.transform, self.keep_bad, self.max_pixels = transform, keep_bad, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int] | BadImage:
        given = self.images[index]
        try:
            if isinstance(given, Image.Image):
                return use_image(given, self.transform, f"image {index}"), self.labels[index]
            given = expand(given) if isinstance(given, str) else given
            return read_image(given, self.transform, max_pixels=self.max_pixels), self.labels[index]
        except BadImage as error:
            if self.keep_bad:
                return error.with_traceback(None)
            raise

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int] | BadImage]:
        """A batch, for torch's loader: an image is decoded once for all of its regions that are in it."""
        places: dict[object, list[int]] = {}
        for place, index in enumerate(indices):
            given = self.images[index]
            file, region = ("", None) if isinstance(given, Image.Image) else split_region(given)
            places.setdefault(file if region else place, []).append(place)
        items: list[Any] = [None] * len(indices)
        for group in places.values():
            if len(group) == 1:
                items[group[0]] = self[indices[group[0]]]
                continue
            paths: list[Any] = [self.images[indices[place]] for place in group]
            found = read_regions(paths, self.transform, self.max_pixels)
            for place, made in zip(group, found, strict=True):
                if isinstance(made, BadImage) and not self.keep_bad:
                    raise made
                items[place] = made if isinstance(made, BadImage) else (made, self.labels[indices[place]])
        return items


class TrainBatches(Sampler):
    """The batches of one epoch, as lists of (key, index): `key` seeds what happens to image `index`.

    `group` batches (processes x accumulation) make one optimiser step; an epoch holds whole steps only, the images left
    over wait for the next one. With `repeats` a step holds each of its images that many times, with keys of their own
    and spread over its batches; an epoch keeps its length and shows fewer images (timm and DeiT count so too). Set
    `epoch` and `start` (optimiser steps to leave out) before iterating.

    Raises ConfigError where a step cannot be made up so.
    """

    drop_last = False  # for Accelerate, which shards the batches among processes

    def __init__(self, images: int, batch_size: int, group: int, seed: int, repeats: int = 1) -> None:
        if images < group:
            raise ConfigError(f"{images} images cannot be shared by {group} batches a step; accumulate less")
        self.images, self.group, self.seed, self.repeats = images, group, seed, repeats
        self.batch_size = min(batch_size, images // group)
        self.size = self.batch_size * group  # images of an optimiser step, repeated ones each time
        self.steps = images // self.size  # optimiser steps an epoch
        self.epoch = self.start = 0
        if self.size % repeats:
            raise ConfigError(f"repeats={repeats}: a step has {self.size} places, no multiple of it; change batch_size")

    def __len__(self) -> int:
        return (self.steps - self.start) * self.group

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = self.order(self.epoch), self.epoch
        for step in range(self.start, self.steps):
            images = self._images(order, step)
            places = [(time, i) for time in range(self.repeats) for i in images]
            keyed = [(mix(self.seed, epoch, i, *([time] if time else [])), i) for time, i in places]
            for first in range(0, self.size, self.batch_size):
                yield keyed[first : first + self.batch_size]

    def order(self, epoch: int) -> np.ndarray:
        """The indices of all images in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)

    def step(self, step: int) -> list[int]:
        """The images that meet in optimiser step `step`, counted from the start of the run."""
        epoch, within = divmod(step, self.steps)
        return self._images(self.order(epoch), within)

    def _images(self, order: np.ndarray, step: int) -> list[int]:
        each = self.size // self.repeats
        return order[step * each : (step + 1) * each].tolist()


class Augmented(Dataset):
    """Item (key, index): image `index` of `inner`, augmented with the randomness that follows from `key`."""

    def __init__(self, inner: ImageDataset) -> None:
        self.inner = inner

    def __getitem__(self, item: tuple[int, int]) -> Any:
        key, index = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            random.seed(key)
            return self.inner[index]


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class CachedImages(ImageDataset):
    """The same with every image read once: decoded, brought through `always`, and kept as bytes in memory.

    `chance` is what then happens to an image each time. Processes that load images share the memory where they are
    forked (Linux); `copies` processes of the run on this machine keep one each. Raises ConfigError where it would not
    fit, and BadImage.
    """

    def __init__(self, images: ImageList, always: Any, chance: Any, copies: int = 1) -> None:
        super().__init__(images, chance)

        def read(path: Path) -> np.ndarray:
            return read_image(path, lambda image: np.asarray(always(image)))

        sample = images.paths[:: max(1, len(images) // 16)]
        needed = sum(read(path).nbytes for path in sample) // len(sample) * len(images) * copies
        free = psutil.virtual_memory().available
        if needed > 0.9 * free:
            raise ConfigError(
                f"cache=ram: {len(images)} images need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
                "free; try a smaller resize_ratio or image_size (crop=resized keeps images as they are), or cache=none"
            )
        with ThreadPoolExecutor() as pool:
            self.pixels = list(pool.map(read, images.paths))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index])
        return use_image(image, self.transform, str(self.images[index])), self.labels[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int] | BadImage]:
        """A batch; nothing is decoded."""
        return [self[index] for index in indices]


def train_loader(dataset: ImageDataset, batches: TrainBatches, workers: int) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B,)) in the order of `batches`, read ahead by `workers` processes."""
    fork = "fork" if workers and isinstance(dataset, CachedImages) and "fork" in get_all_start_methods() else None
    return _loader(Augmented(dataset), workers, fork, batch_sampler=batches)


def make_loader(images: ImageList, transform: Any, batch_size: int, workers: int) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B,)) in the order of `images`, read ahead by `workers` processes."""
    return _loader(ImageDataset(images, transform), workers, batch_size=batch_size)


def _loader(dataset: Any, workers: int, method: str | None = None, **batches: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.accelerator.is_available(),
        multiprocessing_context=method,
        worker_init_fn=partial(_apart, sharing(method)) if workers else None,
        **batches,
    )


def read(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of `loader`. Ctrl-C and `timeout`, which signal the whole process group, reach this process alone.

    The workers start with those signals held back, and leave the group before they heed them again: the run, which
    finishes its step first, still needs them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING) if POSIX else ()
    try:
        batches = iter(loader)
        first = list(islice(batches, 1))
    finally:
        if POSIX:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from batches


def _apart(share: Callable[[], None], _: int) -> None:
    """A worker of `read` leaves the process group, and forgets a signal that came before it did."""
    share()
    if POSIX:
        os.setpgrp()
        while came := signal.sigpending() & STOPPING:
            signal.sigwait(came)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
