"""`glsim train`: a model trained on a folder or list of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import Lines, show_skipped
from glsim.training.config import Train as Options
from glsim.training.config import find_checked_recipe

if TYPE_CHECKING:
    from glsim.training.train import TrainedRun

PURPOSE = "Train"
RECIPE = find_checked_recipe


def run(options: Options, progress: bool) -> TrainedRun:
    """Train it."""
    from glsim.training.train import train

    return train(options, progress)


def show(r: TrainedRun, options: Options) -> Lines:
    """Accuracies and where the bundle is."""
    if r.start is not None:
        yield f"started from {r.start}"
    yield f"trained {r.epoch} epochs: loss {r.train_loss:.3f}, {r.images_per_second} images/s"
    if r.batch_size < options.batch_size:
        yield f"batch_size {options.batch_size} was cut to {r.batch_size}: train has no more images for a step"
    for name, measured in (("val", r.val), ("test", r.test)):
        if measured is not None:
            yield f"{name}: top-1 {measured.top1:.2%} ({measured.correct} of {measured.count})"
    yield from show_skipped(r.skipped)
    yield f"bundle: {r.out} (curve.png, log.jsonl, metrics.json beside it)"
    if "test" in r.splits and r.test is None:
        named = f" --dataset {options.dataset}" if options.dataset is not None else ""
        named += f" --boxes {options.boxes}" if options.boxes is not None else ""
        yield f"next: glsim eval {r.out} --data {options.data}{named}"
