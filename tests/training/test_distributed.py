"""Several processes (gloo, on the CPU) do what one does: the same loss curve, every test image counted once.

By hand: torchrun --standalone --nproc-per-node 2 -m glsim.cli train ..
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import TINY
from safetensors.torch import load_file

from glsim import cli
from glsim.data import synthetic
from glsim.evaluation import evaluate
from glsim.training import train
from glsim.training.config import Train

# 32 images a step however they are shared; SGD, for Adam turns rounding into steps.
SAME = {**TINY, "test": True, "optimizer": "sgd", "lr": 0.05, "epochs": 3, "ema": 0.5}


def start(processes, *words, code=0):
    """`glsim ..` in several processes; returns what they print on stdout and on stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "glsim.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done.stdout, done.stderr


def train_words(data, out, **changes):
    values = {**SAME, **changes, "data": str(data), "out": str(out)}
    if not values.pop("pretrained"):
        yield "--no-pretrained"
    yield from (f"--{name.replace('_', '-')}" for name, value in values.items() if value is True)
    for name, value in values.items():
        if value is not True:
            yield f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, dict) else value}"


def wait_for(run, path):
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline and run.poll() is None:
        time.sleep(0.05)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 species with 23 training and 7 test images each: 2 steps of 32 and 5 left over; 21 to count, an odd number."""
    folder = tmp_path_factory.mktemp("distributed") / "birds"
    synthetic.write(folder, classes=3, train=23, test=7, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train.train(Train(data=str(data), out=str(out), **{**SAME, "batch_size": 32}), progress=False)
    return out


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    return out, *start(2, "train", "--json", *train_words(data, out, batch_size=8, accumulate=2))


def test_two_processes_train_as_one_does(one, two):
    out, printed, errors = two
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(one)] == [2, 4, 6]
    for a, b in zip(rows(one), rows(out), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5) and a["lr"] == b["lr"]
        assert a["train_top1"] == pytest.approx(b["train_top1"], abs=2 / 64)  # a tie may fall the other way
    assert len({round(row["train_loss"], 3) for row in rows(one)}) == 3  # it moves
    a, b = (load_file(folder / "model.safetensors") for folder in (one, out))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)
    result = json.loads(printed)  # one document: of several processes one speaks
    assert result["test"]["count"] == 21 and "Traceback" not in errors
    names = {"state.json", "model.safetensors", "averaged.safetensors", "optimizer.safetensors", "contents.safetensors"}
    assert {p.name for p in (out / "checkpoint").iterdir()} == names | {".glsim"}


def test_every_image_counts_once_in_one_and_two_processes(two, data):
    alone = evaluate.evaluate_bundle(two[0], data, workers=0, batch_size=4, device="cpu")
    during = json.loads((two[0] / "metrics.json").read_text())["test"]
    for key in ("count", "correct", "correct_top5", "per_class"):
        assert during[key] == getattr(alone, key)
    for key in ("ece", "aurc"):
        assert during[key] == pytest.approx(getattr(alone, key), abs=1e-5)
    assert alone.count == 21


@pytest.mark.slow
def test_every_image_counts_once_in_three_processes(two, data, tmp_path):
    alone = evaluate.evaluate_bundle(two[0], data, workers=0, batch_size=4, device="cpu")
    words = ["eval", str(two[0]), "--data", str(data), "--workers=0", "--batch-size=4", "--json"]
    together = json.loads(start(3, *words, "--out", str(tmp_path / "e"))[0])
    for key in ("count", "correct", "correct_top5", "per_class"):
        assert together[key] == getattr(alone, key)
    for key in ("ece", "aurc"):
        assert together[key] == pytest.approx(getattr(alone, key), abs=1e-5)
    assert together["risk_coverage"][-1] == pytest.approx(alone.risk_coverage[-1], abs=1e-5)
    lines = (tmp_path / "e" / "predictions.csv").read_text().splitlines()[1:]
    assert len(lines) == 21 and len({line.split(",")[0] for line in lines}) == 21


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_processes_alike(data, tmp_path):
    """Both say the same step, and nothing hangs."""
    words = train_words(data, tmp_path / "r", lr=1e30, warmup_lr=1e30, clip_grad=0.0, epochs=20)
    _, errors = start(2, "train", *words, code=1)
    steps = re.findall(r"glsim train: the loss or its gradient is no number at step (\d+); try a smaller lr", errors)
    assert steps and len(set(steps)) == 1


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_in_all_processes_and_the_run_goes_on(data, tmp_path):
    out, long = tmp_path / "r", {"batch_size": 8, "accumulate": 2, "epochs": 60, "save_steps": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "glsim.cli"]
    with subprocess.Popen(
        [*command, "train", *train_words(data, out, **long)], stderr=subprocess.PIPE, text=True
    ) as run:
        wait_for(run, out / "checkpoint")
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=90)
    steps = set(re.findall(r"interrupted after step (\d+) of 120, saved", errors))
    state = json.loads((out / "checkpoint" / "state.json").read_text())
    assert steps == {str(state["step"])} and run.returncode != 0 and state["processes"] == 2
    start(2, "train", "--resume", *train_words(data, out, **long))
    assert [row["step"] for row in rows(out)] == list(range(2, 121, 2))


REPRODUCE = """
import json, os, sys
from pathlib import Path
from glsim.cli import load_verb, parse, part_processes
from glsim.files import document
verb = load_verb("reproduce")
try:
    result = verb.run(parse("reproduce", verb.options, sys.argv[2:]), False)
    Path(sys.argv[1], "rank" + os.environ["RANK"] + ".json").write_text(json.dumps(document(result)))
finally:
    part_processes()
"""


@pytest.mark.slow
def test_the_protocol_in_two_processes_is_interrupted_goes_on_and_both_know_the_same(data, tmp_path, capsys):
    changes = {"batch_size": 8, "accumulate": 2, "save_steps": 1, "epochs": 12}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SAME, **changes}))
    (tmp_path / "each.py").write_text(REPRODUCE)
    words = [str(tmp_path / "recipe.yaml"), "--data", str(data), "--lrs", "0.05", "0.0005", "--seeds", "1", "10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    printed, _ = start(2, "reproduce", *words, "--out", str(whole), "--json")
    state = json.loads((whole / "reproduce.json").read_text())
    assert json.loads(printed) == {"out": str(whole), **state} and state["test"]["count"] == 21

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    again = [*launcher, str(tmp_path / "each.py"), str(tmp_path), *words, "--out", str(broken)]
    with (tmp_path / "errors.txt").open("w") as log, subprocess.Popen(again, stdout=log, stderr=log) as run:
        wait_for(run, broken / "lr_0.0005" / "checkpoint")
        assert cli.main(["reproduce", *words, "--out", str(broken)]) == 2 and run.poll() is None
        assert f"{broken} is in use by process" in capsys.readouterr().err
        run.send_signal(signal.SIGTERM)
        assert run.wait(90)
    assert "the same command goes on from there" in (tmp_path / "errors.txt").read_text()
    states = {name: row["state"] for name, row in json.loads((broken / "reproduce.json").read_text())["runs"].items()}
    assert states == {"lr_0.05": "done", "lr_0.0005": "running", "seed_1": "waiting", "seed_10": "waiting"}
    subprocess.run(again, check=True, capture_output=True, timeout=300)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == {"out": str(broken), **state}
    for name in states:
        a, b = (load_file(folder / name / "model.safetensors") for folder in (whole, broken))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "plain", "backbone": "resnet18", "backbone_args": {"layers": [1, 1, 1, 1]}, "options": {}},
        {"method": "cal", "backbone": "resnet18", "backbone_args": {"layers": [1, 1, 1, 1]}, "options": {"views": 1}},
        {"method": "ielt", "options": {"tokens": 12, "votes": 4}},
        {"method": "dcal", "options": {}},
        {"method": "rams", "options": {}},
        {"method": "aftrans", "options": {}},
        {"method": "transfg", "options": {}},
        {"method": "ffvt", "options": {"top_k": 3}},
        {"mixup": 0.5, "repeats": 2, "grad_checkpointing": True, "lora": 2},
        {"supcon": 0.5, "freeze": "backbone", "precision": "bf16"},
        {"lora": 2, "precision": "bf16", "cache": "ram"},
    ],
    ids=lambda changes: changes.get("method", "-".join(changes)),
)
def test_every_method_and_option_runs_in_two_processes(data, tmp_path, changes):
    """Also buffers (batch norm, centres, shares): what was measured while training is what the bundle answers."""
    out = tmp_path / "r"
    start(2, "train", *train_words(data, out, **changes, batch_size=8))
    during = json.loads((out / "metrics.json").read_text())["test"]
    alone = evaluate.evaluate_bundle(out, data, workers=0, device="cpu")
    assert during["count"] == 21
    if "precision" not in changes:
        assert (during["correct"], during["per_class"]) == (alone.correct, alone.per_class)
