"""benchmarks/best_seed.py: the best seed stands beside the mean, under a name that says what it is."""

import importlib.util

from conftest import ROOT
from test_report import make_run


def test_the_best_seed_stands_beside_the_mean(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("best_seed", ROOT / "benchmarks" / "best_seed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = [make_run(tmp_path / f"g{seed}", range(2, last), seed=seed) for seed, last in ((1, 10), (10, 9))]
    assert module.main(made) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.endswith("| mean | best on test |")
    assert row.endswith("| 75.00 | 80.00 (seed 1) |")
    assert module.main([str(tmp_path / "none")]) == 3
    assert "no such folder" in capsys.readouterr().err
