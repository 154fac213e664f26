"""Drawing of explanations: heat-map overlays, outlines of boxes, captions, sheets, as PNG files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from glsim.data.images import fit_size
from glsim.data.transforms import Preprocessing, eval_transform, to_picture
from glsim.files import printable, replacing
from glsim.interpret.heatmaps import Explanation
from glsim.models import METHODS, find_method
from glsim.models.scores import TITLES
from glsim.types import ConfigError

BOX_COLOUR, INK, GREY = "#ff2d55", "#1c1c1e", "#6e6e73"
FINE = 768  # pixels at least of the longer side of a view that pictures are made from
SIDE, WIDEST = 300, 3800  # pixels at most: of a cell's longer side, of a picture's width
SHEET_PIXELS = 12e6  # of a sheet, at most


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: of matplotlib.
        path: of the PNG.
        dpi: dots an inch.
    """
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script the font lacks shows as boxes
        FigureCanvasAgg(figure).figure.savefig(temporary, format="png", dpi=dpi)


def overlay(image: np.ndarray, heatmap: np.ndarray, alpha: float = 0.7, colormap: str = "turbo") -> np.ndarray:
    """Lay a heat-map over an image, which stays visible where the map is low.

    Args:
        image: uint8 (H, W, 3).
        heatmap: in [0, 1], of any size.
        alpha: opacity where the map is 1.
        colormap: a name of matplotlib's.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ConfigError: for a colormap that matplotlib does not have.
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
        """Put an image at a place, as large as fits without changing its shape, in the middle.

        Args:
            image: uint8 (H, W, 3).
            x, y: left upper corner of the place.
            width, height: of the place.
        """
        scale = min(width / image.shape[1], height / image.shape[0])
        w, h = (max(1, round(pixels * scale)) for pixels in image.shape[1::-1])
        left, top = round(x + (width - w) / 2), round(y + (height - h) / 2)
        small = Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS)
        self.pixels[top : top + h, left : left + w] = np.asarray(small)

    def box(self, e: Explanation, x: float, y: float, width: float, height: float) -> None:
        """Draw the box of an explanation on the picture of its whole view.

        Args:
            e: the explanation.
            x, y: left upper corner of that picture.
            width, height: of that picture.
        """
        line = max(2.0, width / 75)
        step = (width / e.image.shape[1], height / e.image.shape[0]) * 2
        left, top, right, bottom = (side * s for side, s in zip(e.box, step, strict=True))
        left, top = max(left, line), max(top, line)  # the line stays on the picture
        right, bottom = min(right, width - line), min(bottom, height - line)
        for colour, thick in (("white", 1.8 * line), (BOX_COLOUR, line)):
            corner = (round(x) + left, round(y) + top)
            self.axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, ec=colour, lw=thick))

    def words(self, text: str, x: float, y: float, room: float, size: float, **style: Any) -> float:
        """Write a text. Where it is too wide it shrinks to two thirds, and then its middle is left out.

        Args:
            text: one line.
            x, y: where its baseline begins.
            room: width that it may take.
            size: of the font.
            style: of matplotlib's text.

        Returns:
            Its width.
        """
        style, text = {"color": INK, "va": "baseline", **style}, printable(text)
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

    Args:
        rows: an image each, with the same metrics.
        path: of the PNG.
        alpha: opacity of a heat-map where it is 1.
        colormap: a name of matplotlib's.
    """
    single, columns = len(rows[0].found) == 1, max(3, 1 + len(rows[0].found))
    side = min(
        1.4 * SIDE if single else SIDE, WIDEST / (columns * 1.03), math.sqrt(SHEET_PIXELS / (columns * len(rows)))
    )
    width, height = cell(rows[0].view, side)
    gap, font = round(0.03 * side), 0.07 * side if single else 0.11 * side
    head, caption = 1.7 * font, 2.0 * font
    page = Page(columns * (width + gap) + gap, head + len(rows) * (height + caption) + gap)
    whole = page.pixels.shape[1] - 2 * gap
    for i, row in enumerate(rows):
        y = head + i * (height + caption)
        baseline = y + 1.45 * font
        used = page.words(row.answer(), gap, baseline, 0.7 * whole, 0.9 * font)
        page.words(row.name, gap + used + font, baseline, whole - gap - used - font, 0.75 * font, color=GREY)
        first = row.found[0]
        cells = [(title_of(e.metric), overlay(row.view, e.heatmap, alpha, colormap), e) for e in row.found]
        crop = [("Crop", row.crop(first), None)] if single else []
        image = ("Image and box", row.view, first) if single else ("Image", row.view, None)
        for column, (title, picture, box) in enumerate([image, *cells, *crop]):
            x = gap + column * (width + gap)
            page.picture(picture, x, y + caption, width, height)
            if box is not None:
                page.box(box, x, y + caption, width, height)
            if i == 0:
                page.words(title, x + width / 2, 1.35 * font, width, font, ha="center", fontweight="bold")
    page.write(path)


def draw_mechanisms(row: Row, path: str | Path, alpha: float = 0.7, colormap: str = "turbo") -> None:
    """Write one PNG of an image: large at the left, then a column for each metric with heat-map, box and crop.

    Args:
        row: the image with its metrics.
        path: of the PNG.
        alpha: opacity of a heat-map where it is 1.
        colormap: a name of matplotlib's.
    """
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
    """The metric for people: "PSM", "Rollout (first=2, last=8)"; or the method, where it scores in a way of its own."""
    name, _, given = metric.partition(":")
    title = find_method(name).title if name in METHODS else TITLES.get(name)
    return (title or name) + (f" ({given.replace(',', ', ')})" if given else "")
