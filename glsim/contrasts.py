"""Floor 4: why one class and not another: what in an image speaks for A against B.

The file is not called `contrast.py` so that `glsim.contrast` can be the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, overload

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glsim.backbone import Model
from glsim.bundle import labels_of, preprocessing_of, temperature_of
from glsim.images import as_shown, open_image
from glsim.pictures import GREY, INK, SIDE, Page, Photograph, to_photograph
from glsim.transforms import eval_transform
from glsim.types import ConfigError

COLORMAP = "RdBu"  # low, against A: red; high, for A: blue
ALPHA = 0.85


class Contrast(NamedTuple):
    """What speaks for A against B in a batch of images."""

    maps: np.ndarray  # float32 (B, rows, cols) in logits: above 0 for A, below 0 for B
    differences: np.ndarray  # float32 (B,) logit of A less that of B
    probabilities: np.ndarray  # float32 (B, 2) of A and of B, among all classes


@overload
def contrast(model: Model, images: Tensor, a: str, b: str) -> np.ndarray: ...


@overload
def contrast(model: Model, images: Photograph | Sequence[Photograph], a: str, b: str) -> list[np.ndarray]: ...


def contrast(
    model: Model, images: Tensor | Photograph | Sequence[Photograph], a: str, b: str
) -> np.ndarray | list[np.ndarray]:
    """What speaks for class `a` (above 0) against class `b` (below 0), as signed float32 maps.

    For a tensor of normalised images (B, 3, H, W) an array (B, rows, cols) over the backbone's grid, in logits. For
    paths and PIL images, one or several, a list of smooth arrays (height, width) in [-1, 1], each of the size of its
    upright photograph and stretched by its own largest value, 0 at the edges that the network is not shown.

    A patch's number is the gradient of logit A less logit B, through the whole model, crops included, times the pixels
    (0: the mean colour), summed over the patch: to first order, the difference that would be lost if the patch had that
    colour. Which patches are chosen, and so the box, counts as given. Swapping `a` and `b` changes the sign alone.

    Raises ConfigError for an unknown class, with those of similar name, and BadImage for a file that cannot be read.
    """
    if isinstance(images, Tensor):
        return attribute(model, images, *classes_of(model, a, b)).maps
    p = preprocessing_of(model)
    transform = eval_transform(p)
    maps = []
    for image in [images] if isinstance(images, Photograph) else images:
        photograph = as_shown(image) if isinstance(image, Image.Image) else open_image(image)
        smooth = to_signed(contrast(model, transform(photograph)[None], a, b)[0], p.image_size)
        above, below = (to_photograph(part.clip(0, 1), photograph.size, p) for part in (smooth, -smooth))
        maps.append(above - below)
    return maps


def attribute(model: Model, images: Tensor, a: int, b: int) -> Contrast:
    """`contrast` by the numbers of two classes, for normalised `images` (B, 3, H, W), with the logits it explains."""
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().to(next(model.parameters()).device).clone().requires_grad_()
        logits = model(pixels).logits.float()
        differences = logits[:, a] - logits[:, b]
        (gradient,) = torch.autograd.grad(differences.sum(), pixels)
        share = (logits.detach() / temperature_of(model)).softmax(dim=1)[:, [a, b]]
    grid = model.backbone.grid if model.backbone.grid != (1, 1) else (7, 7)  # a network without a map: even cells
    maps = pool((gradient * pixels.detach()).sum(dim=1), grid)
    return Contrast(*(t.detach().cpu().numpy() for t in (maps, differences, share)))


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
    found = []
    for name in names:
        if name not in labels:
            close = get_close_matches(name, labels, n=3, cutoff=0.4) or labels[:5] + [".."] * (len(labels) > 5)
            raise ConfigError(f"the model has no class {name!r}; close to it: {', '.join(close)}")
        found.append(labels.index(name))
    if len(set(found)) < len(found):
        raise ConfigError(f"contrast: two different classes are needed, got {' and '.join(map(repr, names))}")
    return found
