"""Faithfulness of patch scores (ROAD): patches removed in the order of their scores, best or worst first.

Remove and debias (ROAD; Rong et al., arXiv 2202.00449): what is removed is imputed from its surroundings, so that a
removed patch tells neither the network nor its shape that something is missing. Written from the paper: its authors'
code, and the libraries that took it over, solve one image at a time through SciPy behind OpenCV and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glsim.evaluation.localization_metrics import patch_lines

WEIGHTS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))  # of the eight neighbours (section 4)
NOISE = 0.01  # standard deviation of what is added to imputed pixels, normalised as the network's input is
SHARES = tuple(i / 10 for i in range(1, 10))  # of the patches


def impute(images: Tensor, removed: Tensor, noise: Tensor | None = None, tolerance: float = 1e-4) -> Tensor:
    """Noisy linear imputation (ROAD): every removed pixel becomes the weighted mean of its neighbours, removed or not.

    At the border the weights of the neighbours there are count in full. That is one linear system an image, symmetric
    and positive: solved by conjugate gradients for all at once. Blocks of 2, 4, 8 .. pixels precondition it, else the
    way across a hole is long.

    Args:
        images: (B, 3, H, W).
        removed: bool (B, H, W), not all of an image.
        noise: (B, 3, H, W), added to what was imputed.
        tolerance: share of the right side that no residual exceeds at the end.
    """
    hole = removed[:, None].to(images.dtype)
    kernel = torch.tensor(WEIGHTS, dtype=images.dtype, device=images.device).expand(images.shape[1], 1, 3, 3)

    def around(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])

    degree = around(torch.ones_like(images[:1]))

    def apply(x: Tensor) -> Tensor:
        return hole * (degree * x - around(x))

    known = images * (1 - hole)
    start = _spread(known, 1 - hole) * hole
    found = start
    residual = hole * around(known) - apply(start)
    better = hole * _blocks(residual)
    direction, size = better, _dot(residual, better)
    target = tolerance**2 * _dot(hole * around(known), hole * around(known)).clamp(min=1e-12)
    for step in range(4 * sum(images.shape[-2:])):
        if step % 5 == 0 and bool((_dot(residual, residual) <= target).all()):
            break
        turned = apply(direction)
        stride = size / _dot(direction, turned).clamp(min=1e-30)
        found = found + stride * direction
        residual = residual - stride * turned
        better = hole * _blocks(residual)
        again = _dot(residual, better)
        direction, size = better + again / size.clamp(min=1e-30) * direction, again
    filled = known + hole * found
    return filled if noise is None else filled + hole * noise


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(2, 3), keepdim=True)


def _blocks(residual: Tensor) -> Tensor:
    """The residual, plus its sum over blocks of 2 x 2, 4 x 4, .. pixels, each over the block's side: symmetric."""
    height, width = residual.shape[-2:]
    if max(height, width) == 1:
        return residual
    sums = 4 * F.avg_pool2d(F.pad(residual, (0, width % 2, 0, height % 2)), 2)
    far = F.interpolate(_blocks(sums), scale_factor=2.0, mode="nearest")
    return residual + far[..., :height, :width] / 2


def _spread(known: Tensor, there: Tensor) -> Tensor:
    """Where the solver starts: the mean of what is known around, the nearer the better (a pyramid of halved images)."""
    height, width = known.shape[-2:]
    if max(height, width) == 1:
        return known / there.clamp(min=1e-6)
    pad = (0, width % 2, 0, height % 2)
    values, counts = (F.avg_pool2d(F.pad(x, pad), 2) for x in (known, there))
    far = _spread(values, counts)
    far = F.interpolate(far, scale_factor=2.0, mode="nearest")[..., :height, :width]
    near = there.clamp(max=1)
    return known / there.clamp(min=1e-6) * near + far * (1 - near)


def ranking(scores: Tensor, chance: Tensor) -> Tensor:
    """The patches (B, N) from the best by `scores` (B, N) to the worst; equal ones in the order of `chance` (B, N)."""
    mixed = chance.argsort(dim=1)
    return mixed.gather(1, scores.gather(1, mixed).argsort(dim=1, descending=True, stable=True))


def remove(ranks: Tensor, grid: tuple[int, int], size: tuple[int, int], share: float, best: bool) -> Tensor:
    """The pixels of some of the patches; at least one patch goes, and one stays.

    Args:
        ranks: a `ranking` (B, N), best first.
        grid: rows and columns of the N patches.
        size: (H, W) in pixels.
        share: of the patches that go.
        best: whether the best go, or the worst.

    Returns:
        (B, H, W).
    """
    count = min(max(1, round(share * ranks.shape[1])), ranks.shape[1] - 1)
    gone = ranks[:, :count] if best else ranks[:, -count:]
    mask = torch.zeros(ranks.shape, device=ranks.device).scatter(1, gone, 1.0).unflatten(1, grid)
    rows, cols = (patch_lines(side, count, ranks.device) for side, count in zip(size, grid, strict=True))
    return torch.einsum("rh,brc,cw->bhw", rows, mask, cols) > 0.5


def removal_curves(
    answer: Callable[[Tensor], Tensor],
    images: Tensor,
    whole: Tensor,
    scores: Tensor,
    grid: tuple[int, int],
    noise: Tensor,
) -> dict[str, Tensor]:
    """The probability of a class while patches are removed and put back.

    Args:
        answer: images (B, 3, H, W) to probabilities (B, C); it is asked 18 times.
        images: (B, 3, H, W).
        whole: its answer to them (B, C), whose best class is followed.
        scores: (B, N), which patches go first.
        grid: rows and columns of the N patches.
        noise: as for `impute`, each image's own: equal scores are ranked by it, not by place.

    Returns:
        `deletion` (B, 10): with 0, 0.1, .. 0.9 of the patches removed, the best first; the sooner it falls, the more
        they mattered. `insertion` (B, 10): with 0.1, .. 0.9 and all of them there, the best first; the sooner it rises,
        the better.
    """
    size = (images.shape[-2], images.shape[-1])
    ranks = ranking(scores.float(), noise.flatten(1)[:, : scores.shape[1]])
    label = whole.argmax(dim=1, keepdim=True)

    def left(share: float, best: bool) -> Tensor:
        seen = impute(images, remove(ranks, grid, size, share, best), noise)
        return answer(seen).gather(1, label)

    start = whole.gather(1, label)
    deletion = [start] + [left(share, True) for share in SHARES]
    insertion = [left(share, False) for share in reversed(SHARES)] + [start]
    return {"deletion": torch.cat(deletion, dim=1), "insertion": torch.cat(insertion, dim=1)}


def under(curve: Tensor) -> Tensor:
    """The mean height of a curve (B, points), points evenly spaced: (B,)."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)
