"""Plots as PNG files: confusion matrix, reliability, risk and coverage; speed, along sizes and against accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from glsim.evaluation.confidence import BINS, Reliability, RiskCoverage
from glsim.interpret.drawing import save_figure

if TYPE_CHECKING:
    from glsim.evaluation.speed import SpeedRow

Side = Literal["image_size", "batch_size"]


def draw_confusion(confusion: Tensor, labels: list[str], path: Path) -> None:
    """Write a PNG of a confusion matrix: colour is the share of the true class, numbers are counts.

    Args:
        confusion: (C, C), a true class a row.
        labels: of the classes.
        path: of the PNG.
    """
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = 3.0 + 0.35 * len(labels)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, col in confusion.nonzero().tolist():
        colour = "white" if share[row, col] > 0.5 else "black"
        axes.text(col, row, str(int(confusion[row, col])), ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, path)


def draw_confidence(bins: Reliability, curve: RiskCoverage, ece: float, threshold: float | None, path: Path) -> None:
    """Write a PNG: accuracy in each bin of confidence, beside the error among the surest images.

    Args:
        bins: images and accuracy by confidence.
        curve: error by the share of images answered.
        ece: expected calibration error, 0 to 1.
        threshold: of rejection, which is marked.
        path: of the PNG.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    filled = bins.images > 0
    middle = ((torch.arange(BINS)[filled] + 0.5) / BINS * 100).numpy()
    share = (bins.images[filled] / bins.images.sum() * 100).numpy()
    left.bar(middle, share, 100 / BINS, color="#d1d1d6", label="share of the images")
    left.plot((0, 100), (0, 100), color="#6e6e73", linestyle="--", linewidth=1, label="as accurate as confident")
    left.scatter(
        (bins.confidence[filled] * 100).numpy(),
        (bins.accuracy[filled] * 100).numpy(),
        20 + 18 * share**0.5,
        color="#0a5fb4",
        edgecolor="white",
        label="accuracy (large: many images)",
        zorder=3,
    )
    title = f"Reliability: calibration error {ece:.1%}"
    left.set(xlabel="confidence, %", ylabel="%", title=title, xlim=(0, 100), ylim=(0, 103))
    coverage, error = ((100 * values).numpy() for values in (curve.coverage, curve.error))
    right.plot(coverage, error, color="#0a5fb4", drawstyle="steps-post", label="error among the surest")
    if threshold is not None and (answered := curve.thresholds >= threshold).any():
        row = int(answered.sum()) - 1
        label = f"threshold {threshold:.2f}: {coverage[row]:.0f} % answered, {error[row]:.1f} % wrong"
        right.plot(coverage[row], error[row], "o", color="#ff2d55", label=label, zorder=3)
    title = f"Risk and coverage: area {curve.area:.4f}"
    right.set(xlabel="images answered, %", ylabel="error among them, %", title=title, xlim=(0, 100))
    right.set_ylim(0, max(1.0, 1.15 * float(error.max())))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", fontsize=8)
    save_figure(figure, path)


# --- speed ------------------------------------------------------------------------------------------------------------


def draw_speed(rows: Sequence[SpeedRow], along: Side, apart: Side, path: Path) -> None:
    """PNG: cost of an image along the image size, or images a second along the batch; a panel per value of `apart`."""
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
