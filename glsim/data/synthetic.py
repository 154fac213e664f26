"""Painted birds with known truth: species that differ only in small parts, and the exact mask of every part.

A real fine-grained data set cannot say whether a method looked at the right place. This one can: body, pose, light
and background come from one random distribution, whatever the species; only the colour of one or two of five small
parts (`PARTS`) tells the species. The background is littered with the same colours, so that a colour somewhere in
the image does not settle the class. All is polygons: a picture is a list of (label, polygon, colour) filled from back
to front, once with the colours and once with the labels, so that the masks are those of the very pixels one sees.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from glsim.files import real

PARTS = ("beak", "crown", "wing_bar", "tail", "eye_ring")
PLAIN = "plain"  # the default variant of every part: the muted colour of the plumage
COLOURS = {
    "red": (206, 28, 40),
    "orange": (248, 138, 22),
    "yellow": (252, 214, 38),
    "blue": (34, 126, 232),
    "magenta": (212, 48, 166),
    "white": (250, 248, 242),
}
VARIANTS = {  # every colour is shared by several parts, so that the colour alone does not name the part
    "beak": ("orange", "red", "blue", "white"),
    "crown": ("red", "blue", "yellow", "magenta"),
    "wing_bar": ("white", "yellow", "red", "blue"),
    "tail": ("blue", "orange", "white", "red"),
    "eye_ring": ("yellow", "white", "magenta", "orange"),
}
SPLITS = ("train", "test", "val")  # the position seeds the split: append only

Shape = tuple[str, np.ndarray, np.ndarray]  # label ("" for scenery), polygon (n, 2), colour (3,)


class Species(NamedTuple):
    """One class: its name, the variant of every part, and the parts that are not plain."""

    name: str
    traits: dict[str, str]
    parts: tuple[str, ...]


class Drawing(NamedTuple):
    """An RGB image and, of the same size and 0 or 255, the masks of every part and of the whole bird, "body"."""

    image: Image.Image
    masks: dict[str, Image.Image]


def species(count: int) -> list[Species]:
    """The first `count` species: those with one coloured part, taking the parts in turn, then those with two.

    Raises ValueError when `count` is below 2 or above the number of species there are.
    """
    rounds = range(len(VARIANTS["beak"]))
    found = [{part: VARIANTS[part][i]} for i in rounds for part in PARTS]
    for i, j in itertools.product(rounds, rounds):
        found += [{a: VARIANTS[a][i], b: VARIANTS[b][j]} for a, b in itertools.combinations(PARTS, 2)]
    if not 2 <= count <= len(found):
        raise ValueError(f"classes is {count}: there are 2 to {len(found)} species")
    names = ["_".join(f"{colour}_{part}" for part, colour in traits.items()) for traits in found[:count]]
    return [Species(n, dict.fromkeys(PARTS, PLAIN) | t, tuple(t)) for n, t in zip(names, found, strict=False)]


def draw(
    bird: Species,
    rng: np.random.Generator,
    size: int = 224,
    part_scale: float = 1.0,
    clutter: float = 1.0,
    bird_scale: float = 1.0,
) -> Drawing:
    """Paint one bird of a species on a branch, `size` pixels square.

    `part_scale` (0.3 to 2) scales the length of the parts, `clutter` (0 to 3) the number of things in the background,
    `bird_scale` (0.2 to 1) the bird, which at 1 is half to two thirds of the image long.
    The same state of `rng` gives the same scene whatever the species: only the pixels of its parts differ.

    Raises ValueError when a number is out of range.
    """
    _check(size, part_scale, clutter, bird_scale)
    pose, scene = (np.random.default_rng(rng.integers(2**63)) for _ in range(2))  # clutter does not move the bird
    times = 4 if size <= 128 else 3 if size <= 320 else 2  # the canvas is finer than the image

    # The bird, mirrored, turned, scaled and placed so that all of it is inside.
    shapes = _bird(bird, pose, part_scale)
    flip, turn, unit = (pose.choice([-1.0, 1.0]), 1.0), pose.uniform(-0.3, 0.3), pose.uniform(0.46, 0.67)
    extent = _put(np.concatenate([polygon for _, polygon, _ in shapes]) * flip, angle=turn)
    low, high = extent.min(0), extent.max(0)
    unit = min(unit, 0.94 / (high - low).max()) * bird_scale
    at = 0.02 - low * unit + pose.uniform(0, 1, 2) * (0.96 - (high - low) * unit)
    shapes = [(label, _put(polygon * flip, at, turn, unit), colour) for label, polygon, colour in shapes]
    perch = _put(np.array((0.04, 0.43)) * flip, at, turn, unit)

    # The background, from far and blurred to near and sharp.
    top, bottom, foliage = _SCENES[scene.integers(len(_SCENES))] + scene.normal(0, 6, (3, 3))
    image = Image.fromarray(np.stack([top, _mix(top, bottom, 0.6), bottom]).clip(0, 255).astype(np.uint8)[:, None])
    for side, blur, count in ((48, 3.0, 26), (160, 1.6, 16), (size * times, 0.0, 9)):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        _paint(image, [shape for _ in range(round(count * clutter)) for shape in _distractor(scene, foliage)])
        image = image.filter(ImageFilter.GaussianBlur(blur)) if blur else image
    _paint(image, _branch(scene, perch, turn + scene.uniform(-0.1, 0.1), unit, foliage) + shapes)

    # Light: its colour, and a slope across the image.
    x = np.linspace(-1, 1, size, dtype=np.float32)
    angle, gain = scene.uniform(0, 2 * np.pi), scene.uniform(0.88, 1.06) * scene.normal(1, 0.025, 3)
    light = 1 + np.add.outer(0.1 * np.sin(angle) * x - 0.06 * x * x, 0.1 * np.cos(angle) * x - 0.06 * x * x)
    pixels = np.asarray(image.reduce(times), np.float32) * light[:, :, None] * gain.astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    # Masks: the pixels of which the part covers over half; if it is too thin for that, those it covers most.
    labels, canvas, masks = ("", "body", *PARTS), Image.new("L", (size * times, size * times)), {}
    _paint(canvas, shapes, labels)
    for name in labels[1:]:
        inside = [255 * (i > 0 if name == "body" else i == labels.index(name)) for i in range(256)]
        cover = np.asarray(canvas.point(inside).reduce(times))
        masks[name] = Image.fromarray((cover >= max(1, min(129, int(cover.max())))).astype(np.uint8) * 255)
    masks["body"] = reduce(ImageChops.lighter, masks.values())
    return Drawing(image, masks)


def write(
    folder: str | Path,
    classes: int = 8,
    train: int = 60,
    test: int = 20,
    size: int = 224,
    seed: int = 0,
    part_scale: float = 1.0,
    clutter: float = 1.0,
    val: int = 0,
    bird_scale: float = 1.0,
) -> dict[str, Any]:
    """Write a data set: `{train,test,val}/<class>/<number>.jpg`, masks and `species.json`, all or nothing.

    `train`, `test` and `val` are images per class; a split of 0 is left out. `masks/body` and `masks/part` mirror the
    folders of the images, as PNG with 0 and 255: the whole bird, and the parts that set its species apart. An image
    depends on its split, class, number, `seed`, `size`, `part_scale`, `clutter` and
    `bird_scale`, not on how many there are.
    Returns all these numbers by name.

    Raises ValueError when a number is out of range, FileExistsError when there is something at `folder`.
    """
    arguments = {name: value for name, value in locals().items() if name != "folder"}
    _check(size, part_scale, clutter, bird_scale)
    birds, counts = species(classes), {"train": train, "test": test, "val": val}
    for name, number in (*counts.items(), ("seed", seed)):
        if number < 0:
            raise ValueError(f"{name} is {number}: it has to be 0 or more")
    if not any(counts.values()):
        raise ValueError("train, test and val are all 0: ask for at least one image per class")
    folder = real(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty: remove it or name another folder")

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for (split, count), (i, bird) in itertools.product(counts.items(), enumerate(birds)):
            for j in range(count):
                rng = np.random.default_rng([seed, SPLITS.index(split), i, j])
                image, masks = draw(bird, rng, size, part_scale, clutter, bird_scale)
                part = reduce(ImageChops.lighter, [masks[name] for name in bird.parts])
                for kind, picture in (("", image), ("masks/body", masks["body"]), ("masks/part", part)):
                    path = partial / kind / split / bird.name / f"{j:04d}.{'png' if kind else 'jpg'}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path, quality=92, subsampling=0)
        about = {"arguments": arguments, "species": [bird._asdict() for bird in birds]}
        (partial / "species.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # it is empty, and not every system renames onto a folder
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return arguments


def _check(size: int, part_scale: float, clutter: float, bird_scale: float) -> None:
    if size < 32:
        raise ValueError(f"size is {size}: an image has to be at least 32 pixels wide")
    if not 0.3 <= part_scale <= 2:
        raise ValueError(f"part_scale is {part_scale}: it has to be 0.3 to 2")
    if not 0 <= clutter <= 3:
        raise ValueError(f"clutter is {clutter}: it has to be 0 to 3")
    if not 0.2 <= bird_scale <= 1:
        raise ValueError(f"bird_scale is {bird_scale}: it has to be 0.2 to 1")


# Colours and geometry. Polygons are (n, 2) arrays, x to the right and y down; outlines are noted in hundredths.

_PALETTE = np.array(list(COLOURS.values()), float)
_CREAM, _INK, _BARK = np.array([(236, 226, 208), (30, 26, 28), (98, 76, 60)], float)
_PLUMAGE = [(136, 112, 88), (122, 122, 122), (116, 114, 84), (150, 130, 106), (104, 100, 102), (126, 104, 98)]
_SCENES = [  # colour at the top, at the bottom, of the foliage
    [(176, 204, 206), (122, 152, 106), (92, 126, 72)],
    [(206, 214, 190), (138, 158, 98), (116, 142, 74)],
    [(226, 210, 178), (158, 142, 102), (142, 124, 62)],
    [(172, 190, 214), (126, 140, 140), (88, 116, 96)],
    [(216, 200, 204), (140, 136, 122), (112, 122, 86)],
    [(118, 148, 128), (64, 92, 72), (72, 108, 66)],
]


def _mix(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    return a + (b - a) * share


def _put(points: np.ndarray, at: ArrayLike = 0.0, angle: float = 0.0, size: ArrayLike = 1.0) -> np.ndarray:
    """Scale, turn, then move."""
    c, s = math.cos(angle), math.sin(angle)
    return (points * size) @ np.array([[c, s], [-s, c]]) + at


@lru_cache
def _points(text: str) -> np.ndarray:
    return np.array(text.replace(",", " ").split(), float).reshape(-1, 2) / 100


@lru_cache
def _spline(n: int, steps: int = 6) -> np.ndarray:
    """The matrix from n points to the closed Catmull-Rom curve through them."""
    t, one = (np.arange(steps) / steps)[:, None], np.eye(n)[:, None]
    a, b, c, d = (np.roll(one, shift, 2) for shift in (-1, 0, 1, 2))
    return (b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))).reshape(n * steps, n)


def _smooth(points: np.ndarray) -> np.ndarray:
    return _spline(len(points)) @ points


_ROUND = np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], 1)
_FEATHER = _smooth(_points("0 -30, 45 -42, 85 -46, 100 -15, 100 15, 85 46, 45 42, 0 30"))
_LEAF = _smooth(_points("0 0, 60 -42, 130 -36, 210 0, 130 36, 60 42"))
_LEAF_LAYERS = (_LEAF, np.where(_LEAF[:, 1:] > 0, _LEAF * (1, 0), _LEAF), _points("-35 -5, 190 -1, 190 1, -35 5"))
_WINGS = [_smooth(_points(text)) for text in ("0 10, 30 -80, 100 -90, 90 -10", "0 0, 80 10, 70 80, 20 60")]


def _edged(label: str, outline: np.ndarray, edge: np.ndarray, fill: np.ndarray, share: float = 0.15) -> list[Shape]:
    return [(label, outline, edge), (label, _mix(outline, outline.mean(0), share), fill)]


def _soft(label: str, outline: np.ndarray, rim: np.ndarray, core: np.ndarray, heart: ArrayLike) -> list[Shape]:
    """A shape shaded from its rim to a point within it, as nested outlines."""
    return [(label, outline + (heart - outline) * t, _mix(rim, core, t**0.7)) for t in (i / 13 for i in range(12))]


def _bird(bird: Species, rng: np.random.Generator, s: float) -> list[Shape]:
    """A bird about 1 long that looks right, its parts scaled by `s`; takes the same from `rng` for every species."""
    coat = _PLUMAGE[rng.integers(len(_PLUMAGE))] + rng.normal(0, 5, 3)
    belly, wing = _mix(coat, _CREAM, rng.uniform(0.45, 0.8)), _mix(coat, _INK, rng.uniform(0.2, 0.4))
    pale, dim, dark = _mix(coat, _CREAM, 0.12), _mix(coat, _INK, 0.12), _mix(coat, _INK, 0.65)
    plump, nod, wag = (1, rng.uniform(0.93, 1.1)), rng.uniform(-0.25, 0.2), rng.uniform(-0.35, 0.2)
    plain = {"beak": _mix(coat, _INK, 0.35), "wing_bar": _mix(wing, coat, 0.5), "tail": _mix(wing, coat, 0.25)}
    paint = {"crown": dim, "eye_ring": pale} | plain
    paint |= {part: np.array(COLOURS[colour], float) for part, colour in bird.traits.items() if colour != PLAIN}
    deep = {part: _mix(colour, _INK, 0.28) for part, colour in paint.items()}
    shine = {part: _mix(colour, _CREAM, 0.3) for part, colour in paint.items()}

    def head(points: np.ndarray, at: ArrayLike = 0.0, angle: float = 0.0, size: ArrayLike = 1.0) -> np.ndarray:
        return _put(_put(points, at, angle, size), (0.17, -0.19), nod, 0.2)  # on a skull of radius 1

    shapes: list[Shape] = []
    for i in range(-2, 3):  # the tail, a fan of feathers
        blade = _put(_FEATHER, (-0.2, 0.09), np.pi + wag + 0.13 * i, (0.1 + (0.25 - 0.012 * abs(i)) * s, 0.1 * s))
        shapes += _edged("tail", blade, deep["tail"], _mix(paint["tail"], shine["tail"], 0.15 * i + 0.3), 0.22)
    for x in (-0.02, 0.1):  # legs and toes
        shapes += [("body", _put(_points("-1 20, 3.5 20, 1.7 39, -0.4 39"), (x, 0)), dark)]
        shapes += [("body", _put(_ROUND, (x + d, 0.405), -8 * d, (0.012, 0.032)), dark) for d in (-0.02, 0.006, 0.032)]

    # Trunk and head are one outline, on it a light breast with down, and a cheek.
    trunk = _points("35 8, 26 24, 8 31, -13 26, -28 14, -28 5, -17 -8") * plump
    face = head(_points("-95 -25, -68 -74, 0 -100, 62 -79, 96 -30, 100 20, 93 65"))
    shapes += _soft("body", _smooth(np.concatenate([trunk, face])), dim, pale, (0.05, -0.02))
    breast = _smooth(_points("31 -3, 33 8, 25 22, 7 28.5, -12 23, 2 8, 20 0")) * plump
    shapes += _soft("body", breast, _mix(coat, belly, 0.12), belly, np.array((0.19, 0.12)) * plump)
    for x, y, turn, shade in rng.uniform(-1, 1, (36, 4)):
        if x * x + y * y < 1:
            down = _put(
                _ROUND[::3], np.array((0.13 + 0.18 * x, 0.13 + 0.11 * y)) * plump, 2 + 0.4 * turn, (0.014, 0.004)
            )
            shapes += [("body", down, _mix(belly, coat, 0.35) if shade > 0 else _mix(belly, _CREAM, 0.5))]
    cheek = head(_ROUND, (0.48, 0.42), 0, (0.4, 0.32))
    shapes += _soft("body", cheek, pale, _mix(coat, _CREAM, 0.45), cheek.mean(0))

    # The wing: flight feathers, coverts over them, and the bar, a row of tips.
    shapes += [("body", _smooth(_points("13 5, 5 -6, -14 -3, -37 17, -15 21, 7 20")), _mix(coat, _INK, 0.25))]
    for i in range(5):
        blade = _put(_FEATHER, (-0.02, 0.12 - 0.035 * i), np.pi - 0.22 - 0.07 * i, (0.3 + 0.024 * i, 0.075))
        shapes += _edged("body", blade, _mix(wing, _INK, 0.35), _mix(wing, coat, 0.12 * i))
    covert = _smooth(_points("14 3, 7 -5.5, -6 -6, -14 3, -10 13, 0 16.5, 10 12"))
    shapes += _soft("body", covert, _mix(wing, coat, 0.25), _mix(wing, coat, 0.75), (0.04, 0.0))
    for i, at in enumerate(_points("-3.5 -9, -5 -3, -3.5 3.5, 0.5 9") * s + _points("-5.5 4.5")):
        tip = _put(_ROUND, at, -0.35 - 0.2 * i, (0.062 * s, 0.042 * s))
        shapes += _edged("wing_bar", tip, deep["wing_bar"], _mix(shine["wing_bar"], paint["wing_bar"], 0.3 * i))

    # The crown: a cap with a swept crest.
    for i in range(4):
        root = _put(np.array((1 - 0.2 * min(s, 1.0), 0.0)), 0, -1.7 - (0.3 * i - 0.2) * min(s, 1.0))
        crest = head(_LEAF, root, -2.35 - 0.25 * i, (0.32 * s, 0.36 * s))
        shapes += [("crown", crest, _mix(deep["crown"], paint["crown"], 0.25 * i))]
    arc = -1.7 + min(1.08 * s, 1.9) * np.linspace(1, -1, 20)
    rim = np.stack([np.cos(arc), np.sin(arc)], 1)
    inner = rim * (1 - 0.6 * min(s, 1.4) * np.sin(np.linspace(0, np.pi, 20)) ** 0.7)[:, None]
    cap, heart = head(np.concatenate([1.02 * rim, inner[::-1]])), head(_points("5 -75"))
    shapes += _soft("crown", cap, _mix(paint["crown"], deep["crown"], 0.35), shine["crown"], heart)

    # The beak: two mandibles, about the corner of the mouth.
    lower, upper, heart = (
        head(_points(text), (0.84, 0.05), 0, 1.1 * s)
        for text in ("-3 0, 45 6, 78 15, 50 30, 15 36, -4 26", "-3 10, -3 -40, 25 -38, 62 -14, 92 16, 50 12", "28 -20")
    )
    shapes += [("beak", _smooth(lower), deep["beak"])]
    shapes += _soft("beak", _smooth(upper), _mix(paint["beak"], deep["beak"], 0.3), shine["beak"], heart)

    # The eye: the ring, the ball, and its lights.
    shapes += _edged("eye_ring", head(_ROUND, (0.37, -0.1), 0, 0.46 * s), deep["eye_ring"], paint["eye_ring"], 0.09)
    for x, y, rx, ry, tint in ((0, 0, 25, 25, _INK), (0, 12, 12, 6, dark), (6, -9, 8.5, 8.5, _PALETTE[-1])):
        k = 0.01 * min(1.0, s)
        shapes += [("body", head(_ROUND, (0.37 + k * x, k * y - 0.1), 0, (k * rx, k * ry)), tint)]
    return shapes


def _leaf(colour: np.ndarray, at: ArrayLike, angle: float, size: float) -> list[Shape]:
    tints = (_mix(colour, _INK, 0.2), colour, _mix(colour, _CREAM, 0.25))
    return [("", _put(layer, at, angle, size), tint) for layer, tint in zip(_LEAF_LAYERS, tints, strict=True)]


def _distractor(rng: np.random.Generator, foliage: np.ndarray) -> list[Shape]:
    """A leaf, berries, a flower, a butterfly or petals somewhere in the unit square, in the colours of parts."""
    hue, other = _PALETTE[rng.integers(len(_PALETTE), size=2)]
    at, angle, size = rng.uniform(-0.02, 1.02, 2), rng.uniform(-np.pi, np.pi), rng.uniform(0.03, 0.065)
    green, kind = foliage + rng.normal(0, 14, 3), rng.integers(6)
    shapes: list[Shape] = []
    if kind < 2:
        return _leaf(green, at, angle, size)
    if kind == 2:  # berries that hang from a twig
        angle *= 0.15
        shapes = _leaf(green, (0, -1.5), 0.4, 0.7) + _leaf(green, (0, -1.5), 2.6, 0.6)
        for x, y in _points("-60 10, 55 30, 0 -40"):
            stalk = np.array([(x - 0.05, y), (x + 0.05, y), (0.05, -1.5), (-0.05, -1.5)])
            shapes += [("", stalk, _BARK), *_edged("", _put(_ROUND, (x, y), 0, 0.5), _mix(hue, _INK, 0.25), hue)]
            shapes += [("", _put(_ROUND, (x - 0.15, y - 0.17), 0, 0.12), _mix(hue, _CREAM, 0.7))]
    elif kind == 3:  # a flower on a long stem
        t, long = np.linspace(0, 1, 12), (1.05 - at[1]) / size
        stem = np.stack([0.09 * angle * long * (2 * t - t * t), long * t], 1)
        shapes = [("", np.concatenate([stem - _points("7 0"), stem[::-1] + _points("7 0")]), _mix(green, _INK, 0.1))]
        for i in range(5):
            shapes += [("", _put(_FEATHER, 0, angle + i * 0.4 * np.pi, (1, 0.75)), _mix(hue, _INK, 0.07 * (i % 3)))]
        shapes += [("", _ROUND * 0.3, _INK if rng.random() < 0.5 else other)]
        angle = 0.0
    elif kind == 4:  # a butterfly
        for wing, side in itertools.product(_WINGS, (-1, 1)):
            shapes += _edged("", wing * (side, 1), _mix(hue, _INK, 0.5), hue, 0.25)
        shapes += [("", _ROUND * (0.08, 0.5), _INK)]
    else:  # petals in the wind
        shapes = [("", _put(_LEAF, drift, 4 * drift[0], 0.5), hue) for drift in rng.uniform(-0.9, 0.9, (3, 2))]
    return [(label, _put(polygon, at, angle, size), colour) for label, polygon, colour in shapes]


def _branch(rng: np.random.Generator, perch: np.ndarray, tilt: float, unit: float, foliage: np.ndarray) -> list[Shape]:
    """A branch across the image, through `perch`, with a few leaves."""
    x = np.linspace(-1.6, 1.6, 40)
    bend = rng.uniform(-0.12, 0.12) * x**2 + 0.012 * np.sin(rng.uniform(7, 11) * x)
    girth = unit * rng.uniform(0.032, 0.048) * (1 + 0.25 * rng.choice([-1, 1]) * x)
    bark, shapes = _BARK + rng.normal(0, 8, 3), []
    for low, high, light, share in ((1, -1, _INK, 0.35), (0.55, -0.95, _BARK, 0.5), (-0.25, -0.8, _CREAM, 0.22)):
        edge = np.concatenate([np.stack([x, bend + low * girth], 1), np.stack([x, bend + high * girth], 1)[::-1]])
        shapes += [("", edge, _mix(bark, light, share))]
    for i in rng.integers(8, 32, 6):
        angle, size = rng.choice([-1, 1]) * rng.uniform(0.5, 1.3), rng.uniform(0.04, 0.065)
        shapes += _leaf(foliage + rng.normal(0, 14, 3), (x[i], bend[i]), angle, size)
    return [(label, _put(polygon, perch, tilt), colour) for label, polygon, colour in shapes]


def _paint(canvas: Image.Image, shapes: list[Shape], labels: tuple[str, ...] = ()) -> None:
    """Fill the polygons, in units of the canvas, with their colours, or with the positions of their labels."""
    brush = ImageDraw.Draw(canvas)
    colours = np.clip([colour for _, _, colour in shapes], 0, 255).astype(int).tolist()
    for (label, polygon, _), colour in zip(shapes, colours, strict=True):
        fill = labels.index(label) if labels else tuple(colour)
        brush.polygon((polygon * canvas.width).ravel().tolist(), fill=fill)
