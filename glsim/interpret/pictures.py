"""What `glsim explain` does: a model run on image files, its explanations drawn as one PNG each and a sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
from PIL import Image
from torch import Tensor

from glsim.checkpoints.bundle import load, preprocessing_of
from glsim.data.box_options import Boxed, boxed_of
from glsim.data.detections import find_examples
from glsim.data.images import BadImage, read_image
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.regions import file_of, stem_of
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


class Looking(Boxed, total=False):
    """How a model is shown images: keywords of all that draws some. The defaults are those of `Gallery`."""

    options: Mapping[str, Any] | None  # options of the method to change
    limit: int  # take at most this many images
    skip_bad: bool  # leave images out that cannot be read, or have no finite answer; they are listed in `skipped`
    max_megapixels: float  # larger images are bad files
    device: str | None  # cpu, cuda, ..; None: the best there is


@dataclass(eq=False)
class Gallery:
    """A model from `source`, and images that it is shown one by one; `Looking` tells of the others.

    Raises DataError for a model or images that are not there.
    """

    source: str | Path
    images: Sequence[str | Path]
    _: KW_ONLY
    options: Mapping[str, Any] | None = None
    limit: int = 100
    skip_bad: bool = False
    max_megapixels: float = MAX_MEGAPIXELS
    device: str | None = None
    boxes: str | Path | None = None
    min_confidence: float = 0.0
    categories: Sequence[str] | None = None
    margin: float = 0.1
    square: bool = False

    def __post_init__(self) -> None:
        self.paths = find_examples(self.images, boxed_of(self))[: self.limit]
        self.model = load(self.source, **self.options or {}).to(pick_device(self.device))
        self.preprocessing = preprocessing_of(self.model)
        self.skipped: list[str] = []

    def views_of(self, image: Image.Image) -> tuple[Tensor, np.ndarray]:
        """What the network is shown of `image` (3, H, W), and the same for people, as `view_of`."""
        return eval_transform(self.preprocessing)(image), view_of(image, self.preprocessing)

    def show(self, out: str | Path, use: Callable[[Image.Image], T]) -> Iterator[tuple[Path, T, Path]]:
        """Path, what `use` makes of it, and file for its picture in the folder `out` of each image that can be read."""
        for path, target in zip(self.paths, targets_of(out, self.paths), strict=True):
            try:
                with pixel_limit(self.max_megapixels):
                    made = read_image(path, use)
            except BadImage as error:
                self.leave_out(error)
            else:
                yield path, made, target

    def leave_out(self, bad: BadImage) -> None:
        """Raise it, or tell it in `skipped`."""
        if not self.skip_bad:
            raise bad
        self.skipped.append(str(bad))


def explain_images(
    source: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    alpha: float = 0.7,
    colormap: str = "turbo",
    top_only: int = 0,
    power: float = 1.0,
    **looking: Unpack[Looking],
) -> Pictures:
    """Draw why a model answers as it does: one PNG an image, and `sheet.png` with up to 24 of them where it is several.

    Args:
        source: what `glsim.load` takes.
        images: files, folders or globs.
        out: folder for the pictures.
        metrics: scores to draw, or "all"; None: the model's own, gls_cos where the method selects nothing.
        alpha: opacity of the heat-map where it is highest, 0 to 1.
        colormap: a name of matplotlib's.
        top_only: show the scores of only so many best patches (0: all).
        power: exponent on the heat-map in [0, 1].
        looking: see `Looking`.

    Returns:
        The paths of what was drawn, with answers and boxes.

    Raises:
        ConfigError: for an option or metric that does not fit, or a folder where a picture would replace an image.
        DataError: for images that are not there or cannot be read.
    """
    check_colormap(colormap)
    gallery = Gallery(source, images, **looking)
    model = gallery.model
    names = spell_out(metrics, model)
    if top_only:
        check_top(top_only, model.backbone.grid, "top_only")
    rows: list[Row] = []
    pictures: list[Picture] = []
    boxes: dict[str, list[int]] = {}
    for path, (seen, view), target in gallery.show(out, gallery.views_of):
        found = [e for (e,) in explain_by(model, seen[None], names, top_only or None, power)]
        row = Row(view, found, "/".join(path.parts[-2:]))  # with the folder, which is often the class
        boxes = {e.metric: list(e.box) for e in found}
        single = len(found) == 1
        if single:
            draw_sheet([row], target, alpha, colormap)
        else:
            draw_mechanisms(row, target, alpha, colormap)
        told = {"box": list(found[0].box)} if single else {"boxes": boxes}
        pictures.append(Picture(str(path), str(target), found[0].label, found[0].probability, **told))
        if len(rows) < SHEET_ROWS:
            rows.append(row)
    sheet = str(Path(out) / SHEET) if len(pictures) > 1 else None
    if sheet:
        draw_sheet(rows, sheet, alpha, colormap)
    return Pictures(str(source), str(out), list(boxes), sheet, pictures, gallery.skipped)


def targets_of(out: str | Path, paths: Sequence[Path]) -> list[Path]:
    """A PNG in the folder `out`, which is made, for each image; ConfigError rather than overwrite one of these."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out={folder} is a file; name a folder")
    make_folder(folder)
    targets = [folder / f"{name}.png" for name in _unique_names(paths)]
    taken = {real(file_of(path)) for path in paths} & {
        real(target) for target in [*targets, *(folder / name for name in OURS)]
    }
    if taken:
        raise ConfigError(f"out={folder} would overwrite the image {min(taken)}; name another folder")
    return targets


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: the image's own, with its folder's name before it where two would collide."""
    stems = [stem_of(path) for path in paths]
    times = Counter(stems)
    alone = [times[stem] == 1 and stem != "sheet" for stem in stems]
    folders = [file_of(path).parent.name for path in paths]
    names = [s if one else f"{folder}_{s}" for s, folder, one in zip(stems, folders, alone, strict=True)]
    times = Counter(names)
    return [n if times[n] == 1 else f"{i:04d}_{n}" for i, n in enumerate(names)]
