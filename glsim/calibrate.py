"""Floor 4: confidences to be taken at their word, which images need no second pass, which are better left unanswered.

All fitted on validation data.

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

from glsim.backbone import Model, StagedModel
from glsim.batches import make_loader
from glsim.bundle import amend, load, pick_device, preprocessing_of
from glsim.catalog import prepared
from glsim.confidence import calibration_error, find_threshold, graded
from glsim.config import Calibrate
from glsim.data import split_hash
from glsim.evaluate import read_split
from glsim.heads import lead
from glsim.images import limited
from glsim.transforms import eval_transform
from glsim.types import ConfigError


class Answers(NamedTuple):
    """What a model said of every image of a split."""

    labels: Tensor  # (images,)
    logits: Tensor  # (images, C) after all it does
    first: Tensor | None = None  # (images, C) after the first pass, of a `StagedModel`


@limited
def run(s: Calibrate, progress: bool = True) -> dict[str, Any]:
    """The verb: fit temperature, margin and threshold, write them into the bundle; returns them, as plain values.

    Raises ConfigError when `s.source` is no bundle folder, DataError for images that do not fit the model.
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
    temperature = fit_temperature(logits, said.labels)
    found |= {
        "data": Path(s.data).name,
        "split": s.split,
        "split_hash": split_hash({s.split: images}, data),
        "count": len(said.labels),
        "correct": count_right(logits, said.labels),
        "temperature": temperature,
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
        }
    amend(folder, {"margin": found["margin"]} if staged else {}, calibration=found)
    return {"bundle": str(folder), **found}


@torch.no_grad()
def ask(model: Model, loader: Any, progress: bool = False) -> Answers:
    """Answer every image of `loader` (images (B, 3, H, W), labels (B,)); a `StagedModel` after one pass and two."""
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
    return Answers(*(torch.cat(column) for column in zip(*rows, strict=True)))


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


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number that `logits` (images, C) are to be divided by for the best likelihood of `labels` (images,)."""
    inverse = torch.zeros((), requires_grad=True)  # its logarithm: convex in the inverse, positive by its exponent
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * inverse.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(step)
    return float((-inverse.detach()).clamp(-5, 5).exp())


def count_right(logits: Tensor, labels: Tensor) -> int:
    """Images whose best class is their label."""
    return int((logits.argmax(dim=1) == labels).sum())
