"""Why A and not B: signs, places, sums; the pictures."""

import numpy as np
import pytest
import torch
from conftest import scene, small_model
from PIL import Image

import glsim
from glsim import cli
from glsim.interpret.contrast import FOR, attribute, overlay, pool


@pytest.mark.parametrize("method", glsim.METHODS)
def test_swapping_the_classes_changes_the_sign_alone(method):
    model = small_model(method, "resnet18" if method == "cal" else "vit_tiny_patch16_224")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    there, back = (attribute(model, images, *pair, steps=3).maps for pair in ((1, 3), (3, 1)))  # at any number of steps
    assert there == pytest.approx(-back, abs=1e-6) and there.dtype == np.float32
    assert there.shape == (2, *model.backbone.grid) and np.abs(there).min(axis=(1, 2)).max() > 0
    assert not any(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        assert attribute(model, images, 1, 3, steps=3).maps == pytest.approx(there, abs=1e-6)


def test_classes_go_by_their_names():
    model = small_model("glsim")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert glsim.contrast(model, images, "class 1", "class 3") == pytest.approx(attribute(model, images, 1, 3).maps)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet18"])
def test_the_map_sums_to_what_the_image_adds_to_the_difference(backbone):
    model = small_model("plain", backbone)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    c = attribute(model, images, 0, 4, steps=100)
    assert c.maps.sum(axis=(1, 2)) == pytest.approx(c.differences - c.start, abs=0.02)
    with torch.no_grad():
        logits = model(images).logits
    assert c.differences == pytest.approx((logits[:, 0] - logits[:, 4]).numpy(), abs=1e-5)
    assert c.probabilities == pytest.approx(logits.softmax(1)[:, [0, 4]].numpy(), abs=1e-5)


class OnePatch(torch.nn.Module):
    """Logits that read the tokens' mean colour at one patch of a grid of 4 x 4, or at a place inside a crop."""

    def __init__(self, model, look):
        super().__init__()
        self.backbone, self.config, self.look = model.backbone, model.config, look

    def forward(self, images):
        value = self.look(images).mean(dim=(1, 2, 3))
        return glsim.Output(torch.stack((value, -value, 0 * value), dim=1))


def test_only_the_patch_that_counts_lights_up():
    model = OnePatch(small_model(classes=3), lambda x: x[:, :, 16:32, 48:64])
    images = torch.ones(2, 3, 64, 64)
    images[1] = -1
    c = attribute(model, images, 0, 1)
    expected = np.zeros((2, 4, 4), np.float32)
    expected[:, 1, 3] = 2, -2
    assert c.maps == pytest.approx(expected, abs=1e-6) and c.differences == pytest.approx([2, -2])


def test_what_a_crop_shows_counts_where_it_was_cut_out():
    from glsim.models.boxes import crop_and_resize

    box = torch.tensor([[16, 32, 48, 64]])  # columns 1 and 2, rows 2 and 3
    model = OnePatch(small_model(classes=3), lambda x: crop_and_resize(x, box)[:, :, :30, 34:])
    maps = attribute(model, torch.ones(1, 3, 64, 64), 0, 1).maps[0]
    assert maps[2, 2] == pytest.approx(2, abs=1e-5) and np.abs(maps).sum() == pytest.approx(2, abs=1e-5)


def test_each_pixel_counts_once_whatever_the_grid():
    values = torch.rand(2, 30, 41, generator=torch.Generator().manual_seed(0))
    pooled = pool(values, (4, 7))
    naive = torch.zeros(2, 4, 7)
    for row in range(30):
        for col in range(41):
            naive[:, row * 4 // 30, col * 7 // 41] += values[:, row, col]
    torch.testing.assert_close(pooled, naive)


def test_photographs_get_maps_of_their_size(tmp_path):
    model, photo = small_model(), scene((90, 70))
    photo.save(tmp_path / "a.png")
    one, two = glsim.contrast(model, [photo, tmp_path / "a.png"], "class 0", "class 1")
    assert one.shape == (70, 90) and one == pytest.approx(two, abs=1e-5) and 0.5 < np.abs(one).max() <= 1
    (swapped,) = glsim.contrast(model, photo, "class 1", "class 0")
    assert one == pytest.approx(-swapped, abs=1e-5)


def test_unknown_classes_are_named_with_those_that_are_close(tmp_path, capsys):
    source = glsim.save(small_model(), tmp_path / "m", labels=["robin", "wren", "oak", "elm", "ash"])
    scene().save(tmp_path / "a.png")
    words = ["explain", "contrast", str(source), str(tmp_path / "a.png"), "--out", str(tmp_path / "p"), "--classes"]
    assert cli.main([*words, "robbin", "elm"]) == 2
    assert "the model has no class 'robbin'; close to it: robin" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    assert cli.main([*words, "robin", "elm"]) == 0
    with Image.open(tmp_path / "p" / "a.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 20)) > 1000
    assert "robin" in capsys.readouterr().out


def test_colours_are_strong_where_the_map_is():
    view, signed = np.full((2, 3, 3), 100, np.uint8), np.zeros((2, 3), np.float32)
    signed[0, 0], signed[1, 2] = 1, -1
    found = overlay(view, signed, alpha=1)
    assert tuple(found[0, 0]) == tuple(bytes.fromhex(FOR[1:])) and found[1, 2, 0] > 200 > found[1, 2, 2]
    assert (found[0, 1] == 155).all() and np.array_equal(overlay(view, 0 * signed), overlay(view, signed, alpha=0))
