"""Floor 4: why. Heat-maps, boxes and crops as arrays and as PNGs.

The file is not called `explain.py` so that `glsim.explain` can be the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from glsim.backbone import Model
from glsim.bundle import labels_of, load, pick_device, preprocessing_of
from glsim.config import Explain
from glsim.crop import crop_and_resize, select
from glsim.data import find_images
from glsim.figures import save_figure
from glsim.images import BadImage, open_image
from glsim.selection import METRICS, NEEDS_ATTENTION
from glsim.transforms import eval_transform, to_picture
from glsim.types import ConfigError, DataError, choose

BOX_COLOUR = "#ff2d55"
SHEET, SHEET_ROWS = "sheet.png", 24


class Explanation(NamedTuple):
    """Why a model answered as it did, for one image; all pictures are in the network's view (H, W)."""

    image: np.ndarray  # uint8 (H, W, 3)
    heatmap: np.ndarray  # float32 (H, W) in [0, 1]
    box: tuple[int, int, int, int]  # left, top, right, bottom; right and bottom exclusive
    crop: np.ndarray  # uint8 (h, w, 3), what the second pass saw
    metric: str  # whose scores the heat-map shows
    label: str
    probability: float


@torch.inference_mode()
def explain(model: Model, images: Tensor, metric: str | None = None) -> list[Explanation]:
    """Explain `model`'s answers for normalised `images` (B, 3, H, W).

    `metric` names the score to draw; by default the model's own, or gls_cos where the method selects nothing. Box and
    crop are the model's own when the metric is; otherwise those that the metric would have chosen.
    """
    own = getattr(model, "metric", None)
    metric = metric or own or "gls_cos"
    score = choose(metric, METRICS, "metric")
    size = (images.shape[-2], images.shape[-1])
    output = model(images)
    selection, crops = output.selection, output.crops
    if selection is None or metric != own:
        f = model.features(images, attention=metric in NEEDS_ATTENTION)
        top_o = min(getattr(model, "top_o", 8), f.patches.shape[1])
        selection = select(score(f), top_o, f.grid, size, getattr(model, "box", "exclusive"))
        crops = crop_and_resize(images, selection.boxes)
    answers = output.logits.float().softmax(dim=1).max(dim=1)
    p, labels = preprocessing_of(model), labels_of(model)
    return [
        Explanation(image, heatmap, tuple(box), crop, metric, labels[answer], probability)
        for image, heatmap, box, crop, answer, probability in zip(
            to_picture(images, p),
            to_heatmap(selection.scores, selection.grid, size).cpu().numpy(),
            selection.boxes.tolist(),
            to_picture(crops, p),
            answers.indices.tolist(),
            answers.values.tolist(),
            strict=True,
        )
    ]


def to_heatmap(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patch scores (B, N) as smooth maps (B, H, W), each stretched to [0, 1] (a constant map is 0)."""
    maps = scores.float().view(-1, 1, *grid)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-12)
    return F.interpolate(maps, size, mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]


def draw(explanations: Sequence[Explanation], path: str | Path, titles: Sequence[str] | None = None) -> None:
    """Write one PNG: a row for each explanation with the image and box, the heat-map, and the crop."""
    rows = len(explanations)
    figure = Figure(figsize=(9.0, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for row, (axes, e) in enumerate(zip(grid, explanations, strict=True)):
        left, top, right, bottom = e.box
        axes[0].imshow(e.image)
        axes[1].imshow(e.image)
        # Where the score is low the photograph stays visible: the map's opacity grows with it.
        axes[1].imshow(e.heatmap, cmap="turbo", alpha=0.25 + 0.4 * e.heatmap, vmin=0, vmax=1)
        axes[2].imshow(e.crop)
        for ax in axes[:2]:
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec="white", lw=4.0))
            ax.add_patch(
                Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=BOX_COLOUR, lw=2.0)
            )
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[0].set_title(titles[row] if titles else "image and box", fontsize=10, parse_math=False)
        axes[1].set_title(e.metric, fontsize=10)
        axes[2].set_title(f"{e.label}  {e.probability:.0%}", fontsize=10, fontweight="bold", parse_math=False)
    save_figure(figure, path)


def run(s: Explain) -> dict[str, Any]:
    """The verb: one PNG an image, and `sheet.png` with up to 24 of them when there are several."""
    paths = find_images(s.images)[: s.limit]
    model = load(s.source).to(pick_device(s.device))
    folder = Path(s.out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out={folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    transform = eval_transform(preprocessing_of(model))
    targets = [folder / f"{name}.png" for name in _unique_names(paths)]
    taken = {path.resolve() for path in paths} & {target.resolve() for target in [*targets, folder / SHEET]}
    if taken:
        raise ConfigError(f"out={folder} would overwrite the image {min(taken)}; name another folder")
    explanations, names, rows, skipped = [], [], [], []
    for path, target in zip(paths, targets, strict=True):
        try:
            image = open_image(path)
        except BadImage as error:
            if not s.skip_bad:
                raise
            skipped.append(str(error))
            continue
        (e,) = explain(model, _batch(image, transform, model), s.metric)
        name = "/".join(path.parts[-2:])  # with the folder, which is often the class
        draw([e], target, [name])
        explanations.append(e)
        names.append(name)
        row = {"path": str(path), "picture": str(target), "label": e.label}
        rows.append({**row, "probability": e.probability, "box": list(e.box)})
    if len(rows) > 1:
        draw(explanations[:SHEET_ROWS], folder / SHEET, names[:SHEET_ROWS])
    return {"source": str(s.source), "out": str(folder), "pictures": rows, "skipped": skipped}


def _batch(image: Image.Image, transform: Any, model: Model) -> Tensor:
    return transform(image)[None].to(next(model.parameters()).device)


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: the image's own, with its folder's name before it where two would collide."""
    stems = [p.stem for p in paths]
    names = [p.stem if stems.count(p.stem) == 1 and p.stem != "sheet" else f"{p.parent.name}_{p.stem}" for p in paths]
    return [n if names.count(n) == 1 else f"{i:04d}_{n}" for i, n in enumerate(names)]
