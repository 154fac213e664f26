"""Localisation: patch scores and boxes of every method against masks, boxes and points, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glsim.checkpoints.bundle import load, preprocessing_of, temperature_of
from glsim.data.annotations import Annotation
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.masks import Masked, check_masks, find_annotated, points_to_view, read_masked, to_view
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.environment import pick_device
from glsim.evaluation.faithfulness import NOISE, SHARES, removal_curves, under
from glsim.evaluation.localization_metrics import measure_boxes, measure_points, measure_scores
from glsim.evaluation.statistics import RESAMPLES, as_numbers
from glsim.files import document, make_parent, write_json
from glsim.interpret.heatmaps import selections_of, spell_out
from glsim.models.base import Model
from glsim.models.boxes import place_boxes
from glsim.types import ConfigError, DataError, Output, optional

KEYS = {"box_recall": "coverage", "box_precision": "purity"}  # what a result calls them
DRAWS = 16  # random places of a box, of which the mean counts


Numbers = list[float | None] | None  # mean, low and high of the 95 % interval; None where there is no mean


@dataclass(frozen=True)
class TargetMeasures:
    """Means over the images of one target: by row, and by measure."""

    left_out: int  # images of which no pixel of the object is left in the network's view: no row has them
    rows: dict[str, dict[str, Numbers]]
    gains: dict[str, dict[str, Numbers]]  # how much more a mechanism's box holds than its controls, image by image


@dataclass(frozen=True)
class Curves:
    """Mean probabilities of a mechanism as patches are removed, at these shares of the patches."""

    removed: list[float]
    kept: list[float]
    deletion: list[float]
    insertion: list[float]


@dataclass(frozen=True)
class Localization:
    """What `evaluate_localization` returns; `rows` and `curves` are by mechanism."""

    source: str
    images: str
    masks: str | None
    count: int
    interval: str
    resamples: int
    seed: int
    targets: dict[str, TargetMeasures]
    curves: dict[str, Curves]
    skipped: list[str]  # images and masks that cannot be taken, and why
    boxes: str | None = optional()
    points: str | None = optional()
    without: dict[str, list[str]] | None = optional()  # by "boxes", "points": images that the list has none of
    unused: dict[str, int] | None = optional()  # the same: images that the list has, and that were not given
    scaled: int | None = optional()  # images whose boxes or points were drawn on a copy in another size
    cut: int | None = optional()  # images with a box that reaches over their edge by more than a pixel


def evaluate_localization(
    source: str | Path,
    images: str | Path,
    masks: str | Path | None = None,
    *,
    boxes: str | Path | None = None,
    points: str | Path | None = None,
    min_confidence: float = 0.0,
    categories: list[str] | None = None,
    metrics: list[str] | None = None,
    controls: bool = False,
    faithfulness: bool = False,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    batch_size: int = 32,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Localization:
    """Measure scores and boxes of every mechanism against masks, boxes and points, with 95 % intervals.

    Args:
        source: what `glsim.load` takes.
        images: folder, file or glob.
        masks: folder that `glsim.data.masks:find_masks` looks in.
        boxes: file or folder that `glsim.data.annotations:read_annotations` reads; with `masks`, a target beside them.
        points: the same, for points; by default those that stand with the boxes.
        min_confidence, categories: of the boxes that are taken.
        metrics: mechanisms, or all; by default the model's own.
        controls: measure boxes of the same size in the centre and at random places, random patches, and the image too.
        faithfulness: measure deletion and insertion too.
        options: options of the method to change.
        limit: at most this many images, evenly spaced.
        resamples: bootstrap draws of the images.
        seed: of these draws and of the random boxes.
        skip_bad: leave bad images, and images with bad masks, out; they are listed in `skipped`.
        max_megapixels: larger images are bad files.
        out: file for the result as JSON.
        progress: draw progress bars.

    Raises:
        ConfigError: for an option or a metric that does not fit, and without masks and boxes.
        DataError: before the model is loaded: for an image without mask, and for bad files unless `skip_bad`.
    """
    if masks is None and boxes is None:
        raise ConfigError(f"{images}: nothing says where the objects of these images are; give masks or boxes")
    if out is not None:
        if Path(out).is_dir():
            raise DataError(f"out={out} is a folder; name a file")
        make_parent(out)  # first: what cannot be made must not come late
    with pixel_limit(max_megapixels):
        found, without, unused = find_annotated(images, masks, boxes, points, min_confidence, categories)
        count = min(limit or len(found), len(found))
        found = [found[i * len(found) // count] for i in range(count)]  # of every class some
        with tqdm(total=count, desc="masks", unit="image", disable=not progress) as bar:
            masked, skipped = check_masks(found, skip_bad, bar.update)
        model = load(source, **options or {}).to(pick_device(device))
        names: list[str | None] = [*spell_out(metrics, model)]
        if controls:
            names.append("random")
        with tqdm(total=len(masked), desc="images", unit="image", disable=not progress) as bar:
            measured = measure(model, masked, names, controls, faithfulness, batch_size, seed, bar.update)
    changed = [
        {c for m in (*i.masks.values(), i.points) if isinstance(m, Annotation) for c in m.changes} for i in masked
    ]
    told = {name: sum(name in changes for changes in changed) for name in ("scaled", "cut")}
    listed: dict[str, Any] = {"without": without, "unused": unused, **told} if without else {}
    result = Localization(
        source=str(source),
        images=str(images),
        masks=None if masks is None else str(masks),
        boxes=None if boxes is None else str(boxes),
        points=None if points is None else str(points),
        **listed,
        count=len(masked),
        interval="95 %, bootstrap over images",
        resamples=resamples,
        seed=seed,
        targets={target: summarise(rows, resamples, seed) for target, rows in measured.targets.items()},
        curves=measured.curves,
        skipped=skipped,
    )
    if out is not None:
        write_json(out, document(result))
    return result


# --- measuring --------------------------------------------------------------------------------------------------------

Rows = dict[str, dict[str, Tensor]]  # row of the table -> measure -> (images,)


class Measured(NamedTuple):
    """What was measured of all images."""

    targets: dict[str, Rows]
    curves: dict[str, Curves]


def measure(
    model: Model,
    images: list[Masked],
    metrics: list[str | None],
    controls: bool = False,
    faithful: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    done: Callable[[int], Any] = lambda count: None,
) -> Measured:
    """Measure scores and boxes of a model against masks, image by image.

    Args:
        model: in eval mode.
        images: with their masks.
        metrics: names of mechanisms, a row each; None: the model's own.
        controls: also boxes as large as a row's own in the middle ("NAME/centre") and at random places ("NAME/random",
            mean of 16, drawn from `seed` and the image), and the whole image ("whole").
        faithful: also the areas under both curves of `glsim.evaluation.faithfulness`.
        batch_size: images at a time.
        seed: of the random places.
        done: told how many images were measured.

    Returns:
        By target, row and name: tensors (images,). NaN where one says nothing: all of an image where no pixel of the
            object is left in the network's view.
    """
    parts: dict[str, dict[str, dict[str, list[Tensor]]]] = {}
    curves: dict[str, dict[str, list[Tensor]]] = {}
    device = next(model.parameters()).device

    def probabilities(output: Output) -> Tensor:
        return (output.logits.float() / temperature_of(model)).softmax(dim=1)

    @torch.inference_mode()
    def answer(pixels: Tensor) -> Tensor:
        return probabilities(model(pixels))

    names = sorted({name for image in images if image.points for name in image.points.visible()})
    batches = _batches(images, preprocessing_of(model), batch_size, names)
    for number, (pixels, masks, points) in enumerate(batches):
        output, found = selections_of(model, pixels, metrics)
        draws = [np.random.default_rng([seed, number * batch_size + i]) for i in range(len(pixels))]
        shares = torch.stack([torch.from_numpy(draw.random((DRAWS, 2))) for draw in draws])
        areas: dict[str, dict[str, Tensor]] = {}
        if faithful:
            noise = torch.stack([torch.from_numpy(draw.standard_normal(pixels.shape[1:])) for draw in draws])
            there, noise = pixels.to(device), NOISE * noise.float().to(device)
            for name, selection, _ in found:
                both = removal_curves(answer, there, probabilities(output), selection.scores, selection.grid, noise)
                areas[name] = {curve: under(heights).cpu() for curve, heights in both.items()}
                for curve, heights in both.items():
                    curves.setdefault(name, {}).setdefault(curve, []).append(heights.cpu())
        for target, (inside, counted) in masks.items():
            lost = ~inside.flatten(1).any(dim=1)
            boxed = partial(_measure_boxes, inside, counted, points, [name for name, _ in names])
            for row, values in _rows(found, inside, counted, boxed, shares if controls else None):
                columns = parts.setdefault(target, {}).setdefault(row, {})
                for name, value in (values | areas.get(row, {})).items():
                    columns.setdefault(name, []).append(value.masked_fill(lost, torch.nan))
        done(len(pixels))
    targets = {
        target: {row: {name: torch.cat(v) for name, v in columns.items()} for row, columns in rows.items()}
        for target, rows in parts.items()
    }
    removed, kept = [0.0, *SHARES], [*(1 - share for share in reversed(SHARES)), 1.0]
    means = {
        row: Curves(removed, kept, **{name: torch.cat(values).mean(dim=0).tolist() for name, values in both.items()})
        for row, both in curves.items()
    }
    return Measured(targets, means)


def _batches(
    images: list[Masked], p: Preprocessing, size: int, names: list[tuple[str, int]]
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]]:
    """Images (B, 3, H, W), for each target both maps of its masks (B, H, W), and the points of these names."""
    transform = eval_transform(p)
    for start in range(0, len(images), size):
        pixels, masks, points = [], dict[str, list[tuple[Tensor, Tensor]]](), []
        for image in images[start : start + size]:
            view, read, marks = read_masked(image, transform)
            pixels.append(view)
            points.append(points_to_view(marks, names, p))
            for target, mask in read.items():
                masks.setdefault(target, []).append(to_view(mask, p))
        yield torch.stack(pixels), {target: _stack(views) for target, views in masks.items()}, torch.stack(points)


def _stack(views: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inside, counted = (torch.stack(maps) for maps in zip(*views, strict=True))
    return inside, counted


def _rows(
    found: Iterable[tuple[str, Any, Tensor]],
    inside: Tensor,
    counted: Tensor,
    boxed: Callable[[Tensor], dict[str, Tensor]],
    shares: Tensor | None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of one batch, each measure (B,)."""
    size = inside.shape[-2:]
    for name, selection, _ in found:
        boxes = selection.boxes.cpu()[:, None]
        yield name, measure_scores(selection.scores.float().cpu(), selection.grid, inside, counted) | boxed(boxes)
        if shares is not None:
            yield f"{name}/centre", boxed(place_boxes(boxes, size, torch.full((len(boxes), 1, 2), 0.5)))
            yield f"{name}/random", boxed(place_boxes(boxes.expand(-1, DRAWS, -1), size, shares))
    if shares is not None:
        yield "whole", boxed(torch.tensor([[0, 0, size[1], size[0]]]).expand(len(inside), 1, 4))


def _measure_boxes(
    inside: Tensor, counted: Tensor, points: Tensor, names: list[str], boxes: Tensor
) -> dict[str, Tensor]:
    """The measures of `boxes` (B, R, 4), each the mean (B,) over the R places of a box."""
    return _mean(measure_boxes(boxes, inside, counted) | measure_points(boxes, points, names))


def _mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.nanmean(dim=1) for name, value in values.items()}


def summarise(rows: Rows, resamples: int, seed: int) -> TargetMeasures:
    """Means with intervals: of every row, and of how much more a mechanism's box holds than its controls (paired).

    Args:
        rows: by row and measure, (images,).
        resamples: draws of the bootstrap.
        seed: of them.
    """
    some = next(iter(rows.values()))["box_recall"]
    gains = {
        row: {
            f"{KEYS.get(measure, measure)} - {control}": columns[measure] - values
            for control in ("centre", "random")
            for measure, values in rows[f"{row}/{control}"].items()
            if measure != "area"
        }
        for row, columns in rows.items()
        if f"{row}/random" in rows
    }
    tables = {
        "rows": {row: {KEYS.get(name, name): v for name, v in columns.items()} for row, columns in rows.items()},
        "gains": gains,
    }
    every = {
        (kind, row, name): column
        for kind, table in tables.items()
        for row, columns in table.items()
        for name, column in columns.items()
    }
    found = as_numbers(every, resamples, seed)
    means = {
        kind: {row: {name: found[kind, row, name] for name in columns} for row, columns in table.items()}
        for kind, table in tables.items()
    }
    return TargetMeasures(int(some.isnan().sum()), means["rows"], means["gains"])
