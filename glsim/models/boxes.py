"""Boxes around selected patches (BOX_RULES, CONTROLS), and crops of them; no loop over the batch, no host sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glsim.models.scores import MASK, above_mean, count_top, largest_component, pick, scramble
from glsim.types import Selection, choose


def exclusive(start: Tensor, end: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """The published rule: the box ends where the last selected patch begins, and is at least one patch wide.

    So the last selected row and column of patches stay outside, unless the box is one patch thin.

    Args:
        start: (B,), first selected grid line along a side.
        end: (B,), the last one.
        count: grid lines along that side.
        side: its length in pixels.

    Returns:
        First pixel and exclusive end, each (B,).
    """
    return grid_line(start, count, side), torch.maximum(grid_line(end, count, side), grid_line(start + 1, count, side))


def inclusive(start: Tensor, end: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """The rule of the paper's figure: the box ends where the last selected patch ends. Arguments as of `exclusive`."""
    return grid_line(start, count, side), grid_line(end + 1, count, side)


def grid_line(line: Tensor, count: int, side: int) -> Tensor:
    """The pixel where grid line `line` of `count` begins: patches share the side evenly, also where they overlap."""
    return line * side // count


# The first and last selected of `count` grid lines (B,) along a side -> pixels: start, exclusive end.
ENDS: dict[str, Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]] = {
    "exclusive": exclusive,
    "inclusive": inclusive,
}


def boxes_from_indices(
    indices: Tensor, grid: tuple[int, int], image_size: Sequence[int], rule: str = "exclusive"
) -> Tensor:
    """Draw a box around selected patches.

    Args:
        indices: (B, K).
        grid: rows and columns of the patches.
        image_size: (H, W) in pixels.
        rule: a name of `ENDS`.

    Returns:
        int64 pixels (B, 4): left, top, right, bottom; right and bottom are exclusive.
    """
    bounds = choose(rule, ENDS, "box rule")
    rows, cols = indices // grid[1], indices % grid[1]
    top, bottom = bounds(rows.amin(1), rows.amax(1), grid[0], image_size[0])
    left, right = bounds(cols.amin(1), cols.amax(1), grid[1], image_size[1])
    return torch.stack((left, top, right, bottom), dim=1)


SHARPNESS, DEVIATIONS = 1.5, 1.75  # of `boxes_from_moments`


def boxes_from_moments(
    scores: Tensor,
    grid: tuple[int, int],
    image_size: Sequence[int],
    deviations: float = DEVIATIONS,
    sharpness: float = SHARPNESS,
) -> Tensor:
    """Draw a box as far around the weighted middle of all patches as they spread.

    Weights are the softmax of `sharpness` times the standardised scores; the box reaches `deviations` weighted standard
    deviations from the weighted mean along each axis, half a patch at least. So one stray patch moves it little, and
    its size follows the object's, not a number of patches.

    Args:
        scores: (B, N), higher is better.
        grid: rows and columns of the patches.
        image_size: (H, W) in pixels.
        deviations, sharpness: the defaults were chosen on a part of CUB's training images (docs/results/selection.md).

    Returns:
        Boxes (B, 4) as those of `boxes_from_indices`.
    """
    scores = scores.nan_to_num(0).double()  # no pixel of a box depends on the precision of the network's arithmetic
    apart = scores - scores.mean(dim=1, keepdim=True)
    weights = (sharpness * apart / (apart.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()).softmax(dim=1)
    lines = weights.unflatten(1, grid)
    starts, ends = [], []
    for share, side in ((lines.sum(dim=1), image_size[1]), (lines.sum(dim=2), image_size[0])):  # columns, rows
        count = share.shape[1]
        place = (torch.arange(count, device=scores.device) + 0.5) / count
        middle = (share * place).sum(dim=1)
        half = (share * (place - middle[:, None]).square()).sum(dim=1).sqrt().mul(deviations).clamp(min=0.5 / count)
        # An edge on a pixel's own stays there, whichever side of it rounding puts it.
        starts.append(((middle - half).clamp(min=0) * side + 1e-6).floor().long())
        ends.append(((middle + half).clamp(max=1) * side - 1e-6).ceil().long())
    return torch.stack((*starts, *ends), dim=1)


# A rule draws boxes (B, 4) by scores (B, N), the selected patches (B, K), their grid and the image's (H, W).
BOX_RULES: dict[str, Callable[[Tensor, Tensor, tuple[int, int], Sequence[int]], Tensor]] = {
    "exclusive": lambda _, indices, grid, size: boxes_from_indices(indices, grid, size, "exclusive"),
    "inclusive": lambda _, indices, grid, size: boxes_from_indices(indices, grid, size, "inclusive"),
    "moments": lambda scores, _, grid, size: boxes_from_moments(scores, grid, size),
}


def random_box(draw: Draw, indices: Tensor, size: Sequence[int], training: bool) -> Tensor:
    """The box's width and height at a uniformly random place.

    Args:
        draw: the rule that draws the box.
        indices: (B, K) selected patches.
        size: (H, W) in pixels.
        training: torch's generator draws the place anew; else it follows from which patches were selected, so that an
            image keeps its place in any batch.

    Returns:
        Boxes (B, 4).
    """
    boxes = draw(indices)
    if training:
        return place_boxes(boxes, size, torch.rand(boxes.shape[0], 2, device=boxes.device))
    code = scramble(indices + 1_000_003).sum(dim=1, keepdim=True) & MASK
    axis = torch.arange(2, device=boxes.device)
    return place_boxes(boxes, size, scramble(code + scramble(axis) & MASK).double() / 2**32)


def centre(draw: Draw, indices: Tensor, size: Sequence[int], training: bool) -> Tensor:
    """The box's width and height in the middle of the image. Arguments as of `random_box`."""
    boxes = draw(indices)
    return place_boxes(boxes, size, boxes.new_full((boxes.shape[0], 2), 0.5, dtype=torch.double))


def whole(draw: Draw, indices: Tensor, size: Sequence[int], training: bool) -> Tensor:
    """The image itself: it is encoded twice. Arguments as of `random_box`."""
    sides = [indices.new_full((indices.shape[0],), side) for side in (0, 0, size[1], size[0])]
    return torch.stack(sides, dim=1)


def corner(draw: Draw, indices: Tensor, size: Sequence[int], training: bool) -> Tensor:
    """The box of the first K patches, a strip in the corner: what the published code crops by its metric `random`.

    Arguments as of `random_box`.
    """
    return draw(torch.arange(indices.shape[1], device=indices.device).expand_as(indices))


Draw = Callable[[Tensor], Tensor]  # a rule's boxes (B, 4) of selected patches (B, K)
# What stands in the place of the box, to tell what choosing it was worth: (the rule, selected patches (B, K), (H, W),
# whether in training) -> boxes (B, 4).
CONTROLS: dict[str, Callable[[Draw, Tensor, Sequence[int], bool], Tensor]] = {
    "random": random_box,
    "centre": centre,
    "whole": whole,
    "corner": corner,
}


def check_box(box: str) -> tuple[str | None, str]:
    """Take "inclusive", "random" or "random:inclusive" apart: the control, None for none, and the rule of its box.

    That of a control that names none is "moments", or of "corner", which needs patches, "exclusive".

    Raises ConfigError listing the choices.
    """
    name, colon, rule = box.partition(":")
    if colon:
        choose(name, CONTROLS, "control")
        choose(rule, ENDS if name == "corner" else BOX_RULES, "box rule")
        return name, rule
    choose(name, BOX_RULES | CONTROLS, "box rule")
    return (name, "exclusive" if name == "corner" else "moments") if name in CONTROLS else (None, name)


def place_boxes(boxes: Tensor, size: Sequence[int], share: Tensor) -> Tensor:
    """Move boxes to other places of their image.

    Args:
        boxes: (.., 4); their widths and heights stay.
        size: (H, W); W - width + 1 and H - height + 1 places are there.
        share: (.., 2), from 0 to below 1 of the ways they can go, x before y; 0.5 is the middle.
    """
    lengths = boxes[..., 2:] - boxes[..., :2]
    places = torch.stack((size[1] - lengths[..., 0], size[0] - lengths[..., 1]), dim=-1) + 1
    start = torch.minimum((share * places).ceil().long() - 1, places - 1).clamp(min=0)
    return torch.cat((start, start + lengths), dim=-1)


def boxes_from_mask(mask: Tensor, image_size: Sequence[int], padding: float = 0.0, rule: str = "inclusive") -> Tensor:
    """Draw the tightest box around what a mask holds.

    Args:
        mask: (B, rows, cols), laid over the image; an empty one gives the whole image.
        image_size: (H, W) in pixels.
        padding: share of the image by which the box is wider on every side.
        rule: a name of `ENDS`; "exclusive" rounds both padded ends down, as the code of WS-DAN and CAL does.

    Returns:
        Boxes (B, 4), as of `boxes_from_indices`.
    """
    bounds = choose(rule, ENDS, "box rule")
    mask = mask | ~mask.any(dim=(1, 2), keepdim=True)
    sides = []
    for lines, side in ((mask.any(dim=2), image_size[0]), (mask.any(dim=1), image_size[1])):
        count = lines.shape[1]
        first = lines.long().argmax(dim=1)
        last = count - 1 - lines.long().flip(1).argmax(dim=1)
        start, end = bounds(first, last, count, side)
        before, after = math.ceil(padding * side) if rule == "exclusive" else int(padding * side), int(padding * side)
        sides.append(((start - before).clamp(min=0), (end + after).clamp(max=side)))
    (top, bottom), (left, right) = sides
    return torch.stack((left, top, right, bottom), dim=1)


def select(
    scores: Tensor,
    top_o: int | float,
    grid: tuple[int, int],
    image_size: Sequence[int],
    box: str = "exclusive",
    training: bool = False,
) -> Selection:
    """Take the `top_o` best patches of a metric's `scores` (B, g, N) and put a box around them.

    Args:
        scores: (B, g, N), higher is better; averaged over g.
        top_o: patches to take; below 1, the share of the grid that they make.
        grid: rows and columns of the N patches.
        image_size: (H, W) in pixels.
        box: a rule of `BOX_RULES`, or one of `CONTROLS` that puts another box in its place: "random",
            "random:inclusive".
        training: chance draws anew; else it follows from the patches taken.

    Raises:
        ConfigError: for fewer than `top_o` patches, or an unknown rule.
    """
    scores, indices = pick(scores, count_top(top_o, scores.shape[-1]))
    control, rule = check_box(box)

    def draw(indices: Tensor) -> Tensor:
        return BOX_RULES[rule](scores, indices, grid, image_size)

    boxes = draw(indices) if control is None else CONTROLS[control](draw, indices, image_size, training)
    return Selection(scores, indices, boxes, grid)


def select_component(
    scores: Tensor, factor: float, grid: tuple[int, int], image_size: Sequence[int], padding: float = 0.0
) -> Selection:
    """Take the largest connected group of patches whose score exceeds `factor` times the mean (RAMS-Trans).

    Args:
        scores: (B, g, N), averaged over g.
        factor: 1 or more.
        grid: rows and columns of the N patches.
        image_size: (H, W) in pixels.
        padding: share of the image by which the box, an inclusive one, is wider on every side.
    """
    scores = scores.mean(dim=1)
    mask = largest_component(above_mean(scores, factor), grid)
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True)
    indices = torch.where(mask.gather(1, order), order, -1)
    return Selection(scores, indices, boxes_from_mask(mask.unflatten(1, grid), image_size, padding), grid)


def select_these(scores: Tensor, indices: Tensor, grid: tuple[int, int], image_size: Sequence[int]) -> Selection:
    """Name the patches that a method took by a rule of its own, with their box.

    Args:
        scores: (B, N).
        indices: (B, K); -1 for none.
        grid: rows and columns of the N patches.
        image_size: (H, W) in pixels.
    """
    mask = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    mask = mask.scatter(1, indices + 1, True)[:, 1:]
    return Selection(scores, indices, boxes_from_mask(mask.unflatten(1, grid), image_size), grid)


def crop_and_resize(images: Tensor, boxes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Cut a box out of each image and resize it.

    Bilinear with aligned corners, as `F.interpolate(image[:, top:bottom, left:right], size, align_corners=True)` for
    each image. Pixel positions are split into whole and fraction before they meet a float, so the result matches to
    rounding at any size (`grid_sample` drifts to 2e-4 at 448 pixels).

    Args:
        images: (B, 3, H, W); the gradient flows to their pixels.
        boxes: (B, 4) int pixels, right and bottom exclusive; no gradient.
        size: (h, w) of the crops; None: (H, W).

    Returns:
        (B, 3, h, w), of the images' type.
    """
    left, top, right, bottom = boxes.unbind(dim=1)
    batch, channels, lines, across = images.shape
    height, width = size or (lines, across)
    upper, lower, share = _between(top, bottom, height)  # B height
    rows = images.flatten(0, 2)  # of all planes in one list: what is copied is whole rows
    first = lines * torch.arange(batch * channels, device=images.device).view(batch, channels, 1)

    def take_rows(index: Tensor) -> Tensor:
        return rows.index_select(0, (first + index[:, None]).flatten()).view(batch, channels, height, across)

    crops = take_rows(upper).lerp_(take_rows(lower), share[:, None, :, None].to(images.dtype))
    nearer, farther, share = _between(left, right, width)  # B width

    def take_columns(index: Tensor) -> Tensor:
        return crops.gather(3, index[:, None, None].expand(-1, channels, height, -1))

    return take_columns(nearer).lerp_(take_columns(farther), share[:, None, None].to(images.dtype))


def _between(start: Tensor, end: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two lines of `start`..`end` (B,) that each of `length` places lies between, and its share of the second.

    All (B, length).
    """
    steps = torch.arange(length, device=start.device, dtype=torch.float32)
    offset = steps * ((end - start - 1).float() / max(length - 1, 1))[:, None]
    whole = offset.long()
    one = start[:, None] + whole
    return one, torch.minimum(one + 1, end[:, None] - 1), offset - whole
