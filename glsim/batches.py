"""Floor 3: which images meet in which step, and how they are read.

The order of an epoch and every random choice in an image's augmentation follow from (seed, epoch, image). So they are
the same whatever the number of workers and processes, and a run can go on in the middle of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from glsim.data import ImageDataset, ImageList
from glsim.types import ConfigError


class TrainBatches(Sampler):
    """The batches of one epoch, as lists of (key, index): `key` seeds what happens to image `index`.

    `group` batches (processes x accumulation) make one optimiser step; an epoch holds whole steps only, the images left
    over wait for the next one. Set `epoch` and `start` (optimiser steps to leave out) before iterating.
    """

    drop_last = False  # for Accelerate, which shards the batches among processes

    def __init__(self, images: int, batch_size: int, group: int, seed: int) -> None:
        if images < group:
            raise ConfigError(f"{images} images cannot be shared by {group} batches a step; accumulate less")
        self.images, self.group, self.seed = images, group, seed
        self.batch_size = min(batch_size, images // group)
        self.steps = images // (self.batch_size * group)  # optimiser steps an epoch
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.steps - self.start) * self.group

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = self.order(self.epoch), self.epoch
        for batch in range(self.start * self.group, self.steps * self.group):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(mix(self.seed, epoch, int(i)), int(i)) for i in chosen]

    def order(self, epoch: int) -> np.ndarray:
        """The indices of all images in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)

    def step(self, step: int) -> list[int]:
        """The images that meet in optimiser step `step`, counted from the start of the run."""
        epoch, within = divmod(step, self.steps)
        size = self.batch_size * self.group
        return self.order(epoch)[within * size : (within + 1) * size].tolist()


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


def train_loader(images: ImageList, transform: Any, batches: TrainBatches, workers: int) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B,)) in the order of `batches`, read ahead by `workers` processes."""
    dataset: Any = Augmented(ImageDataset(images, transform))
    pin = torch.accelerator.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin)


def make_loader(images: ImageList, transform: Any, batch_size: int, workers: int) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B,)) in the order of `images`, read ahead by `workers` processes."""
    dataset: Any = ImageDataset(images, transform)
    pin = torch.accelerator.is_available()
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin)
