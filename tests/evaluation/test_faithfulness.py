"""Removal and imputation against a dense linear system, and curves of answers that are known."""

import pytest
import torch
from conftest import small_model
from PIL import Image

from glsim.data.masks import Masked
from glsim.evaluation.faithfulness import NOISE, SHARES, WEIGHTS, impute, ranking, removal_curves, remove, under
from glsim.evaluation.localization import measure

GRID, SIZE = (3, 4), (12, 20)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_impute(image, removed):
    """One equation a removed pixel, solved at once: (3, H, W) in double precision."""
    height, width = removed.shape
    places = [(y, x) for y in range(height) for x in range(width) if removed[y, x]]
    number = {place: i for i, place in enumerate(places)}
    matrix = torch.zeros(len(places), len(places), dtype=torch.double)
    right = torch.zeros(len(places), 3, dtype=torch.double)
    for (y, x), i in number.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                weight = WEIGHTS[dy + 1][dx + 1]
                if not (0 <= y + dy < height and 0 <= x + dx < width) or not weight:
                    continue
                matrix[i, i] += weight
                if (y + dy, x + dx) in number:
                    matrix[i, number[y + dy, x + dx]] -= weight
                else:
                    right[i] += weight * image[:, y + dy, x + dx].double()
    filled = image.double().clone()
    for (y, x), value in zip(places, torch.linalg.solve(matrix, right), strict=True):
        filled[:, y, x] = value
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_solves_the_papers_equations(share):
    images, scores = torch.randn(4, 3, *SIZE, generator=generator()), torch.randn(4, 12, generator=generator(1))
    removed = remove(scores.argsort(dim=1), GRID, SIZE, share, best=True)
    filled = impute(images, removed, tolerance=1e-6)
    for image, hole, found in zip(images, removed, filled, strict=True):
        torch.testing.assert_close(found, naive_impute(image, hole).float(), atol=1e-3, rtol=1e-3)
        assert torch.equal(found[:, ~hole], image[:, ~hole])
    noise = torch.randn(images.shape, generator=generator(2))
    noisy = impute(images, removed, noise, tolerance=1e-6)
    torch.testing.assert_close(noisy, filled + noise * removed[:, None])


def test_a_constant_image_cannot_be_told_from_its_imputation():
    images = torch.full((1, 3, *SIZE), 0.7)
    removed = remove(torch.randperm(12, generator=generator())[None], GRID, SIZE, 0.8, best=True)
    torch.testing.assert_close(impute(images, removed), images, atol=1e-3, rtol=0)
    assert torch.equal(impute(images, torch.zeros_like(removed)), images)


def test_what_is_removed_is_the_best_or_the_worst():
    ranks = ranking(torch.arange(12.0)[None], torch.zeros(1, 12))
    for best, first in ((True, 11), (False, 0)):
        for share, count in ((0.01, 1), (0.25, 3), (0.5, 6), (1.0, 11)):
            mask = remove(ranks, GRID, SIZE, share, best)[0]
            patches = mask.unflatten(0, (3, 4)).unflatten(2, (4, 5)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
            assert torch.equal(patches.all(dim=1), patches.any(dim=1)) and patches.any(dim=1).sum() == count
            assert patches[first].all() and not patches[11 - first].any()


def test_curves_of_an_answer_that_rests_on_one_patch():
    """The class is as likely as the mean of patch 5 is high: a map that says so beats one that says the opposite."""
    images = torch.zeros(2, 3, *SIZE)
    images[:, :, 4:8, 5:10] = 1.0

    def answer(x):
        p = x[:, :, 4:8, 5:10].mean(dim=(1, 2, 3)).clamp(0, 1)
        return torch.stack((p, 1 - p), dim=1)

    right = torch.zeros(2, 12)
    right[:, 5] = 1
    noise = NOISE * torch.randn(images.shape, generator=generator())
    for scores, low, high in ((right, 0.1, 0.99), (-right, 0.9, 0.2)):
        curves = removal_curves(answer, images, answer(images), scores, GRID, noise)
        assert curves["deletion"].shape == curves["insertion"].shape == (2, len(SHARES) + 1)
        assert (curves["deletion"][:, 0] == 1).all() and (curves["insertion"][:, -1] == 1).all()
        deletion, insertion = under(curves["deletion"]), under(curves["insertion"])
        assert (deletion < low).all() if scores is right else (deletion > low).all()
        assert (insertion > high).all() if scores is right else (insertion < high).all()


def test_equal_scores_are_ranked_by_chance():
    scores = torch.tensor([0.0, 1.0]).repeat(6).expand(2000, -1)
    ranks = ranking(scores, torch.rand(2000, 12, generator=generator()))
    assert (ranks.sort(dim=1).values == torch.arange(12)).all() and (ranks[:, :6] % 2 == 1).all()
    first = ranks[:, [0, -1]]
    for place, patches in ((0, range(1, 12, 2)), (1, range(0, 12, 2))):  # every best, and worst, about as often
        counts = first[:, place].bincount(minlength=12)[list(patches)]
        assert counts.sum() == 2000 and (counts - 2000 / 6).abs().max() < 80


def test_an_answer_is_asked_for_as_often_as_told_and_equal_scores_go_anywhere():
    images, seen = torch.zeros(2, 3, *SIZE), []

    def answer(x):
        seen.append(x)
        return torch.ones(len(x), 2) / 2

    noise = NOISE * torch.randn(images.shape, generator=generator())
    for _ in range(2):
        removal_curves(answer, images, torch.ones(2, 2) / 2, torch.zeros(2, 12), GRID, noise)
    assert len(seen) == 36 and all(torch.equal(a, b) for a, b in zip(seen[:18], seen[18:], strict=True))
    half = seen[4]
    assert ((half == noise) | (half.abs() < 1e-6)).all() and not torch.equal(half[0] == 0, half[1] == 0)
    top = (half != 0)[:, :, : SIZE[0] // 3].float().mean(dim=(1, 2, 3))
    assert (top < 1).any()  # not the first row first


def test_noise_of_its_own_reaches_the_removed_pixels_of_every_image(tmp_path):
    """Grey images are imputed as they are: what differs in what the model is asked is the noise."""
    model, masked = small_model(), []
    for i in range(2):
        Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / f"{i}.png")
        Image.new("L", (64, 64), 255).save(tmp_path / f"mask_{i}.png")
        masked.append(Masked(tmp_path / f"{i}.png", {"object": tmp_path / f"mask_{i}.png"}))

    def noise_of(seed, batch_size):
        asked = []
        with model.register_forward_pre_hook(lambda _, given: asked.append(given[0])):
            measure(model, masked, [None], faithful=True, batch_size=batch_size, seed=seed)
        asked = torch.cat([torch.stack(asked[i : i + 19]) for i in range(0, len(asked), 19)], dim=1)  # 19 2 3 H W
        return (asked - asked[0])[9]  # with 90 % removed

    one, other = noise_of(0, 2), noise_of(1, 2)
    removed = one.abs() > 1e-4
    for i in range(2):
        assert 0.85 < removed[i].float().mean() < 0.95
        assert one[i][removed[i]].std().item() == pytest.approx(0.01, rel=0.1)
    both = removed[0] & removed[1]
    for a, b in ((one[0], one[1]), (one[0], other[0]), (one[1], other[1])):
        assert abs(torch.corrcoef(torch.stack((a[both], b[both])))[0, 1]) < 0.1
    torch.testing.assert_close(noise_of(0, 1), one, atol=1e-5, rtol=0)


def test_the_area_is_the_mean_height():
    assert under(torch.ones(2, 10)).tolist() == [1, 1]
    assert under(torch.linspace(0, 1, 10)[None]).item() == pytest.approx(0.5)
    assert under(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0.25
