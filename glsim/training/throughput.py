"""Throughput of training: images a second that are loaded, beside those that the model can use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.loaders import TrainBatches, read, train_loader
from glsim.data.transforms import batch_mixing
from glsim.environment import environment, make_accelerator
from glsim.files import document, make_folder, write_json
from glsim.models import create_model
from glsim.models.losses import objective
from glsim.training.adapt import SETTINGS as ADAPTATIONS
from glsim.training.adapt import adapt
from glsim.training.components import make_optimizer, make_preprocessing, read_splits, train_images
from glsim.training.config import Train, change_recipe
from glsim.training.train import explain_failures


@dataclass(frozen=True)
class Throughput:
    """Rates in images a second, and what was measured."""

    method: str
    backbone: str
    image_size: list[int]  # height and width, pixels
    batch_size: int
    workers: int
    cache: str
    cache_seconds: float | None  # what it took to fill the cache
    images: int  # of the training split
    loading: float
    model: float
    together: float
    waits: Literal["model", "loader"]  # the faster one
    environment: dict[str, Any]


def measure_throughput(
    recipe: str | Path,
    data: str | Path,
    *,
    train: Mapping[str, Any] | None = None,
    seconds: float = 15.0,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Throughput:
    """Measure how many images a second training loads, and how many the model can use.

    Loading: the training pipeline of the recipe, nothing done to its batches. Model: steps on one batch that is there
    already. Together: steps on what is loaded. A CPU does both, and together they are slower than either alone; an
    accelerator should come near the slower one. Epochs follow each other as in training, the start of the processes
    that load included.

    Args:
        recipe: file, or name of a recipe of the package.
        data: what `glsim.data.readers:read_data` takes.
        train: settings in place of the recipe's.
        seconds: how long each of the three is timed.
        workers: processes that load images; by default those of the recipe.
        max_megapixels: larger images are bad files.
        out: folder for bench.json.
        progress: draw a progress bar.

    Raises:
        ConfigError: for a recipe or settings that do not fit.
        DataError: for data that cannot be read.
    """
    fixed: dict[str, Any] = {"data": str(data), "out": "-", "pretrained": False, "resume": False, "test": False}
    if workers is not None:
        fixed["workers"] = workers
    t = change_recipe(recipe, dict(train or {}), **fixed)
    with pixel_limit(max_megapixels):
        result = _measure(t, seconds, device, progress)
    if out is not None:
        write_json(make_folder(out) / "bench.json", document(result))
    return result


def _measure(t: Train, seconds: float, device: str | None, progress: bool) -> Throughput:
    images = read_splits(t)[0]["train"]
    accelerator = make_accelerator(device, t.precision)
    classes = len(images.classes)
    model = create_model(t.method, t.backbone, classes, t.image_size, False, t.backbone_args or None, **t.options)
    adapt(model, **{name: getattr(t, name) for name in ADAPTATIONS}, device=accelerator.device)
    start = time.perf_counter()
    dataset = train_images(t, images, make_preprocessing(t, model))
    filled = time.perf_counter() - start
    batches = TrainBatches(len(images), t.batch_size, 1, t.seed, t.repeats)
    mixing = batch_mixing(t.mixup, t.cutmix, classes)
    net, optimizer, loader = accelerator.prepare(
        model, make_optimizer(t, model), train_loader(dataset, batches, t.workers)
    )
    net.train()

    def step(batch: Any) -> None:
        pixels, labels = mixing(*batch)
        with accelerator.autocast():
            loss = objective(net(pixels), labels, t.label_smoothing, t.focal)
        accelerator.backward(loss)
        if t.clip_grad:
            accelerator.clip_grad_norm_(net.parameters(), t.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    def epochs() -> Iterator[Any]:
        while True:
            yield from read(loader)
            batches.epoch += 1

    works: dict[str, tuple[Callable[[], Iterable[Any]], Callable[[Any], object]]] = {
        "loading": (epochs, lambda _: None),
        "model": (lambda: repeat(next(epochs())), step),
        "together": (epochs, step),
    }
    rates = {}
    for kind, (source, use) in tqdm(works.items(), disable=not progress):
        with explain_failures(batches, t.workers):
            rates[kind] = images_per_second(source(), use, seconds)
    return Throughput(
        method=t.method,
        backbone=model.config.backbone,
        image_size=list(model.config.image_size),
        batch_size=batches.batch_size,
        workers=t.workers,
        cache=t.cache,
        cache_seconds=round(filled, 1) if t.cache == "ram" else None,
        images=len(images),
        **rates,
        waits="model" if rates["loading"] < rates["model"] else "loader",
        environment=environment(accelerator.device),
    )


def images_per_second(
    source: Iterable[Any],
    use: Callable[[Any], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """How many images are dealt with in a second; the first two batches warm up.

    Args:
        source: batches.
        use: what is done with each.
        seconds: to stop after.
        clock: seconds.
    """
    count = start = 0.0
    for i, batch in enumerate(source):
        use(batch)
        if i == 1:
            wait()
            start = clock()
        elif i > 1:
            count += len(batch[1])
            if clock() - start > seconds:
                break
    wait()
    return count / (clock() - start)


def wait() -> None:
    """Until an accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
