"""Training, evaluation, resuming: a run is repeatable, never half-written, never silently overwritten."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file

import glsim
from glsim import ConfigError, DataError, evaluate, train
from glsim.batches import TrainBatches, train_loader
from glsim.bundle import init_from
from glsim.config import Eval, Train, read_recipe
from glsim.data import ImageDataset, read_data
from glsim.transforms import Preprocessing, train_transform


def settings(birds, out, **changes):
    return Train(data=str(birds), out=str(out), **{**TINY, **changes})


def test_a_run_folder_is_a_bundle_with_everything_beside_it(run_folder, birds):
    names = {"model.safetensors", "config.json", "metrics.json", "README.md", "train.yaml", "log.jsonl", "curve.png"}
    assert names <= {p.name for p in run_folder.iterdir()}
    assert not list(run_folder.glob("*.tmp"))
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2]
    assert "test_top1" not in log[0] and "test_top1" in log[1]  # test is measured once
    config = json.loads((run_folder / "config.json").read_text())
    assert config["label_names"] == list(read_data(birds)["train"].classes)
    assert config["architecture"] == "vit_tiny_patch16_224" and config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["data"]["counts"] == {"train": 18, "test": 9} and len(config["data"]["split_hash"]) == 64
    assert (run_folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_prints_what_training_measured(run_folder, birds, tmp_path):
    trained = json.loads((run_folder / "metrics.json").read_text())["test"]
    result = evaluate.run(
        Eval(source=str(run_folder), data=str(birds), out=str(tmp_path / "e"), workers=0, batch_size=4)
    )
    for key in ("count", "correct", "top1", "correct_top5", "top5", "per_class_mean", "per_class"):
        assert result[key] == trained[key]
    rows = (tmp_path / "e" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 10
    right = sum(row.split(",")[1] == row.split(",")[2] for row in rows[1:])
    assert right == result["correct"]
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"evaluation.json", "predictions.csv", "confusion.png"}


def test_metrics_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return glsim.Output(images)

    logits = torch.eye(7)[[0, 0, 1, 2, 2]] * 5 - torch.arange(7) * 0.1
    labels = torch.tensor([0, 1, 1, 6, 2])
    accelerator = evaluate.make_accelerator("cpu")
    result = evaluate.evaluate(Fixed(), [(logits[:3], labels[:3]), (logits[3:], labels[3:])], 7, accelerator)
    summary = result.summary("abcdefg")
    assert (summary["count"], summary["correct"], summary["correct_top5"]) == (5, 3, 4)
    assert summary["per_class_mean"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)  # classes without images do not count
    assert summary["per_class"]["b"] == [1, 2] and summary["per_class"]["d"] == [0, 0]
    assert result.confusion[6, 2] == 1 and result.confusion[1, 0] == 1


def test_same_seed_same_weights_other_seed_others(birds, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.run(settings(birds, tmp_path / name, epochs=1, seed=seed), progress=False)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_training_learns_what_is_easy(tmp_path):
    """Three colours, as easy as it gets: the loop must reach every test image."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in range(3):
            for i in range(count):
                pixels = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
                pixels[..., label] += 150
                path = tmp_path / "data" / split / "rgb"[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    result = train.run(settings(tmp_path / "data", tmp_path / "r", epochs=8, augment="weak"), progress=False)
    assert result["test"]["top1"] == 1.0
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]


@pytest.mark.parametrize(("workers", "ema", "save_steps"), [(0, 0.9, 1), (2, 0.0, 0)])
def test_sigkill_in_mid_epoch_then_resume_ends_as_undisturbed(birds, tmp_path, workers, ema, save_steps):
    epochs = {"epochs": 4, "workers": workers, "ema": ema, "options": {"top_o": 4, "dropout": 0.1}}
    epochs["save_steps"] = save_steps
    whole, broken = settings(birds, tmp_path / "whole", **epochs), settings(birds, tmp_path / "broken", **epochs)
    train.run(whole, progress=False)
    # The child kills itself, without any warning, in the middle of the third epoch.
    code = f"""
import os, signal, torch
from glsim import train
from glsim.config import Train
steps, plain = [], train.objective
def objective(*a, **k):
    steps.append(1)
    if len(steps) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*a, **k)
train.objective = objective
train.run(Train(**{asdict(broken)!r}), progress=False)
"""
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert len((tmp_path / "broken" / "log.jsonl").read_text().splitlines()) == 2
    state = json.loads((tmp_path / "broken" / "checkpoint" / "state.json").read_text())
    assert state["step"] == (8 if save_steps else 6)
    result = train.run(settings(birds, tmp_path / "broken", resume=True, **epochs), progress=False)
    assert result["epoch"] == 4
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    ours, theirs = (json.loads((tmp_path / n / "metrics.json").read_text())["test"] for n in ("whole", "broken"))
    assert ours["correct"] == theirs["correct"]
    a, b = ((tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "broken"))
    assert [json.loads(row)["train_loss"] for row in a] == [json.loads(row)["train_loss"] for row in b]


def test_accumulated_batches_make_the_same_step(birds, tmp_path):
    """2 batches of 3 are one of 6: the same images, augmented alike, and gradients that add up."""
    runs = {"whole": {"batch_size": 6}, "parts": {"batch_size": 3, "accumulate": 2}}
    for name, changes in runs.items():
        train.run(settings(birds, tmp_path / name, **changes), progress=False)
    logs = [[json.loads(r) for r in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in runs]
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"] and a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in runs)
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=2e-4, rtol=1e-3)  # Adam turns rounding into steps
    with pytest.raises(ConfigError, match="18 images cannot be shared by 19 batches a step"):
        train.run(settings(birds, tmp_path / "r", accumulate=19), progress=False)


def test_an_image_is_augmented_alike_by_any_worker(birds):
    images = read_data(birds)["train"]
    transform = train_transform(Preprocessing((64, 64), 1.2, (0.5,) * 3, (0.5,) * 3), "medium", "random", 1.0)
    batches = TrainBatches(len(images), 6, 1, seed=1)
    dataset = ImageDataset(images, transform)
    read = [[x for x, _ in train_loader(dataset, batches, workers)] for workers in (0, 2)]
    assert len(read[0]) == 3 and all(torch.equal(a, b) for a, b in zip(*read, strict=True))
    batches.epoch = 1
    assert not torch.equal(next(iter(train_loader(dataset, batches, 0)))[0], read[0][0])


def test_an_epoch_holds_every_image_once_in_whole_steps():
    batches = TrainBatches(23, 3, 2, seed=5)
    seen = [i for batch in batches for _, i in batch]
    assert batches.steps == 3 and len(seen) == len(set(seen)) == 18 and len(list(batches)) == len(batches) == 6
    assert batches.step(1) == seen[6:12]
    batches.start = 2
    assert [i for batch in batches for _, i in batch] == seen[12:]
    batches.epoch, batches.start = 1, 0
    assert [i for batch in batches for _, i in batch] != seen
    assert TrainBatches(4, 8, 1, seed=0).batch_size == 4


def test_a_checkpoint_of_another_format_is_refused(birds, tmp_path):
    train.run(settings(birds, tmp_path / "r", epochs=1), progress=False)
    state = tmp_path / "r" / "checkpoint" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match="written by another version of glsim"):
        train.run(settings(birds, tmp_path / "r", epochs=1, resume=True), progress=False)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(birds, tmp_path, monkeypatch):
    out = tmp_path / "r"
    whole = train.run(settings(birds, tmp_path / "whole"), progress=False)
    saves, real = [], torch.save

    def full(obj, f, *args, **kwargs):
        saves.append(1)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        return real(obj, f, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(glsim.GlsimError, match=r"checkpoint cannot be written: .*No space left on device.*--resume"):
        train.run(settings(birds, out), progress=False)
    monkeypatch.undo()
    assert (out / "checkpoint" / "state.json").exists() and not (out / "checkpoint.new").exists()
    assert train.run(settings(birds, out, resume=True), progress=False)["train_loss"] == whole["train_loss"]


def test_a_crash_between_the_two_renames_loses_nothing(birds, tmp_path):
    out = tmp_path / "r"
    train.run(settings(birds, out, epochs=2), progress=False)
    (out / "checkpoint").rename(out / "checkpoint.old")
    (out / "checkpoint.new").mkdir()
    result = train.run(settings(birds, out, epochs=2, resume=True), progress=False)
    assert result["epoch"] == 2


def test_resume_refuses_other_settings_and_runs_are_not_overwritten(run_folder, birds, tmp_path):
    with pytest.raises(
        ConfigError, match=r"already holds a run: go on with glsim train --recipe .*train.yaml --resume"
    ):
        train.run(settings(birds, run_folder), progress=False)
    with pytest.raises(ConfigError, match=r"started with other settings: lr=0.5 \(was 0.001\)"):
        train.run(settings(birds, run_folder, lr=0.5, resume=True), progress=False)
    with pytest.raises(ConfigError, match=r"nothing to resume: .*nowhere has no train.yaml"):
        train.run(settings(birds, tmp_path / "nowhere", resume=True), progress=False)


def test_resume_refuses_other_data_but_lets_it_move(birds, tmp_path):
    data = tmp_path / "birds"
    shutil.copytree(birds, data)
    train.run(settings(data, tmp_path / "r", epochs=1), progress=False)
    moved = data.rename(tmp_path / "moved")
    assert train.run(settings(moved, tmp_path / "r", epochs=1, resume=True), progress=False)["epoch"] == 1
    for split in ("train", "test"):
        (moved / split / "red_crown").rename(moved / split / "aaa")
    with pytest.raises(ConfigError, match="was trained on other images, classes or splits"):
        train.run(settings(moved, tmp_path / "r", epochs=1, resume=True), progress=False)


def test_one_class_is_refused_before_training(birds, tmp_path):
    shutil.copytree(birds / "train" / "red_crown", tmp_path / "one" / "train" / "red_crown")
    with pytest.raises(DataError, match="has one class, 'red_crown'; there is nothing to tell apart"):
        train.run(settings(tmp_path / "one", tmp_path / "r"), progress=False)


def test_a_run_in_one_precision_and_the_next_in_another(birds, tmp_path):
    train.run(settings(birds, tmp_path / "a", epochs=1, precision="bf16"), progress=False)
    result = evaluate.run(Eval(source=str(tmp_path / "a"), data=str(birds), workers=0, device="cpu"))
    assert result["count"] == 9


def test_the_saved_settings_are_a_recipe(run_folder, birds):
    assert Train(**read_recipe(run_folder / "train.yaml")) == settings(birds, run_folder)


def test_ema_is_what_is_saved(birds, tmp_path):
    whole = train.run(settings(birds, tmp_path / "a", epochs=2, ema=0.9), progress=False)
    a = load_file(tmp_path / "a" / "model.safetensors")
    raw = load_file(tmp_path / "a" / "checkpoint" / "model.safetensors")
    assert not all(torch.equal(a[k], raw[k]) for k in a)
    assert whole["test"]["count"] == 9


def test_val_fraction_is_watched_and_held_out(birds, tmp_path):
    result = train.run(settings(birds, tmp_path / "r", epochs=1, val_fraction=0.34), progress=False)
    assert result["val"]["count"] == 6
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["data"]["counts"] == {"train": 12, "val": 6, "test": 9}


def test_eval_sees_the_split_that_was_held_out(birds, tmp_path):
    trained = train.run(settings(birds, tmp_path / "r", epochs=1, val_fraction=0.34), progress=False)["val"]
    again = evaluate.run(Eval(source=str(tmp_path / "r"), data=str(birds), split="val", workers=0))
    assert (again["count"], again["per_class"]) == (trained["count"], trained["per_class"])
    assert evaluate.run(Eval(source=str(tmp_path / "r"), data=str(birds), split="train", workers=0))["count"] == 12


def test_init_from_takes_what_fits(run_folder, birds, tmp_path):
    source = glsim.load(run_folder).state_dict()
    plain = glsim.create_model("plain", TINY["backbone"], 3, 96, backbone_args=TINY["backbone_args"])
    kept = init_from(plain, run_folder)
    assert kept == ["head.bias", "head.weight"]
    key = "backbone.net.blocks.1.mlp.fc1.weight"
    assert torch.equal(plain.state_dict()[key], source[key])
    other = glsim.create_model("plain", TINY["backbone"], 3, 64, backbone_args={**TINY["backbone_args"], "depth": 3})
    with pytest.raises(ConfigError, match="has another backbone than 'vit_tiny_patch16_224'"):
        init_from(other, run_folder)
    start = {"init_from": str(run_folder), "lr": 0.0, "min_lr": 0.0, "warmup_lr": 0.0, "epochs": 1}
    train.run(settings(birds, tmp_path / "r", **start), progress=False)
    assert torch.equal(load_file(tmp_path / "r" / "model.safetensors")[key], source[key])


def test_decay_spares_biases_norms_tokens_and_positions(birds, tmp_path):
    model = glsim.create_model("glsim", TINY["backbone"], 3, 64, backbone_args=TINY["backbone_args"])
    optimizer = train.make_optimizer(settings(birds, tmp_path, weight_decay=0.1), model)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed and all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert not any("cls_token" in n or "pos_embed" in n for n in decayed)


def test_bad_images_stop_training_by_name_or_are_skipped(birds, tmp_path):
    data = tmp_path / "birds"
    shutil.copytree(birds, data)
    victim = sorted((data / "train").rglob("*.jpg"))[4]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=victim.name):
        train.run(settings(data, tmp_path / "a", epochs=1), progress=False)
    # nothing was finished there, so the same folder may be used again
    result = train.run(settings(data, tmp_path / "a", epochs=1, skip_bad=True), progress=False)
    assert len(result["skipped"]) == 1 and str(victim) in result["skipped"][0]
    assert str(victim) in (tmp_path / "a" / "bad_images.txt").read_text()


def test_a_loss_that_is_no_number_stops_the_run(birds, tmp_path):
    message = r"the loss is not a number at step \d+; try a smaller lr than 1e\+30, .* images of that step: .*0003.jpg"
    with pytest.raises(glsim.GlsimError, match=message):
        train.run(settings(birds, tmp_path / "r", lr=1e30, warmup_lr=1e30, clip_grad=0.0, epochs=3), progress=False)


def test_wrong_settings_say_what_would_work(birds, tmp_path):
    with pytest.raises(ConfigError, match="unknown optimizer 'adamv'; choose from: .*adamw"):
        train.run(settings(birds, tmp_path / "r", optimizer="adamv"), progress=False)
    with pytest.raises(ConfigError, match="unknown augmentation 'strong'; choose from: medium, none, weak"):
        train.run(settings(birds, tmp_path / "r", augment="strong"), progress=False)
    with pytest.raises(ConfigError, match="precision=fp16 needs an accelerator"):
        train.run(settings(birds, tmp_path / "r", precision="fp16"), progress=False)
    assert not (tmp_path / "r").exists()
    for name, value in (
        ("epochs", 0),
        ("batch_size", 0),
        ("resize_ratio", 0.9),
        ("label_smoothing", 1.0),
        ("mean", [1]),
        ("schedule", "plateau"),
        ("decay_epochs", 0),
        ("decay_rate", 1.1),
    ):
        with pytest.raises(ConfigError, match=name):
            settings(birds, tmp_path / "r", **{name: value})


def test_schedule_warms_up_and_comes_down(birds, tmp_path):
    s = settings(birds, tmp_path, optimizer="sgd", lr=0.1, warmup_steps=10, warmup_lr=1e-6, min_lr=1e-5)
    optimizer = train.make_optimizer(s, torch.nn.Linear(2, 2))
    assert optimizer.defaults["nesterov"]
    schedule = train.make_schedule(s, optimizer, 100)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6) and max(rates) == pytest.approx(0.1) and rates.index(max(rates)) == 10
    assert rates[-1] < 2e-4 and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("warmup", "every", "length"), [(0, 2, 20), (15, 2, 20), (15, 0.5, 5), (0, 0.01, 1)])
def test_steps_decay_every_so_many_epochs_after_the_warm_up(birds, tmp_path, warmup, every, length):
    decay = {"schedule": "step", "decay_epochs": every, "decay_rate": 0.9, "lr": 1e-3, "warmup_lr": 1e-5}
    s = settings(birds, tmp_path, epochs=10, warmup_steps=warmup, **decay)
    optimizer = train.make_optimizer(s, torch.nn.Linear(2, 2))
    schedule = train.make_schedule(s, optimizer, 100)  # 10 steps an epoch
    for step in [*range(100), 50, 3]:  # and as a resumed run: the step alone decides
        schedule.step_update(step)
        rising = 1e-5 + (1e-3 - 1e-5) * step / max(1, warmup)
        expected = rising if step < warmup else 1e-3 * 0.9 ** ((step - warmup) // length)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_unsplit_folder_keeps_its_split_for_eval(birds, tmp_path):
    data = tmp_path / "flat"
    shutil.copytree(birds / "train", data)
    result = train.run(
        settings(data, tmp_path / "r", epochs=1, test_fraction=0.34, split_seed=7, seed=3), progress=False
    )
    again = evaluate.run(Eval(source=str(tmp_path / "r"), data=str(data), workers=0))
    assert (again["count"], again["correct"]) == (6, result["test"]["correct"])
    everything = evaluate.run(Eval(source=str(tmp_path / "r"), data=str(data), workers=0, split="all"))
    assert everything["count"] == 18
    assert again["split_drawn"] and not everything["split_drawn"]
    assert not evaluate.run(Eval(source=str(tmp_path / "r"), data=str(birds), workers=0))["split_drawn"]


def test_recipe_errors_name_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 1\nepoch: 3\n")
    with pytest.raises(ConfigError, match=r"r.yaml: unknown epoch; known keys: .*epochs"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds no 'key: value' lines"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    assert yaml.safe_load(train.to_recipe(settings("d", "o")))["lr"] == 1e-3


def test_eval_names_what_is_missing(run_folder, birds, tmp_path):
    with pytest.raises(DataError, match="has no split 'val'; it has: train, test"):
        evaluate.run(Eval(source=str(run_folder), data=str(birds), split="val"))
    other = tmp_path / "other"
    shutil.copytree(birds / "test", other / "test")
    next((other / "test").iterdir()).rename(other / "test" / "ostrich")
    with pytest.raises(DataError, match="ostrich"):
        evaluate.run(Eval(source=str(run_folder), data=str(other)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_leaves_with_130(birds, tmp_path, number):
    out = tmp_path / "r"
    words = [f"--{k.replace('_', '-')}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in TINY.items()]
    words = [w for w in words if "pretrained" not in w and "epochs" not in w] + ["--no-pretrained", "--epochs=500"]
    command = [sys.executable, "-m", "glsim.cli", "train", f"--data={birds}", f"--out={out}", *words]
    # A shell's background job, as a CI run may be, ignores SIGINT, and its children would inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=heed, **pipes) as child:
        deadline = time.time() + 120
        while not (out / "checkpoint").exists() and time.time() < deadline and child.poll() is None:
            time.sleep(0.1)
        os.kill(child.pid, number)
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, errors
    step = int(re.search(r"interrupted after step (\d+) of 1500, saved; go on with .* --resume", errors)[1])
    assert "Traceback" not in errors
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == step
