"""Floor 4: why. Heat-maps, boxes and crops as arrays and as PNGs.

The file is not called `explain.py` so that `glsim.explain` can be the function.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from glsim import layers
from glsim.backbone import Model
from glsim.bundle import labels_of, load, pick_device, preprocessing_of, temperature_of
from glsim.config import Explain
from glsim.crop import crop_and_resize, select, select_component
from glsim.data import find_images
from glsim.figures import save_figure
from glsim.files import make_folder, real
from glsim.images import BadImage, fit_size, limited, read_any, read_image
from glsim.selection import METRICS, check_metric, check_top, needs_attention, score
from glsim.transforms import Preprocessing, eval_transform, to_picture
from glsim.types import ConfigError, DataError, Output, Selection

BOX_COLOUR, INK, GREY = "#ff2d55", "#1c1c1e", "#6e6e73"
SHEET, SHEET_ROWS = "sheet.png", 24
FINE = 768  # pixels at least of the longer side of a view that pictures are made from
SIDE, WIDEST, LARGEST = 300, 3800, 12e6  # pixels: of a cell at most, of a picture's width, of a sheet's area
TITLES = {
    "gls_cos": "GLS cos",
    "gls_l1": "GLS L1",
    "gls_l2": "GLS L2",
    "attention": "Attention",
    "rollout": "Rollout",
    "psm": "PSM",
    "maws": "MAWS",
    "sacm": "SACM",
    "rams": "RAMS",
    "mhv": "MHV",
    "random": "Random",
    "cal": "CAL",
}

Photograph = str | Path | Image.Image
T = TypeVar("T")


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
    model: Model,
    images: Photograph | Sequence[Photograph],
    metric: str | None = None,
    *,
    top_o: int | None = None,
    power: float = 1.0,
) -> list[np.ndarray]: ...


def explain(
    model: Model,
    images: Tensor | Photograph | Sequence[Photograph],
    metric: str | None = None,
    *,
    top_o: int | None = None,
    power: float = 1.0,
) -> np.ndarray | list[np.ndarray]:
    """Heat-maps of what `model` (in eval mode) looks at: float32 in [0, 1], as CAM libraries give them.

    For a tensor of normalised images (B, 3, H, W) an array (B, H, W). For paths and PIL images, one or several, a list
    of arrays (height, width), each of the size of its upright photograph, 0 at the edges that the network is not shown.

    `metric` names the score, parameters and all ("attention:block=3"); by default the model's own, or gls_cos where
    the method selects nothing. `top_o` keeps the best patches only, `power` is an exponent on the map.

    Raises ConfigError for a metric that is unknown or reads attention maps the backbone does not have, a `top_o`
    beyond the grid, or a `power` that is not positive, and BadImage for a file that cannot be read.
    """
    if isinstance(images, Tensor):
        ((_, selection, _),) = selections_of(model, images, [metric])[1]
        return _heatmaps(selection, images, top_o, power)
    p = preprocessing_of(model)
    transform = eval_transform(p)
    maps = []
    for image in [images] if isinstance(images, Photograph) else images:
        view, size = read_any(image, lambda photograph: (transform(photograph), photograph.size))
        heatmap = explain(model, view[None], metric, top_o=top_o, power=power)[0]
        maps.append(to_photograph(heatmap, size, p))
    return maps


def explanations(model: Model, images: Tensor, metric: str | None = None) -> list[Explanation]:
    """Explain the answers of `model` (in eval mode) for normalised `images` (B, 3, H, W).

    `metric` as for `explain`, which says what is raised. Box and crop are the model's own when the metric is. By
    another metric they are what the model's rule (`glsim`, `rams`, `aftrans`) would have drawn; where it has none for a
    single box, the box around the 8 best patches.
    """
    return _explanations(model, images, [metric])[0]


def _explanations(
    model: Model, images: Tensor, metrics: Sequence[str | None], top_o: int | None = None, power: float = 1.0
) -> list[list[Explanation]]:
    """For each metric, an explanation of each image; None stands for the model's own, or gls_cos."""
    p, labels = preprocessing_of(model), labels_of(model)
    output, selections = selections_of(model, images, metrics)
    answers = (output.logits.float() / temperature_of(model)).softmax(dim=1).max(dim=1)
    return [
        [
            Explanation(image, heatmap, tuple(box), crop, metric, labels[answer], probability)
            for image, heatmap, box, crop, answer, probability in zip(
                to_picture(images, p),
                _heatmaps(selection, images, top_o, power),
                selection.boxes.tolist(),
                to_picture(crops, p),
                answers.indices.tolist(),
                answers.values.tolist(),
                strict=True,
            )
        ]
        for metric, selection, crops in selections
    ]


@torch.inference_mode()
def selections_of(
    model: Model, images: Tensor, metrics: Sequence[str | None]
) -> tuple[Output, list[tuple[str, Selection, Tensor]]]:
    """The answer to normalised `images` (B, 3, H, W); for each metric its name, selection and crops (B, 3, h, w).

    The images are encoded once for the answer and once, at most, for all metrics that are not the model's own.
    """
    images = images.to(next(model.parameters()).device)
    output = model(images)
    own = None if output.selection is None else getattr(model, "metric", model.config["method"])
    names = list(dict.fromkeys(metric or own or "gls_cos" for metric in metrics))
    others = [name for name in names if name != own]
    for name in others:
        check_metric(name, model.backbone.has_attention)
    scores = _score(model, images, others)
    found = []
    for name in names:
        if name == own:
            selection, crops = output.selection, output.crops
        else:
            selection, crops = _select_by(scores[name], model, images), None
        found.append((name, selection, crop_and_resize(images, selection.boxes) if crops is None else crops))
    return output, found


def _score(model: Model, images: Tensor, metrics: Sequence[str]) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Each metric's scores (B, g, N) and the grid, from one pass."""
    if not metrics:
        return {}
    f = model.features(images, attention=any(map(needs_attention, metrics)))
    return {metric: (score(metric, f), f.grid) for metric in metrics}


def _select_by(scored: tuple[Tensor, tuple[int, int]], model: Any, images: Tensor) -> Selection:
    """What the model's rule, or else the box around the 8 best patches, selects by scores of another metric."""
    (scores, grid), size = scored, images.shape[-2:]
    if hasattr(model, "threshold"):
        return select_component(scores, model.threshold, grid, size)
    top_o = min(getattr(model, "top_o", 8), scores.shape[-1])
    default = "inclusive" if hasattr(model, "metric") else "exclusive"  # as the method draws its own box
    return select(scores, top_o, grid, size, getattr(model, "box", default))


def _heatmaps(selection: Selection, images: Tensor, top_o: int | None, power: float) -> np.ndarray:
    size = (images.shape[-2], images.shape[-1])
    return to_heatmap(selection.scores, selection.grid, size, top_o, power).cpu().numpy()


def to_heatmap(
    scores: Tensor, grid: tuple[int, int], size: tuple[int, int], top_o: int | None = None, power: float = 1.0
) -> Tensor:
    """Patch scores (B, N) as smooth maps (B, H, W), each stretched to [0, 1] (a constant map is 0).

    `top_o` sets all but the best patches to 0 before the map is smoothed; `power` is an exponent on the result.
    Raises ConfigError for a `top_o` beyond the grid, or a `power` that is not positive.
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
    """A map over the network's view (H, W) as one over the upright photograph of `size` (width, height).

    Returns (height, width); what the network was not shown of the photograph is 0.
    """
    middle = p.middle(size)
    canvas = _centred(torch.from_numpy(heatmap)[None, None], p.resized(middle))
    maps = F.interpolate(canvas, middle[::-1], mode="bilinear", align_corners=False, antialias=True)
    return _centred(maps, size[::-1])[0, 0].clamp(0, 1).numpy()


def _centred(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros (.., height, width) of `size` with `maps` in their middle."""
    pads = []
    for view, whole in zip(reversed(maps.shape[-2:]), reversed(size), strict=True):
        before = round((whole - view) / 2)
        pads += [before, whole - view - before]
    return F.pad(maps, pads)


def overlay(image: np.ndarray, heatmap: np.ndarray, alpha: float = 0.7, colormap: str = "turbo") -> np.ndarray:
    """Lay a `heatmap` in [0, 1], of any size, over an `image`, uint8 (H, W, 3): uint8 (H, W, 3).

    The colours' opacity is `alpha` where the map is 1 and less where it is lower: there the image stays visible.
    Raises ConfigError for a `colormap` that matplotlib does not have.
    """
    check_colormap(colormap)
    size = (image.shape[1], image.shape[0])
    heat = np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colours = matplotlib.colormaps[colormap](heat)[..., :3] * 255
    opacity = alpha * (0.4 + 0.6 * heat[..., None])
    return (image * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def check_colormap(name: str) -> None:
    """Raise ConfigError unless matplotlib has the colour map."""
    if name not in matplotlib.colormaps:
        raise ConfigError(f"unknown colormap {name!r}; try turbo, jet, viridis, magma, gray or another of matplotlib's")


@limited
def run(s: Explain) -> dict[str, Any]:
    """The verb: one PNG an image, and `sheet.png` with up to 24 of them when there are several; or contrasts."""
    if s.contrast is not None:
        return import_module("glsim.contrasts").run(s)  # which draws with what is here
    check_colormap(s.colormap)
    paths = find_images(s.images)[: s.limit]
    model = load(s.source, **s.options).to(pick_device(s.device))
    metrics = spell_out(s.metrics, model)
    if s.layers:
        layers.check_layers(model)
    if s.top_only:
        check_top(s.top_only, model.backbone.grid, "top_only")
    folder, targets = Path(s.out), targets_of(s.out, paths)
    p = preprocessing_of(model)
    transform = eval_transform(p)
    if s.layers:
        bad: list[str] = []
        views = (view[None] for _, view, _ in photographs(paths, targets, transform, s.skip_bad, bad))
        written_down = layers.write(model, views, folder)
        return {"source": str(s.source), "out": str(folder), "layers": written_down, "pictures": [], "skipped": bad}
    names: list[str] = []
    rows: list[Row] = []
    pictures: list[dict[str, Any]] = []
    skipped: list[str] = []

    def views_of(image: Image.Image) -> tuple[Tensor, np.ndarray]:
        return transform(image), view_of(image, p)

    for path, (seen, view), target in photographs(paths, targets, views_of, s.skip_bad, skipped):
        found = [e for (e,) in _explanations(model, seen[None], metrics, s.top_only or None, s.power)]
        row = Row(view, found, "/".join(path.parts[-2:]))  # with the folder, which is often the class
        if len(found) == 1:
            draw_sheet([row], target, s.alpha, s.colormap)
        else:
            draw_mechanisms(row, target, s.alpha, s.colormap)
        if len(rows) < SHEET_ROWS:
            rows.append(row)
        names = [e.metric for e in found]
        boxes = {e.metric: list(e.box) for e in found}
        where = {"boxes": boxes} if len(found) > 1 else {"box": list(found[0].box)}
        answer = {"label": found[0].label, "probability": found[0].probability}
        pictures.append({"path": str(path), "picture": str(target), **answer, **where})
    sheet = str(folder / SHEET) if len(pictures) > 1 else None
    if sheet:
        draw_sheet(rows, sheet, s.alpha, s.colormap)
    result = {"source": str(s.source), "out": str(folder), "metrics": names, "sheet": sheet}
    return {**result, "pictures": pictures, "skipped": skipped}


def targets_of(out: str | Path, paths: Sequence[Path]) -> list[Path]:
    """A PNG in the folder `out`, which is made, for each image; ConfigError rather than overwrite one of these."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out={folder} is a file; name a folder")
    make_folder(folder)
    targets = [folder / f"{name}.png" for name in _unique_names(paths)]
    taken = {real(path) for path in paths} & {
        real(target) for target in [*targets, folder / SHEET, folder / layers.PICTURE]
    }
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
    """Path, what `use` makes of the image, and target of each that can be read.

    The others are raised, or with `skip_bad` told in `skipped`.
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


def spell_out(names: list[str] | None, model: Model) -> list[str | None]:
    """Spell out "all": the model's own (None), and every other that it can take; ConfigError for what it cannot."""
    every = [name for name in METRICS if model.backbone.has_attention or not needs_attention(name)]
    metrics: list[str | None] = []
    for name in names or []:
        if name not in ("all", model.config["method"]):
            check_metric(name, model.backbone.has_attention)
        metrics += [None, *every] if name == "all" else [name]
    return metrics or [None]


class Row(NamedTuple):
    """One image, and what each metric says of it."""

    view: np.ndarray  # uint8, what the network was shown, in more pixels than it was
    found: list[Explanation]
    name: str

    def answer(self) -> str:
        """Label and probability."""
        return f"{self.found[0].label.replace('_', ' ')}  {self.found[0].probability:.0%}"

    def crop(self, e: Explanation) -> np.ndarray:
        """What is in the box of `e`, in the shape that the second pass sees."""
        scale = self.view.shape[0] // e.image.shape[0]
        cut = Image.fromarray(self.view).crop([side * scale for side in e.box])  # type: ignore[arg-type]
        size = (e.crop.shape[1] * scale, e.crop.shape[0] * scale)
        return np.asarray(cut.resize(size, Image.Resampling.BICUBIC))


def view_of(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """What the network is shown of `image`, uint8, in a whole multiple of its pixels."""
    height, width = p.image_size
    scale = math.ceil(FINE / max(height, width))
    fine = replace(p, image_size=(height * scale, width * scale))
    return to_picture(eval_transform(fine)(image), fine)


class Page:
    """A white page of pixels; pictures, boxes and words are put at (x, y), counted from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.pixels = np.full((math.ceil(height), math.ceil(width), 3), 255, np.uint8)
        height, width = self.pixels.shape[:2]
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def picture(self, image: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """Put `image` at the place, as large as fits without changing its shape, in the middle."""
        scale = min(width / image.shape[1], height / image.shape[0])
        w, h = (max(1, round(pixels * scale)) for pixels in image.shape[1::-1])
        left, top = round(x + (width - w) / 2), round(y + (height - h) / 2)
        small = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
        self.pixels[top : top + h, left : left + w] = np.asarray(small)

    def box(self, e: Explanation, x: float, y: float, width: float, height: float) -> None:
        """Draw the box of `e` on a picture of its whole view that lies there."""
        line = max(2.0, width / 75)
        step = (width / e.image.shape[1], height / e.image.shape[0]) * 2
        left, top, right, bottom = (side * s for side, s in zip(e.box, step, strict=True))
        left, top = max(left, line), max(top, line)  # the line stays on the picture
        right, bottom = min(right, width - line), min(bottom, height - line)
        for colour, thick in (("white", 1.8 * line), (BOX_COLOUR, line)):
            corner = (round(x) + left, round(y) + top)
            self.axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, ec=colour, lw=thick))

    def words(self, text: str, x: float, y: float, room: float, size: float, **style: Any) -> float:
        """Write `text` with its baseline at `y`; returns its width.

        Where it is wider than `room` its `size` shrinks to two thirds, and then its middle is left out.
        """
        style = {"color": INK, "va": "baseline", **style}
        shown = self.axes.text(x, y, text, parse_math=False, fontsize=size, **style)
        kept = len(text)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            if (width := _width(shown)) > room:
                shown.set_fontsize(size * max(0.66, 0.99 * room / width))
            while (width := _width(shown)) > room and kept > 1:
                kept = max(1, min(kept - 1, int(kept * room / width)))
                shown.set_text(f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}")
        return width

    def write(self, path: str | Path) -> None:
        """Write the page as PNG."""
        height, width = self.pixels.shape[:2]
        self.axes.imshow(self.pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
        save_figure(self.figure, path, dpi=72)


def _width(text: Any) -> float:
    extent = text.get_window_extent()
    return extent.height if text.get_rotation() == 90 else extent.width


def draw_sheet(rows: Sequence[Row], path: str | Path, alpha: float = 0.7, colormap: str = "turbo") -> None:
    """Write one PNG with a row for each image.

    With one metric the columns are the image with its box, the heat-map and the crop; with several, the image and the
    heat-map with box of each metric.
    """
    metrics = [e.metric for e in rows[0].found]
    single = len(metrics) == 1
    columns = 3 if single else 1 + len(metrics)
    side = min(1.4 * SIDE if single else SIDE, WIDEST / (columns * 1.03), math.sqrt(LARGEST / (columns * len(rows))))
    width, height = cell(rows[0].view, side)
    gap, font = round(0.03 * side), 0.07 * side if single else 0.11 * side
    head, caption = 1.7 * font, 2.0 * font
    page = Page(columns * (width + gap) + gap, head + len(rows) * (height + caption) + gap)
    xs = [gap + i * (width + gap) for i in range(columns)]
    titles = ["Image and box", title_of(metrics[0]), "Crop"] if single else ["Image", *map(title_of, metrics)]
    for x, title in zip(xs, titles, strict=True):
        page.words(title, x + width / 2, 1.35 * font, width, font, ha="center", fontweight="bold")
    for i, row in enumerate(rows):
        y = head + i * (height + caption)
        baseline = y + 1.45 * font
        used = page.words(row.answer(), gap, baseline, 0.7 * (page.pixels.shape[1] - 2 * gap), 0.9 * font)
        room = page.pixels.shape[1] - 3 * gap - used - font
        page.words(row.name, gap + used + font, baseline, room, 0.75 * font, color=GREY)
        y += caption
        page.picture(row.view, xs[0], y, width, height)
        for x, e in zip(xs[1:], row.found, strict=False):
            page.picture(overlay(row.view, e.heatmap, alpha, colormap), x, y, width, height)
            page.box(e, x, y, width, height)
        if single:
            page.box(row.found[0], xs[0], y, width, height)
            page.picture(row.crop(row.found[0]), xs[2], y, width, height)
    page.write(path)


def draw_mechanisms(row: Row, path: str | Path, alpha: float = 0.7, colormap: str = "turbo") -> None:
    """Write one PNG of an image: large at the left, then a column for each metric with heat-map, box and crop."""
    side = min(SIDE, WIDEST / (len(row.found) + 3.5))
    width, height = cell(row.view, side)
    gap, font = round(0.03 * side), 0.11 * side
    head = 2.0 * font
    large_width, large_height = 3 * width + 2 * gap, 3 * height + 2 * gap
    start = gap + large_width + 1.6 * font
    page = Page(start + len(row.found) * (width + gap), head + large_height + gap)
    baseline = 1.35 * font
    used = page.words(row.answer(), gap, baseline, 0.7 * large_width, font, fontweight="bold")
    room = large_width - used - font
    page.words(row.name, gap + large_width, baseline, room, 0.75 * font, color=GREY, ha="right")
    page.picture(row.view, gap, head, large_width, large_height)
    ys = [head + i * (height + gap) for i in range(3)]
    for y, name in zip(ys, ("Score", "Box", "Crop"), strict=True):
        style = {"rotation": 90, "ha": "center", "va": "center", "color": GREY}
        page.words(name, start - 0.75 * font, y + height / 2, height, 0.9 * font, **style)
    for i, e in enumerate(row.found):
        x = start + i * (width + gap)
        page.words(title_of(e.metric), x + width / 2, baseline, width, font, ha="center", fontweight="bold")
        for y, picture in zip(ys, (overlay(row.view, e.heatmap, alpha, colormap), row.view, row.crop(e)), strict=True):
            page.picture(picture, x, y, width, height)
        page.box(e, x, ys[1], width, height)
    page.write(path)


def cell(view: np.ndarray, side: float) -> tuple[int, int]:
    """Width and height of a picture of `view` whose longer side has `side` pixels."""
    return fit_size((view.shape[1], view.shape[0]), side)


def title_of(metric: str) -> str:
    """The metric for people: "PSM", "Rollout (first=2, last=8)"."""
    name, _, given = metric.partition(":")
    return TITLES.get(name, name) + (f" ({given.replace(',', ', ')})" if given else "")


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: the image's own, with its folder's name before it where two would collide."""
    stems = [p.stem for p in paths]
    names = [p.stem if stems.count(p.stem) == 1 and p.stem != "sheet" else f"{p.parent.name}_{p.stem}" for p in paths]
    return [n if names.count(n) == 1 else f"{i:04d}_{n}" for i, n in enumerate(names)]
