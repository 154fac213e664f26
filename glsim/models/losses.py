"""Loss terms by name, and the sum that training minimises.

A model in training mode names the terms of its loss in `Output.aux`, with what each needs; one that names none is
trained by the cross-entropy of its logits. `objective` adds the terms up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from glsim.types import ConfigError, Output, choose


def objective(output: Output, labels: Tensor, label_smoothing: float = 0.1, focal: float = 0.0) -> Tensor:
    """What training minimises: the sum of a model's loss terms, a scalar.

    Args:
        output: of a model in training mode; without terms in `aux` the cross-entropy of its logits is taken.
        labels: (B,), or (B, C) shares of each class where images were mixed.
        label_smoothing: in every cross-entropy (arXiv 1512.00567).
        focal: exponent in every cross-entropy (arXiv 1708.02002); 0: none.

    Raises:
        ConfigError: for an unknown term, or one that needs one class an image where labels are shares.
    """
    terms = output.aux or {"cross_entropy": ((1.0, output.logits),)}
    losses = []
    for name, given in terms.items():
        term = choose(name, TERMS, "loss term")
        if name in CLASSIFYING:
            losses.append(term(given, labels, label_smoothing, focal))
        elif labels.ndim == 1:
            losses.append(term(given, labels, label_smoothing))
        else:
            raise ConfigError(f"the loss term {name!r} needs one class an image; leave mixup and cutmix at 0")
    return torch.stack(losses).sum()


def cross_entropy(
    given: Sequence[tuple[float, Tensor]], labels: Tensor, label_smoothing: float, focal: float = 0.0
) -> Tensor:
    """A weighted sum of cross-entropies.

    Args:
        given: (weight, logits) pairs; logits (kB, C) are k views of each image, the batch repeated k times.
        labels: (B,), or (B, C) shares.
        label_smoothing: share of the label that all classes get alike.
        focal: exponent; 0: none.
    """
    losses = [weight * _cross_entropy(logits, labels, label_smoothing, focal) for weight, logits in given]
    return torch.stack(losses).sum()


def contrastive(cls: Tensor, labels: Tensor, label_smoothing: float, margin: float = 0.4) -> Tensor:
    """TransFG's contrastive loss (arXiv 2103.07976, eq. 11).

    1/B^2 [sum over same labels (1 - cos) + sum over different ones max(cos - margin, 0)]

    Args:
        cls: class tokens (B, D).
        labels: (B,).
        label_smoothing: not used.
        margin: similarity up to which another class costs nothing.
    """
    with torch.autocast(cls.device.type, enabled=False):
        unit = F.normalize(cls.float(), dim=-1)
        cos = unit @ unit.T
    same = labels[:, None] == labels[None, :]
    return torch.where(same, 1 - cos, (cos - margin).clamp(min=0)).mean()


def supervised_contrastive(
    given: tuple[float, Tensor], labels: Tensor, label_smoothing: float, temperature: float = 0.1
) -> Tensor:
    """Supervised-contrastive loss (arXiv 2004.11362, eq. 2).

    For each image that has another of its class in the batch: the mean over those of -log softmax over all other images
    of cos / temperature; then the mean over these images, 0 where there are none.

    Args:
        given: a weight, and vectors (B, D).
        labels: (B,).
        label_smoothing: not used.
        temperature: divides the cosine.
    """
    weight, vectors = given
    unit = F.normalize(vectors.float(), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):  # a temperature of 0.1 leaves half precision two digits
        cos = unit @ unit.T
    log_share = (cos / temperature).masked_fill(itself, torch.finfo().min).log_softmax(dim=-1)
    same = (labels[:, None] == labels[None, :]) & ~itself
    others = same.sum(dim=-1)
    each = -log_share.where(same, 0.0).sum(dim=-1) / others.clamp(min=1)
    return weight * each.sum() / (others > 0).sum().clamp(min=1)


def uncertainty(given: tuple[Tensor, Tensor], labels: Tensor, label_smoothing: float, focal: float = 0.0) -> Tensor:
    """DCAL's weighting of several cross-entropies by learned uncertainties (arXiv 2205.02151, eq. 8).

    1/2 sum over k of (exp(-w) CE + w)

    Args:
        given: logits (k, B, C), and w (k,).
        labels: (B,), or (B, C) shares.
        label_smoothing: share of the label that all classes get alike.
        focal: exponent; 0: none.
    """
    logits, w = given
    losses = torch.stack([_cross_entropy(x, labels, label_smoothing, focal) for x in logits])
    return 0.5 * ((-w).exp() * losses + w).sum()


def centre(given: tuple[Tensor, Tensor], labels: Tensor, label_smoothing: float, beta: float = 0.05) -> Tensor:
    """CAL's centre loss (arXiv 2108.08728): squared distance of features to their class's centre.

    Summed over F, mean over B; the distance is to the centre scaled to length one. A centre then moves, in place, by
    `beta` times the mean difference of its images (published: of the last one), those of all processes.

    Args:
        given: features (B, F), and centres (C, F), a buffer and no parameter.
        labels: (B,).
        label_smoothing: not used.
        beta: step of a centre.
    """
    features, centres = given
    difference = features.float() - F.normalize(centres[labels], dim=-1)
    with torch.no_grad():
        moves, whose = _of_all_processes(difference.detach()), _of_all_processes(labels)
        alike = (whose[:, None] == whose[None, :]).sum(dim=1, keepdim=True)
        centres.index_add_(0, whose, beta * moves / alike)
    return difference.square().sum(dim=-1).mean()


def background(
    given: Sequence[tuple[float, Tensor]], labels: Tensor, label_smoothing: float, focal: float = 0.0
) -> Tensor:
    """PIM's loss of places that were not chosen (arXiv 2202.03822, eq. 4): tanh of their logits goes towards -1.

    Args:
        given: (weight, logits (B, n, C)) pairs; of each the mean squared difference.
        labels, label_smoothing, focal: not used.
    """
    return torch.stack([weight * (logits.float().tanh() + 1).square().mean() for weight, logits in given]).sum()


def refinement(
    given: Sequence[tuple[float, float, Tensor, Tensor]], labels: Tensor, label_smoothing: float, focal: float = 0.0
) -> Tensor:
    """HERBS' high-temperature refinement (arXiv 2303.06442, eq. 3): classifiers follow later ones, softened.

    KL(softmax(later / T) || softmax(earlier / T)), a mean over images, places and classes, no gradient to the later.

    Args:
        given: (weight, T, earlier, later), logits (B, S, C).
        labels, label_smoothing, focal: not used.
    """
    losses = []
    for weight, t, earlier, later in given:
        target, log_p = (later.detach().float() / t).softmax(dim=-1), (earlier.float() / t).log_softmax(dim=-1)
        losses.append(weight * F.kl_div(log_p, target, reduction="none").mean())
    return torch.stack(losses).sum()


def exclusion(
    given: tuple[float, float, int, Tensor], labels: Tensor, label_smoothing: float, focal: float = 0.0
) -> Tensor:
    """IFA's mutual exclusion (ISCAS 2022): class tokens of different blocks are pushed apart, so it is below zero.

    - weight T^2 sum over i of KL(softmax(c_(i+d) / T) || softmax(c_i / T)) over channels, a mean over images.

    Args:
        given: weight, T, d, and class tokens (B, D, L).
        labels, label_smoothing, focal: not used.
    """
    weight, t, d, tokens = given
    scaled = tokens.float().transpose(1, 2) / t  # B L D
    target, log_p = scaled[:, d:].softmax(dim=-1), scaled[:, :-d].log_softmax(dim=-1)
    return -weight * t**2 * F.kl_div(log_p, target, reduction="none").sum(dim=(1, 2)).mean()


def pairs(
    given: tuple[float, float, Tensor, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]],
    labels: Tensor,
    label_smoothing: float,
) -> Tensor:
    """API-Net's losses of pairs (arXiv 2002.10191, eq. 6 to 8).

    Every image with the nearest of its class and with the nearest of another one, where the batch has such: the
    cross-entropy of all four answers, and of the true class' probability by the partner's gate how far it comes within
    a margin of that by its own.

    Args:
        given: weight of the ranking, margin, vectors (B, D), and what gives four logits (P, C) of two vectors (P, D).
        labels: (B,).
        label_smoothing: in the cross-entropy.
    """
    weight, margin, x, compare = given
    one, other, there = find_pairs(x, labels)
    by_own, others_by_own, by_other, others_by_other = compare(x[one], x[other])
    truth, kept = torch.cat((labels[one], labels[other])), torch.cat((there, there)).float()
    good, bad = torch.cat((by_own, others_by_own)).float(), torch.cat((by_other, others_by_other)).float()
    each = [F.cross_entropy(y, truth, label_smoothing=label_smoothing, reduction="none") for y in (good, bad)]
    p, q = (y.softmax(dim=-1).gather(1, truth[:, None])[:, 0] for y in (good, bad))
    total = (each[0] + each[1]) / 2 + weight * (q - p + margin).clamp(min=0)
    return (total * kept).sum() / kept.sum().clamp(min=1)


def find_pairs(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For vectors (B, D) the indices (2B,) of an image and of the nearest of its class, then of another class, and
    whether there is one. (Published: the first image of the batch where there is none.)"""
    distance = torch.cdist(x.detach().float(), x.detach().float())
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    alike = labels[:, None] == labels[None, :]
    allowed = torch.cat((alike & ~itself, ~alike))  # 2B B
    nearest = distance.repeat(2, 1).masked_fill(~allowed, torch.inf).argmin(dim=1)
    return torch.arange(len(x), device=x.device).repeat(2), nearest, allowed.any(dim=1)


# Terms by the name a model gives them in `Output.aux`: (what the model hands over, labels (B,), label smoothing).
TERMS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "contrastive": contrastive,
    "supervised_contrastive": supervised_contrastive,
    "uncertainty": uncertainty,
    "centre": centre,
    "background": background,
    "refinement": refinement,
    "exclusion": exclusion,
    "pairs": pairs,
}
# These take shares of classes as labels too, and the focal exponent, or read neither.
CLASSIFYING = {"cross_entropy", "uncertainty", "background", "refinement", "exclusion"}


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, focal: float) -> Tensor:
    logits = logits.float()
    repeated = labels.repeat(len(logits) // len(labels), *[1] * (labels.ndim - 1))
    if not focal:
        return F.cross_entropy(logits, repeated, label_smoothing=label_smoothing)
    shares = F.one_hot(repeated, logits.shape[-1]) if labels.ndim == 1 else repeated
    shares = shares * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    log_p = logits.log_softmax(dim=-1)
    return -(shares * (1 - log_p.exp()) ** focal * log_p).sum(dim=-1).mean()


def _of_all_processes(rows: Tensor) -> Tensor:
    """`rows` (B, ..) of every process of the run, one after the other."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
