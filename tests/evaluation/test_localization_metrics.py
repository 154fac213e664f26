"""Measures of localisation against loops over pixels, hand-made cases, and other libraries."""

import math

import numpy as np
import pytest
import torch
from largest import Largest
from torchmetrics.functional.classification import binary_auroc

from glsim.evaluation.localization_metrics import (
    BOX_MEASURES,
    measure_boxes,
    measure_points,
    measure_scores,
    per_patch,
    roc_auc,
)
from glsim.models.boxes import place_boxes

GRID, SIZE = (3, 4), (30, 46)  # patches of 10 x 11 and 10 x 12 pixels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_masks(count=6):
    """Ellipses, and a border around them that does not count."""
    g = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    inside, counted = [], []
    for _ in range(count):
        cy, cx, a, b = g.uniform(5, 25), g.uniform(5, 40), g.uniform(2, 12), g.uniform(2, 12)
        far = ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2
        inside.append(far < 1)
        counted.append((far < 1) | (far > 1.5))
    return torch.tensor(np.stack(inside)), torch.tensor(np.stack(counted))


def patch_of(y, x):
    row = next(r for r in range(GRID[0]) if y < (r + 1) * SIZE[0] // GRID[0])
    col = next(c for c in range(GRID[1]) if x < (c + 1) * SIZE[1] // GRID[1])
    return row * GRID[1] + col


PIXELS = [(y, x) for y in range(SIZE[0]) for x in range(SIZE[1])]


def naive_scores(scores, inside, counted):
    """Pixel by pixel, one image."""
    scores, inside, counted = scores.tolist(), inside.tolist(), counted.tolist()
    low, high = min(scores), max(scores)
    best = [i for i, v in enumerate(scores) if v == high]
    touched = {patch_of(y, x) for y, x in PIXELS if inside[y][x]}
    on, everywhere = 0.0, 0.0
    for y, x in PIXELS:
        value = (scores[patch_of(y, x)] - low) / (high - low) if high > low else 1.0
        on += value * inside[y][x]
        everywhere += value * counted[y][x]
    return sum(i in touched for i in best) / len(best), on / everywhere


def test_pixels_of_a_patch_agree_with_a_loop():
    inside, _ = some_masks()
    expected = torch.zeros(len(inside), 12)
    for y, x in PIXELS:
        expected[:, patch_of(y, x)] += inside[:, y, x]
    assert torch.equal(per_patch(inside, GRID), expected)


def test_scores_agree_with_loops_and_with_torchmetrics():
    inside, counted = some_masks()
    scores = torch.randn(len(inside), 12, generator=generator()).mul(2).round()  # with ties
    scores[0] = 1.5
    found = measure_scores(scores, GRID, inside, counted)
    places = torch.tensor([patch_of(y, x) for y, x in PIXELS])
    for b in range(len(inside)):
        pointing, energy = naive_scores(scores[b], inside[b], counted[b])
        assert found["pointing"][b].item() == pytest.approx(pointing)
        best = [i for i, v in enumerate(scores[b].tolist()) if v == scores[b].max()]
        middles = [(10 * (i // 4) + 5, int((11, 23, 34, 46)[i % 4] + (0, 11, 23, 34)[i % 4]) // 2) for i in best]
        centred = sum(inside[b, y, x].item() for y, x in middles) / len(best)
        assert found["pointing_centre"][b].item() == pytest.approx(centred)
        assert found["energy"][b].item() == pytest.approx(energy, abs=1e-6)
        kept = counted[b].flatten()
        auc = binary_auroc(scores[b][places][kept].sigmoid(), inside[b].flatten()[kept].long())
        assert found["auc"][b].item() == pytest.approx(auc.item(), abs=1e-5)


def test_the_roc_auc_is_that_of_all_pairs_in_memory_that_grows_with_the_patches():
    scores = torch.randn(5, 60, generator=generator()).mul(2).round()  # 60 patches, about 12 values
    scores[3], scores[4, ::2] = 1.0, -torch.inf
    inside, outside = torch.randint(0, 50, (2, 5, 60), generator=generator(1)).float()
    found = roc_auc(scores, inside, inside + outside)
    for b in range(5):
        won, pairs = 0.0, 0.0
        for i in range(60):
            for j in range(60):
                weight = inside[b, i].item() * outside[b, j].item()
                won += weight * ((scores[b, i] > scores[b, j]).item() + (scores[b, i] == scores[b, j]).item() / 2)
                pairs += weight
        assert found[b].item() == pytest.approx(won / pairs, abs=1e-6)
    many = torch.rand(3, 2, 4096, generator=generator(2))
    with Largest() as largest:
        roc_auc(many[0], many[1], many[1] + many[2])
    assert largest.count <= 4 * 2 * 4097


@pytest.mark.parametrize("wrong", [slice(None), slice(3, 4)])
def test_scores_that_are_no_numbers_say_nothing(wrong):
    inside, counted = some_masks(2)
    scores = torch.randn(2, 12, generator=generator())
    scores[1, wrong] = torch.nan
    for values in measure_scores(scores, GRID, inside, counted).values():
        assert values.isfinite().tolist() == [True, False]


def naive_box(box, inside, counted):
    left, top, right, bottom = box
    held = [(y, x) for y, x in PIXELS if left <= x < right and top <= y < bottom]
    on = [(y, x) for y, x in PIXELS if inside[y, x]]
    ys, xs = zip(*on, strict=True)
    tight = {(y, x) for y, x in PIXELS if min(ys) <= y <= max(ys) and min(xs) <= x <= max(xs)}
    hits = sum(bool(inside[y, x]) for y, x in held)
    coverage = hits / len(on)
    return {
        "area": len(held) / len(PIXELS),
        "box_recall": coverage,
        "holds": float(coverage >= 0.9),
        "box_precision": hits / valid if (valid := sum(bool(counted[y, x]) for y, x in held)) else math.nan,
        "iou": len(tight & set(held)) / len(tight | set(held)),
    }


def some_boxes(count, seed=0):
    g = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        left, top = int(g.integers(0, SIZE[1])), int(g.integers(0, SIZE[0]))
        rows.append([left, top, int(g.integers(left + 1, SIZE[1] + 1)), int(g.integers(top + 1, SIZE[0] + 1))])
    return torch.tensor(rows)


def test_boxes_agree_with_loops():
    inside, counted = some_masks()
    boxes = some_boxes(len(inside) * 3).view(len(inside), 3, 4)
    found = measure_boxes(boxes, inside, counted)
    assert tuple(found) == BOX_MEASURES
    for b in range(len(inside)):
        for r in range(3):
            for name, value in naive_box(boxes[b, r].tolist(), inside[b], counted[b]).items():
                assert found[name][b, r].item() == pytest.approx(value, abs=1e-6, nan_ok=True), name


def one_patch():
    """The object is exactly patch 5 (row 1, column 1)."""
    inside = torch.zeros(1, *SIZE, dtype=torch.bool)
    inside[0, 10:20, 11:23] = True
    return inside, torch.ones_like(inside)


def test_a_perfect_map_and_box():
    inside, counted = one_patch()
    scores = torch.zeros(1, 12)
    scores[0, 5] = 3.0
    assert {k: v.item() for k, v in measure_scores(scores, GRID, inside, counted).items()} == {
        "pointing": 1.0,
        "energy": 1.0,
        "auc": 1.0,
        "pointing_centre": 1.0,
    }
    found = measure_boxes(torch.tensor([[[11, 10, 23, 20]]]), inside, counted)
    assert [round(found[k].item(), 6) for k in BOX_MEASURES] == [round(120 / 1380, 6), 1, 1, 1, 1]


def test_an_inverted_map_is_the_worst_there_is():
    inside, counted = one_patch()
    scores = torch.ones(1, 12)
    scores[0, 5] = 0.0
    assert {k: v.item() for k, v in measure_scores(scores, GRID, inside, counted).items()} == {
        "pointing": 0.0,
        "energy": 0.0,
        "auc": 0.0,
        "pointing_centre": 0.0,
    }
    random = torch.rand(1, 12, generator=generator())
    auc, inverse = (measure_scores(s, GRID, inside, counted)["auc"].item() for s in (random, -random))
    assert auc + inverse == pytest.approx(1)


def test_a_constant_map_is_chance():
    inside, counted = one_patch()
    found = measure_scores(torch.full((1, 12), -2.0), GRID, inside, counted)
    assert found["pointing"].item() == pytest.approx(1 / 12)
    assert found["energy"].item() == pytest.approx(120 / 1380)
    assert found["auc"].item() == 0.5


def test_the_whole_image_as_box_and_as_object():
    inside, counted = one_patch()
    image = torch.tensor([[[0, 0, SIZE[1], SIZE[0]]]])
    found = measure_boxes(image, inside, counted)
    assert [round(found[k].item(), 6) for k in BOX_MEASURES] == [1, 1, 1, round(120 / 1380, 6), round(120 / 1380, 6)]
    full = torch.ones_like(inside)
    assert all(found.item() == 1 for found in measure_boxes(image, full, counted).values())
    scores = measure_scores(torch.rand(1, 12, generator=generator()), GRID, full, counted)
    assert scores["pointing"] == 1 and scores["energy"] == 1 and scores["auc"].isnan()  # there is no background


def test_an_empty_mask_says_nothing():
    inside, counted = one_patch()
    none = torch.zeros_like(inside)
    assert all(v.isnan().all() for v in measure_scores(torch.rand(1, 12), GRID, none, counted).values())
    found = measure_boxes(torch.tensor([[[0, 0, 5, 5]]]), none, counted)
    assert [found[k].isnan().item() for k in BOX_MEASURES] == [False, True, True, True, True]


def test_a_box_on_what_does_not_count_has_no_purity():
    inside, counted = one_patch()
    counted[0, :5] = False
    found = measure_boxes(torch.tensor([[[0, 0, 8, 5], [0, 0, 8, 6]]]), inside, counted)
    assert found["box_precision"].isnan().tolist() == [[True, False]] and found["box_recall"].tolist() == [[0, 0]]


def test_a_box_beside_the_object_holds_nothing():
    inside, counted = one_patch()
    found = measure_boxes(torch.tensor([[[23, 10, 30, 20]]]), inside, counted)
    assert [found[k].item() for k in BOX_MEASURES[1:]] == [0, 0, 0, 0]


def test_places_are_inside_uniform_and_in_the_middle():
    boxes = some_boxes(2000)
    moved = place_boxes(boxes, SIZE, torch.rand(2000, 2, generator=generator()))
    assert torch.equal(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2])
    assert (moved >= 0).all() and (moved[:, 2] <= SIZE[1]).all() and (moved[:, 3] <= SIZE[0]).all()
    middle = place_boxes(boxes, SIZE, torch.full((2000, 2), 0.5))
    for (left, top, right, bottom), (x, y, _, _) in zip(boxes.tolist(), middle.tolist(), strict=True):
        assert x == (SIZE[1] - (right - left)) // 2 and y == (SIZE[0] - (bottom - top)) // 2
    same = torch.tensor([[0, 0, SIZE[1] - 4, SIZE[0]]]).expand(5000, -1)
    counts = place_boxes(same, SIZE, torch.rand(5000, 2, generator=generator(1)))[:, 0].bincount(minlength=5)
    assert len(counts) == 5 and (counts - 1000).abs().max() < 150


def test_parts_are_those_inside_of_each_box():
    boxes = some_boxes(6, seed=3).view(2, 3, 4)
    points = torch.tensor(np.random.default_rng(1).uniform(-5, 50, (2, 5, 2)))
    points[0, 2] = torch.nan
    points[1, 3:] = torch.nan
    names = ["beak", "eye", "eye", "tail", "tail"]
    found = measure_points(boxes, points, names)
    assert list(found) == ["parts", "parts/beak", "parts/eye", "parts/tail"]
    for key, value in found.items():
        wanted = [i for i, name in enumerate(names) if key in ("parts", f"parts/{name}")]
        for b in range(2):
            for r, (left, top, right, bottom) in enumerate(boxes[b].tolist()):
                places = [points[b, i].tolist() for i in wanted if not points[b, i].isnan().any()]
                held = [left <= x < right and top <= y < bottom for x, y in places]
                expected = sum(held) / len(held) if held else math.nan
                assert value[b, r].item() == pytest.approx(expected, nan_ok=True)
    edges = torch.tensor([[[11.0, 10], [22.9, 19.9], [23, 15], [15, 20], [10.9, 15]]])
    assert measure_points(torch.tensor([[[11, 10, 23, 20]]]), edges, names)["parts"].item() == pytest.approx(0.4)
    assert measure_points(boxes, torch.zeros(2, 0, 2), []) == {}
