"""Measures of confidence: calibration error, and the error when only confident answers are given.

Selective classification: Geifman and El-Yaniv, arXiv 1705.08500; area under the curve (AURC): arXiv 1805.08206.
`confidences` (images,) are probabilities of the answers, `right` (images,) bool says whether they are correct.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

BINS = 15  # of the expected calibration error, as in Guo et al., arXiv 1706.04599


def calibration_error(confidences: Tensor, right: Tensor) -> float:
    """Expected calibration error over 15 bins: mean distance of confidence and accuracy."""
    return float(binary_calibration_error(confidences.clamp(0, 1), right.long(), n_bins=BINS))


def graded(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences of the answers that `logits` (images, C) give, and whether they are the `labels` (images,)."""
    confidences, guesses = logits.softmax(dim=1).max(dim=1)
    return confidences, guesses == labels


class Reliability(NamedTuple):
    """What became of the answers of each bin of confidence; 0 where a bin is empty."""

    images: Tensor  # (15,) how many
    confidence: Tensor  # (15,) mean
    accuracy: Tensor  # (15,)


def reliability(confidences: Tensor, right: Tensor) -> Reliability:
    """The bins that the calibration error is the mean over, each up to its upper edge, without it."""
    index = (confidences.double() * BINS).long().clamp(0, BINS - 1)
    count, sums, hits = (
        torch.zeros(BINS, dtype=torch.double).index_add(0, index, values.double())
        for values in (torch.ones_like(confidences), confidences, right)
    )
    return Reliability(count.long(), sums / count.clamp(min=1), hits / count.clamp(min=1))


class RiskCoverage(NamedTuple):
    """What is answered, and how wrongly, at each threshold that makes a difference, the highest first; all (K,)."""

    thresholds: Tensor  # the distinct confidences: images that reach one are answered
    answered: Tensor  # images
    wrong: Tensor  # of them

    @property
    def coverage(self) -> Tensor:
        """Share of the images that are answered (K,)."""
        return self.answered / self.answered[-1]

    @property
    def error(self) -> Tensor:
        """Share of the answered images that are wrong (K,)."""
        return self.wrong / self.answered

    @property
    def area(self) -> float:
        """AURC: the error among the images at least as confident as one, mean over all images; lower is better.

        Images of the same confidence are answered together, so their order does not matter.
        """
        sizes = self.answered.diff(prepend=self.answered.new_zeros(1))
        return float((sizes * self.error).sum() / self.answered[-1])

    def points(self, count: int = 20) -> list[dict[str, float]]:
        """The curve at `count` even steps of coverage, each with the highest threshold that covers as much."""
        steps = torch.arange(1, count + 1, dtype=torch.double) / count
        rows = torch.searchsorted(self.coverage, steps - 1e-9).unique()
        columns = (values[rows].tolist() for values in (self.coverage, self.error, self.thresholds))
        return [{"coverage": c, "error": e, "threshold": t} for c, e, t in zip(*columns, strict=True)]


def risk_coverage(confidences: Tensor, right: Tensor) -> RiskCoverage:
    """The curve of at least one image."""
    order = confidences.argsort(descending=True)
    values = confidences.double()[order]
    last = torch.cat((values[1:] != values[:-1], values.new_ones(1, dtype=torch.bool)))  # of equal confidences
    answered = torch.arange(1, len(values) + 1, dtype=torch.double)
    wrong = (~right.bool())[order].double().cumsum(0)
    return RiskCoverage(values[last], answered[last], wrong[last])


def largest_rate(wrong: int, count: int) -> float:
    """The error rate that `wrong` of `count` answers leave possible: upper end of Wilson's interval, 95 %, one-sided.

    1 without answers. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if not count:
        return 1.0
    z, rate = 1.6449, wrong / count
    spread = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return min(1.0, (rate + z**2 / (2 * count) + spread) / (1 + z**2 / count))


def find_threshold(confidences: Tensor, right: Tensor, max_error: float) -> tuple[float | None, Tensor]:
    """The lowest threshold at which few of the answers are wrong, and who answers.

    Only thresholds count above which no other one is worse: one that does well by chance in between is not taken. A
    single wrong image among the surest few says little of a rate, so that it alone does not make one worse. The
    threshold lies midway to the next lower confidence.

    Args:
        confidences: (images,).
        right: bool (images,).
        max_error: points (of 100) of the answers that may be wrong.

    Returns:
        The threshold (None: there is none, and nobody answers), and bool (images,), who answers.
    """
    curve = risk_coverage(confidences, right)
    allowed = max_error / 100 * curve.answered + 1e-9
    worse = (curve.wrong > allowed.clamp(min=1)).nonzero()
    end = int(worse[0]) if len(worse) else len(allowed)
    good = (curve.wrong <= allowed)[:end].nonzero()
    if not len(good):
        return None, torch.zeros_like(right, dtype=torch.bool)
    row = int(good[-1])
    threshold = float(curve.thresholds[row : row + 2].mean()) if row + 1 < len(allowed) else 0.0
    return threshold, confidences.double() >= threshold
