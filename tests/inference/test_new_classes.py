"""The script that holds classes out of training."""

import csv
import importlib.util
import json

import pytest
from conftest import ROOT, TINY

from glsim.checkpoints.bundle import labels_of, load

pytest.importorskip("faiss", reason="the extra `index` is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("new_classes", ROOT / "benchmarks" / "new_classes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classes_held_out_are_met_afterwards(script, birds, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(TINY | {"val_fraction": 0.2, "epochs": 1}))
    words = ["--data", birds, "--out", tmp_path / "out", "--known", 2, "--shots", 1, 3, "--steps", 1, "--workers", 0]
    monkeypatch.setattr("sys.argv", ["new_classes.py", *map(str, [recipe, *words])])
    script.main()
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "new_classes.json").read_text())
    known = labels_of(load(tmp_path / "out" / "run"))
    assert len(known) == 2 and (result["known"], result["new"]) == (2, 1)
    with (tmp_path / "out" / "known.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == set(known) and len(rows) == 2 * (6 + 3)
    assert set(result["embeddings"]) == {"global", "crop", "fused"}
    assert (result["calibration"]["val"], result["calibration"]["test"]) == (2, 6)
    for m in result["embeddings"].values():
        assert m["before"]["unknown"]["count"] == 3 and m["before"]["count"] == 6
        assert [(r["shots"], r["added"], r["count"]) for r in m["after"]["added"]] == [(0, 0, 6), (1, 1, 9), (3, 1, 9)]
        assert m["after"]["unknown"] is None
    assert "| fused | 3 | 1 |" in out and "AUROC" in out
    trained = (tmp_path / "out" / "run" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["new_classes.py", "--run", str(tmp_path / "out" / "run"), *map(str, words)])
    script.main()
    assert capsys.readouterr().out == out
    assert (tmp_path / "out" / "run" / "model.safetensors").stat().st_mtime_ns == trained
