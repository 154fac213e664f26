"""Running sums of an epoch: loss, right answers, images, seconds; training that diverged is noticed here."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from glsim.data.loaders import TrainBatches
from glsim.data.readers import ImageList
from glsim.types import GlsimError


class Diverged(GlsimError):
    """The loss, or its gradient, is no longer a number."""


class TrainingMeans(NamedTuple):
    """What an epoch comes to, over all processes."""

    train_loss: float  # mean over images
    train_top1: float
    images_per_second: float
    seconds: float


class Tally:
    """The sums of an epoch so far, and the first step at which loss or gradient was no number."""

    def __init__(self, accelerator: Accelerator, sums: list[float] | None = None) -> None:
        self.accelerator, self.start, self.seconds = accelerator, time.perf_counter(), 0.0
        self.values = torch.zeros(3, device=accelerator.device)  # loss, right, images: of this process
        self.bad = torch.tensor(-1, device=accelerator.device)
        if sums is not None:
            own = 3 * accelerator.process_index
            self.seconds = sums[-1]
            self.values += torch.tensor(sums[own : own + 3], device=accelerator.device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, step: int, norm: Tensor | None = None) -> None:
        """Count one batch; does not wait for the device.

        Args:
            logits: (B, C).
            labels: (B,) classes, or (B, C) shares of a mixed image, of which the class with the largest is right.
            loss: () mean over the batch.
            step: the number of the step.
            norm: () of the gradient, where a step ends.
        """
        right = (logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))).sum()
        self.values += torch.stack((loss.detach() * len(labels), right, torch.full_like(loss, len(labels))))
        sound = loss.isfinite()
        if norm is not None and self.accelerator.scaler is None:  # which leaves such a step out, and scales less
            sound = sound & norm.isfinite()
        self.bad = torch.where((self.bad < 0) & ~sound, step, self.bad)

    def sums(self) -> list[float]:
        """Loss, right answers and images of each process in turn, and seconds: what a resumed epoch begins with."""
        return [*self.accelerator.gather(self.values).tolist(), self.elapsed()]

    def elapsed(self) -> float:
        """Seconds of the epoch so far, without the time between an interruption and the start that resumes it."""
        return self.seconds + time.perf_counter() - self.start

    def means(self) -> TrainingMeans:
        """The epoch as the log tells it."""
        loss, right, images = self.accelerator.reduce(self.values.clone(), "sum").tolist()
        seconds = self.elapsed()
        return TrainingMeans(loss / images, right / images, round(images / seconds, 1), round(seconds, 2))

    def __str__(self) -> str:
        loss, right, images = self.values.tolist()
        speed = images * self.accelerator.num_processes / self.elapsed()
        return f"loss {loss / images:.3f}, accuracy {right / images:.1%}, {speed:.0f} images/s"

    def check(self, batches: TrainBatches, images: ImageList, lr: float) -> None:
        """Look whether a loss or gradient was no number, in all processes alike; it waits for the device.

        Args:
            batches: which images each step had.
            images: of the train split.
            lr: the peak rate, for the message.

        Raises:
            Diverged: naming step and files.
        """
        bad = [step for step in self.accelerator.gather(self.bad).view(-1).tolist() if step >= 0]
        if bad:
            step = min(bad)
            names = ", ".join(str(images.paths[i]) for i in batches.step(step))
            raise Diverged(
                f"the loss or its gradient is no number at step {step}; try a smaller lr than {lr}, a longer warm-up, "
                f"or clip_grad. The images of that step: {names}"
            )
