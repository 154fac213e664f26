"""Named image pipelines: what each step may and may not do, where pixels go, and what a cache must keep."""

import random

import numpy as np
import pytest
import torch
from conftest import scene
from PIL import Image
from torchvision.transforms import v2

from glsim import ConfigError
from glsim.data.transforms import (
    AUGMENTATIONS,
    PRESETS,
    Preprocessing,
    Resize,
    augmentations,
    batch_mixing,
    eval_transform,
    mask_transform,
    to_picture,
    train_steps,
    train_transform,
)
from glsim.inference.predictor import to_original
from glsim.interpret.heatmaps import to_photograph

HALF = ((0.5,) * 3, (0.5,) * 3)
WHOLE = Preprocessing((48, 48), 1.0, *HALF)  # nothing is cut off: only the augmentations can change the picture


def drawn(transform, image, seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    return transform(image)


def test_presets_are_the_pipelines_that_the_papers_numbers_were_trained_with():
    """Written out once more from torchvision's own parts: the same numbers, drawn in the same order."""
    p = Preprocessing((48, 64), 1.34, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    image, tensor = scene((90, 70)), [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]
    cut = [v2.Resize((64, 85), v2.InterpolationMode.BICUBIC), v2.RandomCrop((48, 64))]
    free = [v2.RandomResizedCrop((48, 64), scale=(0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC)]
    published = {
        "none": [],
        "weak": [v2.RandomHorizontalFlip()],
        "medium": [v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()],
    }
    for name, steps in published.items():
        for crop, first in (("random", cut), ("resized", free)):
            last = [v2.RandomErasing(0.3, scale=(0.02, 0.4))] if name == "medium" else []
            theirs = v2.Compose([*first, *steps, *tensor, *last])
            ours = train_transform(p, name, crop, 0.4)
            for seed in range(8):
                seen, wanted = drawn(ours, image, seed), drawn(theirs, image, seed)
                torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=1e-6, msg=f"{name}, {crop}, {seed}")


def test_a_list_of_names_is_a_list_of_steps_each_once():
    assert augmentations("none") == [] and augmentations("weak") == ["flip"]
    assert augmentations("medium, jitter,flip") == ["flip", "trivialaugment", "erase", "jitter"]
    assert set(PRESETS) & set(AUGMENTATIONS) == set()
    with pytest.raises(
        ConfigError, match="unknown augmentation 'colour'; choose from: affine, autoaugment, blur, erase"
    ):
        augmentations("flip,colour")
    with pytest.raises(ConfigError, match="unknown augmentation ''"):
        augmentations("flip,")
    with pytest.raises(ConfigError, match="unknown crop policy 'center'; choose from: centre, random, resized"):
        train_transform(WHOLE, "none", "center")


PLAIN = np.asarray(scene((48, 48))).astype(int)
SAME_COLOURS = {"flip": (slice(None), slice(None, None, -1)), "vflip": (slice(None, None, -1), slice(None))}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_step_does_what_its_name_says(name):
    """Over 40 draws: it changes the picture, not in every way, and leaves what it must."""
    step = train_transform(WHOLE, name, "centre")
    seen = [to_picture(drawn(step, scene((48, 48)), seed), WHOLE).astype(int) for seed in range(40)]
    changed = [x for x in seen if (x != PLAIN).any()]
    assert changed, "changes nothing"
    if name in SAME_COLOURS:
        assert all((x == PLAIN[SAME_COLOURS[name]]).all() for x in changed) and len(changed) < 40
    elif name == "grey":
        assert all((x == x[..., :1]).all() for x in changed) and len(changed) < 20
    elif name == "solarise":
        assert all((x[PLAIN < 128] == PLAIN[PLAIN < 128]).all() for x in changed) and len(changed) < 20
    elif name == "blur":
        assert all(np.abs(np.diff(x, axis=0)).mean() < np.abs(np.diff(PLAIN, axis=0)).mean() for x in changed)
        assert 5 < len(changed) < 35
    elif name == "erase":
        shares = [(x != PLAIN).any(axis=-1).mean() for x in changed]
        assert max(shares) <= 0.42 and len(changed) < 25
    elif name == "affine":
        assert sum((x == 0).all(axis=-1).any() for x in changed) > 25  # most turns let black corners in
    else:
        assert len({x.tobytes() for x in seen}) > 10


def test_erasing_comes_last_whatever_its_place():
    """It works on the normalised tensor: an erased pixel is 0 there, the mean colour."""
    step = train_transform(WHOLE, "erase,jitter", "centre")
    seen = [drawn(step, scene((48, 48)), seed) for seed in range(30)]
    assert any((x == 0).all(dim=0).float().mean() > 0.02 for x in seen)


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (64, 64), (300, 40)])
@pytest.mark.parametrize("target", [(48, 48), (40, 64)])
def test_the_short_side_rule_keeps_the_aspect_and_fills_the_target(size, target):
    p = Preprocessing(target, 1.5, *HALF, "short")
    rows, cols = p.resized(size)
    assert rows >= p.resize[0] and cols >= p.resize[1] and (rows == p.resize[0] or cols == p.resize[1])
    assert abs(cols / rows - size[0] / size[1]) <= 1.5 / min(rows, cols) * max(1, size[0] / size[1])
    if target == (48, 48):  # torchvision's rule
        assert (rows, cols) == tuple(v2.Resize(p.resize[0])(torch.zeros(3, size[1], size[0])).shape[1:])
    image = Image.new("RGB", size)
    assert eval_transform(p)(image).shape == train_transform(p)(image).shape == (3, *target)
    assert mask_transform(p)(image.convert("L")).shape == target


@pytest.mark.parametrize("size", [(1500, 50), (40, 1001)])
def test_of_a_far_too_long_image_the_middle_is_resized_and_nothing_else_changes(size):
    p = Preprocessing((64, 48), 1.34, *HALF, "short")
    image = scene(size)
    whole = v2.functional.resize(image, list(p.resized(size)), v2.InterpolationMode.BICUBIC)
    seen, expected = (np.asarray(v2.CenterCrop((64, 48))(x)).astype(int) for x in (Resize(p)(image), whole))
    assert p.middle(size) != size
    assert np.abs(seen - expected).mean() < 3  # a pixel, by the rounding of what is cut off
    assert np.abs(seen[8:, 8:] - expected[:-8, :-8]).mean() > 6


def test_a_line_of_pixels_does_not_fill_the_memory():
    """Resized as a whole, it would be 15 million pixels wide."""
    p, size = Preprocessing((224, 224), 1.34, *HALF, "short"), (50000, 1)
    kept = Resize(p)(Image.new("RGB", size))
    assert p.resized(size) == (300, 15_000_000) and kept.height == 300 and kept.width <= 9 * 300
    seen = to_photograph(np.ones((224, 224), np.float32), size, p)
    assert seen.shape == (1, 50000) and (seen[0, 24999:25001] > 0).all() and np.count_nonzero(seen) <= 4
    for size in ((8 * 300, 300), (300, 8 * 300), (640, 480)):
        assert p.middle(size) == size


def test_a_box_goes_back_to_the_photograph_by_the_short_side_rule():
    """A white rectangle in a wide photograph: found in the network's view, and put back where it is."""
    p = Preprocessing((64, 64), 1.25, *HALF, "short")
    photograph = np.zeros((200, 320, 3), np.uint8)
    photograph[60:140, 120:180] = 255
    seen = to_picture(eval_transform(p)(Image.fromarray(photograph)), p)[..., 0] > 127
    (top, bottom), (left, right) = ((where.min(), where.max() + 1) for where in seen.nonzero())
    box = to_original((left, top, right, bottom), (320, 200), p)
    assert np.abs(np.subtract(box, (120, 60, 180, 140))).max() <= 3
    assert abs((right - left) / (bottom - top) - 60 / 80) < 0.05  # the aspect is kept; "square" would squeeze it
    square = Preprocessing((64, 64), 1.25, *HALF)
    assert to_original((0, 0, 64, 64), (320, 200), square) == (32, 20, 288, 180)


def test_the_rule_is_stored_and_old_bundles_squeeze():
    p = Preprocessing((48, 48), 1.2, *HALF, "short")
    assert Preprocessing.from_dict(p.as_dict()) == p
    old = {k: v for k, v in p.as_dict().items() if k != "resize_rule"}
    assert Preprocessing.from_dict(old).resize_rule == "square"
    with pytest.raises(ConfigError, match="unknown resize rule 'long'; choose from: short, square"):
        Preprocessing.from_dict(p.as_dict() | {"resize_rule": "long"})


@pytest.mark.parametrize("rule", ["square", "short"])
@pytest.mark.parametrize("crop", ["random", "centre", "resized"])
def test_what_a_cache_keeps_and_what_chance_adds_make_the_whole(rule, crop):
    """The first part draws nothing, and its result survives being kept as bytes."""
    p = Preprocessing((48, 48), 1.3, *HALF, rule)
    always, chance = train_steps(p, "medium", crop, 0.5)
    image = scene((90, 70))
    state = torch.random.get_rng_state()
    kept = np.asarray(always(image))
    assert torch.equal(state, torch.random.get_rng_state()) and kept.dtype == np.uint8
    assert kept.shape == ((70, 90, 3) if crop == "resized" else (*p.resized((90, 70)), 3))
    whole = train_transform(p, "medium", crop, 0.5)
    for seed in range(4):
        seen, wanted = drawn(chance, Image.fromarray(kept), seed), drawn(whole, image, seed)
        torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=1e-6)


def test_mixing_by_its_equations():
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    same = batch_mixing(0.0, 0.0, 3)(images, labels)
    assert same[0] is images and same[1] is labels
    torch.manual_seed(0)
    mixed, shares = batch_mixing(1.0, 0.0, 3)(images, labels)
    part = shares[0, 0]  # of the image itself; the other is the one before it
    assert 0.02 < part < 0.98
    torch.testing.assert_close(mixed, part * images + (1 - part) * images.roll(1, 0))
    own = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(shares, part * own + (1 - part) * own.roll(1, 0))

    torch.manual_seed(0)
    cut, shares = batch_mixing(0.0, 1.0, 3)(images, labels)
    foreign = (cut != images).any(dim=1)
    assert torch.equal(cut.masked_fill(~foreign[:, None], 0), images.roll(1, 0).masked_fill(~foreign[:, None], 0))
    torch.testing.assert_close(shares[0, 0], 1 - foreign[0].float().mean())  # the share is the area's


def test_with_both_mixings_chance_picks_one_for_each_batch():
    mixing, images, labels = batch_mixing(1.0, 1.0, 3), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    untouched = [(mixing(images, labels)[0] == images).any() for _ in range(40)]  # cutmix leaves pixels as they were
    assert 8 < sum(map(bool, untouched)) < 32


def test_what_the_short_side_rule_cuts_off_is_dark_on_the_photograph():
    seen = to_photograph(np.ones((64, 64), np.float32), (320, 200), Preprocessing((64, 64), 1.0, *HALF, "short"))
    assert seen.shape == (200, 320)
    assert (seen[:, 70:250] == 1).all() and (seen[:, :50] == 0).all() and (seen[:, 270:] == 0).all()
