"""Floor 4: one page of what a model got wrong, for a person to look through."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from glsim.backbone import Model
from glsim.bundle import preprocessing_of
from glsim.data import ImageList
from glsim.files import printable, write_text
from glsim.images import BadImage, fit_size, read_image
from glsim.pictures import BOX_COLOUR, TITLES, Explanation, explanations, overlay, to_photograph
from glsim.predict import to_original
from glsim.sources import located
from glsim.transforms import Preprocessing, eval_transform

PAGE = "index.html"
MOST, PAIRS = 200, 12  # mistakes and pairs of classes that the page shows
SIDE, BATCH = 256, 16  # pixels of the longer side of a picture; images explained at a time


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
    """The images with a wrong prediction, the most confident first."""
    rows = zip(images.paths, images.labels, predictions, confidences, true_confidences, strict=True)
    wrong = [Mistake(*row) for row in rows if row[1] != row[2]]
    return sorted(wrong, key=lambda m: (-m.confidence, str(m.path)))


def write_page(
    folder: Path, model: Model, mistakes: list[Mistake], classes: Sequence[str], train: ImageList | None, about: Any
) -> Path:
    """Write `folder`/index.html, which needs no other file; returns it. An older one is replaced.

    `train` gives an example of each class, where there is one. `about` is the summary that `evaluate.run` returns.
    """
    shown, pairs = mistakes[:MOST], confused_pairs(mistakes)
    wanted = {c for m in shown for c in (m.truth, m.answer)} | {c for pair, _ in pairs[:PAIRS] for c in pair}
    examples = draw_examples(train, wanted)
    names = [_text(name.replace("_", " ")) for name in classes]
    body = _head(mistakes, about)
    if mistakes:
        body += _pairs(pairs, shown, names, examples, list(about["per_class"].values()))
        body += f"<h2>One by one, the most confident first</h2>\n<p>{_legend(model, shown[0], len(mistakes))}</p>\n"
    for number, (m, pictures) in enumerate(draw(model, shown), start=1):
        body += _card(number, m, pictures, names, examples, located(about["data"]))
    title = f"glsim mistakes: {_text(about['source'])}"
    # An example stands beside many mistakes: as a background its picture is in the page once.
    style = _STYLE + "".join(f".of{c} {{ background-image: url({address}) }}\n" for c, address in examples.items())
    write_text(folder / PAGE, _HTML.format(title=title, style=style, body=body))
    return folder / PAGE


def confused_pairs(mistakes: Sequence[Mistake]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of classes (a, b) with how often (a was taken for b, b for a); most often first, a the one more often."""
    counts = Counter((m.truth, m.answer) for m in mistakes)
    found = []
    for a, b in counts:
        there, back = counts[a, b], counts[b, a]
        if (there, -a) > (back, -b):
            found.append(((a, b), (there, back)))
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
    small = photograph.resize(fit_size(photograph.size, SIDE), Image.Resampling.LANCZOS)
    heat = overlay(np.asarray(small), to_photograph(e.heatmap, small.size, p))
    left, top, right, bottom = to_original(e.box, photograph.size, p)
    crop = photograph.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    box = to_original(e.box, small.size, p)
    return [
        ("image and box", _address(_with_box(small, box))),
        (f"scores: {TITLES.get(e.metric, e.metric)}", _address(_with_box(Image.fromarray(heat), box))),
        ("in the box", _address(crop.resize(fit_size(crop.size, SIDE), Image.Resampling.BICUBIC))),
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
                first[label] = read_image(path, _small)
            except BadImage:
                continue
    return first


def _small(photograph: Image.Image) -> str:
    return _address(photograph.resize(fit_size(photograph.size, SIDE), Image.Resampling.LANCZOS))


def _address(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# --- the page ---------------------------------------------------------------------------------------------------------

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style></head><body>
{body}</body></html>
"""


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1e }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } a { color: inherit }
.grey, figcaption { color: #666 } figcaption, .small { font-size: .8rem; line-height: 1.35 }
.small, figcaption, h3 { overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: 5rem 5rem 1fr; gap: .8rem; align-items: center }
.pair { padding: .6rem 0; border-bottom: 1px solid #ddd } .pair p { margin: 0 }
.example { display: block; width: 100%; aspect-ratio: 1; background: #f4f4f5 center / contain no-repeat }
.none { display: grid; place-items: center; text-align: center; color: #888; font-size: .75rem; line-height: 1.2 }
.card { border: 1px solid #ddd; border-radius: .4rem; padding: .8rem; margin: 1rem 0; scroll-margin-top: 1rem }
.card:target { border-color: #ff2d55; box-shadow: 0 0 0 1px #ff2d55 }
h3 { margin: 0; font-size: 1.1rem; font-weight: 400 }
.card p { margin: 0 0 .6rem } figure { margin: 0; min-width: 0 }
.pictures { display: grid; grid-template-columns: repeat(5, 1fr); gap: .6rem }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #f4f4f5 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); column-gap: 2rem }
.first { position: relative }
.first::before { content: ""; position: absolute; inset: 0 auto 0 -.35rem; border-left: 1px solid #ddd }
@media (max-width: 44rem) {
.pictures { grid-template-columns: repeat(6, 1fr) } figure { grid-column: span 2 }
.example-of { grid-column: span 3 } .example-of .example { aspect-ratio: 3 / 2 }
.first::before { display: none } .pair { grid-template-columns: 4rem 4rem 1fr }
}
"""


def _head(mistakes: Sequence[Mistake], about: dict[str, Any]) -> str:
    count = f"{about['count']:,} {'image' if about['count'] == 1 else 'images'}"
    title = f"{len(mistakes):,} of {count} wrong" if mistakes else f"None of {count} wrong"
    flip = ", image and mirror image averaged" * about["flip"]
    split = "all splits" if about["split"] == "all" else f"split {about['split']}"
    return f"""<h1>{title}</h1>
<p class="grey small">{_text(about["source"])} on {_text(about["data"])}, {split}: top-1 {about["top1"]:.2%}{flip}</p>
"""


def _legend(model: Model, first: Mistake, wrong: int) -> str:
    """What the pictures show."""
    image = read_image(first.path, eval_transform(preprocessing_of(model)))[None]
    with torch.inference_mode():
        crops = model(image.to(next(model.parameters()).device)).crops is not None
    method = _text(model.config["method"])
    capped = f"The {MOST} of {wrong:,} about which the model was surest. " * (wrong > MOST)
    return capped + (
        "The heat-map goes from blue, low scores, to red, high ones; edges that the network was not shown are blue. "
        + (
            f"{method} encoded what is in the box once more."
            if crops
            else f"{method} does not look into the box again."
        )
    )


def _pairs(
    pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    shown: Sequence[Mistake],
    names: Sequence[str],
    examples: dict[int, str],
    per_class: Sequence[Sequence[int]],
) -> str:
    """The classes taken for each other most often, with an example of both and where the mistakes stand."""
    text = '<h2>Most often confused</h2>\n<div class="pairs">\n'
    for (a, b), counts in pairs[:PAIRS]:
        lines = [
            f"<p><b>{names[true]}</b> taken for <b>{names[said]}</b>: {count} of {per_class[true][1]:,}</p>"
            for (true, said), count in zip(((a, b), (b, a)), counts, strict=True)
            if count
        ]
        links = [f'<a href="#m{i}">{i}</a>' for i, m in enumerate(shown, 1) if {m.truth, m.answer} == {a, b}]
        lines += [f'<p class="small grey">see {", ".join(links)}</p>'] * bool(links)
        pictures = "".join(_example(c, names, examples) for c in (a, b))
        text += f'<div class="pair">{pictures}<div>{"".join(lines)}</div></div>\n'
    rest = len(pairs) - PAIRS
    return (
        text
        + "</div>\n"
        + (f'<p class="grey">and {rest:,} more {"pair" if rest == 1 else "pairs"}</p>\n' if rest > 0 else "")
    )


def _card(
    number: int, m: Mistake, pictures: list[tuple[str, str]], names: Sequence[str], examples: dict[int, str], root: Path
) -> str:
    """One mistake."""
    path = m.path.relative_to(root) if m.path.is_relative_to(root) else m.path
    figures = "".join(
        f'<figure><img loading="lazy" src="{address}" alt=""><figcaption>{_text(title)}</figcaption></figure>'
        for title, address in pictures
    )
    for c, which, first in ((m.truth, "true", " first"), (m.answer, "predicted", "")):
        figures += (
            f'<figure class="example-of{first}">{_example(c, names, examples)}'
            f"<figcaption>{which}: {names[c]}, in training</figcaption></figure>"
        )
    answers = f"{names[m.answer]} {m.confidence:.1%}, {names[m.truth]} {m.true_confidence:.1%}"
    return f"""<article class="card" id="m{number}">
<h3><span class="grey">{number}.</span> <b>{names[m.truth]}</b> taken for <b>{names[m.answer]}</b></h3>
<p class="small grey">{answers}; {_text(path)}</p>
<div class="pictures">{figures}</div>
</article>
"""


def _example(c: int, names: Sequence[str], examples: dict[int, str]) -> str:
    if c in examples:
        return f'<span class="example of{c}" role="img" aria-label="training image of {names[c]}"></span>'
    return f'<span class="example none">no training image of {names[c]}</span>'


def _text(value: Any) -> str:
    return html.escape(printable(value))
