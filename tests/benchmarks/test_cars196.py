"""benchmarks/cars196.py: a few steps on a CPU; stopped and resumed it ends where it ends undisturbed."""

import json

import pytest
import torch
import yaml
from conftest import TINY
from safetensors.torch import load_file

from glsim.data import synthetic
from glsim.data.readers import read_data
from glsim.data.transforms import Preprocessing, eval_transform


@pytest.fixture
def cars(script):
    return script("cars196")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cars") / "birds"
    synthetic.write(folder, classes=3, train=6, test=3, size=64)
    return folder


@pytest.mark.slow
def test_stopped_and_resumed(cars, few, tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        yaml.safe_dump({**TINY, "options": {}, "resize_ratio": 1.25, "crop": "resized", "crop_scale": 0.5})
    )
    words = ["--data", str(few), "--recipe", str(recipe), "--pretrain-epochs", "2", "--epochs", "2", "--seeds", "1"]
    words += ["--variants", "published", "plain", "transfg"]
    through = cars.follow(cars.parse([*words, "--out", str(tmp_path / "through")]))
    assert [row["name"] for row in through["rows"]] == ["published", "plain", "transfg", "plain_flip"]
    assert through["left_out"] == {} and all(row["count"] == 9 for row in through["rows"])
    stops = 0
    for _ in range(20):
        try:
            result = cars.follow(cars.parse([*words, "--out", str(tmp_path / "stopped"), "--minutes", "0"]))
            break
        except cars.Stopped as stopped:
            stops += "1 of 2 epochs" in str(stopped)
    assert stops == 4  # once in the pre-training, once in each run
    assert result == json.loads((tmp_path / "stopped" / "paired.json").read_text())
    for name in ("transfg/seed_1/predictions_test.csv", "plain_flip/seed_1/predictions_test.csv"):
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    one, other = (load_file(tmp_path / way / "start" / "model.safetensors") for way in ("through", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert [row["correct"] for row in result["rows"]] == [row["correct"] for row in through["rows"]]
    capsys.readouterr()
    assert cars.follow(cars.parse([*words, "--out", str(tmp_path / "stopped")])) == result
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("*/**/state.pt"))
    with pytest.raises(SystemExit):
        cars.parse([*words, "--out", "x", "--variants", "detail"])  # of another size than all images are kept at
    assert "choose from published" in capsys.readouterr().err
    for more in (["--epochs", "3"], ["--lr", "0.1"], ["--pretrain-epochs", "1"], ["--mixup", "0"]):
        with pytest.raises(cars.ConfigError, match="was started with other settings"):
            cars.follow(cars.parse([*words, "--out", str(tmp_path / "stopped"), *more]))


def test_pixels(cars, few):
    """The middle is what `glsim eval` sees, up to the rounding of a byte; each image is augmented in its own way."""
    p = Preprocessing((48, 48), 1.25, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = read_data(few)["test"]
    pixels, transform = cars.Pixels(images, p), eval_transform(p)
    from glsim.data.images import open_image

    told = torch.stack([transform(open_image(path)) for path in images.paths])
    torch.testing.assert_close(pixels.centre(slice(0, 9)), told)
    same = torch.zeros(6, dtype=torch.long)
    torch.manual_seed(3)
    many = pixels.augmented(same, 0.35)
    assert many.shape == (6, 3, 48, 48) and many.isfinite().all()
    assert len({round(float(view.mean()), 5) for view in many}) == 6
    torch.manual_seed(3)
    assert torch.equal(pixels.augmented(same, 0.35), many)


def test_augmented_is_cropped_turned_mirrored_and_erased(cars, few, monkeypatch):
    """By a picture of its own places: where each pixel of a view comes from says what was done to it."""
    p = Preprocessing((48, 48), 1.25, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = cars.Pixels(read_data(few)["test"], p)
    rows, cols = pixels.images.shape[-2:]
    down, right = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    pixels.images = torch.stack((4 * down, 4 * right, torch.full_like(down, 255)))[None].to(torch.uint8)
    monkeypatch.setattr(torch, "lerp", lambda start, end, weight: end)  # contrast and colour as they are
    torch.manual_seed(0)
    views = pixels.augmented(torch.zeros(400, dtype=torch.long), 0.35)
    bright = views[:, 2].amax(dim=(1, 2))
    assert 0.59 < bright.min() < 0.7 and bright.max() == 1  # 0.6 to 1.4, cut off at 1
    fair = views[(bright < 1)]
    fair = fair / fair[:, 2:].amax(dim=(2, 3), keepdim=True)
    erased = (fair[:, 2] < 0.5).flatten(1).any(dim=1)
    assert 0.15 < erased.double().mean() < 0.35
    whole = fair[~erased]
    place = whole[:, :2] * 255 / 4  # of each pixel of a view in its image: row, column
    inner = place[:, :, 12:36, 12:36]  # off the borders, which are mirrored
    step = torch.stack((inner.diff(dim=3).mean(dim=(2, 3)), inner.diff(dim=2).mean(dim=(2, 3))), dim=1)  # n (x y) (r c)
    across, along = step[:, 0, 1], step[:, 1, 0]
    assert 0.4 < (across < 0).double().mean() < 0.6 and (along > 0).all()
    zoom = (across.abs() * along) * 48 * 48 / (rows * cols)  # area of the view
    assert 0.3 < zoom.min() < 0.42 and 0.85 < zoom.max() < 1.05
    angle = torch.atan2(step[:, 1, 1].abs(), along)
    assert 0.1 < angle.max() < 0.26


@pytest.mark.slow
def test_the_recipe_builds(cars):
    """Two passes cost two, and the method that asks most of the grid finds one that is large enough."""
    a = cars.parse(["--data", "x", "--out", "y"])
    assert cars.paired.operations(a, "published") == pytest.approx(2 * cars.paired.operations(a, "plain"), rel=0.05)
    assert cars.paired.operations(a, "ielt") > 0
