"""Localisation metrics of patch scores and boxes against object masks and points.

A mask is two bool maps (B, H, W): `inside`, the pixels of the object, and `counted`, those that are object or
background (the border of a trimap is neither). Every measure is one number an image (B,) or a box (B, R), NaN where it
says nothing: no pixel of the object, for the ROC-AUC none of the background, for the precision of a box neither; a
score is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glsim.models.boxes import boxes_from_mask, grid_line


def per_patch(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many pixels of `mask` (B, H, W) lie in each patch of a `grid` (rows, cols): (B, N)."""
    rows, cols = (patch_lines(side, count, mask.device) for side, count in zip(mask.shape[1:], grid, strict=True))
    return torch.einsum("rh,bhw,cw->brc", rows, mask.float(), cols).flatten(1)


def patch_lines(side: int, count: int, device: torch.device) -> Tensor:
    """Which pixels (side,) belong to each of `count` grid lines: (count, side), 0 or 1."""
    start = grid_line(torch.arange(count + 1, device=device), count, side)
    pixel = torch.arange(side, device=device)
    return ((pixel >= start[:-1, None]) & (pixel < start[1:, None])).float()


# --- patch scores -----------------------------------------------------------------------------------------------------


def pointing_game(scores: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    """1 where the best patch holds a pixel of the object, else 0 (arXiv 1608.00507); of equally good ones the mean.

    A patch is the tolerance: there 15 pixels.

    Args:
        scores: (B, N).
        inside: (B, N), pixels of the object in a patch.
        counted: (B, N), pixels of a patch that count.

    Returns:
        (B,).
    """
    return _known(_best_of(scores, inside > 0), scores, inside)


def _best_of(scores: Tensor, hits: Tensor) -> Tensor:
    """Whether the best patch is one of `hits` (B, N)."""
    best = (scores == scores.amax(dim=1, keepdim=True)).float()
    return (best * hits).sum(dim=1) / best.sum(dim=1)


def energy_inside(scores: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    """The share of the map, stretched to [0, 1], that lies on the object (arXiv 1910.01279); a constant map is 1.

    Arguments and shape as of `pointing_game`.
    """
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    maps = torch.where(high > low, (scores - low) / (high - low), 1.0)
    return _known((maps * inside).sum(dim=1) / (maps * counted).sum(dim=1), scores, inside)


def roc_auc(scores: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    """How often a pixel of the object has a better patch than a pixel of the background; a tie is half.

    So every patch counts as object and as background by its pixels, and no threshold says which it is. Arguments and
    shape as of `pointing_game`.
    """
    scores, inside, outside = scores.contiguous(), inside.double(), (counted - inside).double()
    ordered, order = scores.sort(dim=1)
    below = F.pad(outside.gather(1, order).cumsum(dim=1), (1, 0))  # background up to each place in the order
    worse, not_better = (below.gather(1, torch.searchsorted(ordered, scores, right=right)) for right in (False, True))
    wins = (inside * (worse + not_better) / 2).sum(dim=1)
    return _known((wins / (inside.sum(dim=1) * below[:, -1])).float(), scores, inside)


def _known(values: Tensor, scores: Tensor, inside: Tensor) -> Tensor:
    return values.masked_fill(scores.isnan().any(dim=1) | (inside.sum(dim=1) == 0), torch.nan)


SCORE_MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pointing": pointing_game,
    "energy": energy_inside,
    "auc": roc_auc,
}


def measure_scores(scores: Tensor, grid: tuple[int, int], inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """All of `SCORE_MEASURES` by name, each (B,), and `pointing_centre`: 1 where the best patch's middle is object.

    Args:
        scores: (B, N).
        grid: rows and columns of the N patches.
        inside: (B, H, W), the object.
        counted: (B, H, W), the pixels that count.
    """
    parts, scores = (per_patch(inside, grid), per_patch(counted, grid)), scores.float()
    rows, cols = (
        grid_line(2 * torch.arange(count, device=inside.device) + 1, 2 * count, side)
        for side, count in zip(inside.shape[1:], grid, strict=True)
    )
    middles = inside[:, rows][:, :, cols].flatten(1)
    found = {name: measure(scores, *parts) for name, measure in SCORE_MEASURES.items()}
    return found | {"pointing_centre": _known(_best_of(scores, middles), scores, parts[0])}


# --- boxes ------------------------------------------------------------------------------------------------------------

HOLDS = 0.9  # a box holds an object when at least this share of its pixels lies inside
BOX_MEASURES = ("area", "box_recall", "holds", "box_precision", "iou")


def measure_boxes(boxes: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Measures of boxes by name, each (B, R).

    `area`: share of the image; `box_recall`: share of the object inside; `holds`: 1 where that is `HOLDS` or more;
    `box_precision`: share of the box that is object; `iou`: with the tightest box around the object.

    Args:
        boxes: (B, R, 4), int pixels.
        inside: (B, H, W), the object.
        counted: (B, H, W), the pixels that count.
    """
    size = inside.shape[1:]
    areas = _area(boxes).float()
    held, total = _count(inside, boxes), inside.flatten(1).sum(dim=1)[:, None].float()
    box_recall = held / total  # 0 / 0 is NaN
    tight = boxes_from_mask(inside, size)[:, None]
    low, high = torch.maximum(boxes, tight)[..., :2], torch.minimum(boxes, tight)[..., 2:]
    shared = (high - low).clamp(min=0).prod(dim=-1)
    empty = total == 0
    return {
        "area": areas / (size[0] * size[1]),
        "box_recall": box_recall,
        "holds": (box_recall >= HOLDS).float().masked_fill(empty, torch.nan),
        "box_precision": (held / _count(counted, boxes)).masked_fill(empty, torch.nan),
        "iou": (shared / (areas + _area(tight) - shared)).masked_fill(empty, torch.nan),
    }


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _count(mask: Tensor, boxes: Tensor) -> Tensor:
    """Pixels of `mask` (B, H, W) inside `boxes` (B, R, 4): (B, R), from a table of sums."""
    batch, height, width = mask.shape
    sums = mask.new_zeros(batch, height + 1, width + 1, dtype=torch.int64)
    sums[:, 1:, 1:] = mask.long().cumsum(dim=1).cumsum(dim=2)
    left, top, right, bottom = boxes.unbind(dim=-1)

    def at(row: Tensor, col: Tensor) -> Tensor:
        return sums.flatten(1).gather(1, row * (width + 1) + col)

    return (at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)).float()


def measure_points(boxes: Tensor, points: Tensor, names: list[str]) -> dict[str, Tensor]:
    """`parts`: the share of an image's `points` (B, P, 2), x, y, that lie in each of `boxes` (B, R, 4): (B, R).

    `parts/NAME` is that of the points of one of the `names`, of which each point has one. NaN where there is no point;
    points that are NaN are none.
    """
    places = points[:, None]
    held = ((places >= boxes[:, :, None, :2]) & (places < boxes[:, :, None, 2:])).all(dim=-1).float()
    held = held.masked_fill(places.isnan().any(dim=-1), torch.nan)  # B R P
    columns = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    found = {"parts": held} | {f"parts/{name}": held[..., which] for name, which in columns.items()}
    return {name: shares.nanmean(dim=-1) for name, shares in found.items()} if names else {}
