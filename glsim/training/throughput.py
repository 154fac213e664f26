"""Throughput of training: images a second that are loaded, beside those that the model can use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from tqdm import tqdm

from glsim.config import Bench, change_recipe
from glsim.data.loaders import TrainBatches, read, train_loader
from glsim.data.transforms import batch_mixing
from glsim.environment import environment, make_accelerator
from glsim.files import make_folder, write_json
from glsim.models import create_model
from glsim.models.losses import objective
from glsim.training.adapt import adapt
from glsim.training.components import make_optimizer, make_preprocessing, read_splits, train_images
from glsim.training.train import explain_failures

KINDS = ("loading", "model", "together")


def run(s: Bench, progress: bool = True) -> dict[str, Any]:
    """`glsim bench --loader`: a rate in images a second for each of `KINDS`, what `waits`, and what was measured.

    Loading: the training pipeline of the recipe, nothing done to its batches. Model: steps on one batch that is there
    already. Together: steps on what is loaded. A CPU does both, and together they are slower than either alone; an
    accelerator should come near the slower one. Epochs follow each other as in training, the start of the processes
    that load included. `cache_seconds` is what it took to fill the cache.
    """
    more = {} if s.workers is None else {"workers": s.workers}
    t = change_recipe(str(s.loader), s.train, data=s.data, out="-", pretrained=False, resume=False, test=False, **more)
    images = read_splits(t)[0]["train"]
    accelerator = make_accelerator(s.device, t.precision)
    classes = len(images.classes)
    model = create_model(t.method, t.backbone, classes, t.image_size, False, t.backbone_args or None, **t.options)
    adapt(model, **{name: getattr(t, name) for name in ("freeze", "lora", "supcon", "grad_checkpointing", "compile")})
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
    result: dict[str, Any] = {
        "method": t.method,
        "backbone": model.config["backbone"],
        "image_size": list(model.backbone.image_size),
        "batch_size": batches.batch_size,
        "workers": t.workers,
        "cache": t.cache,
        "cache_seconds": round(filled, 1) if t.cache == "ram" else None,
        "images": len(images),
    }
    for kind in tqdm(KINDS, disable=not progress):
        source, use = works[kind]
        with explain_failures(batches, t.workers):
            result[kind] = images_per_second(source(), use, s.seconds)
    result["waits"] = "model" if result["loading"] < result["model"] else "loader"
    result["environment"] = environment(accelerator.device)
    if s.out is not None:
        write_json(make_folder(s.out) / "bench.json", result)
    return result


def images_per_second(
    source: Iterable[Any],
    use: Callable[[Any], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Images of the batches from `source` that `use` deals with in a second; the first two batches warm up."""
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


def as_text(r: dict[str, Any]) -> str:
    """The three rates, and who waits."""
    height, width = r["image_size"]
    other = {"model": "loader", "loader": "model"}[r["waits"]]
    share = r["together"] / min(r["loading"], r["model"])
    lines = [
        f"{r['method']} on {r['backbone']}, {width} x {height} pixels, batches of {r['batch_size']}; "
        f"{r['workers']} workers, cache {r['cache']}; {r['environment']['device']}",
        *[f"cache filled in {r['cache_seconds']} s"] * (r["cache_seconds"] is not None),
        *(f"{kind:8} {r[kind]:9,.1f} images/s" for kind in KINDS),
    ]
    lines[-1] += f", {share:.0%} of the slower one, {r['together'] / r['model']:.0%} of the model alone"
    return "\n".join([*lines, f"the {r['waits']} waits for the {other}"])
