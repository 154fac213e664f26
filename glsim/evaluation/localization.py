"""Localisation: patch scores and boxes of every method against object masks, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glsim.checkpoints.bundle import load, preprocessing_of, temperature_of
from glsim.config import Localize
from glsim.data.images import limited
from glsim.data.masks import Masked, check_masks, find_masks, read_masked, to_view
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.environment import pick_device
from glsim.evaluation.faithfulness import NOISE, SHARES, faithfulness, under
from glsim.evaluation.localization_metrics import BOX_MEASURES, measure_boxes, measure_scores
from glsim.evaluation.statistics import as_numbers, signed
from glsim.files import make_parent, write_json
from glsim.interpret.heatmaps import selections_of, spell_out, title_of
from glsim.models.backbone import Model
from glsim.models.boxes import placed
from glsim.types import DataError, Output

DRAWS = 16  # random places of a box, of which the mean counts


@limited
def run(s: Localize, progress: bool = True) -> dict[str, Any]:
    """The verb: measures of every mechanism, with 95 % intervals; written as JSON to `s.out` where that is given.

    Raises DataError before the model is loaded: naming the image without mask, or, unless `s.skip_bad`, the first image
    or mask that cannot be taken.
    """
    if s.out is not None:
        if Path(s.out).is_dir():
            raise DataError(f"out={s.out} is a folder; name a file")
        make_parent(s.out)  # first: what cannot be made must not come late
    found = find_masks(s.images, s.masks)
    count = min(s.limit or len(found), len(found))
    found = [found[i * len(found) // count] for i in range(count)]  # of every class some
    with tqdm(total=count, desc="masks", unit="image", disable=not progress) as bar:
        images, skipped = check_masks(found, s.skip_bad, bar.update)
    model = load(s.source, **s.options).to(pick_device(s.device))
    names: list[str | None] = [*spell_out(s.metrics, model), *(["random"] if s.controls else [])]
    with tqdm(total=len(images), desc="images", unit="image", disable=not progress) as bar:
        measured = measure(model, images, names, s.controls, s.faithfulness, s.batch_size, s.seed, bar.update)
    result = {
        "source": str(s.source),
        "images": str(s.images),
        "masks": str(s.masks),
        "count": len(images),
        "interval": "95 %, bootstrap over images",
        "resamples": s.resamples,
        "seed": s.seed,
        "targets": {target: summary(rows, s.resamples, s.seed) for target, rows in measured.targets.items()},
        "curves": measured.curves,
        "skipped": skipped,
    }
    if s.out is not None:
        write_json(s.out, result)
    return result


# --- measuring --------------------------------------------------------------------------------------------------------

Rows = dict[str, dict[str, Tensor]]  # row of the table -> measure -> (images,)


class Measured(NamedTuple):
    """What was measured of all images."""

    targets: dict[str, Rows]
    curves: dict[str, dict[str, list[float]]]  # of every mechanism: shares of the patches, and mean probabilities there


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
    """All measures of every image, by target, row and name: tensors (images,).

    NaN where one says nothing: all of an image where no pixel of the object is left in the network's view.

    A row is a mechanism by its name (None in `metrics`: the model's own). With `controls` "NAME/centre" and
    "NAME/random" are boxes as large as its own, in the middle and at random places (mean of 16, drawn from `seed` and
    the image), and "whole" is the whole image. With `faithful` the areas under both curves of
    `glsim.evaluation.faithfulness` stand beside the measures of the scores. `done` is told how many images were
    measured.
    """
    parts: dict[str, dict[str, dict[str, list[Tensor]]]] = {}
    curves: dict[str, dict[str, list[Tensor]]] = {}
    device = next(model.parameters()).device

    def probabilities(output: Output) -> Tensor:
        return (output.logits.float() / temperature_of(model)).softmax(dim=1)

    @torch.inference_mode()
    def answer(pixels: Tensor) -> Tensor:
        return probabilities(model(pixels))

    for number, (pixels, masks) in enumerate(_batches(images, preprocessing_of(model), batch_size)):
        output, found = selections_of(model, pixels, metrics)
        draws = [np.random.default_rng([seed, number * batch_size + i]) for i in range(len(pixels))]
        shares = torch.stack([torch.from_numpy(draw.random((DRAWS, 2))) for draw in draws])
        areas: dict[str, dict[str, Tensor]] = {}
        if faithful:
            noise = torch.stack([torch.from_numpy(draw.standard_normal(pixels.shape[1:])) for draw in draws])
            there, noise = pixels.to(device), NOISE * noise.float().to(device)
            for name, selection, _ in found:
                both = faithfulness(answer, there, probabilities(output), selection.scores, selection.grid, noise)
                areas[name] = {curve: under(heights).cpu() for curve, heights in both.items()}
                for curve, heights in both.items():
                    curves.setdefault(name, {}).setdefault(curve, []).append(heights.cpu())
        for target, (inside, counted) in masks.items():
            lost = ~inside.flatten(1).any(dim=1)
            for row, values in _rows(found, inside, counted, shares if controls else None):
                columns = parts.setdefault(target, {}).setdefault(row, {})
                for name, value in (values | areas.get(row, {})).items():
                    columns.setdefault(name, []).append(value.masked_fill(lost, torch.nan))
        done(len(pixels))
    targets = {
        target: {row: {name: torch.cat(v) for name, v in columns.items()} for row, columns in rows.items()}
        for target, rows in parts.items()
    }
    means = {
        row: {"removed": [0.0, *SHARES], "kept": [*(1 - share for share in reversed(SHARES)), 1.0]}
        | {name: torch.cat(values).mean(dim=0).tolist() for name, values in both.items()}
        for row, both in curves.items()
    }
    return Measured(targets, means)


def _batches(
    images: list[Masked], p: Preprocessing, size: int
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """Images (B, 3, H, W), and for each target both maps of its masks (B, H, W)."""
    transform = eval_transform(p)
    for start in range(0, len(images), size):
        pixels, masks = [], dict[str, list[tuple[Tensor, Tensor]]]()
        for image in images[start : start + size]:
            view, read = read_masked(image, transform)
            pixels.append(view)
            for target, mask in read.items():
                masks.setdefault(target, []).append(to_view(mask, p))
        yield torch.stack(pixels), {target: _stack(views) for target, views in masks.items()}


def _stack(views: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inside, counted = (torch.stack(maps) for maps in zip(*views, strict=True))
    return inside, counted


def _rows(
    found: Iterable[tuple[str, Any, Tensor]], inside: Tensor, counted: Tensor, shares: Tensor | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The rows of one batch, each measure (B,)."""
    size = inside.shape[-2:]
    for name, selection, _ in found:
        boxes = selection.boxes.cpu()[:, None]
        values = measure_scores(selection.scores.float().cpu(), selection.grid, inside, counted)
        yield name, values | _mean(measure_boxes(boxes, inside, counted))
        if shares is not None:
            middle = placed(boxes, size, torch.full((len(boxes), 1, 2), 0.5))
            yield f"{name}/centre", _mean(measure_boxes(middle, inside, counted))
            moved = placed(boxes.expand(-1, DRAWS, -1), size, shares)
            yield f"{name}/random", _mean(measure_boxes(moved, inside, counted))
    if shares is not None:
        image = torch.tensor([[0, 0, size[1], size[0]]]).expand(len(inside), 1, 4)
        yield "whole", _mean(measure_boxes(image, inside, counted))


def _mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.nanmean(dim=1) for name, value in values.items()}


def summary(rows: Rows, resamples: int, seed: int) -> dict[str, Any]:
    """Means with intervals: of every row, and of how much more a mechanism's box holds than its controls (paired).

    `left_out` counts the images of which no pixel of the object is left in the network's view: no row has them.
    """
    some = next(iter(rows.values()))["coverage"]
    gains = {
        row: {
            f"{measure} - {control}": columns[measure] - rows[f"{row}/{control}"][measure]
            for control in ("centre", "random")
            for measure in BOX_MEASURES[1:]
        }
        for row, columns in rows.items()
        if f"{row}/random" in rows
    }
    tables = {"rows": rows, "gains": gains}
    every = {
        (kind, row, name): column
        for kind, table in tables.items()
        for row, columns in table.items()
        for name, column in columns.items()
    }
    found = as_numbers(every, resamples, seed)
    return {
        "left_out": int(some.isnan().sum()),
        **{
            kind: {row: {name: found[kind, row, name] for name in columns} for row, columns in table.items()}
            for kind, table in tables.items()
        },
    }


# --- for people -------------------------------------------------------------------------------------------------------

HEADS = {
    "pointing": "pointing",
    "energy": "energy",
    "auc": "ROC-AUC",
    "area": "area",
    "coverage": "coverage",
    "holds": "holds",
    "purity": "purity",
    "iou": "IoU",
    "deletion": "deletion",
    "insertion": "insertion",
}


def as_text(result: dict[str, Any]) -> str:
    """A table for each target: a line a row, means in percent with half the width of the interval."""
    lines = [f"{result['count']} images; percent, +- half of the 95 % interval"]
    for target, found in result["targets"].items():
        rows = found["rows"]
        heads = [name for name in HEADS if any(name in row for row in rows.values())]
        titles = {row: _title(row) for row in rows}
        width = max(map(len, titles.values()))
        why = "images left out: no pixel of it is left in the network's view"
        left_out = f" ({found['left_out']} {why})" * bool(found["left_out"])
        lines += ["", f"{target}{left_out}", " " * width + "".join(f"{HEADS[name]:>14}" for name in heads)]
        for row, values in rows.items():
            cells = "".join(f"{_cell(values[name]) if name in values else '':>14}" for name in heads)
            lines.append(f"{titles[row]:{width}}{cells}".rstrip())
        for row, values in found["gains"].items():
            more = values["coverage - random"]
            if more is not None:
                lines.append(f"coverage of {title_of(row)} - random box: {signed(*_percent(more))}")
    return "\n".join(lines)


def _title(row: str) -> str:
    name, _, control = row.rpartition("/")
    return f"  {control}, same size" if name else {"whole": "whole image"}.get(row, title_of(row))


def _cell(value: list[float | None] | None) -> str:
    if value is None:
        return "-"
    mean, low, high = _percent(value)
    return f"{mean:.1f}" if low is None else f"{mean:.1f} +-{(high - low) / 2:.1f}"


def _percent(value: list[float | None]) -> list[Any]:
    return [None if v is None else 100 * v for v in value]
