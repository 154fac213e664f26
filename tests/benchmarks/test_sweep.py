"""benchmarks/sweep.py: interrupted anywhere, the same command goes on; test is never measured."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, TINY

from glsim.training import tally, train
from glsim.training.resume import Interrupted

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install -e '.[sweep]'")


@pytest.fixture
def sweep(monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return module


@pytest.fixture
def words(birds, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "epochs": 1}))
    named = ["--data", str(birds), "--out", str(tmp_path / "s"), "--val-fraction", "0.34"]
    return [str(tmp_path / "tiny.yaml"), *named, "--lr", "1e-4", "1e-2", "--drop-path", "0", "0.3"]


class FakeTraining:
    """In the place of train.run: no training; the accuracy on val is ten times the learning rate."""

    def __init__(self, monkeypatch, stop_at=None, error=None):
        self.seen, self.stop_at, self.error = [], stop_at, error
        monkeypatch.setattr(train, "train", self.run)

    def run(self, s):
        self.seen.append(s)
        if len(self.seen) == self.stop_at:
            raise self.error
        return SimpleNamespace(val=SimpleNamespace(top1=s.lr * 10))


class Killed(BaseException):
    """Stands for SIGKILL: Optuna does not catch it, the trial stays as it is."""


@pytest.mark.parametrize("error", [Interrupted("interrupted after step 3"), KeyboardInterrupt(), Killed()])
def test_an_interrupted_trial_is_taken_up_again_with_its_settings(sweep, words, monkeypatch, capsys, error):
    first = FakeTraining(monkeypatch, stop_at=3, error=error)
    if isinstance(error, Killed):
        with pytest.raises(Killed):
            sweep.main([*words, "--trials", "4"])
    else:
        assert sweep.main([*words, "--trials", "4"]) == 130
    capsys.readouterr()
    second = FakeTraining(monkeypatch)
    assert sweep.main([*words, "--trials", "4"]) == 0
    assert len(second.seen) == 2 and second.seen[0] == first.seen[2]
    seen = [*first.seen[:2], *second.seen]
    assert len({s.lr for s in seen}) == len({s.out for s in seen}) == 4
    assert all((s.test, s.val_fraction) == (False, 0.34) for s in seen)
    assert all(0 <= s.options["drop_path"] <= 0.3 and s.options["top_o"] == 4 for s in seen)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| trial | val top-1 | lr | drop_path |" and len(lines) == 2 + 4
    best = max(seen, key=lambda s: s.lr)
    assert lines[2].startswith(f"| {best.out.rpartition('/')[2]} | {best.lr * 10:.2%} | {best.lr:.4g} |")
    assert sweep.main([*words, "--trials", "4"]) == 0 and len(second.seen) == 2  # all there


def test_a_diverged_trial_is_no_result_and_what_cannot_be_searched_is_refused(sweep, words, monkeypatch, capsys):
    fake = FakeTraining(monkeypatch, stop_at=1, error=tally.Diverged("the loss is not a number"))
    assert sweep.main([*words, "--trials", "3"]) == 0 and len(fake.seen) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + 2 and "the loss is not a number" in err
    for wrong, said in (
        (words[:7], "nothing to search"),
        ([*words, "--weight-decay", "0", "1"], "a log-uniform range starts above 0"),
        ([*words, "--val-fraction", "0"], "--val-fraction 0: the data has no val split"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(wrong)
        assert said in capsys.readouterr().err


def test_a_real_trial_never_measures_test(sweep, words, tmp_path, capsys):
    assert sweep.main([*words, "--trials", "1"]) == 0
    metrics = json.loads((tmp_path / "s" / "trial_0" / "metrics.json").read_text())
    assert "val" in metrics and "test" not in metrics
    assert f"{metrics['val']['top1']:.2%}" in capsys.readouterr().out
