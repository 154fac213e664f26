"""The verb quickstart: what it trains, compares and says."""

import json
from types import SimpleNamespace

import pytest
import timm
from safetensors.torch import save_file
from torch import ones

from glsim import cli
from glsim.cli import quickstart
from glsim.cli.quickstart import Difference
from glsim.training.config import read_recipe
from glsim.training.runs import read_measured, read_predictions

WORDS = ["--epochs", "1", "--train", "2", "--test", "1", "--workers", "0"]


def call(capsys, *words):
    code = cli.main(["quickstart", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_from_scratch(capsys, tmp_path):
    out = tmp_path / "q"
    code, text, _ = call(capsys, "--out", out, *WORDS)
    assert code == 0
    for said in ("plain", "GLSim - plain: ", "its crop moved", "crops that hold the part", "report.html"):
        assert said in text
    assert "start from" not in text
    for method in ("plain", "glsim"):  # trained by the recipe
        recipe, trained_by = read_recipe(f"synthetic_{method}"), read_recipe(out / method / "train.yaml")
        assert {name: trained_by[name] for name in recipe} == {**recipe, "epochs": 1}

    report = json.loads((out / "report" / "report.json").read_text())
    rights = []
    for method in ("plain", "glsim"):
        test = read_measured(json.loads((out / method / "metrics.json").read_text())["test"])
        rights.append([label == said for label, said in read_predictions(out / method, test).values()])
        assert report["test_top1"][method] == test.top1
    gained, lost = (sum(g > p for p, g in zip(*pair, strict=True)) for pair in (rights, rights[::-1]))
    d = report["difference"]
    assert (d["only_glsim"], d["only_plain"], d["images"]) == (gained, lost, 5)
    assert d["points"] == pytest.approx(100 * (report["test_top1"]["glsim"] - report["test_top1"]["plain"]))
    assert d["low"] <= d["points"] <= d["high"]
    assert set(report["moved_top1"]) == {"random", "centre"} and min(report["milliseconds"].values()) > 0
    assert report["pretrained"] is None

    page = (out / "report" / "report.html").read_text()
    measured = json.loads((out / "plain" / "run.json").read_text())["starts"][0]
    assert f"Trained on {measured['device']} with torch {measured['versions']['torch']}, " in page
    assert "from scratch" in page and "these images do not tell which one is better" in page
    pictures = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(pictures) == 5 and all((out / "report" / p).is_file() for p in pictures)
    assert call(capsys, "--out", out, *WORDS)[0] == 2  # never into a folder that holds something


def test_from_weights(capsys, tmp_path):
    weights, out = tmp_path / "own.safetensors", tmp_path / "q"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    code, text, _ = call(capsys, "--out", out, "--init-from", weights, *WORDS)
    assert code == 0 and "both start from own.safetensors (timm ViT): test_vit" in text
    for method in ("plain", "glsim"):
        recipe = read_recipe(out / method / "train.yaml")
        assert recipe["backbone"].startswith("test_vit") and recipe["init_from"] == str(weights)
        assert (recipe["image_size"], recipe["backbone_args"], recipe["lr"]) == (96, {}, 1e-4)
    assert recipe["options"] == {"metric": "gls_border", "box": "moments"}
    assert "from the weights in <b>own.safetensors</b>" in (out / "report" / "report.html").read_text()


def test_weights_that_nothing_takes_are_refused_before_anything_is_drawn(capsys, tmp_path):
    save_file({"unknown.weight": ones(3, 3)}, tmp_path / "odd.safetensors")
    code, _, err = call(capsys, "--out", tmp_path / "q", "--init-from", tmp_path / "odd.safetensors")
    assert code == 2 and "no network of timm is known to take it" in err and not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("patch", "size"),
    [(16, 96), (14, 98), (32, 96), (None, 96)],
)
def test_images_are_whole_patches(monkeypatch, patch, size):
    found = SimpleNamespace(backbones=["net"], sizes=SimpleNamespace(patch=patch), convention="timm")
    monkeypatch.setattr("glsim.checkpoints.examine.examine_weights", lambda file: found)
    assert quickstart.on_weights("w.pth")[1]["image_size"] == size


@pytest.mark.parametrize(
    ("points", "low", "high", "p", "better"),
    [
        (5, 1, 9, 0.01, "GLSim is the better one here"),
        (-5, -9, -1, 0.01, "plain is the better one here"),
        (5, -1, 11, 0.2, None),
        (100, 100, 100, 0.5, None),  # two images: the bootstrap knows no doubt, the test does
        (0, 0, 0, 1, None),
        (100, None, None, 1, None),
    ],
)
def test_a_difference_is_said_only_where_interval_and_test_agree(points, low, high, p, better):
    said = Difference(points, low, high, 200, 0, 0, p).verdict
    assert said == (better or "these images do not tell which one is better")
