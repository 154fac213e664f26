"""Workloads that are timed: answers to batches, training steps, and images read, prepared and answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from glsim.checkpoints.bundle import METRICS_FILE, load, preprocessing_of
from glsim.checkpoints.config import read_metrics
from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.data.image_files import find_images
from glsim.data.limits import sharing
from glsim.data.loaders import ImageDataset
from glsim.data.readers import read_data
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.environment import pick_device
from glsim.evaluation.speed_settings import SpeedSettings
from glsim.inference.predictor import answers
from glsim.models import create_model
from glsim.models.base import EarlyExitModel, Model
from glsim.models.losses import objective
from glsim.types import ConfigError, DataError

AS_EXPORTED = ("float32", False, "cpu")  # dtype of the images, compiled, device


@dataclass(frozen=True)
class Job:
    """What a row measures."""

    method: str  # with its options: glsim:crop_size=112; or a source
    backbone: str  # "" and 0 for a source that is yet to be read: it has its own
    image_size: int | list[int]  # side, or height and width; pixels
    batch_size: int
    dtype: str
    compile: bool


Work = Callable[[], object]


def build(job: Job, s: SpeedSettings) -> Model:
    """The model of a row: a trained one out of a source, else one whose weights are random.

    Raises ConfigError for an exported graph that is to be anything but what it is, and for a compiled model with a
    margin, whose two passes `answers` calls one by one.
    """
    model = load(job.method) if s.sources else untrained(job, s)
    if isinstance(model, GraphModel) and (job.dtype, job.compile, pick_device(s.device).type) != AS_EXPORTED:
        raise ConfigError(f"{job.method} is exported and runs as it is: --device cpu --dtypes float32 --compile no")
    if isinstance(model, EarlyExitModel) and model.margin is not None and job.compile:
        raise ConfigError(f"{job.method} answers early (margin {model.margin:g}), which is not compiled: --compile no")
    return model


def untrained(job: Job, s: SpeedSettings) -> Model:
    """The method of a row with its options, random weights."""
    method, _, given = job.method.partition(":")
    options = {}
    for part in re.split(r",(?![^[]*\])", given) if given else []:  # not the comma of crop_size=[96,128]
        key, _, value = part.partition("=")
        options[key.strip()] = yaml.safe_load(value)
    torch.manual_seed(0)
    return create_model(method, job.backbone, s.num_classes, job.image_size, False, s.backbone_args, **options)


def about_source(source: str, model: Model) -> dict[str, Any]:
    """What a trained model says of itself: backbone, side of its images (height and width, if they differ), accuracy.

    Raises DataError for numbers that cannot be read.
    """
    height, width = model.config.image_size
    row = {"backbone": model.config.backbone, "image_size": height if height == width else [height, width]}
    folder = Path(source.removeprefix("local-dir:"))
    test = ((read_metrics(folder / METRICS_FILE) if folder.is_dir() else None) or {}).get("test")
    return row | {"accuracy": test["top1"]} if isinstance(test, dict) and "top1" in test else row


def test_images(model: Model, s: SpeedSettings) -> Tensor:
    """Images drawn evenly from the test split of `s.data` as `model` was trained, prepared for it."""
    seen = {"split_seed": 0, "test_fraction": 0.2} | model.config.data
    assert s.data is not None
    return _test_images(s.data, seen["split_seed"], seen["test_fraction"], preprocessing_of(model), s.images, s.workers)


@lru_cache(maxsize=2)
def _test_images(
    data: str, seed: int, fraction: float, preprocessing: Preprocessing, count: int, workers: int
) -> Tensor:
    splits = read_data(data, seed=seed, test_fraction=fraction)
    found = splits["test"].paths if "test" in splits else ()
    if len(found) < count:
        raise DataError(f"{data} has {len(found)} test images, {count} were asked for; fewer: --images")
    paths = [found[i * len(found) // count] for i in range(count)]
    return torch.cat(list(read(paths, preprocessing, 32, workers)))


def read(paths: Sequence[Path], preprocessing: Preprocessing, size: int, workers: int) -> Iterable[Tensor]:
    """Batches of images (B, 3, H, W) as they are prepared for a model."""
    dataset: Any = ImageDataset(paths, eval_transform(preprocessing))
    start = sharing() if workers else None
    return (images for images, _ in DataLoader(dataset, size, num_workers=workers, worker_init_fn=start))


def answering(model: Model, job: Job, device: torch.device, images: Tensor | None = None) -> Work:
    """An answer to a batch, weights and images of the dtype, in inference mode; waits for the device.

    Args:
        model: whose answers they are.
        job: batch, image size, dtype, compiled or not.
        device: where it runs.
        images: (.., 3, H, W): answer each whole batch of them, second passes regrouped as `predict` does it; None:
            noise.
    """
    net, dtype = compiled(model.eval(), job, device)
    if images is None:
        images = torch.randn(job.batch_size, 3, *model.config.image_size)
    batches = [batch for batch in images.to(device, dtype).split(job.batch_size) if len(batch) == job.batch_size]

    @torch.inference_mode()
    def work() -> None:
        for _ in answers(net, batches):
            pass
        wait(device)

    return work


def training(model: Model, job: Job, device: torch.device) -> Work:
    """A step on a batch with arbitrary labels: forward (autocast where the dtype is not float32), backward, SGD."""
    net, dtype = compiled(model.train(), job, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    images = torch.randn(job.batch_size, 3, *model.config.image_size, device=device)
    labels = torch.arange(job.batch_size, device=device) % model.config.num_classes

    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)

    return work


def compiled(model: Model, job: Job, device: torch.device) -> tuple[Any, torch.dtype]:
    """The model on its device, one that answers in the dtype of the row, compiled where that says so; and the dtype."""
    dtype = getattr(torch, job.dtype)
    model = model.to(device) if model.training else model.to(device, dtype)
    return (torch.compile(model) if job.compile else model), dtype


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def loaded(model: Model, job: Job, device: torch.device, s: SpeedSettings) -> float:
    """Images a second of one pass over those of `s.data`, at most `s.repeats` batches: read, prepared, answered.

    Args:
        model: which answers.
        job: batch, image size, dtype, compiled or not.
        device: where it runs.
        s: which images, and how many processes load them.
    """
    net, dtype = compiled(model.eval(), job, device)
    assert s.data is not None
    paths = find_images(s.data)[: s.repeats * job.batch_size]
    start = time.perf_counter()
    with torch.inference_mode():
        for images in read(paths, preprocessing_of(model), job.batch_size, s.workers):
            net(images.to(device, dtype))
        wait(device)
    return len(paths) / (time.perf_counter() - start)
