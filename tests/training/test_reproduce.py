"""The paper's protocol: what chooses never sees test, an interruption anywhere changes nothing, results are plain counts."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from conftest import TINY, parsed
from safetensors.torch import load_file

from glsim import ConfigError, DataError, GlsimError, cli
from glsim.cli import reproduce as verb
from glsim.files import document
from glsim.training import report, reproduce, resume, tally, train
from glsim.training.config import change_recipe, to_recipe
from glsim.training.runs import Measured

VAL = {0.1: 2, 0.03: 4, 0.01: 4, 0.001: 1}  # right answers on val by lr: a tie at the top
TEST = {1: 5, 10: 8, 100: 6}


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "lr": 0.02, "seed": 77}))
    return file


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class FakeTraining:
    """In the place of train.run: no training, known results; `points` are the moments at which it can be killed."""

    def __init__(self, monkeypatch, kill_at=None, diverge=()):
        self.kill_at, self.diverge, self.points, self.seen = kill_at, diverge, 0, []
        monkeypatch.setattr(train, "train", self.run)
        monkeypatch.setattr(reproduce, "write_json", self.write)

    def point(self):
        self.points += 1
        if self.points == self.kill_at:
            raise Killed

    def write(self, path, value):
        self.point()
        path.write_text(json.dumps(value))
        self.point()

    def run(self, s, progress):
        folder = reproduce.Path(s.out)
        assert s.resume == (folder / "train.yaml").exists()
        self.seen.append(s)
        self.point()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.yaml").write_text(to_recipe(s))
        self.point()
        if s.lr in self.diverge:
            raise tally.Diverged(f"the loss is not a number at lr {s.lr}")
        right, split = (TEST[s.seed], "test") if s.test else (VAL[s.lr], "val")
        measured = Measured(count=10, correct=right, top1=right / 10, per_class_mean=right / 20)
        return SimpleNamespace(**{"out": s.out, "seconds": time.time(), split: measured})


def ask(recipe, birds, out, **changes):
    values = {"lrs": [0.1, 0.03, 0.01, 0.001], "seeds": [1, 10, 100], **changes}
    return verb.Options(recipe=str(recipe), data=str(birds), out=str(out), **values)


def reproduced(options):
    return reproduce.reproduce_recipe(**vars(options), progress=False)


def test_the_lr_is_chosen_on_val_and_every_seed_measured_on_test(recipe, birds, tmp_path, monkeypatch):
    fake = FakeTraining(monkeypatch)
    result = reproduced(ask(recipe, birds, tmp_path / "r"))
    choosing, measuring = fake.seen[:4], fake.seen[4:]
    assert [s.lr for s in choosing] == [0.1, 0.03, 0.01, 0.001]
    assert all((s.test, s.val_fraction, s.seed) == (False, 0.2, 1) for s in choosing)
    assert [(s.test, s.val_fraction, s.seed, s.lr) for s in measuring] == [
        (True, 0.0, seed, 0.01) for seed in (1, 10, 100)
    ]
    assert [os.path.basename(s.out) for s in fake.seen] == [
        *("lr_0.1", "lr_0.03", "lr_0.01", "lr_0.001"),
        *("seed_1", "seed_10", "seed_100"),
    ]
    assert result.lr == 0.01  # of the two best the smaller
    assert result.test.correct == [5, 8, 6] and result.test.count == 10
    assert result.test.top1.mean == pytest.approx(19 / 30)
    assert result.test.top1.std == pytest.approx(statistics.stdev([0.5, 0.8, 0.6]))
    assert json.loads((tmp_path / "r" / "reproduce.json").read_text()) == {
        k: v for k, v in document(result).items() if k != "out"
    }
    assert all(s.epochs == TINY["epochs"] and s.options == TINY["options"] for s in fake.seen)


def test_killed_at_any_moment_it_ends_as_undisturbed(recipe, birds, tmp_path, monkeypatch):
    changes = {"lrs": [0.1, 0.03], "seeds": [1, 10]}
    fake = FakeTraining(monkeypatch)
    reproduced(ask(recipe, birds, tmp_path / "whole", **changes))
    whole = (tmp_path / "whole" / "reproduce.json").read_text()
    assert fake.points > 20
    for moment in range(1, fake.points + 1):
        s = ask(recipe, birds, tmp_path / str(moment), **changes)
        broken = FakeTraining(monkeypatch, kill_at=moment)
        with pytest.raises(Killed):
            reproduced(s)
        again = FakeTraining(monkeypatch)
        reproduced(s)
        assert (tmp_path / str(moment) / "reproduce.json").read_text() == whole, moment
        assert len(broken.seen) + len(again.seen) <= 5  # four runs, one of them begun twice


def test_what_is_done_is_not_done_again(recipe, birds, tmp_path, monkeypatch):
    FakeTraining(monkeypatch)
    s = ask(recipe, birds, tmp_path / "r")
    first = reproduced(s)
    fake = FakeTraining(monkeypatch)
    assert reproduced(s) == first and not fake.seen


def test_one_lr_needs_no_choice_and_no_lr_is_the_recipes(recipe, birds, tmp_path, monkeypatch):
    for lrs, lr in (([], 0.02), ([0.1], 0.1)):
        fake = FakeTraining(monkeypatch)
        result = reproduced(ask(recipe, birds, tmp_path / str(lr), lrs=lrs))
        assert [(s.seed, s.lr, s.test) for s in fake.seen] == [(seed, lr, True) for seed in (1, 10, 100)]
        assert result.lr == lr


def test_one_seed_has_no_std(recipe, birds, tmp_path, monkeypatch):
    FakeTraining(monkeypatch)
    result = reproduced(ask(recipe, birds, tmp_path / "r", lrs=[], seeds=[10]))
    assert result.test.top1 == (0.8, None)


def test_an_lr_that_diverges_is_not_chosen(recipe, birds, tmp_path, monkeypatch, capsys):
    FakeTraining(monkeypatch, diverge=[0.01, 0.03])
    result = reproduced(ask(recipe, birds, tmp_path / "r"))
    assert result.lr == 0.1 and result.runs["lr_0.01"].state == "diverged"
    assert "lr 0.01: the loss is not a number" in "\n".join(verb.show(result, None))
    FakeTraining(monkeypatch, diverge=VAL)
    s = ask(recipe, birds, tmp_path / "s")
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(GlsimError, match=r"every lr diverged: the loss is not a number at lr 0\.1; "):
            reproduced(s)


def test_a_validation_split_of_the_data_chooses_instead(recipe, tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / f"{split}.jpg").touch()
    fake = FakeTraining(monkeypatch)
    reproduced(ask(recipe, tmp_path / "data", tmp_path / "r"))
    assert all(s.val_fraction == 0.0 for s in fake.seen) and not any(s.test for s in fake.seen[:4])


def test_data_without_a_test_split_is_refused(recipe, tmp_path):
    for name in "ab":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "1.jpg").touch()
    with pytest.raises(DataError, match="has no split 'test'; it has: train"):
        reproduced(ask(recipe, tmp_path / "data", tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_other_settings_or_images_are_refused_by_name(recipe, birds, tmp_path, monkeypatch):
    FakeTraining(monkeypatch)
    s = ask(recipe, birds, tmp_path / "r")
    reproduced(s)
    for changes, said in (
        ({"lrs": [0.1]}, r"lrs=\[0.1\] \(was \[0.1, 0.03, 0.01, 0.001\]\)"),
        ({"seeds": [1, 10]}, r"seeds=\[1, 10\] \(was \[1, 10, 100\]\)"),
        ({"val_fraction": 0.3}, r"val_fraction=0.3 \(was 0.2\)"),
        ({"train": {"epochs": 9, "momentum": 0.5}}, r"epochs=9 \(was 2\), momentum=0.5 \(was 0.9\)"),
    ):
        with pytest.raises(ConfigError, match=f"r was started with other settings: .*{said}.*; name another --out"):
            reproduced(replace(s, **changes))
    other = tmp_path / "other"
    for split in ("train", "test"):
        for name in "ab":
            (other / split / name).mkdir(parents=True)
            for number in "12":
                (other / split / name / f"{number}.jpg").touch()
    with pytest.raises(ConfigError, match="split_hash="):
        reproduced(replace(s, data=str(other)))
    reproduced(replace(s, train={"workers": 3}))  # changes nothing in the runs
    whole = json.loads((tmp_path / "r" / "reproduce.json").read_text())
    seed = whole["runs"]["seed_1"]
    for damaged in (
        {k: v for k, v in whole.items() if k != "plan"},
        {**whole, "runs": []},
        {**whole, "runs": {"seed_1": seed}},
        {**whole, "runs": {**whole["runs"], "seed_1": []}},
        {**whole, "runs": {**whole["runs"], "seed_1": {**seed, "test": {"correct": None}}}},
        [],
    ):
        (tmp_path / "r" / "reproduce.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="reproduce.json is damaged"):
            reproduced(s)
    (tmp_path / "r" / "reproduce.json").write_text("{")
    with pytest.raises(DataError, match="reproduce.json is damaged"):
        reproduced(s)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out=.*file is a file; name a folder"):
        reproduced(replace(s, out=str(tmp_path / "file")))


def test_a_plan_of_an_earlier_version_has_the_defaults_of_later_settings(recipe, birds, tmp_path, monkeypatch):
    FakeTraining(monkeypatch)
    s = ask(recipe, birds, tmp_path / "r")
    whole = reproduced(s)
    file = tmp_path / "r" / "reproduce.json"
    state = json.loads(file.read_text())
    del state["plan"]["train"]["focal"]
    file.write_text(json.dumps(state))
    assert reproduced(s).test == whole.test
    with pytest.raises(ConfigError, match=r"focal=2.0 \(was 0.0\)"):
        reproduced(replace(s, train={"focal": 2.0}))


def test_settings_are_checked_by_name_and_type(recipe, birds, tmp_path):
    for train_settings, said in (
        ({"epochs": "many"}, 'tiny.yaml with --train: .*"epochs"'),
        ({"epoch": 3}, "tiny.yaml with --train: .*epoch"),
        ({"epochs": 0}, "epochs=0: at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            reproduced(ask(recipe, birds, tmp_path / "r", train=train_settings))
    for changes, said in (
        ({"train": {"lr": 1}}, "--train.lr: use --lrs"),
        ({"train": {"test": False}}, "--train.test: the protocol sets that itself"),
        ({"seeds": []}, r"seeds=\[\]: one or more"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: each only once"),
        ({"lrs": [0.0]}, r"lrs=\[0.0\]: above 0"),
        ({"seeds": [1, -1]}, "seed=-1: from 0 to 4294967295"),
        ({"val_fraction": 0.0}, "val_fraction=0: the lr is chosen on what is held out"),
    ):
        with pytest.raises(ConfigError, match=said):
            ask(recipe, birds, tmp_path / "r", **changes)


def test_the_command_line_changes_settings_of_the_recipe(recipe, birds, tmp_path):
    words = [str(recipe), "--data", str(birds), "--out", "o", "--lrs", "0.1", "1e-3", "--seeds", "3", "4"]
    words += ["--train.epochs", "9", "--train.precision", "no", "--train.options.classifier", "avg_cls"]
    words += ["--train.backbone_args.depth", "1", "--train.mean", "[1,2,3]"]
    s = parsed("reproduce", words)
    assert (s.lrs, s.seeds) == ([0.1, 1e-3], [3, 4])
    settings = change_recipe(s.recipe, s.train, data=s.data, out=s.out)
    assert (settings.epochs, settings.precision, settings.mean) == (9, "no", [1, 2, 3])
    assert settings.options == {"top_o": 4, "classifier": "avg_cls"}
    assert settings.backbone_args == {**TINY["backbone_args"], "depth": 1}


@pytest.mark.parametrize("error", [resume.Interrupted("saved"), KeyboardInterrupt()])
def test_an_interruption_says_that_the_same_command_goes_on(recipe, birds, tmp_path, monkeypatch, error):
    def stopped(s, progress):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # where training does not listen itself
        raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(resume.Interrupted, match="interrupted in .*lr_0.1; the same command goes on") as stop:
        reproduced(ask(recipe, birds, tmp_path / "r"))
    assert stop.value.exit_code == 130 and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_after_the_last_step_of_a_run_stops_before_the_next(recipe, birds, tmp_path, monkeypatch):
    measure = train.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(train, "evaluate", signalled)
    s = ask(recipe, birds, tmp_path / "r", lrs=[], seeds=[1, 10], train={"epochs": 1})
    with pytest.raises(resume.Interrupted, match="interrupted in .*seed_1"):
        reproduced(s)
    assert not (tmp_path / "r" / "seed_10").exists()
    monkeypatch.undo()
    assert reproduced(s).test.runs == 2


@pytest.mark.slow
def test_a_real_one_interrupted_and_continued_then_reported(recipe, birds, tmp_path, capsys):
    """SIGTERM in the midst of the first run: exit code 130; the same command ends with the weights of an undisturbed one."""
    words = [
        "reproduce",
        recipe,
        "--data",
        birds,
        "--out",
        tmp_path / "r",
        "--lrs",
        "0.01",
        "0.001",
        "--seeds",
        "1",
        "10",
    ]
    words = [str(w) for w in [*words, "--val-fraction", "0.34", "--train.epochs", "3"]]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "glsim.cli", *words], text=True, preexec_fn=heed, **pipes) as child:
        deadline = time.time() + 120
        while (
            not (tmp_path / "r" / "lr_0.01" / "checkpoint").exists() and time.time() < deadline and child.poll() is None
        ):
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "the same command goes on from there" in errors and "Traceback" not in errors
    assert cli.main([*words, "--json"]) == 0
    broken = json.loads(capsys.readouterr().out)
    assert cli.main([str(tmp_path / "whole") if w == str(tmp_path / "r") else w for w in words]) == 0
    said = capsys.readouterr().out
    assert "val top-1" in said and "(chosen)" in said and "over 2 seeds, last epoch" in said
    whole = json.loads((tmp_path / "whole" / "reproduce.json").read_text())
    assert {k: v for k, v in broken.items() if k != "out"} == whole
    for name in ("lr_0.01", "lr_0.001", "seed_1", "seed_10"):
        a, b = (load_file(tmp_path / r / name / "model.safetensors") for r in ("r", "whole"))
        assert all((a[k] == b[k]).all() for k in a)
    for name, splits in (("lr_0.01", {"val"}), ("seed_1", {"test"})):
        metrics = json.loads((tmp_path / "r" / name / "metrics.json").read_text())
        assert {k for k in metrics if k in ("val", "test")} == splits
        assert (tmp_path / "r" / name / "predictions_test.csv").exists() == (splits == {"test"})
        record = json.loads((tmp_path / "r" / name / "run.json").read_text())
        assert record["starts"][0]["command"].endswith("--train.epochs 3") or name != "lr_0.01"
        config = json.loads((tmp_path / "r" / name / "config.json").read_text())
        assert record["split_hash"] == config["data"]["split_hash"] and record["seed"] == 1
    starts = json.loads((tmp_path / "r" / "lr_0.01" / "run.json").read_text())["starts"]
    assert len(starts) == 2 and {"python", "torch", "torchvision", "timm", "accelerate", "glsim"} == set(
        starts[0]["versions"]
    )
    assert starts[0]["date"] and starts[0]["device"] and starts[0]["processes"] == 1 and starts[0]["precision"] == "no"
    (data,) = report.report_runs([str(tmp_path / "r")]).data
    assert data.rows[0].correct == whole["test"]["correct"] and data.rows[0].top1._asdict() == whole["test"]["top1"]
