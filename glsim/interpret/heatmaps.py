"""Heat-maps, boxes and crops of what a model selects, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glsim.checkpoints.bundle import labels_of, preprocessing_of, temperature_of
from glsim.data.images import read_any
from glsim.data.transforms import Preprocessing, eval_transform, to_picture
from glsim.models.base import Model
from glsim.models.boxes import crop_and_resize
from glsim.models.scores import METRICS, check_metric, check_top, needs_attention, score
from glsim.types import ConfigError, Output, Selection

Photograph = str | Path | Image.Image
Photographs = Photograph | Sequence[Photograph]


class Explanation(NamedTuple):
    """Why a model answered as it did, for one image; all pictures are in the network's view (H, W)."""

    image: np.ndarray  # uint8 (H, W, 3)
    heatmap: np.ndarray  # float32 (H, W) in [0, 1]
    box: tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive
    crop: np.ndarray  # uint8 (h, w, 3), what the second pass saw, or would see
    metric: str  # whose scores the heat-map shows; the method's name where it scores in a way of its own
    label: str
    probability: float


@overload
def explain(
    model: Model, images: Tensor, metric: str | None = None, *, top_o: int | None = None, power: float = 1.0
) -> np.ndarray: ...


@overload
def explain(
    model: Model, images: Photographs, metric: str | None = None, *, top_o: int | None = None, power: float = 1.0
) -> list[np.ndarray]: ...


def explain(
    model: Model,
    images: Tensor | Photographs,
    metric: str | None = None,
    *,
    top_o: int | None = None,
    power: float = 1.0,
) -> np.ndarray | list[np.ndarray]:
    """Heat-maps of what `model` (in eval mode) looks at: float32 in [0, 1], as CAM libraries give them.

    Args:
        model: what `glsim.load` or `glsim.create_model` returns.
        images: normalised images (B, 3, H, W), or paths and PIL images, one or several.
        metric: name of the score, with its parameters ("attention:block=3"); None: the model's own, or gls_cos where
            the method selects nothing.
        top_o: keep so many of the best patches only.
        power: exponent on the map.

    Returns:
        For a tensor an array (B, H, W). For paths and PIL images a list of arrays (height, width), each of the size of
        its upright photograph, 0 at the edges that the network is not shown.

    Raises:
        ConfigError: for a metric that is unknown or reads attention that the backbone does not have, a `top_o` beyond
            the grid, or a `power` that is not positive.
        BadImage: for a file that cannot be read.
    """
    if isinstance(images, Tensor):
        ((_, selection, _),) = selections_of(model, images, [metric])[1]
        return heatmaps_of(selection, images, top_o, power)
    return over_photographs(model, images, lambda view: explain(model, view, metric, top_o=top_o, power=power)[0])


def over_photographs(model: Model, images: Photographs, use: Callable[[Tensor], np.ndarray]) -> list[np.ndarray]:
    """The map (H, W) that `use` makes of what the network is shown of each image (1, 3, H, W), over its photograph."""
    p = preprocessing_of(model)
    transform, maps = eval_transform(p), []
    for image in [images] if isinstance(images, Photograph) else images:
        view, size = read_any(image, lambda photograph: (transform(photograph), photograph.size))
        maps.append(to_photograph(use(view[None]), size, p))
    return maps


def explanations(model: Model, images: Tensor, metric: str | None = None) -> list[Explanation]:
    """Explain the answers of `model` (in eval mode).

    Args:
        images: normalised, (B, 3, H, W).
        metric: as for `explain`.

    Returns:
        One explanation an image. Box and crop are the model's own when the metric is. By another metric they are what
        the model's rule would have drawn (`glsim.models.base:Model.select`).

    Raises:
        ConfigError: as `explain`.
    """
    return explain_by(model, images, [metric])[0]


def explain_by(
    model: Model, images: Tensor, metrics: Sequence[str | None], top_o: int | None = None, power: float = 1.0
) -> list[list[Explanation]]:
    """Explanations of some images by some metrics.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised.
        metrics: their names; None stands for the model's own, or gls_cos.
        top_o: show so many best patches only; None: all.
        power: exponent on the map.

    Returns:
        For each metric, an explanation of each image.
    """
    p, labels = preprocessing_of(model), labels_of(model)
    output, selections = selections_of(model, images, metrics)
    answers = (output.logits.float() / temperature_of(model)).softmax(dim=1).max(dim=1)
    said = [(labels[i], x) for i, x in zip(answers.indices.tolist(), answers.values.tolist(), strict=True)]
    views, found = to_picture(images, p), []
    for metric, selection, crops in selections:
        maps, boxes = heatmaps_of(selection, images, top_o, power), map(tuple, selection.boxes.tolist())
        rows = zip(views, maps, boxes, to_picture(crops, p), said, strict=True)
        found.append([Explanation(view, heat, box, crop, metric, *answer) for view, heat, box, crop, answer in rows])
    return found


@torch.inference_mode()
def selections_of(
    model: Model, images: Tensor, metrics: Sequence[str | None]
) -> tuple[Output, list[tuple[str, Selection, Tensor]]]:
    """What a model answers, and what it selects by some metrics.

    The images are encoded once for the answer and once, at most, for all metrics that are not the model's own.

    Args:
        model: in eval mode.
        images: (B, 3, H, W), normalised.
        metrics: their names; None: the model's own, or gls_cos.

    Returns:
        The answer; for each metric its name, selection and crops (B, 3, h, w).
    """
    images = images.to(next(model.parameters()).device)
    output = model(images)
    own = None if output.selection is None else model.metric or model.config.method
    names = list(dict.fromkeys(metric or own or "gls_cos" for metric in metrics))
    others = [name for name in names if name != own]
    for name in others:
        check_metric(name, model.backbone.has_attention)
    f = model.features(images, attention=any(map(needs_attention, others))) if others else None
    found = []
    for name in names:
        if f is None or name == own:
            selection, crops = output.selection, output.crops
        else:
            selection, crops = model.select(score(name, f), images), None
        assert selection is not None
        found.append((name, selection, crop_and_resize(images, selection.boxes) if crops is None else crops))
    return output, found


def heatmaps_of(selection: Selection, images: Tensor, top_o: int | None = None, power: float = 1.0) -> np.ndarray:
    """`to_heatmap` of the scores of `selection`, over its `images` (B, 3, H, W): float32 (B, H, W)."""
    size = (images.shape[-2], images.shape[-1])
    return to_heatmap(selection.scores, selection.grid, size, top_o, power).cpu().numpy()


def to_heatmap(
    scores: Tensor, grid: tuple[int, int], size: tuple[int, int], top_o: int | None = None, power: float = 1.0
) -> Tensor:
    """Patch scores as smooth maps, each stretched to [0, 1] (a constant map is 0).

    Args:
        scores: (B, N).
        grid: rows and columns of the N patches.
        size: (H, W) of the maps in pixels.
        top_o: set all but so many best patches to 0 before a map is smoothed; None: keep all.
        power: exponent on the result, above 0.

    Returns:
        (B, H, W).

    Raises:
        ConfigError: for a `top_o` beyond the grid, or a `power` that is not positive.
    """
    if not power > 0:
        raise ConfigError(f"power={power}: above 0 is needed")
    scores = scores.float()
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    maps = (scores - low) / (high - low).clamp(min=1e-12)
    if top_o is not None:
        check_top(top_o, grid, "top_o")
        best = scores.topk(top_o, dim=1).indices
        maps = torch.zeros_like(maps).scatter(1, best, maps.gather(1, best))
    maps = F.interpolate(maps.view(-1, 1, *grid), size, mode="bicubic", align_corners=False)
    return maps.clamp(0, 1)[:, 0] ** power


def to_photograph(heatmap: np.ndarray, size: tuple[int, int], p: Preprocessing) -> np.ndarray:
    """A map in [-1, 1] over the network's view (H, W) as one over the upright photograph of `size` (width, height).

    Args:
        heatmap: (H, W).
        size: (width, height) of the photograph.
        p: how the view was made of it.

    Returns:
        (height, width).
    """
    middle = p.middle(size)
    canvas = _centred(torch.from_numpy(heatmap)[None, None], p.resized(middle))
    maps = F.interpolate(canvas, middle[::-1], mode="bilinear", align_corners=False, antialias=True)
    return _centred(maps, size[::-1])[0, 0].clamp(-1, 1).numpy()


def _centred(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros (.., height, width) of `size` with `maps` in their middle."""
    pads = []
    for view, whole in zip(reversed(maps.shape[-2:]), reversed(size), strict=True):
        before = round((whole - view) / 2)
        pads += [before, whole - view - before]
    return F.pad(maps, pads)


def metrics_of(model: Model) -> list[str]:
    """The metrics that the backbone of `model` can serve."""
    return [name for name in METRICS if model.backbone.has_attention or not needs_attention(name)]


def spell_out(names: Sequence[str] | None, model: Model) -> list[str | None]:
    """Spell out "all": the model's own (None), and every other that it can take; ConfigError for what it cannot."""
    metrics: list[str | None] = []
    for name in names or []:
        if name not in ("all", model.config.method):
            check_metric(name, model.backbone.has_attention)
        metrics += [None, *metrics_of(model)] if name == "all" else [name]
    return metrics or [None]
