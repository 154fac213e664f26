"""benchmarks/start.py: what it trains from what, and the files it writes of finished and unfinished runs."""

import csv
import json
import sys

import pytest
from conftest import ROOT, TINY

import glsim
from glsim.files import to_json


@pytest.fixture
def start(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import start

    return start


def test_methods_start_from_the_same_weights_and_go_on_where_they_stopped(start, birds, tmp_path, monkeypatch, capsys):
    weights = glsim.create_model("plain", TINY["backbone"], 4, 64, backbone_args=TINY["backbone_args"])
    glsim.save(weights, tmp_path / "weights")
    recipe = {name: value for name, value in TINY.items() if name not in ("options", "epochs")}
    (tmp_path / "recipe.yaml").write_text(to_json({**recipe, "method": "plain", "test": True}))
    out = tmp_path / "out"
    words = ["--data", birds, "--weights", tmp_path / "weights", "--out", out, "--recipe", tmp_path / "recipe.yaml"]
    words += ["--epochs", 1, "--methods"]
    monkeypatch.setattr(sys, "argv", ["start.py", *map(str, words), "plain", "glsim"])
    start.main()
    trained = []
    monkeypatch.setattr("cost_accuracy.train", trained.append)
    start.main()  # finished runs are left alone
    assert not trained
    with (out / "start.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [("plain", "1", "1"), ("glsim", "1", "1")]
    assert all(float(row["train_loss"]) > 0 and 0 <= float(row["test_top1"]) <= 1 for row in rows)
    assert glsim.load(out / "glsim" / "seed_1").config.options["aggregator_start"] == "identity"
    told = json.loads((out / "start.json").read_text())
    assert set(told["starts"]) == {"plain/seed_1", "glsim/seed_1"} and len(told["rows"]) == 2
    assert (out / "start.png").stat().st_size > 1000
    assert capsys.readouterr().out.startswith("method,seed,epoch,train_loss,train_top1,test_top1\n")
