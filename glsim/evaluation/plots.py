"""Plots of an evaluation as PNG files: confusion matrix, reliability, risk and coverage."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glsim.evaluation.confidence import BINS, Reliability, RiskCoverage
from glsim.interpret.drawing import save_figure


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
