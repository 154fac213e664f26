"""Calibration: temperature, margin of the early exit, threshold of rejection, fitted on a split.

Temperature: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from glsim.checkpoints.bundle import amend, load, preprocessing_of
from glsim.data.box_options import Boxed
from glsim.data.catalog import prepared
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.loaders import make_loader
from glsim.data.readers import split_hash
from glsim.data.transforms import eval_transform
from glsim.environment import pick_device
from glsim.evaluation.confidence import calibration_error, find_threshold, graded, largest_rate
from glsim.evaluation.evaluate import read_split
from glsim.files import document
from glsim.models.base import EarlyExitModel, Model
from glsim.models.heads import NO_ANSWER, are_answers, top2_margin
from glsim.types import ConfigError, DataError, optional

MAX_LOSS = 0.1  # points of accuracy
COLDEST = 5.0  # logarithm of the highest temperature that is looked for, and of one over the lowest
WIDEST = 2.0  # a temperature that may as well be so many times higher or lower is not taken


class Answers(NamedTuple):
    """What a model said of every image of a split."""

    labels: Tensor  # (images,)
    logits: Tensor  # (images, C) after all it does
    first: Tensor | None = None  # (images, C) after the first pass, of a `EarlyExitModel`


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted on the images of a split. Of `nll` and `ece` the first is before, the second after it."""

    bundle: str
    margin: float | None = optional(beside="max_loss")  # of the early exit; None: every image needs both passes
    second_pass_share: float | None = optional()  # of the images
    max_loss: float | None = optional()  # points of accuracy that skipping second passes may cost
    correct_first: int | None = optional()  # right answers of the first pass alone
    correct_second: int | None = optional()  # right answers of both passes, always
    data: str  # its name
    split: str
    split_hash: str
    count: int  # images
    correct: int  # right answers
    temperature: float
    temperature_interval: tuple[float, float] | None  # of 95 %
    temperature_kept: str | None  # why the temperature stays 1
    nll: list[float]  # mean log-loss
    ece: list[float]  # expected calibration error
    max_error: float | None = optional()  # points of the answers that may be wrong
    threshold: float | None = optional(beside="max_error")  # None: there is none
    coverage: float | None = optional()  # share of the images that are answered at the threshold
    answered: int | None = optional()  # images
    answered_correct: int | None = optional()
    error_at_most: float | None = optional()  # share of such answers that may be wrong, one-sided, 95 %


def calibrate_bundle(
    source: str | Path,
    data: str | Path,
    *,
    dataset: str | None = None,
    split: str = "val",
    max_loss: float = MAX_LOSS,
    max_error: float | None = None,
    batch_size: int = 32,
    workers: int = 2,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
    **boxed: Unpack[Boxed],
) -> Calibration:
    """Fit temperature, margin of the early exit and threshold of rejection on a split; write them into the bundle.

    The temperature stays 1 where the images cannot tell it, and `temperature_kept` says why.

    Args:
        source: a bundle folder, which is changed.
        data: what `glsim.data.readers:read_data` takes; with `dataset` prepared as that named data set.
        split: train, val, test, or all; images that the model was not trained on.
        max_loss: points of accuracy (of 100) that skipping second passes may cost on these images.
        max_error: points (of 100) of the answers that may be wrong: below the threshold found, they are rejected.
        max_megapixels: larger images are bad files.
        progress: draw a progress bar.
        boxed: see `glsim.data.box_options:Boxed`.

    Raises:
        ConfigError: when `source` is no bundle folder, or `max_loss` is given for a model without early exit.
        DataError: for images that do not fit the model.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(f"{source} is no folder: calibrate writes into the bundle; download or convert it first")
    with pixel_limit(max_megapixels):
        model = load(folder)
        if isinstance(model, EarlyExitModel):
            model.margin = None
        elif max_loss != MAX_LOSS:
            raise ConfigError(f"max_loss={max_loss}: {source} spares no second pass; train with --options.early_loss 1")
        place = prepared(data, dataset)
        images, _ = read_split(model, place, split, boxed)
        loader = make_loader(images, eval_transform(preprocessing_of(model)), batch_size, workers)
        said = ask(model.to(pick_device(device)).eval(), loader, progress)
    logits, chosen = said.logits, dict[str, Any]()
    if said.first is not None:
        margin, unsure = find_margin(said.first, said.logits, said.labels, max_loss)
        logits = torch.where(unsure[:, None], said.logits, said.first)
        chosen = {"margin": margin, "second_pass_share": float(unsure.float().mean()), "max_loss": max_loss}
        chosen["correct_first"] = count_right(said.first, said.labels)
        chosen["correct_second"] = count_right(said.logits, said.labels)
    temperature, interval, why_not = fit_temperature(logits, said.labels)
    before, after = (graded(logits / t, said.labels) for t in (1.0, temperature))
    if max_error is not None:
        chosen |= rejection(*after, max_error)
    found = Calibration(
        bundle=str(folder),
        **chosen,
        data=Path(data).name,
        split=split,
        split_hash=split_hash({split: images}, place),
        count=len(said.labels),
        correct=count_right(logits, said.labels),
        temperature=temperature,
        temperature_interval=interval,
        temperature_kept=why_not,
        nll=[float(F.cross_entropy(logits / t, said.labels)) for t in (1.0, temperature)],
        ece=[calibration_error(*before), calibration_error(*after)],
    )
    kept = document(found)
    del kept["bundle"]
    amend(folder, {"margin": found.margin} if said.first is not None else {}, calibration=kept)
    return found


def rejection(confidences: Tensor, right: Tensor, max_error: float) -> dict[str, Any]:
    """The fields of `Calibration` about the threshold that keeps the error of the answers at `max_error` points."""
    threshold, answered = find_threshold(confidences, right, max_error)
    return {
        "max_error": max_error,
        "threshold": threshold,
        "coverage": float(answered.float().mean()),
        "answered": int(answered.sum()),
        "answered_correct": int(right[answered].sum()),
        "error_at_most": largest_rate(int((~right[answered]).sum()), int(answered.sum())),
    }


@torch.no_grad()
def ask(model: Model, loader: Any, progress: bool = False) -> Answers:
    """Answer every image; an `EarlyExitModel` after one pass and after two.

    Args:
        model: in eval mode.
        loader: batches of images (B, 3, H, W) and labels (B,).
        progress: draw a progress bar.

    Raises:
        DataError: where an answer is no number.
    """
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    for images, labels in tqdm(loader, unit="batch", disable=not progress):
        images = images.to(device)
        if isinstance(model, EarlyExitModel):
            given, first, selection = model.first_pass(images)
            told = [model.second_pass(images, given, selection.boxes).logits, first]
        else:
            told = [model(images).logits]
        rows.append((labels, *(logits.float().cpu() for logits in told)))
    said = Answers(*(torch.cat(column) for column in zip(*rows, strict=True)))
    real = torch.stack([are_answers(logits) for logits in said[1:] if logits is not None]).all(dim=0)
    if wrong := int((~real).sum()):
        raise DataError(f"{wrong} of {len(said.labels)} images: {NO_ANSWER}")
    return said


def find_margin(first: Tensor, second: Tensor, labels: Tensor, max_loss: float) -> tuple[float | None, Tensor]:
    """The smallest margin of the early exit that costs little accuracy, and who would be unsure.

    Only margins count above which no other one costs more: one that does well by chance in between is not taken.

    Args:
        first: logits (images, C) after one pass.
        second: logits (images, C) after two.
        labels: (images,).
        max_loss: points (of 100) of accuracy that it may cost.

    Returns:
        The margin (None: every image needs both passes), and bool (images,), who goes on.
    """
    order = (ahead := top2_margin(first)).argsort()
    gained = ((second.argmax(1) == labels).long() - (first.argmax(1) == labels).long())[order]  # by its second pass
    ahead = ahead[order]
    lost = gained.flip(0).cumsum(0).flip(0)  # right answers fewer when the images from here on get one pass
    allowed = math.floor(max_loss / 100 * len(labels) + 1e-9)
    count = int((lost > allowed).nonzero().max()) + 1 if (lost > allowed).any() else 0  # images with a second pass
    if count == len(labels):
        return None, torch.ones_like(labels, dtype=torch.bool)
    margin = float(ahead[count - 1].nextafter(torch.tensor(2.0))) if count else 0.0
    return margin, top2_margin(first) < margin


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

    count, least, most = len(labels), math.exp(-COLDEST), math.exp(COLDEST)
    if not bool((gaps > 0).any()):
        why = f"all {count} images are answered right, and the likelihood only grows as it falls to 0"
    elif slope(0.0)[0] >= 0:
        why = f"labels of {count} images have no more than the mean logit, and the likelihood only grows with it"
    elif slope(least)[0] >= 0 or slope(most)[0] <= 0:
        why = f"the best one for {count} images is not in {least:.4f} to {most:.0f}"
    else:
        low, high = -COLDEST, COLDEST  # logarithms of the inverse
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(math.exp(middle))[0] < 0 else (low, middle)
        inverse = math.exp(low)
        information = slope(inverse)[1] * inverse**2  # of the logarithm of the temperature
        off = 1.96 / math.sqrt(information) if information > 0 else math.inf
        if off <= math.log(WIDEST):
            return Temperature(1 / inverse, (math.exp(-off) / inverse, math.exp(off) / inverse))
        why = f"{count} images are too few: it may be {WIDEST:g} times the best one, {1 / inverse:.3g}, or less"
    return Temperature(1.0, None, why)


def count_right(logits: Tensor, labels: Tensor) -> int:
    """Images whose best class is their label."""
    return int((logits.argmax(dim=1) == labels).sum())
