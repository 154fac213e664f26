"""benchmarks/cost_accuracy.py: trains, calibrates, times; what is finished is left alone."""

import json
import sys
from importlib import import_module

import pytest
import yaml
from conftest import ROOT, TINY

from glsim import models
from glsim.data import synthetic


@pytest.mark.parametrize("val", [0, 2])
@pytest.mark.slow
def test_rows_of_every_recipe(tmp_path, monkeypatch, capsys, val):
    """Without a val split the margin comes from a run of its own, on held-out training images."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(models.METHODS, "tokens", "one_pass")  # as the script does, and undone
    cost_accuracy = import_module("cost_accuracy")
    synthetic.write(tmp_path / "birds", classes=2, train=6, test=2, val=val, size=64)
    recipes = {
        "plain": {"method": "plain", "options": {}},
        "early": {"options": {"top_o": 4, "early_loss": 1.0}},
        "tokens": {"method": "tokens"},
    }
    for name, changes in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, "epochs": 1, **changes}))
    files = [str(tmp_path / f"{name}.yaml") for name in recipes]
    words = [*files[:2], "--once", files[2], "--data", str(tmp_path / "birds"), "--out", str(tmp_path / "out")]
    words += ["--seeds", "1", "2", "--against", "plain", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["cost_accuracy.py", *words])
    cost_accuracy.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "cost.json").read_text())["rows"]}
    assert list(rows) == ["plain", "early", "early, both passes", "early, first pass", "tokens"]
    assert rows["plain"]["costs"] == [1.0, 1.0] and rows["tokens"]["seeds"] == [1]
    assert all(row["count"] == 4 and max(row["correct"]) <= 4 and row["cost"] > 0 for row in rows.values())
    assert rows["early, first pass"]["second_pass_share"] == 0 and rows["plain"]["second_pass_share"] is None
    assert (tmp_path / "out" / "early" / "val").exists() == (val == 0)
    assert (tmp_path / "out" / "cost.png").stat().st_size > 1000
    log = tmp_path / "out" / "plain" / "seed_1" / "log.jsonl"
    before = log.stat().st_mtime_ns
    capsys.readouterr()
    cost_accuracy.main()
    assert log.stat().st_mtime_ns == before and "training" not in capsys.readouterr().err
