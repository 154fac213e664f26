"""The study of fine-tuning: its arms can be built, boxes move with their pixels, what is finished is told."""

import argparse
import json

import pytest
import torch
from conftest import ROOT

from glsim import models
from glsim.data import synthetic
from glsim.data.readers import read_data
from glsim.data.transforms import Preprocessing, train_steps
from glsim.models.backbone import build_backbone


@pytest.fixture
def study(monkeypatch):
    for name, module in (("annotated", "annotated"), ("ruled", "rules"), ("tokens", "one_pass")):
        monkeypatch.setitem(models.METHODS, name, module)  # what the imports below make known, for this test alone
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    import study

    return study


def asked(tmp_path, **more):
    given = {"data": "cub20", "weights": "w", "out": tmp_path, "set": [], "val": False, "seeds": [1, 10]}
    return argparse.Namespace(**given | more)


def test_every_arm_is_a_run_whose_options_its_method_takes(study, tmp_path):
    runs = {arm: study.settings(asked(tmp_path, set=["epochs=2"]), arm, 10) for arm in study.ARMS}
    shared = ("backbone", "freeze", "lr", "head_lr", "layer_decay", "batch_size", "seed", "precision", "augment")
    assert len({tuple(getattr(run, name) for name in shared) for run in runs.values()}) == 1
    assert {run.epochs for run in runs.values()} == {2} and all(run.test for run in runs.values())
    tiny = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    for arm, run in runs.items():
        model = models.create_model(run.method, run.backbone, 4, run.image_size, False, tiny, **run.options)
        assert model.config.image_size == [run.image_size] * 2, arm
    held_out = study.settings(asked(tmp_path, val=True), "glsim", 1)
    assert held_out.val_fraction == 0.2 and not held_out.test


def test_a_box_moves_with_its_pixels_and_is_what_the_crop_shows(study, tmp_path):
    import annotated

    synthetic.write(tmp_path / "birds", classes=2, train=2, test=1, size=64)
    images = read_data(tmp_path / "birds")["train"]
    boxes = {"/".join(path.parts[-3:]): (20.0, 20.0, 44.0, 44.0) for path in images.paths}
    p = Preprocessing((56, 56), 1.25, (0, 0, 0), (1, 1, 1))
    both = annotated.Boxed(images, *train_steps(p, "flip", "random"), boxes)
    marked = dict.fromkeys(boxes, (0.0, 0.0, 64.0, 64.0))
    whole = annotated.Boxed(images, *train_steps(p, "none", "centre"), marked)
    for seed in range(8):
        torch.manual_seed(seed)
        view, label = both[seed % len(images)]
        assert view.shape == (4, 56, 56) and label == images.labels[seed % len(images)]
        rows, cols = view[3].any(dim=1).sum(), view[3].any(dim=0).sum()
        assert (rows, cols) == (26, 26)  # 24 of 64 pixels, resized to 70, and inside of any crop of 56
    assert whole[0][0][3].all()  # the box of the whole image fills the view
    model = annotated.build(small(), 2, crop_size=32)
    with torch.inference_mode():
        output = model.eval()(torch.stack([both[0][0], both[1][0]]))
    assert output.crops.shape == (2, 3, 32, 32)
    left, top, right, bottom = output.selection.boxes.unbind(dim=1)
    assert (right - left == 26).all() and (bottom - top == 26).all()


def small():
    args = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "dynamic_img_size": True}
    return build_backbone("vit_tiny_patch16_224", 32, backbone_args=args)


def test_what_is_finished_is_told(study, tmp_path):
    right = {"plain": {1: "aab", 10: "abb"}, "glsim": {1: "aaa", 10: "aaa"}, "centre": {1: "bbb"}}
    for arm, seeds in right.items():
        for seed, said in seeds.items():
            folder = tmp_path / arm / f"seed_{seed}"
            folder.mkdir(parents=True)
            rows = [f"test/a/{i}.png,a,{answer}" for i, answer in enumerate(said)]
            (folder / "predictions_test.csv").write_text("\n".join(["path,label,prediction", *rows]) + "\n")
            (folder / "log.jsonl").write_text(json.dumps({"seconds": 60}) + "\n")
    (tmp_path / "cost.json").write_text(json.dumps({"cost": {"plain": 1.0, "glsim": 2.0}}))
    table = study.write(asked(tmp_path))
    assert "plain, 168 pixels | 50.00 +- 23.57 | 2, 1 of 3 | 1.00 | 1.0 |  |" in table
    assert "| 100.00 +- 0.00 | 3, 3 of 3 | 2.00 | 1.0 | +50.0" in table
    assert "| glsim - centre | +100.0 (+100.0 to +100.0) | +100.0 | +3 -0 | 0.25 |" in table
    told = json.loads((tmp_path / "study.json").read_text())
    row = next(d for d in told["differences"] if (d["arm"], d["against"]) == ("glsim", "plain"))
    assert (row["won"], row["lost"], row["p"]) == (3, 0, 0.25) and row["seeds"] == [1, 10]
    assert (tmp_path / "study.png").stat().st_size > 5000
