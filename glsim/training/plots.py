"""The training curve as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from glsim.interpret.drawing import save_figure


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="train")
    loss.set(xlabel="epoch", ylabel="loss", title="Loss")
    for name in ("train", "val", "test"):
        points = [(row["epoch"], 100 * row[f"{name}_top1"]) for row in history if f"{name}_top1" in row]
        if points:
            accuracy.plot(*zip(*points, strict=True), marker="." if len(points) > 1 else "*", label=name)
    accuracy.set(xlabel="epoch", ylabel="top-1, %", title="Accuracy", ylim=(0, 101))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
