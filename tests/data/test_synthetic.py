"""The painted birds: same seed same bytes, exact masks, and classes that differ in their parts and nowhere else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from glsim.data.synthetic import COLOURS, PARTS, PLAIN, draw, species, write

BIRDS = species(8)


def rng(*seed):
    return np.random.default_rng(seed)


def on(mask):
    return np.asarray(mask) > 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "birds"
    write(path, classes=3, train=2, test=1, val=1, size=64, seed=5)
    return path


def test_species_are_distinct_and_in_a_fixed_order():
    every = species(180)
    assert len({bird.name for bird in every}) == len({tuple(bird.traits.values()) for bird in every}) == 180
    assert species(8) == every[:8]
    assert {part for bird in BIRDS[:5] for part in bird.parts} == set(PARTS)
    for bird in every:
        assert tuple(bird.traits) == PARTS
        assert bird.parts == tuple(part for part in PARTS if bird.traits[part] != PLAIN)
        assert bird.name.replace("_", "").isalpha()
    assert [len(bird.parts) for bird in every] == [1] * 20 + [2] * 160


@pytest.mark.parametrize("count", [-1, 0, 1, 181])
def test_species_names_the_limit(count):
    with pytest.raises(ValueError, match=rf"{count}.*2 to 180"):
        species(count)


def test_draw_is_deterministic():
    one, two = (draw(BIRDS[1], rng(3), 64) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes()
    assert all(one.masks[name].tobytes() == two.masks[name].tobytes() for name in one.masks)
    assert one.image.tobytes() != draw(BIRDS[1], rng(4), 64).image.tobytes()


@pytest.mark.parametrize(("size", "part_scale"), [(64, 0.3), (64, 1.0), (64, 2.0), (97, 0.5), (160, 1.0), (330, 1.0)])
def test_masks(size, part_scale):
    for seed in range(6):
        image, masks = draw(BIRDS[seed], rng(seed), size, part_scale)
        assert image.mode == "RGB"
        assert image.size == (size, size)
        assert list(masks) == ["body", *PARTS]
        body = on(masks["body"])
        for mask in masks.values():
            assert (mask.mode, mask.size) == ("L", (size, size))
            assert set(np.unique(mask)) == {0, 255}
            assert (body >= on(mask)).all()
        if part_scale >= 1:  # thinner ones may share a pixel
            assert sum(on(masks[part]).astype(int) for part in PARTS).max() == 1
        assert not np.concatenate([body[0], body[-1], body[:, 0], body[:, -1]]).any(), "the bird leaves the image"


def test_sizes_of_bird_and_parts():
    """As documented: a bird spans half to three quarters of the image, a part is a per cent or so of its area."""
    masks = [draw(BIRDS[0], rng(seed), 96, clutter=0).masks for seed in range(20)]
    spans = [on(m["body"]).any(0).mean() for m in masks]
    assert min(spans) > 0.42
    assert max(spans) < 0.8
    for part in PARTS:
        assert 0.005 < np.mean([on(m[part]).mean() for m in masks]) < 0.04
    small, large = (draw(BIRDS[0], rng(0), 96, scale).masks for scale in (0.5, 1.5))
    assert all(on(small[part]).sum() < on(masks[0][part]).sum() < on(large[part]).sum() for part in PARTS)


def test_a_species_differs_from_another_only_in_its_parts():
    birds = (*BIRDS[:5], species(180)[-1])
    for seed in range(4):
        drawings = [(bird, draw(bird, rng(seed), 80)) for bird in birds]
        for (a, one), (b, two) in itertools.combinations(drawings, 2):
            assert all(one.masks[name].tobytes() == two.masks[name].tobytes() for name in one.masks)
            apart = np.any([on(one.masks[p]) for p in PARTS if a.traits[p] != b.traits[p]], axis=0)
            near = on(Image.fromarray(apart).convert("L").filter(ImageFilter.MaxFilter(5)))  # tips are fine
            change = np.abs(np.asarray(one.image, int) - np.asarray(two.image, int)).max(2)
            assert not change[~near].any()
            assert (change[apart] > 20).mean() > 0.8


def test_a_part_has_its_colour():
    for bird in BIRDS:
        part, colour = bird.parts[0], np.array(COLOURS[bird.traits[bird.parts[0]]], float)
        image, masks = draw(bird, rng(1), 96)
        seen = np.asarray(image, float)[on(masks[part])].mean(0)
        guess = {name: np.linalg.norm(seen / seen.mean() - np.array(c) / np.mean(c)) for name, c in COLOURS.items()}
        assert min(guess, key=guess.get) == bird.traits[part], (bird.name, seen, colour)


def test_background_has_the_colours_of_the_parts():
    """A colour of a part is there behind most birds; without clutter, it is not; and clutter leaves the bird alone."""
    found = dict.fromkeys(COLOURS, 0)
    for seed in range(12):
        drawings = {clutter: draw(BIRDS[0], rng(seed), 96, clutter=clutter) for clutter in (0, 1, 3)}
        body = on(drawings[1].masks["body"])
        assert all((on(d.masks["body"]) == body).all() for d in drawings.values())
        values = {clutter: np.asarray(d.image, float)[~body] for clutter, d in drawings.items()}
        for name, colour in COLOURS.items():
            close = {clutter: (np.abs(v - colour).max(1) < 40).sum() for clutter, v in values.items()}
            found[name] += close[1] > 8
            assert name == "white" or close[0] == 0
    assert min(found.values()) >= 5, found


def test_the_scale_of_a_bird_scales_its_mask_and_moves_no_chance():
    """Half as long, a quarter of the pixels, the same scene behind it."""
    large, small = (draw(species(3)[0], np.random.default_rng(4), 192, bird_scale=scale) for scale in (1.0, 0.5))
    areas = [np.asarray(d.masks["body"]).astype(bool).sum() for d in (large, small)]
    assert 0.2 < areas[1] / areas[0] < 0.3
    with pytest.raises(ValueError, match="bird_scale is 0.1: it has to be 0.2 to 1"):
        draw(species(3)[0], np.random.default_rng(4), 192, bird_scale=0.1)


def test_write_lays_out_images_and_masks(folder):
    names = [bird.name for bird in species(3)]
    per_split = {"train": 2, "test": 1, "val": 1}
    images = [f"{split}/{name}/{i:04d}" for split, n in per_split.items() for name in names for i in range(n)]
    files = [f"{path}.jpg" for path in images] + [f"masks/{k}/{path}.png" for k in ("body", "part") for path in images]
    assert sorted(contents(folder)) == sorted([*files, "species.json"])
    assert [path.name for path in folder.parent.iterdir()] == ["birds"], "something temporary is left"
    about = json.loads((folder / "species.json").read_text())
    assert about["arguments"] == {
        "classes": 3, "train": 2, "test": 1, "size": 64, "seed": 5, "part_scale": 1.0, "clutter": 1.0, "val": 1,
        "bird_scale": 1.0,
    }  # fmt: skip
    assert [(b["name"], b["traits"], tuple(b["parts"])) for b in about["species"]] == [tuple(b) for b in species(3)]


def test_written_images_are_the_drawings(folder):
    bird = species(3)[1]
    image, masks = draw(bird, rng(5, 0, 1, 1), 64)
    with Image.open(folder / "train" / bird.name / "0001.jpg") as file:
        assert np.abs(np.asarray(file, float) - np.asarray(image, float)).mean() < 6
    for kind, mask in (("body", masks["body"]), ("part", masks[bird.parts[0]])):
        with Image.open(folder / "masks" / kind / "train" / bird.name / "0001.png") as file:
            assert (np.asarray(file) == np.asarray(mask)).all()


def test_part_mask_is_the_union_of_the_parts(tmp_path):
    write(tmp_path / "birds", classes=21, train=1, test=0, size=32)
    bird = species(21)[20]
    assert len(bird.parts) == 2
    masks = draw(bird, rng(0, 0, 20, 0), 32).masks
    with Image.open(tmp_path / "birds" / "masks" / "part" / "train" / bird.name / "0000.png") as file:
        assert (on(file) == on(masks[bird.parts[0]]) | on(masks[bird.parts[1]])).all()
    assert not (tmp_path / "birds" / "test").exists()


def test_write_is_deterministic_whatever_the_counts(folder, tmp_path):
    (tmp_path / "same").mkdir()  # an empty folder is taken
    write(tmp_path / "same", classes=3, train=2, test=1, val=1, size=64, seed=5)
    write(tmp_path / "more", classes=4, train=3, test=2, val=0, size=64, seed=5)
    write(tmp_path / "other", classes=3, train=2, test=1, val=1, size=64, seed=6)
    first, same, more, other = (contents(path) for path in (folder, *(tmp_path / n for n in ("same", "more", "other"))))
    assert first == same
    shared = {path for path in first.keys() & more.keys() if path != "species.json"}
    assert len(shared) == 3 * (2 + 1) * 3
    assert all(first[path] == more[path] for path in shared)
    assert first.keys() == other.keys()
    assert not any(first[path] == other[path] for path in first)
    images = [data for path, data in first.items() if path.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_write_keeps_what_is_there(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(FileExistsError, match="remove it or name another"):
        write(folder, classes=2, train=1, test=0, size=32)
    assert contents(folder) == before
    (tmp_path / "file").write_text("here")
    with pytest.raises(FileExistsError, match="remove it or name another"):
        write(tmp_path / "file", classes=2, train=1, test=0, size=32)


def test_write_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glsim.data.synthetic.draw", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "birds", classes=2, train=1, test=1, size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 31}, "size is 31.*32"),
        ({"part_scale": 0.2}, "part_scale is 0.2.*0.3 to 2"),
        ({"part_scale": 2.1}, "part_scale is 2.1.*0.3 to 2"),
        ({"part_scale": float("nan")}, "part_scale is nan.*0.3 to 2"),
        ({"clutter": -0.1}, "clutter is -0.1.*0 to 3"),
        ({"clutter": 3.5}, "clutter is 3.5.*0 to 3"),
        ({"classes": 1}, "classes is 1.*2 to 180"),
        ({"train": -1}, "train is -1.*0 or more"),
        ({"seed": -1}, "seed is -1.*0 or more"),
        ({"train": 0, "test": 0}, "all 0.*at least one"),
    ],
)
def test_errors_name_the_value_and_what_works(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "birds", **wrong)
    assert list(tmp_path.iterdir()) == []
    if wrong.keys() <= {"size", "part_scale", "clutter"}:
        with pytest.raises(ValueError, match=words):
            draw(BIRDS[0], rng(0), **wrong)
