"""Removal and imputation against a dense linear system, and curves of answers that are known."""

import pytest
import torch

from glsim.road import SHARES, WEIGHTS, faithfulness, impute, remove, under

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
    removed = remove(scores, GRID, SIZE, share, best=True)
    filled = impute(images, removed, tolerance=1e-6)
    for image, hole, found in zip(images, removed, filled, strict=True):
        torch.testing.assert_close(found, naive_impute(image, hole).float(), atol=1e-3, rtol=1e-3)
        assert torch.equal(found[:, ~hole], image[:, ~hole])
    noise = torch.randn(images.shape, generator=generator(2))
    noisy = impute(images, removed, noise, tolerance=1e-6)
    torch.testing.assert_close(noisy, filled + noise * removed[:, None])


def test_a_constant_image_cannot_be_told_from_its_imputation():
    images = torch.full((1, 3, *SIZE), 0.7)
    removed = remove(torch.randn(1, 12, generator=generator()), GRID, SIZE, 0.8, best=True)
    torch.testing.assert_close(impute(images, removed), images, atol=1e-3, rtol=0)
    assert torch.equal(impute(images, torch.zeros_like(removed)), images)


def test_what_is_removed_is_the_best_or_the_worst():
    scores = torch.arange(12.0)[None]
    for best, first in ((True, 11), (False, 0)):
        for share, count in ((0.01, 1), (0.25, 3), (0.5, 6), (1.0, 11)):
            mask = remove(scores, GRID, SIZE, share, best)[0]
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
    noise = torch.zeros_like(images)
    for scores, low, high in ((right, 0.1, 0.99), (-right, 0.9, 0.2)):
        curves = faithfulness(answer, images, scores, GRID, noise)
        assert curves["deletion"].shape == curves["insertion"].shape == (2, len(SHARES) + 1)
        assert (curves["deletion"][:, 0] == 1).all() and (curves["insertion"][:, -1] == 1).all()
        deletion, insertion = under(curves["deletion"]), under(curves["insertion"])
        assert (deletion < low).all() if scores is right else (deletion > low).all()
        assert (insertion > high).all() if scores is right else (insertion < high).all()


def test_the_area_is_the_mean_height():
    assert under(torch.ones(2, 10)).tolist() == [1, 1]
    assert under(torch.linspace(0, 1, 10)[None]).item() == pytest.approx(0.5)
    assert under(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0.25
