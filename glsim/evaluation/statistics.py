"""Bootstrap intervals of means over images, and McNemar's exact test."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

RESAMPLES, LEVEL = 1000, 0.95  # of an interval
AT_ONCE = 2**22  # images drawn at once: 64 MB

Key = TypeVar("Key")


def bootstrap_ci(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means over images and their 95 % intervals by the bootstrap.

    Images are drawn with replacement, the same ones for all columns. The draws are most of the work: call it once for
    all columns.

    Args:
        values: (images, M), NaN left out.
        resamples: draws.
        seed: of them.

    Returns:
        (3, M): mean, low, high. NaN for a column without a number, and for both ends of one with a single number.
    """
    values = values.double().cpu()
    mean, images = values.nanmean(dim=0, keepdim=True), len(values)
    there, values = values.isfinite().double(), values.nan_to_num()
    generator, one = torch.Generator().manual_seed(seed), torch.ones((), dtype=torch.double)
    means = []
    for part in torch.arange(resamples).split(max(1, AT_ONCE // images)):
        draws = torch.randint(images, (len(part), images), generator=generator)
        counts = torch.zeros(draws.shape, dtype=torch.double).scatter_add_(1, draws, one.expand_as(draws))
        means.append((counts @ values) / (counts @ there))  # part M
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.double)
    ends = torch.cat(means).nanquantile(tail, dim=0).masked_fill(there.sum(dim=0) < 2, torch.nan)
    return torch.cat((mean, ends))


def as_numbers(
    columns: dict[Key, Tensor], resamples: int = RESAMPLES, seed: int = 0
) -> dict[Key, list[float | None] | None]:
    """Mean, low and high of every column by `bootstrap_ci`; None where there is none, or no mean either.

    Args:
        columns: by name, (images,).
        resamples: draws of the bootstrap.
        seed: of them.
    """
    if not columns:
        return {}
    found = bootstrap_ci(torch.stack(tuple(columns.values()), dim=1), resamples, seed)
    rows = [[value if value == value else None for value in row] for row in found.T.tolist()]
    return {name: None if row[0] is None else row for name, row in zip(columns, rows, strict=True)}


def signed(mean: float, low: float | None, high: float | None, digits: int = 1) -> str:
    """A difference as `as_numbers` gives it, for people: "+1.2 (-0.3 to +2.7)", or "+1.2" without an interval.

    Args:
        mean: the difference.
        low, high: ends of its interval; None: there is none.
        digits: after the point.
    """
    mean, *ends = (round(value, digits) + 0.0 for value in (mean, low, high) if value is not None)  # no -0.0
    between = f" ({ends[0]:+.{digits}f} to {ends[1]:+.{digits}f})" if ends else ""
    return f"{mean:+.{digits}f}{between}"


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: how likely `b` and `c` images that only one of two models gets right are at
    least as uneven by chance, each of them falling to either side with probability 1/2."""
    n, term, total = b + c, 1, 0
    for i in range(min(b, c) + 1):
        total += term  # n choose i
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)
