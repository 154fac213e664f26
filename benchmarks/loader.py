"""Images a second that are loaded beside those that the model can train on, and which of the two waits.

    python benchmarks/loader.py recipes/flowers12_glsim.yaml --data flowers12 --workers 2
    python benchmarks/loader.py recipes/flowers12_glsim.yaml --data flowers12 --workers 2 --cache ram

Loading: the training pipeline of the recipe with nothing done to the batches. Model: optimiser steps on one batch that
is there already. Together: a training loop over the loader. On a CPU the first two share the cores, so that together
they are slower than either alone; an accelerator should be near the slower one. Each is timed over `--seconds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from glsim import create_model, train
from glsim.adapt import adapt
from glsim.batches import TrainBatches, train_loader
from glsim.bundle import default_preprocessing
from glsim.config import Train, read_recipe
from glsim.evaluate import make_accelerator
from glsim.losses import objective
from glsim.transforms import Preprocessing


def main() -> None:
    """Parse, time loading, model and both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--cache", choices=("none", "ram"), default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=15.0, help="each is timed so long")
    arguments = parser.parse_args()
    given = {"workers": arguments.workers, "cache": arguments.cache, "batch_size": arguments.batch_size}
    values = read_recipe(arguments.recipe) | {k: v for k, v in given.items() if v is not None}
    s = Train(**{**values, "pretrained": False, "data": arguments.data, "out": "-"})

    accelerator = make_accelerator(None, s.precision)
    images = train.read_splits(s)[0]["train"]
    model = create_model(
        s.method, s.backbone, len(images.classes), s.image_size, False, s.backbone_args or None, **s.options
    )
    adapt(model, **{name: getattr(s, name) for name in ("freeze", "lora", "supcon", "grad_checkpointing", "compile")})
    default = default_preprocessing(model.config["backbone"], model.backbone.image_size)
    p = Preprocessing(default.image_size, s.resize_ratio, default.mean, default.std, s.resize)
    started = time.perf_counter()
    batches = TrainBatches(len(images), s.batch_size, 1, s.seed, s.repeats)
    loader: Any = train_loader(train.train_images(s, images, p), batches, s.workers)
    if s.cache == "ram":
        print(f"cache filled in {time.perf_counter() - started:.1f} s")
    model, optimizer, loader = accelerator.prepare(model, train.make_optimizer(s, model), loader)
    model.train()

    def step(batch: Any) -> None:
        with accelerator.autocast():
            loss = objective(model(batch[0]), batch[1], s.label_smoothing, s.focal)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def epochs() -> Iterator[Any]:
        for epoch in range(10**9):
            batches.epoch = epoch
            yield from loader

    loading = images_per_second(epochs(), lambda _: None, arguments.seconds)
    alone = images_per_second(repeat(next(iter(loader))), step, arguments.seconds)
    together = images_per_second(epochs(), step, arguments.seconds)
    print(f"{s.method} on {s.backbone}, batches of {batches.batch_size}, {s.workers} workers, cache {s.cache}, "
          f"{accelerator.device}")  # fmt: skip
    print(f"loading   {loading:8.0f} images/s")
    print(f"model     {alone:8.0f} images/s")
    print(f"together  {together:8.0f} images/s, {together / min(loading, alone):.0%} of the slower one")
    print(f"the {'model waits for the loader' if loading < alone else 'loader waits for the model'}")


def images_per_second(source: Iterable[Any], use: Any, seconds: float) -> float:
    """Images of the batches from `source` that `use` deals with in a second; the first two batches warm up."""
    count, start = 0, time.perf_counter()
    for i, batch in enumerate(source):
        use(batch)
        if i == 1:
            wait()
            count, start = 0, time.perf_counter()
        elif i > 1:
            count += len(batch[1])
            if time.perf_counter() - start > seconds:
                break
    wait()
    return count / (time.perf_counter() - start)


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
