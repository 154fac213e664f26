"""Figures as PNG files."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write a figure as PNG, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script the font lacks shows as boxes
        FigureCanvasAgg(figure).figure.savefig(temporary, format="png", dpi=dpi)
    temporary.replace(path)
