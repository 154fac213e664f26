"""The HTML page of the images that a model got wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from glsim.checkpoints.bundle import preprocessing_of
from glsim.data.images import BadImage, fit_size, read_image
from glsim.data.pages import render
from glsim.data.readers import ImageList
from glsim.data.sources import located
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.files import data_url, write_text
from glsim.inference.predictor import to_original
from glsim.interpret.drawing import BOX_COLOUR, overlay, title_of
from glsim.interpret.heatmaps import Explanation, explanations, to_photograph
from glsim.models import find_method
from glsim.models.base import Model

if TYPE_CHECKING:
    from glsim.evaluation.evaluate import BundleEvaluation

PAGE = "index.html"
MOST, PAIRS = 200, 12  # mistakes and pairs of classes that the page shows
SIDE, BATCH = 256, 16  # pixels of the longer side of a picture; images explained at a time
TEMPLATE = Path(__file__).with_suffix(".html")


class Mistake(NamedTuple):
    """An image whose class the model did not say; classes are numbers."""

    path: Path
    truth: int
    answer: int
    confidence: float  # probability of the answer
    true_confidence: float  # probability of the truth


def find_mistakes(
    images: ImageList, predictions: Sequence[int], confidences: Sequence[float], true_confidences: Sequence[float]
) -> list[Mistake]:
    """The images with a wrong prediction, the most confident first.

    Args:
        images: with their classes.
        predictions: number of the class predicted, an image each.
        confidences: probability of the class predicted.
        true_confidences: probability of the true class.
    """
    rows = zip(images.paths, images.labels, predictions, confidences, true_confidences, strict=True)
    wrong = [Mistake(*row) for row in rows if row[1] != row[2]]
    return sorted(wrong, key=lambda m: (-m.confidence, str(m.path)))


def write_page(
    folder: Path,
    model: Model,
    mistakes: list[Mistake],
    classes: Sequence[str],
    train: ImageList | None,
    about: BundleEvaluation,
) -> Path:
    """Write `folder`/index.html, which needs no other file; an older one is replaced.

    Args:
        model: the model, for heat-maps and crops.
        mistakes: what `find_mistakes` found.
        classes: names of the classes.
        train: images to take an example of each class from, where there are any.
        about: what `evaluate_bundle` returns.

    Returns:
        The path of the page.
    """
    shown, pairs = mistakes[:MOST], confused_pairs(mistakes)
    wanted = {c for m in shown for c in (m.truth, m.answer)} | {c for pair, _ in pairs[:PAIRS] for c in pair}
    root = located(about.data)
    page = render(
        TEMPLATE,
        about=about,
        wrong=len(mistakes),
        shown=len(shown),
        method=model.config.method,
        crops=find_method(model.config.method).crops,
        names=[name.replace("_", " ") for name in classes],
        examples=draw_examples(train, wanted),
        images=[images for _, images in about.per_class.values()],
        pairs=[
            (*pair, [number for number, m in enumerate(shown, 1) if {m.truth, m.answer} == set(pair[0])])
            for pair in pairs[:PAIRS]
        ],
        more_pairs=max(0, len(pairs) - PAIRS),
        cards=(  # one by one: the pictures of all would fill the memory twice
            (m, str(m.path.relative_to(root) if m.path.is_relative_to(root) else m.path), pictures)
            for m, pictures in draw(model, shown)
        ),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def confused_pairs(mistakes: Sequence[Mistake]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of classes (a, b) with how often (a was taken for b, b for a); most often first, a the one more often."""
    counts = Counter((m.truth, m.answer) for m in mistakes)
    both = {(a, b): (count, counts.get((b, a), 0)) for (a, b), count in counts.items()}
    found = [((a, b), (there, back)) for (a, b), (there, back) in both.items() if (there, -a) > (back, -b)]
    return sorted(found, key=lambda pair: (-sum(pair[1]), pair[0]))


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(model: Model, mistakes: Sequence[Mistake]) -> Iterator[tuple[Mistake, list[tuple[str, str]]]]:
    """Each mistake with its pictures, as (title, address): the photograph with the box, the heat-map, the crop."""
    p = preprocessing_of(model)
    transform = eval_transform(p)
    for start in range(0, len(mistakes), BATCH):
        part = mistakes[start : start + BATCH]
        found = explanations(model, torch.stack([read_image(m.path, transform) for m in part]))
        for m, e in zip(part, found, strict=True):  # read again: all of them at once would fill the memory
            yield m, read_image(m.path, partial(_pictures, e=e, p=p))


def _pictures(photograph: Image.Image, e: Explanation, p: Preprocessing) -> list[tuple[str, str]]:
    small = _small(photograph)
    heat = overlay(np.asarray(small), to_photograph(e.heatmap, small.size, p))
    left, top, right, bottom = to_original(e.box, photograph.size, p)
    crop = photograph.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    box = to_original(e.box, small.size, p)
    return [
        ("image and box", data_url(_with_box(small, box))),
        (f"scores: {title_of(e.metric)}", data_url(_with_box(Image.fromarray(heat), box))),
        ("in the box", data_url(crop.resize(fit_size(crop.size, SIDE), Image.Resampling.BICUBIC))),
    ]


def _with_box(picture: Image.Image, box: Sequence[int]) -> Image.Image:
    picture, last = picture.copy(), (picture.width - 1, picture.height - 1) * 2
    left, top, right, bottom = (min(max(side, 0), most) for side, most in zip(box, last, strict=True))
    pen = ImageDraw.Draw(picture)
    for inset, colour, width in ((0, "white", 5), (1, BOX_COLOUR, 3)):
        corners = (left + inset, top + inset, max(left, right - inset), max(top, bottom - inset))
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour, width=width)
    return picture


def draw_examples(train: ImageList | None, wanted: set[int]) -> dict[int, str]:
    """The address of a picture of the first image of each class that can be read."""
    first: dict[int, str] = {}
    for path, label in zip(train.paths, train.labels, strict=True) if train else ():
        if label in wanted and label not in first:
            try:
                first[label] = data_url(read_image(path, _small))
            except BadImage:
                continue
    return first


def _small(photograph: Image.Image) -> Image.Image:
    return photograph.resize(fit_size(photograph.size, SIDE), Image.Resampling.LANCZOS)
