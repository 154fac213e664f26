"""Contrastive heat-maps: what in an image speaks for class A against class B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Unpack, overload

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from torch import Tensor

from glsim.checkpoints.bundle import labels_of, preprocessing_of, temperature_of
from glsim.data.images import BadImage
from glsim.data.names import clean_label
from glsim.interpret.drawing import GREY, SIDE, Page, cell
from glsim.interpret.heatmaps import Photographs, over_photographs
from glsim.interpret.pictures import Gallery, Looking
from glsim.models.base import Model
from glsim.models.heads import NO_ANSWER
from glsim.types import ConfigError

STEPS = 16  # of the path from the mean colour to the image
FOR, AGAINST = "#0a5fb4", "#d9480f"  # colours of A and B


class Contrast(NamedTuple):
    """What speaks for A against B in a batch of images."""

    maps: np.ndarray  # float32 (B, rows, cols) in logits: above 0 for A, below 0 for B
    differences: np.ndarray  # float32 (B,) logit of A less that of B
    start: np.ndarray  # float32 (B,) the same of an image of the mean colour alone
    probabilities: np.ndarray  # float32 (B, 2) of A and of B, among all classes


@overload
def contrast(model: Model, images: Tensor, a: str, b: str) -> np.ndarray: ...


@overload
def contrast(model: Model, images: Photographs, a: str, b: str) -> list[np.ndarray]: ...


def contrast(model: Model, images: Tensor | Photographs, a: str, b: str) -> np.ndarray | list[np.ndarray]:
    """What speaks for class `a` (above 0) against class `b` (below 0), as signed float32 maps.

    Integrated gradients (arXiv 1703.01365): the gradient of logit A less logit B, through the whole model, crops
    included, averaged over 16 steps from an image of the mean colour to the image, times the pixels' distance from that
    colour, summed over each patch. So the map sums to the difference, less that of the mean colour, up to the steps'
    error; and where a step chooses another box or other patches, the jump this makes is in no patch. Swapping `a` and
    `b` changes the sign alone.

    Args:
        images: normalised images (B, 3, H, W), or paths and PIL images, one or several.
        a: name of a class.
        b: name of another one.

    Returns:
        For a tensor an array (B, rows, cols) over the backbone's grid, in logits. For paths and PIL images a list of
        smooth arrays (height, width) in [-1, 1], each of the size of its upright photograph and stretched by its own
        largest value, 0 at the edges that the network is not shown.

    Raises:
        ConfigError: for an unknown class, with those of similar name.
        BadImage: for a file that cannot be read.
    """
    if isinstance(images, Tensor):
        return attribute(model, images, *classes_of(model, a, b)).maps
    size = preprocessing_of(model).image_size
    return over_photographs(model, images, lambda view: to_signed(contrast(model, view, a, b)[0], size))


def attribute(model: Model, images: Tensor, a: int, b: int, steps: int = STEPS) -> Contrast:
    """`contrast` by the numbers of two classes, with the logits it explains.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised.
        a, b: numbers of the classes.
        steps: of the integral (arXiv 1703.01365).
    """
    grid = model.backbone.grid if model.backbone.grid != (1, 1) else (7, 7)  # a network without a map: even cells
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().to(next(model.parameters()).device).clone()
        total = torch.zeros_like(pixels)
        for step in range(steps):
            between = (pixels * ((step + 0.5) / steps)).requires_grad_()
            logits = model(between).logits.float()
            (gradient,) = torch.autograd.grad((logits[:, a] - logits[:, b]).sum(), between)
            total += gradient
        maps = pool((total / steps * pixels).sum(dim=1), grid)
    with torch.inference_mode():
        logits, none = model(pixels).logits.float(), model(torch.zeros_like(pixels)).logits.float()
    shares = (logits / temperature_of(model)).softmax(dim=1)[:, [a, b]]
    numbers = (maps, logits[:, a] - logits[:, b], none[:, a] - none[:, b], shares)
    return Contrast(*(number.cpu().numpy() for number in numbers))


def pool(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum pixels (B, H, W) over the cells of `grid`: (B, rows, cols). Each pixel counts once."""
    rows, cols = (
        F.one_hot(torch.arange(side, device=values.device) * count // side, count).to(values.dtype)
        for side, count in zip(values.shape[1:], grid, strict=True)
    )
    return rows.T @ values @ cols


def to_signed(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (rows, cols) as a smooth one of `size` (H, W) in [-1, 1], its largest value at 1 or -1 (of zeros: 0)."""
    scaled = torch.from_numpy(values / max(float(np.abs(values).max()), 1e-12))[None, None]
    return F.interpolate(scaled, size, mode="bicubic", align_corners=False)[0, 0].clamp(-1, 1).numpy()


def classes_of(model: Model, *names: str) -> list[int]:
    """The numbers of classes; ConfigError names the classes that an unknown one may mean."""
    labels = labels_of(model)
    numbers = {clean_label(label): i for i, label in enumerate(labels)}
    found = []
    for name in names:
        if clean_label(name) not in numbers:
            close = get_close_matches(name, labels, n=3, cutoff=0.4) or labels[:5] + [".."] * (len(labels) > 5)
            raise ConfigError(f"the model has no class {name!r}; close to it: {', '.join(close)}")
        found.append(numbers[clean_label(name)])
    if len(set(found)) < len(found):
        raise ConfigError(f"contrast: two different classes are needed, got {' and '.join(map(repr, names))}")
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContrastPicture:
    """What in one image speaks for class A against class B."""

    path: str
    picture: str
    difference: float  # logit of A less that of B
    start: float  # the same of an image of the mean colour alone
    probabilities: list[float]  # of A and of B, among all classes
    map: list[list[float]]  # (rows, cols) in logits: above 0 for A


@dataclass(frozen=True)
class ContrastPictures:
    """What `contrast_images` drew."""

    source: str
    out: str
    contrast: list[str]  # the two classes
    pictures: list[ContrastPicture]
    skipped: list[str]  # files that cannot be read or answered, and why


def contrast_images(
    source: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    classes: Sequence[str],
    alpha: float = 0.7,
    power: float = 1.0,
    **looking: Unpack[Looking],
) -> ContrastPictures:
    """Draw what speaks for the first of two `classes` against the second: one PNG an image, with the map beside it.

    Args:
        source: what `glsim.load` takes.
        images: files, folders or globs.
        out: folder for the pictures.
        classes: names of two classes of the model.
        alpha: opacity of the map where it is strongest, 0 to 1.
        power: exponent on the strength of the map in [0, 1].
        looking: see `glsim.interpret.pictures:Looking`.

    Returns:
        The paths of what was drawn, with maps and probabilities.

    Raises:
        ConfigError: for an unknown class, or a folder where a picture would replace an image.
        DataError: for images that are not there or cannot be read.
    """
    gallery = Gallery(source, images, **looking)
    model = gallery.model
    a, b = classes_of(model, *classes)
    pictures = []
    for path, (seen, view), target in gallery.show(out, gallery.views_of):
        c = attribute(model, seen[None], a, b)
        if not (np.isfinite(c.maps).all() and np.isfinite(c.probabilities).all()):
            gallery.leave_out(BadImage(path, NO_ANSWER))
            continue
        draw(view, c, classes, "/".join(path.parts[-2:]), target, alpha, power)
        numbers = float(c.differences[0]), float(c.start[0]), c.probabilities[0].tolist(), c.maps[0].tolist()
        pictures.append(ContrastPicture(str(path), str(target), *numbers))
    return ContrastPictures(str(source), str(out), list(classes), pictures, gallery.skipped)


def draw(
    view: np.ndarray, c: Contrast, names: Sequence[str], name: str, path: str | Path, alpha: float, power: float = 1.0
) -> None:
    """Write one PNG: an image, and what in it speaks for which class.

    Args:
        view: uint8 (H, W, 3).
        c: of one image, the first row.
        names: of both classes.
        name: of the image, for the head.
        path: of the PNG.
        alpha: opacity of the strongest place.
        power: exponent on the map.
    """
    width, height = cell(view, 1.4 * SIDE)
    gap, font = round(0.03 * width), 0.07 * 1.4 * SIDE
    smooth = to_signed(c.maps[0], (view.shape[0], view.shape[1]))
    head, foot = 1.9 * font, 3.0 * font
    page = Page(2 * width + 3 * gap, head + height + foot)
    a, b = (label.replace("_", " ") for label in names)
    page.words("Image", gap + width / 2, 1.3 * font, width, font, ha="center", fontweight="bold")
    right = 2 * gap + width
    page.words("Evidence", right + width / 2, 1.3 * font, width, font, ha="center", fontweight="bold")
    page.picture(view, gap, head, width, height)
    page.picture(overlay(view, smooth, alpha, power), right, head, width, height)
    line = head + height + 1.3 * font
    page.words(name, gap, line, width, 0.75 * font, color=GREY)
    sides = zip((a, b), c.probabilities[0], (FOR, AGAINST), (line, line + 1.15 * font), strict=True)
    for label, probability, colour, y in sides:
        page.words("■", right, y, font, 0.85 * font, color=colour)
        page.words(f"for {label}", right + 1.2 * font, y, width - 6 * font, 0.85 * font)
        page.words(f"p = {probability:.1%}", right + width, y, 4.5 * font, 0.75 * font, color=GREY, ha="right")
    page.write(path)


def overlay(view: np.ndarray, signed: np.ndarray, alpha: float = 0.7, power: float = 1.0) -> np.ndarray:
    """Lay a signed map over a grey copy of an image, above 0 in one colour, below in another.

    Args:
        view: uint8 (H, W, 3).
        signed: (H, W) in [-1, 1].
        alpha: opacity at 1 and -1; none at 0.
        power: exponent on the map.

    Returns:
        uint8 (H, W, 3).
    """
    grey = view @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat(90 + 0.65 * grey[..., None], 3, axis=2)  # lighter, with less contrast, so that colours stand out
    colours = np.where(signed[..., None] > 0, to_rgb(FOR), to_rgb(AGAINST)) * 255
    opacity = alpha * np.abs(signed[..., None]) ** power
    return (grey * (1 - opacity) + colours * opacity).round().clip(0, 255).astype(np.uint8)
