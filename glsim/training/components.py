"""Builders of the parts of a run from its settings: splits, images, preprocessing, optimiser, schedule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torchvision.transforms import v2

from glsim.checkpoints.bundle import default_preprocessing
from glsim.data.box_options import boxed_of
from glsim.data.boxed import read_boxed
from glsim.data.catalog import prepared
from glsim.data.images import BadImage, find_bad
from glsim.data.loaders import CachedImages, ImageDataset
from glsim.data.readers import ImageList, hold_out_val
from glsim.data.splits import drop_bad, take_split
from glsim.data.transforms import Preprocessing, train_steps
from glsim.models.base import Model
from glsim.training.config import Train
from glsim.types import ConfigError, DataError


def read_splits(s: Train) -> tuple[dict[str, ImageList], list[BadImage]]:
    """The splits to train, watch and test on, and the unreadable files left out of them (with `skip_bad`).

    Raises:
        ConfigError: where val images are asked for and the data has a val split of its own.
        DataError: for data that cannot be read, a single class, or a split or class without images.
    """
    place = prepared(s.data, s.dataset)
    splits = read_boxed(place, boxed_of(s), seed=s.split_seed, test_fraction=s.test_fraction)
    take_split(splits, "train", s.data)
    if len(splits["train"].classes) < 2:
        raise DataError(f"{s.data} has one class, {splits['train'].classes[0]!r}; there is nothing to tell apart")
    if s.val_fraction:
        if "val" in splits:
            raise ConfigError(f"{s.data} has a val split of its own; leave val_fraction at 0")
        splits = hold_out_val(splits, s.val_fraction, s.split_seed)
        take_split(splits, "val", s.data)
    if s.test:
        take_split(splits, "test", s.data)
    bad = []
    if s.skip_bad:
        bad = find_bad([path for images in splits.values() for path in images.paths])
        splits = {name: drop_bad(images, bad) for name, images in splits.items()}
    present = set(splits["train"].labels)
    lacking = [c for i, c in enumerate(splits["train"].classes) if i not in present]
    if lacking:
        raise DataError(f"{s.data}: no readable training image of {', '.join(lacking[:10])}")
    return splits, bad


def train_images(s: Train, images: ImageList, p: Preprocessing, copies: int = 1) -> ImageDataset:
    """What the loader reads: augmented images, out of files or out of memory.

    Args:
        s: the recipe.
        images: of the train split.
        p: size and normalisation.
        copies: processes on this machine that each keep them in memory.
    """
    always, chance = train_steps(p, s.augment, s.crop, s.crop_scale)
    if s.cache == "ram":
        return CachedImages(images, always, chance, copies)
    return ImageDataset(images, v2.Compose([always, chance]))


def make_preprocessing(s: Train, model: Model) -> Preprocessing:
    """The backbone's, with what the settings say otherwise."""
    default = default_preprocessing(model.config.backbone, model.config.image_size)
    mean, std = tuple(s.mean or default.mean), tuple(s.std or default.std)
    return Preprocessing(default.image_size, s.resize_ratio, mean, std, s.resize)


def make_optimizer(s: Train, model: Model) -> torch.optim.Optimizer:
    """timm's optimiser of that name; ConfigError lists the names."""
    known = [str(name) for name in list_optimizers()]
    if s.optimizer not in known:
        raise ConfigError(f"unknown optimizer {s.optimizer!r}; choose from: {', '.join(known)}")
    groups = partial(parameter_groups, s)
    return create_optimizer_v2(model, opt=s.optimizer, lr=s.lr, momentum=s.momentum, param_group_fn=groups)


def parameter_groups(s: Train, model: Model) -> list[dict[str, Any]]:
    """timm's groups of what is trained, by weight decay and layer; what lies above the backbone apart, at `head_lr`."""
    common: Any = {"weight_decay": s.weight_decay, "no_weight_decay_list": model.no_weight_decay()}
    if s.layer_decay < 1:
        groups = param_groups_layer_decay(model, layer_decay=s.layer_decay, **common)
    else:
        groups = param_groups_weight_decay(model, **common)
    if s.head_lr is None:
        return groups
    inside = set(model.backbone.parameters())
    parts = [
        (group | {"params": [p for p in group["params"] if (p in inside) == below]}, below)
        for group in groups
        for below in (True, False)
    ]
    return [group | ({} if below else {"lr": s.head_lr}) for group, below in parts if group["params"]]


def make_schedule(s: Train, optimizer: Any, steps: int) -> Scheduler:
    """Linear warm-up (at most half of all steps), then cosine down to `min_lr` or decay by steps.

    Args:
        s: the recipe.
        optimizer: whose rate is set.
        steps: of the whole run.

    Returns:
        A schedule; `step_update(step)` sets the rate, which follows from the number of the step alone.
    """
    warmup = min(s.warmup_steps, steps // 2)
    peak = s.lr if s.head_lr is None else min(s.lr, s.head_lr)  # the lower one: no rate starts or ends above its own
    start = min(s.warmup_lr, peak)
    common: Any = {"warmup_t": warmup, "warmup_lr_init": start, "warmup_prefix": True, "t_in_epochs": False}
    if s.schedule == "step":
        every = max(1, round(s.decay_epochs * steps / s.epochs))
        return StepLRScheduler(optimizer, decay_t=every, decay_rate=s.decay_rate, **common)
    return CosineLRScheduler(optimizer, t_initial=steps - warmup, lr_min=min(s.min_lr, peak), **common)
