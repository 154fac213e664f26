"""Draw `docs/birds.png`: what a trained model sees in three synthetic birds.

    python docs/make_birds.py RUN [--out docs/birds.png]

RUN is a bundle trained on the synthetic set, as `quickstart/glsim` after `make quickstart`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import glsim
from glsim.checkpoints.bundle import labels_of, preprocessing_of
from glsim.cli.quickstart import BIRDS
from glsim.data.synthetic import Species, draw, species
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.inference.predictor import to_original
from glsim.interpret.drawing import BOX_COLOUR
from glsim.interpret.heatmaps import explanations

COLUMNS = 3
SIZE = 448  # finer than the network's input: box and crop are found there, and shown in the full drawing
SEED = 2024  # data sets are drawn with seed 0 unless told otherwise, so these birds are in none of them
WIDTH, DPI = 960, 100  # pixels of the picture


class Panel(NamedTuple):
    """One bird, all pictures at full resolution."""

    image: Image.Image  # what the network was shown of the drawing
    heatmap: np.ndarray  # (H, W) in [0, 1], over all of `image`
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of `image`
    crop: Image.Image
    title: str


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="bundle trained on the synthetic set")
    parser.add_argument("--out", default="docs/birds.png", help="PNG to write")
    arguments = parser.parse_args()
    try:
        model = glsim.load(arguments.run)
        birds = known_species(model)
    except glsim.GlsimError as error:
        parser.error(str(error))
    lay_out([explain_bird(model, bird, i) for i, bird in enumerate(birds)], Path(arguments.out))


def known_species(model: Any) -> list[Species]:
    """The first three of the model's species; ConfigError where it was trained on something else."""
    labels = set(labels_of(model))
    birds = [bird for bird in species(180) if bird.name in labels]  # of all there are
    if len(birds) < COLUMNS:
        some = ", ".join(sorted(labels)[:5])
        raise glsim.ConfigError(f"the model has to know {COLUMNS} species of the synthetic set; it knows {some}")
    return birds[:COLUMNS]


def explain_bird(model: Any, bird: Species, number: int) -> Panel:
    """Draw a bird, ask the model, and take its box and crop over to the full drawing."""
    p = preprocessing_of(model)
    looks = {key: BIRDS[key] for key in ("part_scale", "clutter")}
    drawing = draw(bird, np.random.default_rng([SEED, number]), SIZE, **looks).image
    (e,) = explanations(model, eval_transform(p)(drawing)[None])
    height, width = p.image_size
    left, top, right, bottom = to_drawing((0, 0, width, height), p)
    box = to_drawing(e.box, p)
    found, truth = (name.replace("_", " ") for name in (e.label, bird.name))
    return Panel(
        drawing.crop((left, top, right, bottom)),
        e.heatmap,
        (box[0] - left, box[1] - top, box[2] - left, box[3] - top),
        drawing.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC),  # the network stretches it to a square too
        f"{found} {e.probability:.0%}" + ("" if found == truth else f", truth: {truth}"),
    )


def to_drawing(box: tuple[int, int, int, int], p: Preprocessing) -> tuple[int, int, int, int]:
    """A box in pixels of the network's view, in pixels of the drawing."""
    return to_original(box, (SIZE, SIZE), p)


def lay_out(panels: list[Panel], path: Path) -> None:
    """Write the figure: a column for each bird, the image and box above heat-map and crop."""
    column = WIDTH / len(panels)
    edge, gap, title = 6, 8, 28  # pixels
    large = column - 2 * edge
    small = (large - gap) / 2
    height = title + large + gap + small + edge
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")

    def place(x: float, y: float, side: float) -> Any:
        """A square of `side` pixels, `x` from the left and `y` from the top."""
        axes = figure.add_axes((x / WIDTH, 1 - (y + side) / height, side / WIDTH, side / height))
        axes.set_axis_off()
        return axes

    for i, panel in enumerate(panels):
        x = i * column + edge
        extent = (0, panel.image.width, panel.image.height, 0)
        image = place(x, title, large)
        heat = place(x, title + large + gap, small)
        crop = place(x + small + gap, title + large + gap, small)
        for axes in (image, heat):
            axes.imshow(panel.image, extent=extent, interpolation="antialiased")
            left, top, right, bottom = panel.box
            for colour, line in (("white", 4.0), (BOX_COLOUR, 2.0)):
                scaled = line if axes is image else line / 2
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=scaled, clip_on=False)
                )
        # Where the score is low the drawing stays visible: the map's opacity grows with it.
        heat.imshow(
            panel.heatmap, cmap="turbo", alpha=0.25 + 0.4 * panel.heatmap, vmin=0, vmax=1, extent=extent, zorder=0.5
        )
        crop.imshow(panel.crop)
        image.set_title(panel.title, fontsize=10, fontweight="bold", pad=7, color="#1c1c1e")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Without an alpha channel and with the slow compression the file is a fifth smaller.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
