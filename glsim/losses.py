"""Floor 1: what training minimises.

A model in training mode names the terms of its loss in `Output.aux`, with what each needs; one that names none is
trained by the cross-entropy of its logits. `objective` adds the terms up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glsim.types import Output, choose


def objective(output: Output, labels: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """The sum of the terms in `output.aux`, or the cross-entropy of `output.logits` (B, C): a scalar.

    `labels` (B,); label smoothing (arXiv 1512.00567) acts in every cross-entropy.
    """
    terms = output.aux or {"cross_entropy": ((1.0, output.logits),)}
    losses = [choose(name, TERMS, "loss term")(given, labels, label_smoothing) for name, given in terms.items()]
    return torch.stack(losses).sum()


def cross_entropy(given: Sequence[tuple[float, Tensor]], labels: Tensor, label_smoothing: float) -> Tensor:
    """`given`: (weight, logits) pairs, summed. Logits (kB, C) are k views of each image, the batch repeated k times."""
    losses = [weight * _cross_entropy(logits, labels, label_smoothing) for weight, logits in given]
    return torch.stack(losses).sum()


def contrastive(cls: Tensor, labels: Tensor, label_smoothing: float, margin: float = 0.4) -> Tensor:
    """TransFG's contrastive loss on the class tokens (B, D) (arXiv 2103.07976, eq. 11).

    1/B^2 [sum over same labels (1 - cos) + sum over different ones max(cos - margin, 0)]
    """
    unit = F.normalize(cls, dim=-1)
    cos = unit @ unit.T
    same = labels[:, None] == labels[None, :]
    return torch.where(same, 1 - cos, (cos - margin).clamp(min=0)).mean()


def uncertainty(given: tuple[Tensor, Tensor], labels: Tensor, label_smoothing: float) -> Tensor:
    """DCAL's weighting of several cross-entropies by learned uncertainties (arXiv 2205.02151, eq. 8).

    `given`: logits (k, B, C) and w (k,); 1/2 sum of (exp(-w) CE + w).
    """
    logits, w = given
    losses = torch.stack([_cross_entropy(x, labels, label_smoothing) for x in logits])
    return 0.5 * ((-w).exp() * losses + w).sum()


def centre(given: tuple[Tensor, Tensor], labels: Tensor, label_smoothing: float, beta: float = 0.05) -> Tensor:
    """CAL's centre loss (arXiv 2108.08728): squared distance of the features (B, F) to their class's centre (C, F).

    Summed over F, mean over B; the distance is to the centre scaled to length one. A centre then moves, in place, by
    `beta` times the mean difference of its images (published: of the last one). It is a buffer, no parameter.
    """
    features, centres = given
    difference = features.float() - F.normalize(centres[labels], dim=-1)
    with torch.no_grad():
        alike = (labels[:, None] == labels[None, :]).sum(dim=1, keepdim=True)
        centres.index_add_(0, labels, beta * difference / alike)
    return difference.square().sum(dim=-1).mean()


# Terms by the name a model gives them in `Output.aux`: (what the model hands over, labels (B,), label smoothing).
TERMS: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "contrastive": contrastive,
    "uncertainty": uncertainty,
    "centre": centre,
}


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    repeated = labels.repeat(len(logits) // len(labels))
    return F.cross_entropy(logits.float(), repeated, label_smoothing=label_smoothing)
