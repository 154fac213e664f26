"""Two runs never meet in one folder, and the lock of a dead one is no lock."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import TINY
from safetensors.torch import load_file

from glsim import ConfigError, DataError, cli
from glsim.environment import make_accelerator
from glsim.training import reproduce, train
from glsim.training.config import Train, to_recipe
from glsim.training.resume import HOLDER, LOCK, lock_folder, seal


def settings(birds, out, **changes):
    return Train(data=str(birds), out=str(out), **{**TINY, "test": True, **changes})


def in_use_by(pid):
    return rf"is in use by process {pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait"


def test_a_living_run_keeps_others_out_and_a_killed_one_does_not(birds, tmp_path, capsys):
    """The workers that load images are forks of the run, and outlive its SIGKILL for seconds: they hold nothing."""
    out, changes = tmp_path / "r", {"workers": 2, "cache": "ram", "save_steps": 1, "epochs": 500}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_recipe(settings(birds, out, **changes)))
    words = ["train", "--recipe", str(recipe)]
    with (tmp_path / "errors.txt").open("w") as log:  # not a pipe, which the workers would hold open
        child = subprocess.Popen([sys.executable, "-m", "glsim.cli", *words], stdout=log, stderr=log)
    run, family, deadline = psutil.Process(child.pid), [], time.time() + 120
    try:
        while not (out / "checkpoint").exists() and time.time() < deadline and child.poll() is None:
            time.sleep(0.05)
        assert cli.main([*words, "--resume", "--json"]) == 2
        said = json.loads(capsys.readouterr().out)
        assert re.search(in_use_by(child.pid), said["error"]) and said["exit_code"] == 2
        while len(family) < 2 and time.time() < deadline and child.poll() is None:
            run.resume()
            time.sleep(0.02)
            run.suspend()  # for between two epochs it has no workers
            family = run.children()
        assert len(family) == 2
        child.kill()
        child.wait()
        with lock_folder(out, make_accelerator("cpu")):
            assert all(worker.is_running() for worker in family)
    finally:
        child.kill()
        child.wait()
    state = out / "checkpoint" / "state.json"
    progress = json.loads(state.read_text())
    epochs = progress["step"] // 3 + 1
    del progress["seal"]
    state.write_text(seal({**progress, "settings": {**progress["settings"], "epochs": epochs}}))
    assert (
        train.train(settings(birds, out, **{**changes, "epochs": epochs}, resume=True), progress=False).epoch == epochs
    )
    assert not (out / LOCK).exists() and not (out / HOLDER).exists()


def test_a_run_that_has_saved_nothing_yet_keeps_others_out_too(birds, tmp_path):
    with lock_folder(tmp_path / "r", make_accelerator("cpu")):
        for _ in range(2):  # who was refused has let nothing go
            with pytest.raises(ConfigError, match=in_use_by(os.getpid())):
                train.train(settings(birds, tmp_path / "r"), progress=False)
        (tmp_path / "r" / HOLDER).unlink()
        with pytest.raises(ConfigError, match="r is in use by another process; wait for it, end it, or name another"):
            train.train(settings(birds, tmp_path / "r"), progress=False)
    assert not (tmp_path / "r").exists()
    assert train.train(settings(birds, tmp_path / "r", epochs=1), progress=False).epoch == 1


def test_a_run_that_ends_between_two_looks_is_not_overwritten(birds, tmp_path, monkeypatch):
    """It was not there at the first look, and is when the lock is had."""
    out, plain = tmp_path / "r", train.make_accelerator

    def meanwhile(*arguments, **named):
        monkeypatch.setattr(train, "make_accelerator", plain)
        train.train(settings(birds, out, epochs=1), progress=False)
        return plain(*arguments, **named)

    monkeypatch.setattr(train, "make_accelerator", meanwhile)
    with pytest.raises(ConfigError, match="already holds a run"):
        train.train(settings(birds, out, epochs=1, seed=2), progress=False)
    assert yaml.safe_load((out / "train.yaml").read_text())["seed"] == 1


def test_a_run_that_cannot_begin_leaves_no_folder(birds, tmp_path):
    with pytest.raises(DataError):
        train.train(settings(tmp_path / "none", tmp_path / "a" / "r"), progress=False)
    assert not (tmp_path / "a" / "r").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError):
        train.train(settings(tmp_path / "none", tmp_path / "mine"), progress=False)
    assert list((tmp_path / "mine").iterdir()) == []


def test_reproduce_holds_its_folder_and_that_of_each_run(birds, tmp_path, monkeypatch):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    s = dict(recipe=recipe, data=str(birds), out=tmp_path / "r", seeds=[1], train={"epochs": 1})
    seen, plain = [], train.evaluate

    def during(*arguments):
        with pytest.raises(ConfigError, match=f"r {in_use_by(os.getpid())}"):
            reproduce.reproduce_recipe(**s, progress=False)
        alone = settings(birds, tmp_path / "r" / "seed_1", epochs=1, resume=True)
        with pytest.raises(ConfigError, match=f"seed_1 {in_use_by(os.getpid())}"):
            train.train(alone, progress=False)
        seen.append(1)
        return plain(*arguments)

    monkeypatch.setattr(train, "evaluate", during)
    assert reproduce.reproduce_recipe(**s, progress=False).test.runs == 1 and seen
    assert not list((tmp_path / "r").rglob(LOCK)) and not list((tmp_path / "r").rglob(HOLDER))


@pytest.mark.parametrize("number", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_where_the_file_system_has_no_locks_a_file_has_to_do(birds, tmp_path, monkeypatch, number):
    def missing(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", missing)
    with (
        pytest.warns(UserWarning, match=r"flock not supported on this filesystem, .*r/\.soft\.lock has to do"),
        lock_folder(tmp_path / "r", make_accelerator("cpu")),
        pytest.raises(ConfigError, match=rf"{in_use_by(os.getpid())}.*; if it is dead, remove .*/r/\.soft\.lock$"),
    ):
        train.train(settings(birds, tmp_path / "r"), progress=False)
    assert not (tmp_path / "r").exists()
    with pytest.warns(UserWarning, match="flock not supported"):
        result = train.train(settings(birds, tmp_path / "r", epochs=1), progress=False)
    assert result.epoch == 1 and not list((tmp_path / "r").glob("*.lock"))
    assert load_file(tmp_path / "r" / "model.safetensors")
