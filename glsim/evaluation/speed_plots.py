"""Plots of measured speed: along the image size, along the batch size, and against accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from glsim.interpret.drawing import save_figure

if TYPE_CHECKING:
    from glsim.evaluation.speed import SpeedRow

Side = Literal["image_size", "batch_size"]


def draw(rows: Sequence[SpeedRow], along: Side, apart: Side, path: Path) -> None:
    """Write a PNG: cost of an image along the image size, or images a second along the batch.

    Args:
        rows: measured; those that failed are left out.
        along: what the axis is.
        apart: what has a panel for each of its values.
        path: of the PNG.
    """
    cost = along == "image_size"
    measured = [(row, row.images_per_second) for row in rows if row.error is None and row.images_per_second]
    panels = sorted({getattr(row, apart) for row, _ in measured})
    if not panels:
        return
    several = [k for k in ("backbone", "dtype", "compile") if len({getattr(row, k) for row, _ in measured}) > 1]
    figure = Figure(figsize=(1.2 + 3.8 * len(panels), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=cost, squeeze=False)[0]
    for axes, value in zip(all_axes, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row, rate in measured:
            if getattr(row, apart) == value:
                label = ", ".join([row.method, *_words(row, several, "eager")])
                lines.setdefault(label, []).append((getattr(row, along), 1000 / rate if cost else rate))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        places = sorted({getattr(row, along) for row, _ in measured})
        axes.set(xscale="log", yscale="log" if cost else "linear")
        axes.set_xticks(places, [str(place) for place in places])
        if cost:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set(xlabel=along.replace("_", " "), title=f"{apart.replace('_', ' ')} {value}")
        axes.grid(alpha=0.3)
        if not cost:
            axes.set_ylim(bottom=0)
    all_axes[0].set_ylabel("ms an image" if cost else "images a second")
    all_axes[-1].legend()
    save_figure(figure, path)


def draw_accuracy(rows: Sequence[SpeedRow], path: Path) -> None:
    """PNG: test accuracy against images a second, a point a bundle with its name; a panel per batch size."""
    known = [row for row in rows if row.error is None and row.accuracy is not None]
    points = [(row, row.images_per_second or 0.0, 100 * (row.accuracy or 0.0)) for row in known]
    panels = sorted({row.batch_size for row in known})
    if not panels:
        return
    several = [k for k in ("dtype", "compile") if len({getattr(row, k) for row in known}) > 1]
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, batch in zip(all_axes, panels, strict=True):
        for row, rate, accuracy in points:
            if row.batch_size == batch:
                name = ", ".join([Path(row.method).name, *_words(row, several, "")])
                axes.plot(rate, accuracy, "o", color="tab:blue")
                axes.annotate(name, (rate, accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="images a second", title=f"batch size {batch}")
        axes.set_xlim(0, 1.4 * max(rate for _, rate, _ in points))  # the names stand right of their points
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("test top-1, %")
    save_figure(figure, path)


def _words(row: SpeedRow, settings: Sequence[str], eager: str) -> list[str]:
    """The values of `settings` as a label has them; `eager` stands for what is not compiled."""
    compiled = "compiled" if row.compile else eager
    words = [compiled if name == "compile" else str(getattr(row, name)) for name in settings]
    return [word for word in words if word]
