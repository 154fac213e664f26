"""Calibration: temperature, margin of the early exit, threshold of rejection, fitted on a split.

Temperature: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from glsim.checkpoints.bundle import amend, load, preprocessing_of
from glsim.config import Calibrate
from glsim.data.catalog import prepared
from glsim.data.limits import limited
from glsim.data.loaders import make_loader
from glsim.data.readers import split_hash
from glsim.data.transforms import eval_transform
from glsim.environment import pick_device
from glsim.evaluation.confidence import NO_ANSWER, are_answers, calibration_error, find_threshold, graded, largest_rate
from glsim.evaluation.evaluate import read_split
from glsim.models.backbone import Model, StagedModel
from glsim.models.heads import lead
from glsim.types import ConfigError, DataError

COLDEST = 5.0  # logarithm of the highest temperature that is looked for, and of one over the lowest
WIDEST = 2.0  # a temperature that may as well be so many times higher or lower is not taken


class Answers(NamedTuple):
    """What a model said of every image of a split."""

    labels: Tensor  # (images,)
    logits: Tensor  # (images, C) after all it does
    first: Tensor | None = None  # (images, C) after the first pass, of a `StagedModel`


@limited
def run(s: Calibrate, progress: bool = True) -> dict[str, Any]:
    """The verb: fit temperature, margin and threshold, write them into the bundle; returns them, as plain values.

    The temperature stays 1 where the images cannot tell it, and `temperature_kept` says why. Raises ConfigError when
    `s.source` is no bundle folder, DataError for images that do not fit the model.
    """
    folder = Path(s.source)
    if not folder.is_dir():
        raise ConfigError(f"{s.source} is no folder: calibrate writes into the bundle; download or convert it first")
    model = load(folder)
    staged = isinstance(model, StagedModel)
    if isinstance(model, StagedModel):
        model.margin = None
    elif s.max_loss != Calibrate.max_loss:
        raise ConfigError(f"max_loss={s.max_loss}: {s.source} spares no second pass; train with --options.early_loss 1")
    data = prepared(s.data, s.dataset)
    images, _ = read_split(model, data, s.split)
    loader = make_loader(images, eval_transform(preprocessing_of(model)), s.batch_size, s.workers)
    said = ask(model.to(pick_device(s.device)).eval(), loader, progress)
    logits, found = said.logits, dict[str, Any]()
    if said.first is not None:
        margin, unsure = find_margin(said.first, said.logits, said.labels, s.max_loss)
        logits = torch.where(unsure[:, None], said.logits, said.first)
        found = {
            "margin": margin,
            "second_pass_share": float(unsure.float().mean()),
            "max_loss": s.max_loss,
            "correct_first": count_right(said.first, said.labels),
            "correct_second": count_right(said.logits, said.labels),
        }
    fitted = fit_temperature(logits, said.labels)
    temperature = fitted.value
    found |= {
        "data": Path(s.data).name,
        "split": s.split,
        "split_hash": split_hash({s.split: images}, data),
        "count": len(said.labels),
        "correct": count_right(logits, said.labels),
        "temperature": temperature,
        "temperature_interval": fitted.interval,
        "temperature_kept": fitted.why_not,
        "nll": [float(F.cross_entropy(logits / t, said.labels)) for t in (1.0, temperature)],
        "ece": [calibration_error(*graded(logits / t, said.labels)) for t in (1.0, temperature)],
    }
    if s.max_error is not None:
        confidences, right = graded(logits / temperature, said.labels)
        threshold, answered = find_threshold(confidences, right, s.max_error)
        found |= {
            "max_error": s.max_error,
            "threshold": threshold,
            "coverage": float(answered.float().mean()),
            "answered": int(answered.sum()),
            "answered_correct": int(right[answered].sum()),
            "error_at_most": largest_rate(int((~right[answered]).sum()), int(answered.sum())),
        }
    amend(folder, {"margin": found["margin"]} if staged else {}, calibration=found)
    return {"bundle": str(folder), **found}


@torch.no_grad()
def ask(model: Model, loader: Any, progress: bool = False) -> Answers:
    """Answer every image of `loader` (images (B, 3, H, W), labels (B,)); a `StagedModel` after one pass and two.

    Raises DataError where an answer is no number.
    """
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    for images, labels in tqdm(loader, unit="batch", disable=not progress):
        images = images.to(device)
        if isinstance(model, StagedModel):
            given, first, selection = model.first(images)
            second = model.second(images, given, selection.boxes).logits
            rows.append((labels, second.float().cpu(), first.float().cpu()))
        else:
            rows.append((labels, model(images).logits.float().cpu()))
    said = Answers(*(torch.cat(column) for column in zip(*rows, strict=True)))
    real = are_answers(said.logits) if said.first is None else are_answers(said.logits) & are_answers(said.first)
    if wrong := int((~real).sum()):
        raise DataError(f"{wrong} of {len(said.labels)} images: {NO_ANSWER}")
    return said


def find_margin(first: Tensor, second: Tensor, labels: Tensor, max_loss: float) -> tuple[float | None, Tensor]:
    """The smallest margin that costs at most `max_loss` points of accuracy, and who would be unsure (images,).

    `first`, `second` (images, C) are the logits after one pass and two. Only margins count above which no other one
    costs more: one that does well by chance in between is not taken. None: every image needs both passes.
    """
    order = (ahead := lead(first)).argsort()
    gained = ((second.argmax(1) == labels).long() - (first.argmax(1) == labels).long())[order]  # by its second pass
    ahead = ahead[order]
    lost = gained.flip(0).cumsum(0).flip(0)  # right answers fewer when the images from here on get one pass
    allowed = math.floor(max_loss / 100 * len(labels) + 1e-9)
    count = int((lost > allowed).nonzero().max()) + 1 if (lost > allowed).any() else 0  # images with a second pass
    if count == len(labels):
        return None, torch.ones_like(labels, dtype=torch.bool)
    margin = float(ahead[count - 1].nextafter(torch.tensor(2.0))) if count else 0.0
    return margin, lead(first) < margin


class Temperature(NamedTuple):
    """What logits are to be divided by, and how well the images tell."""

    value: float  # 1 where `why_not` says that it cannot be told
    interval: tuple[float, float] | None = None  # of 95 %, by the curvature of the likelihood
    why_not: str | None = None


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """The number that `logits` (images, C) are to be divided by for the best likelihood of `labels` (images,).

    The mean log-loss is convex in the inverse b of the temperature, its slope the mean over images of E[z] - z_label,
    where E is over the softmax of b z. So it has a minimum at a b above 0 if and only if the slope is below 0 at b = 0
    (labels have more than the mean logit) and above 0 for b without end (some label has less than the largest logit).
    Else, and where the images leave the temperature open by more than a factor of `WIDEST`, it stays 1.
    """
    gaps = logits.double() - logits.double().gather(1, labels[:, None])  # (images, C), 0 at the label

    def slope(inverse: float) -> tuple[float, float]:
        """The slope of the summed log-loss, and its curvature."""
        p = (inverse * gaps).softmax(dim=1)
        means = (p * gaps).sum(dim=1)
        return float(means.sum()), float((p * gaps**2).sum() - (means**2).sum())

    count = len(labels)
    if not bool((gaps > 0).any()):
        return Temperature(
            1.0, None, f"all {count} images are answered right, and the likelihood only grows as it falls to 0"
        )
    if slope(0.0)[0] >= 0:
        return Temperature(
            1.0,
            None,
            f"labels of {count} images have no more than the mean logit, and the likelihood only grows with it",
        )
    low, high = -COLDEST, COLDEST  # logarithms of the inverse
    if slope(math.exp(low))[0] >= 0 or slope(math.exp(high))[0] <= 0:
        return Temperature(
            1.0, None, f"the best one for {count} images is not in {math.exp(-COLDEST):.4f} to {math.exp(COLDEST):.0f}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle))[0] < 0 else (low, middle)
    inverse = math.exp(low)
    information = slope(inverse)[1] * inverse**2  # of the logarithm of the temperature
    off = 1.96 / math.sqrt(information) if information > 0 else math.inf
    if off > math.log(WIDEST):
        return Temperature(
            1.0,
            None,
            f"{count} images are too few: it may be {WIDEST:g} times the best one, {1 / inverse:.3g}, or less",
        )
    return Temperature(1 / inverse, (math.exp(-off) / inverse, math.exp(off) / inverse))


def count_right(logits: Tensor, labels: Tensor) -> int:
    """Images whose best class is their label."""
    return int((logits.argmax(dim=1) == labels).sum())
