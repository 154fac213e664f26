"""What `glsim explain` does: a model run on image files, its explanations drawn as one PNG each and a sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from glsim.checkpoints.bundle import load, preprocessing_of
from glsim.data.image_files import find_images
from glsim.data.images import BadImage, read_image
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.transforms import eval_transform
from glsim.environment import pick_device
from glsim.files import make_folder, real
from glsim.interpret.drawing import Row, check_colormap, draw_mechanisms, draw_sheet, view_of
from glsim.interpret.heatmaps import explain_by, spell_out
from glsim.models.scores import check_top
from glsim.types import ConfigError, DataError, optional

SHEET, SHEET_ROWS = "sheet.png", 24
OURS = (SHEET, "layers.png")  # names that no picture of an image has

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """The picture of one image, with the model's answer."""

    path: str
    picture: str
    label: str
    probability: float
    box: list[int] | None = optional()  # left, top, right, bottom, in pixels of the network's view; of one metric
    boxes: dict[str, list[int]] | None = optional()  # the same of several metrics, by their names


@dataclass(frozen=True)
class Pictures:
    """What `explain_images` drew."""

    source: str
    out: str
    metrics: list[str]
    sheet: str | None  # of several images
    pictures: list[Picture]
    skipped: list[str]  # files that cannot be read, and why


def explain_images(
    source: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    alpha: float = 0.7,
    colormap: str = "turbo",
    top_only: int = 0,
    power: float = 1.0,
    limit: int = 100,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
) -> Pictures:
    """Draw why a model answers as it does: one PNG an image, and `sheet.png` with up to 24 of them where it is several.

    Args:
        source: what `glsim.load` takes.
        images: files, folders or globs.
        out: folder for the pictures.
        options: options of the method to change.
        metrics: scores to draw, or "all"; None: the model's own, gls_cos where the method selects nothing.
        alpha: opacity of the heat-map where it is highest, 0 to 1.
        colormap: a name of matplotlib's.
        top_only: show the scores of only so many best patches (0: all).
        power: exponent on the heat-map in [0, 1].
        limit: draw at most this many images.
        skip_bad: leave unreadable images out; they are listed in `skipped`.
        max_megapixels: larger images are bad files.

    Returns:
        The paths of what was drawn, with answers and boxes.

    Raises:
        ConfigError: for an option or metric that does not fit, or a folder where a picture would replace an image.
        DataError: for images that are not there or cannot be read.
    """
    with pixel_limit(max_megapixels):
        check_colormap(colormap)
        paths = find_images(images)[:limit]
        model = load(source, **options or {}).to(pick_device(device))
        names = spell_out(metrics, model)
        if top_only:
            check_top(top_only, model.backbone.grid, "top_only")
        targets, p = targets_of(out, paths), preprocessing_of(model)
        transform = eval_transform(p)
        rows: list[Row] = []
        pictures: list[Picture] = []
        skipped: list[str] = []

        def views_of(image: Image.Image) -> tuple[Tensor, np.ndarray]:
            return transform(image), view_of(image, p)

        drawn: list[str] = []
        for path, (seen, view), target in photographs(paths, targets, views_of, skip_bad, skipped):
            found = [e for (e,) in explain_by(model, seen[None], names, top_only or None, power)]
            row = Row(view, found, "/".join(path.parts[-2:]))  # with the folder, which is often the class
            boxes = {e.metric: list(e.box) for e in found}
            answer = (str(path), str(target), found[0].label, found[0].probability)
            if len(found) == 1:
                draw_sheet([row], target, alpha, colormap)
                pictures.append(Picture(*answer, box=list(found[0].box)))
            else:
                draw_mechanisms(row, target, alpha, colormap)
                pictures.append(Picture(*answer, boxes=boxes))
            if len(rows) < SHEET_ROWS:
                rows.append(row)
            drawn = list(boxes)
        sheet = str(Path(out) / SHEET) if len(pictures) > 1 else None
        if sheet:
            draw_sheet(rows, sheet, alpha, colormap)
    return Pictures(str(source), str(out), drawn, sheet, pictures, skipped)


def targets_of(out: str | Path, paths: Sequence[Path]) -> list[Path]:
    """A PNG in the folder `out`, which is made, for each image; ConfigError rather than overwrite one of these."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out={folder} is a file; name a folder")
    make_folder(folder)
    targets = [folder / f"{name}.png" for name in _unique_names(paths)]
    taken = {real(path) for path in paths} & {real(target) for target in [*targets, *(folder / name for name in OURS)]}
    if taken:
        raise ConfigError(f"out={folder} would overwrite the image {min(taken)}; name another folder")
    return targets


def photographs(
    paths: Sequence[Path],
    targets: Sequence[Path],
    use: Callable[[Image.Image], T],
    skip_bad: bool,
    skipped: list[str],
) -> Iterator[tuple[Path, T, Path]]:
    """Read images one by one.

    Args:
        paths: of the images.
        targets: of what is made of each.
        use: what is kept of an image.
        skip_bad: leave unreadable ones out, told in `skipped`; else they are raised.
        skipped: receives a line each.

    Returns:
        Path, what `use` made, and target.

    Raises:
        BadImage: for one that cannot be read.
    """
    for path, target in zip(paths, targets, strict=True):
        try:
            made = read_image(path, use)
        except BadImage as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            continue
        yield path, made, target


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: the image's own, with its folder's name before it where two would collide."""
    stems = [p.stem for p in paths]
    names = [p.stem if stems.count(p.stem) == 1 and p.stem != "sheet" else f"{p.parent.name}_{p.stem}" for p in paths]
    return [n if names.count(n) == 1 else f"{i:04d}_{n}" for i, n in enumerate(names)]
