"""The script that holds classes out of training."""

import csv
import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT, TINY

from glsim.checkpoints.bundle import labels_of, load
from glsim.inference.index import Encoded
from glsim.inference.index_evaluation import Queries
from glsim.inference.index_vectors import Index


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


def test_classes_are_added_in_steps(script, monkeypatch):
    """Classes on axes of their own, one of them (3) with a single good image among bad ones."""
    axes = np.eye(6, dtype=np.float32)
    labels = np.repeat([0, 1, 2, 3], 4)
    vectors = axes[labels].copy()
    vectors[13:16] = axes[0]  # three images of class 3 look like class 0
    paths = tuple(f"/x/{i}.jpg" for i in range(16))
    index = Index("global", "w", "m", tuple("abcd"), labels, paths, vectors)
    nothing = np.zeros(4, np.float32)
    encoded = Encoded([0, 1, 2, 3], axes[:4], np.zeros(4, np.int64), nothing, nothing, [])
    guesses = np.array([0, 1, 0, 0])  # the head knows a and b only
    queries = Queries(encoded, np.array([0, 1, 2, 3]), guesses, np.array([2, 3]))

    def add(queries):
        return script.add_in_steps(index, queries, shots=[1, 4], steps=2, seed=0, k=1)

    rows = add(queries)
    assert [(r["shots"], r["added"], r["count"]) for r in rows] == [
        (0, 0, 2),
        (1, 1, 3),
        (1, 2, 4),
        (4, 1, 3),
        (4, 2, 4),
    ]
    assert [r["head"]["top1"] for r in rows] == pytest.approx([1, 2 / 3, 1 / 2, 2 / 3, 1 / 2])
    assert rows[0]["prototypes"] == {"top1": 1.0, "top1_old": 1.0, "top1_added": None, "std": 0.0}
    assert rows[1]["prototypes"]["top1_added"] == 1.0 and rows[1]["head"]["top1_added"] == 0.0
    assert rows[4]["neighbours"]["top1_added"] == 1.0  # with all four images, class 3 has its good one
    monkeypatch.setattr(script, "DRAWS", 400)
    one = add(queries)[2]["neighbours"]
    assert one["top1_added"] == pytest.approx((1 + 1 / 4) / 2, abs=0.05)  # of four images drawn, one is good
    assert one["std"] == pytest.approx(np.sqrt(1 / 4 * 3 / 4) / 4, abs=0.02)  # of one image in four
    assert add(queries._replace(added=np.array([], np.int64))) == []
