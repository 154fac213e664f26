"""Floor 4: does the model look at the object? Scores and boxes of every mechanism against masks, beside controls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from glsim.backbone import Model
from glsim.bundle import load, pick_device, preprocessing_of, temperature_of
from glsim.catalog import xml_boxes
from glsim.config import Localize
from glsim.crop import placed
from glsim.data import find_images
from glsim.files import make_parent, real, write_json
from glsim.images import BadImage, limited, read_image, read_stored
from glsim.pictures import selections_of, spell_out, title_of
from glsim.road import NOISE, SHARES, faithfulness, under
from glsim.transforms import Preprocessing, eval_transform, mask_transform
from glsim.types import DataError, DataWarning, Output
from glsim.where import BOX_MEASURES, as_numbers, measure_boxes, measure_scores, signed

T = TypeVar("T")
OBJECT = "object"
SYNTHETIC = {OBJECT: "body", "part": "part"}  # folders of masks that `glsim.synthetic` writes
ENDINGS = (".png", ".PNG", ".xml", ".XML", "")  # Stanford Dogs' boxes have none
DRAWS = 16  # random places of a box, of which the mean counts
BORDER = 3  # of a trimap: neither object (1) nor background (2)


class Masked(NamedTuple):
    """An image and the files that say where things are in it, by target."""

    path: Path
    masks: dict[str, Path]


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


# --- masks ------------------------------------------------------------------------------------------------------------


def find_masks(images: str | Path, masks: str | Path) -> list[Masked]:
    """Every image of a folder (or file, or glob) with its mask in the folder `masks`.

    A mask stands below `masks` as its image does below any folder that holds it, or has its name alone; it ends in .png
    or .xml (or in nothing: Stanford Dogs). In a folder with `body` and `part`, as `glsim.synthetic` writes them, they
    are two targets. A PNG in the folder of masks is an image only where its own XML stands beside it. Raises DataError
    naming the first image without mask.
    """
    folder = Path(masks)
    if not folder.is_dir():
        raise DataError(f"masks={masks} is no folder; wanted one with a PNG or a PASCAL VOC XML file for every image")
    both = all((folder / name).is_dir() for name in SYNTHETIC.values())
    folders = {target: folder / name for target, name in SYNTHETIC.items()} if both else {OBJECT: folder}
    found, taken = [], dict[Path, Path]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # masks may lie beside: they are not left out
        paths = find_images(images)
    for path in paths:
        if _is_mask(path, folder):
            continue
        chosen = {target: _mask_of(path, place) for target, place in folders.items()}
        found.append(Masked(path, chosen))
        for file in chosen.values():
            if file in taken:
                raise DataError(
                    f"{file} is the mask of {taken[file]} and of {path}; put masks in folders as the images"
                )
            taken[file] = path
    if not found:
        raise DataError(f"{images}: no image outside of the masks in {masks}")
    return found


def _is_mask(path: Path, folder: Path) -> bool:
    inside = path.suffix.lower() == ".png" and real(path).is_relative_to(real(folder))
    return inside and not any(path.with_suffix(ending).is_file() for ending in (".xml", ".XML"))


def _mask_of(path: Path, folder: Path) -> Path:
    parts = path.absolute().parts
    names = (Path(*parts[i:]) for i in range(1, len(parts)) if ".." not in parts[i:])
    for file in (folder / name.with_suffix(ending) for name in names for ending in ENDINGS):
        if file.is_file() and real(file) != real(path):
            return file
    wanted = folder / path.stem
    raise DataError(f"{path} has no mask in {folder}; wanted {wanted}.png or {wanted}.xml, or in folders as the image")


def check_masks(
    images: list[Masked], skip_bad: bool = False, done: Callable[[int], Any] = lambda count: None
) -> tuple[list[Masked], list[str]]:
    """The images that can be measured, and what is wrong with the others: everything is read, and let go again.

    Raises DataError for the first bad one unless `skip_bad`, and where none is left.
    """
    sound, bad = [], []
    pool = ThreadPoolExecutor()
    try:
        for image, fault in zip(images, pool.map(_fault, images), strict=True):
            if fault is None:
                sound.append(image)
            elif skip_bad:
                bad.append(str(fault))
            else:
                raise fault
            done(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if not sound:
        raise DataError(f"no image is left: {bad[0]}")
    return sound, bad


def _fault(image: Masked) -> DataError | None:
    try:
        _read(image, lambda photograph: None)
    except DataError as error:
        return error.with_traceback(None)  # which would keep the pixels
    return None


def _read(image: Masked, use: Callable[[Image.Image], T]) -> tuple[T, dict[str, Image.Image]]:
    made, size = read_image(image.path, lambda photograph: (use(photograph), photograph.size))
    return made, {target: read_mask(file, size) for target, file in image.masks.items()}


def read_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """A mask for an upright image of `size` (width, height), mode "L": 255 object, 128 neither, 0 background.

    A PNG: what is neither zero nor wholly transparent is object; one with no values but 1, 2 and 3 is a trimap
    (Oxford-IIIT Pets): object, background, border, which is neither. An XML file: all boxes of it, first pixel (1, 1),
    last pixel included, as far as they lie in the image. Raises DataError for anything else, for another size than the
    image's, and for a mask without any object.
    """
    mask = _read_png(file, size) if file.suffix.lower() == ".png" else _read_xml(file, size)
    if not (np.asarray(mask) == 255).any():
        raise DataError(f"{file}: an empty mask, no pixel of it is object")
    return mask


def _read_png(file: Path, size: tuple[int, int]) -> Image.Image:
    def levels(opened: Image.Image) -> Image.Image:
        _check_size(file, opened.size, size)
        pixels = np.atleast_3d(np.asarray(opened))
        if opened.mode in ("LA", "RGBA"):
            pixels = pixels[..., :-1] * (pixels[..., -1:] > 0)
        values = pixels.max(axis=2)
        if values.min() >= 1 and 2 <= values.max() <= BORDER:
            return Image.fromarray(np.array([0, 255, 0, 128], np.uint8)[values])
        return Image.fromarray(np.where(values != 0, 255, 0).astype(np.uint8))

    try:
        return read_stored(file, levels, ("PNG",))
    except BadImage as error:
        raise DataError(f"{file}: no readable PNG ({error.reason})") from error


def _read_xml(file: Path, size: tuple[int, int]) -> Image.Image:
    told, boxes = xml_boxes(file)
    if told is not None:
        _check_size(file, told, size)
    if not boxes:
        raise DataError(f"{file}: no bndbox in it, as the format of PASCAL VOC has for every object")
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        shown = max(left, 1) - 1, max(top, 1) - 1, min(right, size[0]) - 1, min(bottom, size[1]) - 1
        if shown[0] > shown[2] or shown[1] > shown[3]:
            turned = left > right or top > bottom
            why = "is empty or turned round" if turned else f"lies outside of {size[0]} x {size[1]} pixels"
            raise DataError(f"{file}: box {left},{top},{right},{bottom} {why}")
        draw.rectangle(shown, fill=255)
    return mask


def _check_size(file: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        (width, height), (w, h) = found, size
        raise DataError(f"{file} is of {width} x {height} pixels, its image of {w} x {h} (upright)")


def to_view(mask: Image.Image, p: Preprocessing) -> tuple[Tensor, Tensor]:
    """What `read_mask` gave, as the network sees its image: object, and object or background, both bool (H, W)."""
    transform, levels = mask_transform(p), np.asarray(mask)
    inside, neither = (transform(Image.fromarray((levels == level).astype(np.uint8) * 255)) for level in (255, 128))
    return inside, ~neither


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
    the image), and "whole" is the whole image. With `faithful` the areas under both curves of `glsim.road` stand beside
    the measures of the scores. `done` is told how many images were measured.
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
            view, read = _read(image, transform)
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
