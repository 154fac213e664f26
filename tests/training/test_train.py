"""Training, evaluation, resuming: a run is repeatable, never half-written, never silently overwritten."""

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from multiprocessing import get_start_method
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType
from conftest import ROOT, TINY, small_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

import glsim
from glsim import ConfigError, DataError, cli
from glsim.checkpoints.config import FORMAT
from glsim.checkpoints.init_from import init_from
from glsim.data import loaders as batches_module
from glsim.data.loaders import ImageDataset, TrainBatches, make_loader, read, train_loader
from glsim.data.readers import read_data
from glsim.data.transforms import Preprocessing, train_transform
from glsim.environment import make_accelerator
from glsim.evaluation import evaluate
from glsim.models.losses import TERMS, objective
from glsim.training import components, resume, train
from glsim.training.adapt import adapt, merged
from glsim.training.config import WITHOUT_EFFECT, Train, read_recipe, to_recipe
from glsim.training.memory import saved_bytes


def settings(birds, out, **changes):
    return Train(data=str(birds), out=str(out), **{**TINY, "test": True, **changes})


@pytest.fixture(scope="module")
def averaged_run(birds, tmp_path_factory):
    """A finished run with averaged weights: every part that a checkpoint can have is there."""
    out = tmp_path_factory.mktemp("averaged") / "r"
    train.train(settings(birds, out, ema=0.5), progress=False)
    return out


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
    result = evaluate.evaluate_bundle(run_folder, birds, out=tmp_path / "e", workers=0, batch_size=4)
    for key in ("count", "correct", "top1", "correct_top5", "top5", "per_class_mean", "per_class"):
        assert getattr(result, key) == trained[key]
    rows = (tmp_path / "e" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 10
    right = sum(row.split(",")[1] == row.split(",")[2] for row in rows[1:])
    assert right == result.correct
    names = {"evaluation.json", "predictions.csv", "confusion.png", "confusion.csv", "confidence.png"}
    assert {p.name for p in (tmp_path / "e").iterdir()} == names | {".glsim"} and names == set(result.written)


def test_metrics_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return glsim.Output(images)

    logits = torch.eye(7)[[0, 0, 1, 2, 2]] * 5 - torch.arange(7) * 0.1
    labels = torch.tensor([0, 1, 1, 6, 2])
    accelerator = make_accelerator("cpu")
    result = evaluate.evaluate(Fixed(), [(logits[:3], labels[:3]), (logits[3:], labels[3:])], 7, accelerator)
    summary = result.summary("abcdefg")
    assert (summary.count, summary.correct, summary.correct_top5) == (5, 3, 4)
    assert summary.per_class_mean == pytest.approx((1 + 0.5 + 1 + 0) / 4)  # classes without images do not count
    assert summary.per_class["b"] == [1, 2] and summary.per_class["d"] == [0, 0]
    assert result.confusions().tolist() == [[0, 0, 1], [1, 0, 1], [1, 1, 1], [2, 2, 1], [6, 2, 1]]


def test_same_seed_same_weights_other_seed_others(birds, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.train(settings(birds, tmp_path / name, epochs=1, seed=seed), progress=False)
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
    result = train.train(settings(tmp_path / "data", tmp_path / "r", epochs=8, augment="weak"), progress=False)
    assert result.test.top1 == 1.0
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]


MIXED = {"mixup": 0.4, "cutmix": 1.0, "repeats": 2, "cache": "ram", "layer_decay": 0.7, "lora": 2}


@pytest.mark.parametrize(
    ("workers", "ema", "save_steps", "more"),
    [(0, 0.9, 1, MIXED), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 0.0, 0, {}), (0, 0.9, 1, {})))],
)
def test_sigkill_in_mid_epoch_then_resume_ends_as_undisturbed(birds, tmp_path, workers, ema, save_steps, more):
    epochs = {"epochs": 4, "workers": workers, "ema": ema, "options": {"top_o": 4, "dropout": 0.1}, **more}
    epochs["save_steps"] = save_steps
    whole, broken = settings(birds, tmp_path / "whole", **epochs), settings(birds, tmp_path / "broken", **epochs)
    train.train(whole, progress=False)
    # The child kills itself, without any warning, in the middle of the third epoch.
    code = f"""
import os, signal, torch
from glsim.training import train
from glsim.training.config import Train
steps, plain = [], train.objective
def objective(*a, **k):
    steps.append(1)
    if len(steps) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*a, **k)
train.objective = objective
train.train(Train(**{asdict(broken)!r}), progress=False)
"""
    errors = tmp_path / "errors.txt"  # not a pipe: the loader's processes hold it open for seconds after their parent
    with errors.open("w") as file:
        dead = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file)
    assert dead.returncode == -signal.SIGKILL, errors.read_text()
    assert len((tmp_path / "broken" / "log.jsonl").read_text().splitlines()) == 2
    state = json.loads((tmp_path / "broken" / "checkpoint" / "state.json").read_text())
    assert state["step"] == (8 if save_steps else 6)
    result = train.train(settings(birds, tmp_path / "broken", resume=True, **epochs), progress=False)
    assert result.epoch == 4
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
        train.train(settings(birds, tmp_path / name, **changes), progress=False)
    logs = [[json.loads(r) for r in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in runs]
    for a, b in zip(*logs, strict=True):
        assert a["step"] == b["step"] and a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in runs)
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=2e-4, rtol=1e-3)  # Adam turns rounding into steps
    with pytest.raises(ConfigError, match="18 images cannot be shared by 19 batches a step"):
        train.train(settings(birds, tmp_path / "r", accumulate=19), progress=False)


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
    assert [i for batch in TrainBatches(23, 3, 2, seed=6) for _, i in batch] != seen  # the order follows from the seed
    assert TrainBatches(4, 8, 1, seed=0).batch_size == 4


def test_repeated_images_meet_in_their_step_each_time_augmented_anew():
    batches = TrainBatches(23, 3, 4, seed=5, repeats=2)
    assert batches.steps == TrainBatches(23, 3, 4, seed=5).steps == 1
    step = list(batches)
    assert [len(batch) for batch in step] == [3, 3, 3, 3]
    seen = [item for batch in step for item in batch]
    assert len({key for key, _ in seen}) == 12  # no two alike
    assert sorted(i for _, i in seen) == sorted(2 * batches.step(0)) and len(set(batches.step(0))) == 6
    assert all(len({i for _, i in batch}) == 3 for batch in step)  # spread over the batches
    once = {i: key for batch in TrainBatches(23, 3, 4, seed=5) for key, i in batch}
    assert all((once[i], i) in seen for i in batches.step(0))  # the first time as ever
    long = TrainBatches(24, 4, 2, seed=5, repeats=4)
    assert long.steps == 3 and [len(set(long.step(k))) for k in range(6)] == [2] * 6
    long.epoch, long.start = 1, 2
    assert {i for batch in long for _, i in batch} == set(long.step(5))
    with pytest.raises(ConfigError, match="repeats=5: a step has 12 places, no multiple of it; change batch_size"):
        TrainBatches(23, 3, 4, seed=5, repeats=5)


@pytest.mark.parametrize(("crop", "workers"), [("random", 0), ("resized", 2)])
def test_a_cache_changes_nothing_and_reads_every_file_once(birds, tmp_path, monkeypatch, crop, workers):
    start = {"epochs": 2, "crop": crop, "workers": workers}
    train.train(settings(birds, tmp_path / "a", **start), progress=False)
    reads, plain = [], batches_module.read_image
    monkeypatch.setattr(batches_module, "read_image", lambda path, *a, **b: reads.append(path) or plain(path, *a, **b))
    train.train(settings(birds, tmp_path / "b", cache="ram", **start), progress=False)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    reads = [path for path in reads if "train" in path.parts]
    assert len(reads) == 18 + 18  # all of them, and before that (so few) all as the sample that memory is judged by


def test_a_cache_that_would_not_fit_is_refused_with_numbers(birds, tmp_path, monkeypatch):
    free = SimpleNamespace(available=18 * 85 * 85 * 3)  # of 18 images of 64 pixels at ratio 1.34: just all of it
    monkeypatch.setattr(batches_module.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match=r"cache=ram: 18 images need about 0.0 GiB and 0.0 GiB are free; try a small"):
        train.train(settings(birds, tmp_path / "r", cache="ram"), progress=False)
    free.available *= 2
    train.train(settings(birds, tmp_path / "r", cache="ram", epochs=1), progress=False)


def test_layers_learn_the_slower_the_lower_and_heads_at_the_full_rate(birds, tmp_path):
    s = settings(birds, tmp_path, layer_decay=0.5, weight_decay=0.1, lr=1.0)
    model = glsim.create_model("glsim", TINY["backbone"], 3, 64, backbone_args=TINY["backbone_args"])
    optimizer = components.make_optimizer(s, model)
    components.make_schedule(s, optimizer, 100).step_update(2)  # the peak, right after the warm-up
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(rates) == set(names.values())
    top = max(rates.values())
    expected = {
        "backbone.net.cls_token": 1 / 8,
        "backbone.net.patch_embed.proj.weight": 1 / 8,
        "backbone.net.blocks.0.attn.qkv.weight": 1 / 4,
        "backbone.net.blocks.1.mlp.fc1.bias": 1 / 2,
        "backbone.net.norm.weight": 1 / 2,
        "aggregator.blocks.0.attn.qkv.weight": 1,
        "head.linear.weight": 1,
    }
    assert top > 0.9 and {n: rates[n] / top for n in expected} == pytest.approx(expected)
    assert all(rate == top for n, rate in rates.items() if not n.startswith("backbone."))
    train.train(settings(birds, tmp_path / "r", layer_decay=0.5, epochs=1, warmup_steps=0), progress=False)
    row = json.loads((tmp_path / "r" / "log.jsonl").read_text())
    assert row["lr"] > 2e-4  # what is logged is the full rate


@pytest.mark.parametrize(
    ("backbone", "args"), [(TINY["backbone"], TINY["backbone_args"]), ("resnet18", {"layers": (1, 1, 1, 1)})]
)
def test_a_frozen_backbone_stays_bit_for_bit_and_heads_learn(birds, tmp_path, backbone, args):
    """Batch norm's running means too: they move in training mode without any gradient."""
    s = settings(birds, tmp_path / "r", backbone=backbone, backbone_args=args, freeze="backbone", weight_decay=0.1)
    train.set_seed(s.seed)
    before = glsim.create_model("glsim", backbone, 3, 64, False, dict(args), top_o=4).state_dict()
    train.train(s, progress=False)
    after = load_file(tmp_path / "r" / "model.safetensors")
    same = {k for k in after if torch.equal(before[k], after[k])}
    assert {k for k in after if k.startswith("backbone.")} <= same
    assert not any(k.startswith("head.") or "aggregator.blocks" in k for k in same)


FAMILIES = {  # what the first block and the stem before it hold, and what comes next
    "vit_tiny_patch16_224": (("cls_token", "pos_embed", "patch_embed.", "blocks.0."), "blocks.1."),
    "vit_small_patch14_reg4_dinov2": (
        ("cls_token", "reg_token", "pos_embed", "patch_embed.", "blocks.0."),
        "blocks.1.",
    ),
    "eva02_tiny_patch14_224": (("cls_token", "pos_embed", "patch_embed.", "blocks.0."), "blocks.1."),
    "beit_base_patch16_224": (("cls_token", "patch_embed.", "blocks.0."), "blocks.1."),
    "swin_tiny_patch4_window7_224": (("patch_embed.", "layers.0."), "layers.1."),
    "convnext_atto": (("stem.", "stages.0."), "stages.1."),
    "resnet18": (("conv1.", "bn1.", "layer1.0."), "layer1.1."),
}


@pytest.mark.parametrize("backbone", FAMILIES)
def test_frozen_blocks_are_the_first_ones_and_nothing_is_kept_of_them(backbone):
    """The second pass of glsim too; no dropout acts there, and the means of batch norm are still."""
    below, above = FAMILIES[backbone]
    size, drops = (56 if "14" in backbone else 64), {} if "resnet" in backbone else {"drop_path_rate": 0.5}
    whole, model = (small_model("glsim", backbone, size, args=drops) for _ in range(2))
    adapt(model, freeze=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = saved_bytes(model.train(), 3, "no", backward=True)
    assert kept < 0.9 * saved_bytes(whole.train(), 3, "no")
    inside = {n.removeprefix("backbone.net."): p.grad is not None for n, p in model.named_parameters()}
    assert {n for n, learns in inside.items() if not learns} == {n for n in inside if n.startswith(below)}
    moved = {n.removeprefix("backbone.net.") for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert not any(name.startswith(below) for name in moved) and bool(moved) == ("resnet" in backbone)
    model.eval().train()  # as between two epochs
    modes = {name: module.training for name, module in model.backbone.net.named_modules()}
    assert {name for name, on in modes.items() if not on} >= {name for name in modes if name.startswith(below)}
    assert all(on for name, on in modes.items() if name.startswith(above)) and model.aggregator.training
    assert not any(modes.get(name) for name in ("pos_drop", "patch_drop", "act1", "maxpool"))


def test_all_blocks_may_be_frozen_and_adapters_go_into_the_others():
    for count, learning in ((2, set()), (1, {"backbone.net.blocks.1.attn.qkv"})):
        model = small_model("plain")
        adapt(model, freeze=count)
        names = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
        assert bool(names) == (count == 1) and all(n.startswith(("net.blocks.1.", "net.norm.")) for n in names)
        if learning:
            model = small_model("plain")
            adapt(model, freeze=count, lora=2)
            adapted = {n.partition(".parametrizations")[0] for n, p in model.named_parameters() if p.requires_grad}
            assert adapted == learning | {"head.weight", "head.bias"}


@pytest.mark.parametrize("more", [{}, {"layer_decay": 0.7}, {"lora": 2, "ema": 0.5}], ids=str)
def test_a_run_with_frozen_blocks_leaves_them_bit_for_bit_and_resumes(birds, tmp_path, monkeypatch, more):
    """In bf16, which a CPU has too."""
    more = {"freeze": 1, "weight_decay": 0.1, "head_lr": 2e-3, "precision": "bf16", "save_steps": 1, **more}
    s = settings(birds, tmp_path / "a", **more)
    train.set_seed(s.seed)
    before = glsim.create_model("glsim", TINY["backbone"], 3, 64, False, TINY["backbone_args"], top_o=4).state_dict()
    train.train(s, progress=False)
    after = load_file(tmp_path / "a" / "model.safetensors")
    same = {k.removeprefix("backbone.net.") for k in after if torch.equal(before[k], after[k])}
    below = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")
    assert {k.removeprefix("backbone.net.") for k in after if k.removeprefix("backbone.net.").startswith(below)} <= same
    assert "blocks.1.attn.qkv.weight" not in same and "head.linear.weight" not in same
    assert all(v.dtype == torch.float32 for v in after.values())
    steps = []

    def objective_until(*given):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return objective(*given)

    monkeypatch.setattr(train, "objective", objective_until)
    broken = settings(birds, tmp_path / "b", **more)
    with pytest.raises(KeyboardInterrupt):
        train.train(broken, progress=False)
    train.train(replace(broken, resume=True), progress=False)
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert len(steps) == 7 and all(torch.equal(after[k], again[k]) for k in after)


def test_what_lies_above_the_backbone_has_a_rate_of_its_own(birds, tmp_path):
    changes = {"lr": 1e-3, "head_lr": 5e-2, "weight_decay": 0.1, "warmup_lr": 1e-6, "min_lr": 1e-5}
    model = small_model("glsim", classes=3)
    names = {id(p): n for n, p in model.named_parameters()}
    for more in ({}, {"layer_decay": 0.5}):
        s = settings(birds, tmp_path, **changes, **more)
        plain, optimizer = (
            components.make_optimizer(replace(s, head_lr=None), model),
            components.make_optimizer(s, model),
        )
        schedule = components.make_schedule(s, optimizer, 100)
        components.make_schedule(s, plain, 100).step_update(2)
        found = {}
        for step in (0, 2, 99):
            schedule.step_update(step)
            found[step] = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert found[2].keys() == set(names.values())
        before = {names[id(p)]: g["lr"] for g in plain.param_groups for p in g["params"]}
        for name, rate in found[2].items():
            expected = before[name] if name.startswith("backbone.") else before[name] * 50
            assert rate == pytest.approx(expected) and found[0][name] <= 1e-6 and found[99][name] < 1e-4
        decays = [
            {names[id(p)] for g in o.param_groups if g["weight_decay"] for p in g["params"]} for o in (plain, optimizer)
        ]
        assert decays[0] == decays[1]
    low = settings(birds, tmp_path, lr=1e-3, head_lr=1e-6, min_lr=1e-5)
    optimizer = components.make_optimizer(low, model)
    schedule = components.make_schedule(low, optimizer, 10)
    for step in range(10):
        schedule.step_update(step)
        assert min(g["lr"] for g in optimizer.param_groups) <= 1e-6  # nor does the cosine rise to min_lr


@pytest.mark.parametrize(
    "backbone", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_gap_224", "convnext_atto"]
)
def test_what_pools_learns_like_the_head(backbone):
    """fc_norm, an attention pool or the norm of a head lie above the blocks, and lower no block's rate."""
    model = small_model("glsim", backbone, 56 if "14" in backbone else 64)
    layer = model.group_matcher()
    blocks = {"blocks.0.": 1, "blocks.1.": 2, "stages.0.": 1, "stages.3.": 4}
    depth = 4 if "convnext" in backbone else 2
    for name, _ in model.named_parameters():
        inner = name.removeprefix("backbone.net.")
        if inner.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed", "stem")):
            assert layer(name) == 0, name
        elif known := [number for start, number in blocks.items() if inner.startswith(start)]:
            assert [layer(name)] == known, name
        elif inner.startswith(("norm.", "norm_pre.")):  # timm: of the last block
            assert layer(name) == depth, name
        elif not inner.startswith("stages."):
            assert layer(name) == depth + 1, name


def test_adapters_train_little_and_leave_a_bundle_like_any_other(birds, tmp_path):
    s = settings(birds, tmp_path / "r", lora=2, lr=1e-2)
    train.set_seed(s.seed)
    before = glsim.create_model("glsim", TINY["backbone"], 3, 64, backbone_args=TINY["backbone_args"], top_o=4)
    weights = {k: v.clone() for k, v in before.state_dict().items()}
    trained = train.train(s, progress=False).test
    after = load_file(tmp_path / "r" / "model.safetensors")
    assert set(after) == set(weights)
    changed = {k for k in after if k.startswith("backbone.") and not torch.equal(weights[k], after[k])}
    assert changed == {f"backbone.net.blocks.{i}.attn.qkv.weight" for i in range(2)}
    for k in changed:
        assert torch.linalg.matrix_rank(after[k] - weights[k], rtol=1e-3) == 2
    again = evaluate.evaluate_bundle(tmp_path / "r", birds, workers=0)
    assert again.per_class == trained.per_class
    with pytest.raises(ConfigError, match="lora: 'resnet18' has no attention with one matrix for q, k and v"):
        train.train(settings(birds, tmp_path / "x", backbone="resnet18", backbone_args={}, lora=2), progress=False)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_adapters_are_seen_by_every_family(backbone):
    """EVA and BEiT read the weight past the layer: replacing the layer would do nothing there."""
    size = 56 if "eva" in backbone else 64
    model, images = small_model("plain", backbone, size), torch.randn(2, 3, size, size)
    before = model(images).logits
    adapt(model, lora=2)
    torch.testing.assert_close(model(images).logits, before)  # nothing at the start
    model(images).logits.sum().backward()
    learning = {n.rpartition(".")[2] for n, p in model.backbone.named_parameters() if p.grad is not None}
    assert learning == {"up", "down"}
    for name, p in model.backbone.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(p)
    changed = model(images).logits
    assert (changed - before).abs().max() > 1e-3
    whole = merged(model)
    torch.testing.assert_close(whole(images).logits, changed)
    assert not any("parametrizations" in k for k in whole.state_dict()) and whole is not model


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        *((method, "vit_tiny_patch16_224") for method in ("glsim", "rams", "dcal", "aftrans")),
        ("glsim", "resnet18"),
        ("plain", "eva02_tiny_patch14_224"),
    ],
)
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(method, backbone):
    """Also where a pass has its attention replaced, and would be computed anew without that."""
    size = 56 if "eva" in backbone else 64
    images, labels = torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])
    gradients, kept = [], []
    for on in (False, True):
        options = (
            {"metric": "gls_cos"} if method == "dcal" else {}
        )  # its own metric needs the maps of the other pass too
        model = small_model(method, backbone, size, **options)
        adapt(model, grad_checkpointing=on)
        kept.append(saved_bytes(model.train(), 3, "no"))
        torch.manual_seed(0)
        model.zero_grad()
        objective(model(images), labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert kept[1] < 0.9 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_what_cannot_be_adapted_says_so(birds, tmp_path):
    for changes, message in (
        ({"method": "transfg", "grad_checkpointing": True}, "grad_checkpointing: 'transfg' needs the attention maps"),
        ({"freeze": 2, "lora": 2}, "lora: 'vit_tiny_patch16_224' has no attention with .* above the frozen ones"),
        ({"freeze": 3}, "freeze=3: 'vit_tiny_patch16_224' has 2 blocks"),
        (
            {"method": "plain", "backbone": "pit_ti_224", "backbone_args": {}, "image_size": None, "freeze": 1},
            "freeze: timm does not say which blocks 'pit_ti",
        ),
        ({"method": "ffvt", "supcon": 1.0}, "supcon: 'ffvt' has no class token before its parts are chosen"),
        ({"method": "transfg", "mixup": 0.2}, "loss term 'contrastive' needs one class an image; leave mixup and"),
        ({"method": "cal", "cutmix": 1.0}, "loss term 'centre' needs one class an image; leave mixup and cutmix at 0"),
    ):
        s = settings(birds, tmp_path / "r", **{"options": {}, **changes})
        with pytest.raises(ConfigError, match=message):
            train.train(s, progress=False)
    with pytest.raises(ConfigError, match="supcon needs one class an image; leave mixup and cutmix at 0"):
        settings(birds, tmp_path / "r", supcon=1.0, mixup=0.2)


def test_the_extra_terms_act_and_leave_no_trace_in_the_bundle(birds, tmp_path):
    logs = {}
    for name, changes in {
        "plain": {},
        "focal": {"focal": 2.0},
        "supcon": {"supcon": 1.0},
        "mixup": {"mixup": 1.0},
    }.items():
        train.train(settings(birds, tmp_path / name, augment="none", **changes), progress=False)
        rows = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(row)["train_loss"] for row in rows]
        glsim.load(tmp_path / name)
    assert logs["plain"][0] == pytest.approx(np.log(3), abs=0.2)  # the head starts at even odds
    assert logs["focal"][0] == pytest.approx((2 / 3) ** 2 * np.log(3), abs=0.2)
    assert logs["supcon"][0] > logs["plain"][0] + 0.5
    assert logs["mixup"] != logs["plain"]


def test_the_contrast_is_of_the_first_pass():
    model, images, labels = small_model("glsim").train(), torch.randn(4, 3, 64, 64), torch.tensor([0, 0, 1, 1])
    adapt(model, supcon=0.5)
    weight, cls = model(images).aux["supervised_contrastive"]
    torch.testing.assert_close((weight, cls), (0.5, model.features(images).cls))
    model(images)  # features() is a pass of its own, whose token must not be taken for the next one's
    expected = objective(model(images)._replace(aux={}), labels) + TERMS["supervised_contrastive"](
        (0.5, cls), labels, 0.1
    )
    torch.testing.assert_close(objective(model(images), labels), expected)
    assert not model.eval()(images).aux


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "glsim"])
def test_a_compiled_model_trains_alike_and_its_bundle_loads(birds, tmp_path, method):
    options = {"options": {"top_o": 4} if method == "glsim" else {}, "method": method, "augment": "weak"}
    for name, changes in {"plain": {}, "compiled": {"compile": True}}.items():
        train.train(settings(birds, tmp_path / name, **options, **changes), progress=False)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "compiled"))
    assert set(a) == set(b)
    logs = [
        [json.loads(r) for r in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("plain", "compiled")
    ]
    assert [row["train_loss"] for row in logs[0]] == pytest.approx([row["train_loss"] for row in logs[1]], abs=1e-3)
    again = evaluate.evaluate_bundle(tmp_path / "compiled", birds, workers=0)
    assert again.correct == json.loads((tmp_path / "compiled" / "metrics.json").read_text())["test"]["correct"]


def test_the_resize_rule_goes_with_the_bundle(tmp_path):
    """Wide pictures whose class stands at the left edge: squeezed it is seen, by the short side it is cut off."""
    for split, count in (("train", 6), ("test", 4)):
        for label in range(2):
            for i in range(count):
                pixels = np.full((64, 192, 3), 128, np.uint8)
                pixels[:, :50, label] = 255
                path = tmp_path / "data" / split / "ab"[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    right = {}
    for rule, size in (("square", {"box": (0, 0, 192, 64)}), ("short", {"box": (64, 0, 128, 64)})):
        out = tmp_path / rule
        changes = {"resize": rule, "resize_ratio": 1.0, "crop": "centre", "augment": "none", "epochs": 6}
        trained = train.train(settings(tmp_path / "data", out, **changes), progress=False).test
        assert glsim.load(out).config.preprocessing["resize_rule"] == rule
        again = evaluate.evaluate_bundle(out, tmp_path / "data", workers=0)
        assert again.per_class == trained.per_class
        right[rule] = again.top1
        (answer,) = glsim.Predictor(out)(str(tmp_path / "data" / "test" / "a" / "0.png"))
        left, top, right_edge, bottom = size["box"]
        assert left <= answer.box[0] < answer.box[2] <= right_edge and top <= answer.box[1] < answer.box[3] <= bottom
    assert right == {"square": 1.0, "short": 0.5}


def test_a_checkpoint_of_another_number_of_processes_is_refused(birds, tmp_path):
    train.train(settings(birds, tmp_path / "r", epochs=1), progress=False)
    assert rewrite_state(tmp_path / "r" / "checkpoint", processes=2)["processes"] == 1
    with pytest.raises(ConfigError, match="was trained by 2 processes, now there are 1, whose batches would be others"):
        train.train(settings(birds, tmp_path / "r", epochs=1, resume=True), progress=False)


def test_a_checkpoint_of_another_format_is_refused(birds, tmp_path):
    train.train(settings(birds, tmp_path / "r", epochs=1), progress=False)
    state = tmp_path / "r" / "checkpoint" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 2}))
    message = r"written by another version of glsim \(format 2, here 4\): finish the run with that one, or start a new"
    with pytest.raises(ConfigError, match=message):
        train.train(settings(birds, tmp_path / "r", epochs=1, resume=True), progress=False)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_whole(birds, tmp_path, monkeypatch):
    out = tmp_path / "r"
    whole = train.train(settings(birds, tmp_path / "whole"), progress=False)
    real = resume._write

    def full(folder, name, tensors):
        if name == "optimizer" and (out / "checkpoint").exists():
            raise OSError(28, "No space left on device")
        return real(folder, name, tensors)

    monkeypatch.setattr(resume, "_write", full)
    with pytest.raises(glsim.GlsimError, match=r"r cannot be written: .*No space left on device.*--resume"):
        train.train(settings(birds, out), progress=False)
    monkeypatch.undo()
    assert (out / "checkpoint" / "state.json").exists() and not (out / "checkpoint.new").exists()
    assert train.train(settings(birds, out, resume=True), progress=False).train_loss == whole.train_loss


@contextlib.contextmanager
def disk_full_from(monkeypatch, step, room=30_000):
    """From that step on the kernel itself refuses files of more than `room` bytes."""
    steps, plain, before = [], train.objective, resource.getrlimit(resource.RLIMIT_FSIZE)

    def objective(*arguments):
        steps.append(1)
        if len(steps) == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        return plain(*arguments)

    monkeypatch.setattr(train, "objective", objective)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()


@pytest.mark.parametrize(("save_steps", "good"), [(1, 4), (0, 3)])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_bundle_whole(birds, tmp_path, monkeypatch, save_steps, good):
    """Whatever is written first: a checkpoint in mid-epoch, or the bundle at the end of one."""
    out, changes = tmp_path / "r", {"epochs": 3, "save_steps": save_steps}
    whole = train.train(settings(birds, tmp_path / "whole", **changes), progress=False)
    with (
        disk_full_from(monkeypatch, 5),
        pytest.raises(
            glsim.GlsimError, match=r"r cannot be written: .*; the last checkpoint is whole, --resume goes on"
        ),
    ):
        train.train(settings(birds, out, **changes), progress=False)
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == good
    assert not (out / "checkpoint.new").exists()
    glsim.load(out)  # the bundle of the epoch before
    again = train.train(settings(birds, out, resume=True, **changes), progress=False)
    assert again.train_loss == whole.train_loss
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "r"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@contextlib.contextmanager
def unwritable(folder):
    """Nobody may write into `folder`, root (whom permissions do not stop) included."""
    user = os.geteuid()
    folder.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_an_unwritable_folder_is_an_error_that_leaves_the_last_checkpoint_whole(birds, monkeypatch):
    with tempfile.TemporaryDirectory() as place:  # pytest's own lies below a folder that only its user can enter
        place = Path(place)
        place.chmod(0o755)
        data, out = place / "birds", place / "r"
        shutil.copytree(birds, data)
        with contextlib.ExitStack() as stack:
            steps, plain = [], train.objective

            def objective(*arguments):
                steps.append(1)
                if len(steps) == 5:
                    stack.enter_context(unwritable(out))
                return plain(*arguments)

            monkeypatch.setattr(train, "objective", objective)
            with pytest.raises(
                glsim.GlsimError, match="cannot be written: .*[Pp]ermission denied.*checkpoint is whole"
            ):
                train.train(settings(data, out, save_steps=1), progress=False)
        monkeypatch.undo()
        assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 4
        assert train.train(settings(data, out, save_steps=1, resume=True), progress=False).epoch == 2


def test_a_place_where_nothing_can_be_made_is_an_error_before_training(birds, capsys):
    words = ["train", "--data", str(birds), "--out", "/proc/nowhere", "--image-size", "64", "--no-pretrained"]
    words += ["--backbone", TINY["backbone"], "--backbone-args.depth", "1", "--options.top_o", "4", "--workers", "0"]
    assert cli.main(words) == 1
    assert "/proc/nowhere" in capsys.readouterr().err


def test_a_crash_between_the_two_renames_loses_nothing(birds, tmp_path):
    out = tmp_path / "r"
    train.train(settings(birds, out, epochs=2), progress=False)
    (out / "checkpoint").rename(out / "checkpoint.old")
    (out / "checkpoint.new").mkdir()
    result = train.train(settings(birds, out, epochs=2, resume=True), progress=False)
    assert result.epoch == 2


def test_at_every_moment_a_whole_checkpoint_exists(birds, tmp_path, monkeypatch):
    """From the first one on, after whatever is renamed or removed."""
    out, whole = tmp_path / "r", []

    def looking(function):
        def then_look(*given, **named):
            result = function(*given, **named)
            whole.append(any((out / name / "state.json").exists() for name in ("checkpoint", "checkpoint.old")))
            return result

        return then_look

    monkeypatch.setattr(Path, "rename", looking(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", looking(shutil.rmtree))
    train.train(settings(birds, out, epochs=2), progress=False)
    first = whole.index(True)
    assert all(whole[first:]) and len(whole) >= first + 4  # the second one comes by two renames


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(birds, tmp_path, monkeypatch):
    out, plain, synced = tmp_path / "r", os.fsync, set()

    def fsync(number):
        assert not (out / "checkpoint").exists()
        synced.add(os.fstat(number).st_ino)
        plain(number)

    monkeypatch.setattr(os, "fsync", fsync)
    train.train(settings(birds, out, epochs=1), progress=False)
    files = [path for path in (out / "checkpoint").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        ".glsim",
        "state.json",
        *(f"{n}.safetensors" for n in PARTS if n != "averaged"),
    }
    assert {path.stat().st_ino for path in files} <= synced


def rewrite_state(folder, **changes):
    """Change what a checkpoint tells of its run, as somebody who can would; returns what it told."""
    progress = json.loads((folder / "state.json").read_text())
    progress.pop("seal")
    (folder / "state.json").write_text(resume.seal({**progress, **changes}))
    return progress


def plan_epochs(folder, epochs):
    """Make the run of a checkpoint a longer one."""
    settings = json.loads((folder / "state.json").read_text())["settings"]
    rewrite_state(folder, settings={**settings, "epochs": epochs})


def test_a_second_crash_finds_a_whole_checkpoint_too(birds, tmp_path, monkeypatch):
    """A run that goes on from checkpoint.old must not remove it before the next one has its name."""
    out = tmp_path / "r"
    train.train(settings(birds, out, epochs=1), progress=False)
    (out / "checkpoint").rename(out / "checkpoint.old")
    plan_epochs(out / "checkpoint.old", 2)
    removed, plain = [], shutil.rmtree

    def rmtree(path, *arguments, **named):
        if Path(path).name == "checkpoint.old":
            removed.append((out / "checkpoint" / "state.json").exists())
        plain(path, *arguments, **named)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    train.train(settings(birds, out, epochs=2, resume=True), progress=False)
    assert removed and all(removed)


def test_resume_refuses_other_settings_and_runs_are_not_overwritten(run_folder, birds, tmp_path):
    with pytest.raises(
        ConfigError, match=r"already holds a run: go on with glsim train --recipe .*train.yaml --resume"
    ):
        train.train(settings(birds, run_folder), progress=False)
    with pytest.raises(ConfigError, match=r"started with other settings: lr=0.5 \(was 0.001\)"):
        train.train(settings(birds, run_folder, lr=0.5, resume=True), progress=False)
    with pytest.raises(ConfigError, match=r"nothing to resume: .*nowhere has no train.yaml"):
        train.train(settings(birds, tmp_path / "nowhere", resume=True), progress=False)


CHANGED = {  # every setting but those of FREE, with another value
    "dataset": "cub",
    "method": "plain",
    "backbone": "deit_tiny_patch16_224",
    "pretrained": True,
    "image_size": 32,
    "options": {"top_o": 5},
    "backbone_args": {"depth": 1},
    "init_from": "x.pth",
    "val_fraction": 0.5,
    "test_fraction": 0.3,
    "test": False,
    "split_seed": 4,
    "skip_bad": True,
    "resize_ratio": 1.5,
    "resize": "short",
    "augment": "weak",
    "crop": "centre",
    "crop_scale": 0.4,
    "mean": [0.1, 0.2, 0.3],
    "std": [0.1, 0.2, 0.3],
    "repeats": 2,
    "mixup": 0.2,
    "cutmix": 0.2,
    "freeze": 1,
    "lora": 2,
    "epochs": 5,
    "batch_size": 4,
    "accumulate": 2,
    "save_steps": 1,
    "optimizer": "sgd",
    "lr": 0.5,
    "head_lr": 0.1,
    "layer_decay": 0.9,
    "weight_decay": 0.1,
    "momentum": 0.5,
    "warmup_steps": 1,
    "warmup_lr": 1e-5,
    "min_lr": 1e-6,
    "schedule": "step",
    "decay_epochs": 1.0,
    "decay_rate": 0.5,
    "label_smoothing": 0.3,
    "focal": 1.0,
    "supcon": 0.1,
    "clip_grad": 0.0,
    "ema": 0.5,
    "precision": "bf16",
    "grad_checkpointing": True,
    "compile": True,
    "seed": 7,
    "min_confidence": 0.2,
    "categories": ["animal"],
    "margin": 0.2,
    "square": True,
}
NEEDED = {name: {"boxes": "boxes.csv"} for name in ("min_confidence", "categories")}  # beside a setting


def test_no_setting_was_forgotten():
    assert {*CHANGED, *WITHOUT_EFFECT, "resume"} == {f.name for f in fields(Train)}


@pytest.mark.parametrize("key", CHANGED)
def test_an_edited_recipe_is_not_that_of_the_run(run_folder, birds, tmp_path, key, capsys):
    """What the checkpoint says counts, not what anybody wrote into RUN/train.yaml since."""
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    values = yaml.safe_load((out / "train.yaml").read_text())
    before, values[key] = values[key], CHANGED[key]
    values |= NEEDED.get(key, {})
    (out / "train.yaml").write_text(yaml.safe_dump(values))
    weights = (out / "model.safetensors").read_bytes()
    assert cli.main(["train", "--recipe", str(out / "train.yaml"), "--out", str(out), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "r was started with other settings: " in said and f"{key}={CHANGED[key]!r} (was {before!r})" in said
    assert "--init-from" in said and (out / "model.safetensors").read_bytes() == weights
    with pytest.raises(ConfigError, match=f"started with other settings: .*{key}="):  # nor is it by the command line
        train.train(
            replace(settings(birds, out), **{key: CHANGED[key], "resume": True}, **NEEDED.get(key, {})), progress=False
        )


def test_settings_that_change_nothing_may_change(run_folder, birds, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(run_folder, out)
    train.train(settings(birds, out, workers=1, cache="ram", data_licence="mine", resume=True), progress=False)
    assert yaml.safe_load((out / "train.yaml").read_text())["data_licence"] == "mine"


def test_a_run_that_was_moved_is_named_with_out(run_folder, birds, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run_folder, moved)
    recipe = moved / "train.yaml"
    recipe.write_text(recipe.read_text().replace(str(run_folder), str(tmp_path / "gone")))
    words = ["train", "--recipe", str(recipe), "--resume"]
    assert cli.main(words) == 2
    assert "nothing to resume" in (said := capsys.readouterr().err) and "moved, name the folder: --out NEW" in said
    assert not (tmp_path / "gone").exists()
    assert cli.main([*words, "--out", str(moved)]) == 0


def replaced(folder, how):
    """Change training images of class red_crown in a way; returns the path that has to be named."""
    a, b = sorted((folder / "train" / "red_crown").iterdir())[1:3]
    first, second = a.read_bytes(), b.read_bytes()
    stat = a.stat()
    if how == "swapped":
        a.write_bytes(second)
        b.write_bytes(first)
    elif how == "another":
        a.write_bytes(next((folder / "test").rglob("*.jpg")).read_bytes())
    elif how == "one byte, the same time":
        a.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
        os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "drawn over":
        Image.new("RGB", (64, 64)).save(a)
    return a


@pytest.mark.parametrize("how", ["swapped", "another", "one byte, the same time", "drawn over"])
def test_an_image_with_another_content_is_named(run_folder, birds, tmp_path, how):
    data, out = tmp_path / "birds", tmp_path / "r"
    shutil.copytree(birds, data)
    shutil.copytree(run_folder, out)
    path = replaced(data, how)
    count = 2 if how == "swapped" else 1
    message = f"trained on other images than the data has now: the content of {count} of 27 files.*first {path}; put"
    with pytest.raises(ConfigError, match=message):
        train.train(settings(data, out, resume=True), progress=False)


def test_a_copy_with_other_times_is_the_same_data(run_folder, birds, tmp_path):
    data, out = tmp_path / "copy", tmp_path / "r"
    shutil.copytree(birds, data, copy_function=shutil.copyfile)
    shutil.copytree(run_folder, out)
    assert train.train(settings(data, out, resume=True), progress=False).epoch == 2


def test_a_list_in_another_order_is_not_the_same_data(birds, tmp_path):
    """Which images meet in a step goes by their places."""
    rows = [f"{p},{p.parent.name},train" for p in sorted((birds / "train").rglob("*.jpg"))]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.csv").write_text("\n".join(["path,label,split", *order]) + "\n")
    start = {"epochs": 1, "test": False}
    train.train(settings(tmp_path / "a" / "list.csv", tmp_path / "r", **start), progress=False)
    (tmp_path / "a" / "list.csv").write_text((tmp_path / "b" / "list.csv").read_text())
    with pytest.raises(ConfigError, match="of 18 files, or their order in a list, has changed"):
        train.train(settings(tmp_path / "a" / "list.csv", tmp_path / "r", resume=True, **start), progress=False)


def test_a_file_that_cannot_be_read_is_named_before_training(birds, tmp_path):
    data = tmp_path / "birds"
    shutil.copytree(birds, data)
    images = read_data(data)["train"]
    victim = images.paths[3]
    victim.unlink()
    with pytest.raises(DataError, match=f"{victim}: cannot be read"):
        resume.fingerprints(images.paths, make_accelerator("cpu"))


@pytest.fixture(scope="module")
def single(birds, tmp_path_factory):
    """One training image a class: nothing can be held out."""
    folder = tmp_path_factory.mktemp("single") / "data"
    for split in ("train", "test"):
        for name in ("red_crown", "orange_beak"):
            (folder / split / name).mkdir(parents=True)
            shutil.copy(next((birds / split / name).iterdir()), folder / split / name)
    return folder


def test_nothing_is_measured_on_an_empty_split(single, tmp_path, capsys):
    """Refused before training, and by each verb that measures or keeps a split, in the same words."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({**TINY, "epochs": 1}))
    start = ["train", "--recipe", str(recipe), "--data", str(single)]
    assert cli.main([*start, "--out", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    config["data"]["val_fraction"] = 0.2  # as an earlier version could leave it
    (run / "config.json").write_text(json.dumps(config))
    data = ["--data", str(single)]
    words = [
        [*start, "--out", str(tmp_path / "x"), "--val-fraction", "0.2"],
        ["reproduce", str(recipe), *data, "--out", str(tmp_path / "x"), "--lrs", "0.1", "0.2"],
        ["eval", str(run), *data, "--split", "val"],
        ["calibrate", str(run), *data],
        ["index", "build", str(run), *data, "--split", "val", "--out", str(tmp_path / "x")],
    ]
    for given in words:
        capsys.readouterr()
        assert cli.main([*given, "--json"]) == 3, given
        said = json.loads(capsys.readouterr().out)["error"]
        assert said.startswith(f"{single} has no split 'val'; it has: train, test; train with --val-fraction 0.1"), said
        assert said.endswith("of classes that have two or more") and not (tmp_path / "x").exists()


def test_a_test_split_that_is_asked_for_has_to_be_there(birds, tmp_path):
    shutil.copytree(birds / "train", tmp_path / "data" / "train")
    with pytest.raises(DataError, match="data has no split 'test'; it has: train$"):
        train.train(settings(tmp_path / "data", tmp_path / "r"), progress=False)


NORMED = {"method": "plain", "backbone": "resnet18", "backbone_args": {"layers": (1, 1, 1, 1)}, "options": {}}


def test_batch_norm_of_one_value_is_told_with_what_to_change(birds, tmp_path, capsys):
    small = {**NORMED, "image_size": 32, "epochs": 1, "test": False}
    for changes, said in (
        ({"batch_size": 1}, "batches of 1 image leave batch norm one value a channel.*larger batch_size or image_size"),
        ({"accumulate": 18}, r"a smaller accumulate \(18 training images are shared by 18 batches a step\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            train.train(settings(birds, tmp_path / "r", **small, **changes), progress=False)
    works = {**small, "batch_size": 1, "freeze": "backbone"}  # what the message says
    assert train.train(settings(birds, tmp_path / "r", **works), progress=False).epoch == 1


def test_a_killed_process_that_loads_images_is_told(birds, tmp_path, monkeypatch):
    if get_start_method() != "fork":
        pytest.skip("what stands for the kernel's killer reaches workers through a fork alone")

    def deadly(image):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 64, 64)

    monkeypatch.setattr(components, "train_steps", lambda *_: (v2.Identity(), deadly))
    message = r"one of the 2 processes that load images was killed, .*memory ran out \(DataLoader.*fewer --workers"
    with pytest.raises(glsim.GlsimError, match=message):
        train.train(settings(birds, tmp_path / "r", workers=2), progress=False)


def test_a_batch_that_was_cut_is_told_and_the_card_has_what_was_used(birds, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "r"
    recipe.write_text(yaml.safe_dump({**TINY, "epochs": 1, "batch_size": 32, "accumulate": 2}))
    assert cli.main(["train", "--recipe", str(recipe), "--data", str(birds), "--out", str(out)]) == 0
    assert "batch_size 32 was cut to 9: train has no more images for a step" in capsys.readouterr().out
    assert "18 images a step" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["training"]["batch_size"] == 18


def test_resume_refuses_other_data_but_lets_it_move(birds, tmp_path):
    data = tmp_path / "birds"
    shutil.copytree(birds, data)
    train.train(settings(data, tmp_path / "r", epochs=1), progress=False)
    moved = data.rename(tmp_path / "moved")
    assert train.train(settings(moved, tmp_path / "r", epochs=1, resume=True), progress=False).epoch == 1
    for split in ("train", "test"):
        (moved / split / "red_crown").rename(moved / split / "aaa")
    with pytest.raises(ConfigError, match="was trained on other images, classes or splits"):
        train.train(settings(moved, tmp_path / "r", epochs=1, resume=True), progress=False)


def test_one_class_is_refused_before_training(birds, tmp_path):
    shutil.copytree(birds / "train" / "red_crown", tmp_path / "one" / "train" / "red_crown")
    with pytest.raises(DataError, match="has one class, 'red_crown'; there is nothing to tell apart"):
        train.train(settings(tmp_path / "one", tmp_path / "r"), progress=False)


def test_a_run_in_one_precision_and_the_next_in_another(birds, tmp_path):
    train.train(settings(birds, tmp_path / "a", epochs=1, precision="bf16"), progress=False)
    result = evaluate.evaluate_bundle(tmp_path / "a", birds, workers=0, device="cpu")
    assert result.count == 9


def test_the_saved_settings_are_a_recipe(run_folder, birds):
    assert Train(**read_recipe(run_folder / "train.yaml")) == settings(birds, run_folder)


def test_ema_is_what_is_saved(birds, tmp_path):
    whole = train.train(settings(birds, tmp_path / "a", epochs=2, ema=0.9), progress=False)
    a = load_file(tmp_path / "a" / "model.safetensors")
    raw = load_file(tmp_path / "a" / "checkpoint" / "model.safetensors")
    assert not all(torch.equal(a[k], raw[k]) for k in a)
    assert whole.test.count == 9


def test_val_fraction_is_watched_and_held_out(birds, tmp_path):
    result = train.train(settings(birds, tmp_path / "r", epochs=1, val_fraction=0.34), progress=False)
    assert result.val.count == 6
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["data"]["counts"] == {"train": 12, "val": 6, "test": 9}


def test_eval_sees_the_split_that_was_held_out(birds, tmp_path):
    trained = train.train(settings(birds, tmp_path / "r", epochs=1, val_fraction=0.34), progress=False).val
    again = evaluate.evaluate_bundle(tmp_path / "r", birds, split="val", workers=0)
    assert (again.count, again.per_class) == (trained.count, trained.per_class)
    assert evaluate.evaluate_bundle(tmp_path / "r", birds, split="train", workers=0).count == 12


def test_init_from_takes_what_fits(run_folder, birds, tmp_path):
    source = glsim.load(run_folder).state_dict()
    plain = glsim.create_model("plain", TINY["backbone"], 3, 96, backbone_args=TINY["backbone_args"])
    assert init_from(plain, run_folder).new == ["head.bias", "head.weight"]
    key = "backbone.net.blocks.1.mlp.fc1.weight"
    assert torch.equal(plain.state_dict()[key], source[key])
    other = glsim.create_model("plain", TINY["backbone"], 3, 64, backbone_args={**TINY["backbone_args"], "depth": 3})
    with pytest.raises(ConfigError, match="does not fit 'vit_tiny_patch16_224': it holds nothing for blocks.2"):
        init_from(other, run_folder)
    start = {"init_from": str(run_folder), "lr": 0.0, "min_lr": 0.0, "warmup_lr": 0.0, "epochs": 1}
    train.train(settings(birds, tmp_path / "r", **start), progress=False)
    assert torch.equal(load_file(tmp_path / "r" / "model.safetensors")[key], source[key])


def test_decay_spares_biases_norms_tokens_and_positions(birds, tmp_path):
    model = glsim.create_model("glsim", TINY["backbone"], 3, 64, backbone_args=TINY["backbone_args"])
    optimizer = components.make_optimizer(settings(birds, tmp_path, weight_decay=0.1), model)
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
        train.train(settings(data, tmp_path / "a", epochs=1), progress=False)
    # nothing was finished there, so the same folder may be used again
    result = train.train(settings(data, tmp_path / "a", epochs=1, skip_bad=True), progress=False)
    assert len(result.skipped) == 1 and str(victim) in result.skipped[0]
    assert str(victim) in (tmp_path / "a" / "bad_images.txt").read_text()


def test_a_loss_that_is_no_number_stops_the_run(birds, tmp_path):
    message = r"the loss or its gradient is no number at step \d+; try a smaller lr than 1e\+30, .* images of that step: .*0003.jpg"
    with pytest.raises(glsim.GlsimError, match=message):
        train.train(settings(birds, tmp_path / "r", lr=1e30, warmup_lr=1e30, clip_grad=0.0, epochs=3), progress=False)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_batch_is_named_with_its_step_and_files_and_nothing_is_saved_after_it(
    birds, tmp_path, monkeypatch, value, where
):
    """A gradient is enough: the weights would be none, and the loss would tell after they were saved."""
    out, steps, plain = tmp_path / "r", [], train.objective

    def objective(*arguments):
        steps.append(1)
        loss = plain(*arguments)
        if len(steps) == 5 and where == "loss":
            return loss * value
        if len(steps) == 5:
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(train, "objective", objective)
    with pytest.raises(glsim.GlsimError, match="no number at step 4; try a smaller lr than") as caught:
        train.train(settings(birds, out, save_steps=1), progress=False)
    monkeypatch.undo()
    paths = read_data(birds)["train"].paths
    files = [str(paths[i]) for i in TrainBatches(18, 6, 1, seed=1).step(4)]
    assert str(caught.value).endswith(f"The images of that step: {', '.join(files)}")
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 4
    assert train.train(settings(birds, out, save_steps=1, resume=True), progress=False).epoch == 2


def test_200_corrupt_files_among_1000(tmp_path):
    """Cut off, emptied, web pages and noise: the first stops the run by its name, or all are skipped and listed."""
    rng, bad = np.random.default_rng(0), []
    for i in range(1000):
        path = tmp_path / "data" / ("train" if i % 5 else "test") / "ab"[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        if i % 5 == 2:
            whole = path.read_bytes()
            path.write_bytes([whole[:200], b"", b"<html>404</html>", rng.bytes(500)][i // 5 % 4])
            bad.append(str(path))
    assert len(bad) == 200
    tiny = {"image_size": 32, "backbone_args": {"depth": 1, "embed_dim": 16, "num_heads": 1}, "options": {"top_o": 2}}
    start = {**tiny, "epochs": 1, "batch_size": 100}
    with pytest.raises(DataError) as caught:
        train.train(settings(tmp_path / "data", tmp_path / "r", **start), progress=False)
    assert any(name in str(caught.value) for name in bad)
    result = train.train(settings(tmp_path / "data", tmp_path / "r", skip_bad=True, **start), progress=False)
    assert sorted(line.split(":")[0] for line in result.skipped) == sorted(bad)
    assert len((tmp_path / "r" / "bad_images.txt").read_text().splitlines()) == 200
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["data"]["counts"] == {"train": 600, "test": 200}


def test_an_old_bundle_keeps_its_answers():
    """tests/checkpoints/old_bundle was written in format 1 (commit 636e3d1), and expected.json by the model it was saved from."""
    folder = ROOT / "tests" / "checkpoints" / "old_bundle"
    assert json.loads((folder / "config.json").read_text())["format"] == 1 < FORMAT
    expected = json.loads((folder / "expected.json").read_text())
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).roll(1, -1)
    model = glsim.load(folder)
    with torch.no_grad():
        output = model(images)
    torch.testing.assert_close(output.logits, torch.tensor(expected["logits"]))
    assert output.selection.boxes.tolist() == expected["boxes"]
    assert glsim.Predictor(model)(Image.new("RGB", (50, 40)))[0].labels[0] in ("iris", "daisy", "snowdrop")


def test_the_training_page_lists_every_setting_with_its_default_and_help():
    page = (ROOT / "docs" / "training.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\| (.*) \|$", page, re.M)
    expected = []
    for f in fields(Train):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        shown = "" if default is MISSING else json.dumps(default).strip('"')
        expected.append((f.name, shown, f.metadata["help"]))
    assert sorted(listed) == sorted(expected)


def test_wrong_settings_say_what_would_work(birds, tmp_path):
    with pytest.raises(ConfigError, match="unknown optimizer 'adamv'; choose from: .*adamw"):
        train.train(settings(birds, tmp_path / "r", optimizer="adamv"), progress=False)
    with pytest.raises(ConfigError, match="unknown augmentation 'strong'; choose from: affine, .*, medium, none"):
        train.train(settings(birds, tmp_path / "r", augment="strong"), progress=False)
    with pytest.raises(ConfigError, match="precision=fp16 needs an accelerator"):
        train.train(settings(birds, tmp_path / "r", precision="fp16"), progress=False)
    assert not (tmp_path / "r").exists()
    for name, value in (
        ("epochs", 0),
        ("batch_size", 0),
        ("resize_ratio", 0.9),
        ("label_smoothing", 1.0),
        ("mean", [1]),
        ("std", [0.2, 0.0, 0.2]),
        ("seed", -1),
        ("seed", 2**32),
        ("schedule", "plateau"),
        ("decay_epochs", 0),
        ("decay_rate", 1.1),
        ("layer_decay", 0.0),
        ("repeats", 0),
        ("mixup", -1.0),
        ("focal", -1.0),
        ("cache", "disk"),
        ("resize", "long"),
        ("freeze", "head"),
        ("freeze", 0),
        ("head_lr", -1.0),
        ("lora", -1),
    ):
        with pytest.raises(ConfigError, match=name):
            settings(birds, tmp_path / "r", **{name: value})


def test_schedule_warms_up_and_comes_down(birds, tmp_path):
    s = settings(birds, tmp_path, optimizer="sgd", lr=0.1, warmup_steps=10, warmup_lr=1e-6, min_lr=1e-5)
    optimizer = components.make_optimizer(s, small_model("plain"))
    assert optimizer.defaults["nesterov"]
    schedule = components.make_schedule(s, optimizer, 100)
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
    optimizer = components.make_optimizer(s, small_model("plain"))
    schedule = components.make_schedule(s, optimizer, 100)  # 10 steps an epoch
    for step in [*range(100), 50, 3]:  # and as a resumed run: the step alone decides
        schedule.step_update(step)
        rising = 1e-5 + (1e-3 - 1e-5) * step / max(1, warmup)
        expected = rising if step < warmup else 1e-3 * 0.9 ** ((step - warmup) // length)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_unsplit_folder_keeps_its_split_for_eval(birds, tmp_path):
    data = tmp_path / "flat"
    shutil.copytree(birds / "train", data)
    result = train.train(
        settings(data, tmp_path / "r", epochs=1, test_fraction=0.34, split_seed=7, seed=3), progress=False
    )
    again = evaluate.evaluate_bundle(tmp_path / "r", data, workers=0)
    assert (again.count, again.correct) == (6, result.test.correct)
    everything = evaluate.evaluate_bundle(tmp_path / "r", data, workers=0, split="all")
    assert everything.count == 18
    assert again.split_drawn and not everything.split_drawn
    assert not evaluate.evaluate_bundle(tmp_path / "r", birds, workers=0).split_drawn


def test_recipe_errors_name_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 1\nepoch: 3\n")
    with pytest.raises(ConfigError, match=r"r.yaml: unknown epoch; known keys: .*epochs"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds no 'key: value' lines"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    assert yaml.safe_load(to_recipe(settings("d", "o")))["lr"] == 1e-3


def test_eval_names_what_is_missing(run_folder, birds, tmp_path):
    with pytest.raises(DataError, match="has no split 'val'; it has: train, test"):
        evaluate.evaluate_bundle(run_folder, birds, split="val")
    other = tmp_path / "other"
    shutil.copytree(birds / "test", other / "test")
    next((other / "test").iterdir()).rename(other / "test" / "ostrich")
    with pytest.raises(DataError, match="ostrich"):
        evaluate.evaluate_bundle(run_folder, other)


@pytest.mark.parametrize(
    ("number", "workers"), [pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow), (signal.SIGTERM, 2)]
)
def test_a_signal_finishes_the_step_saves_and_leaves_with_130(birds, tmp_path, number, workers):
    """Sent to the whole process group, as Ctrl-C and `timeout` do."""
    out = tmp_path / "r"
    words = [
        f"--{k.replace('_', '-')}={json.dumps(v) if isinstance(v, dict) else v}"
        for k, v in {**TINY, "workers": workers}.items()
    ]
    words = [w for w in words if "pretrained" not in w and "epochs" not in w] + ["--no-pretrained", "--epochs=500"]
    command = [sys.executable, "-m", "glsim.cli", "train", f"--data={birds}", f"--out={out}", *words]
    # A shell's background job, as a CI run may be, ignores SIGINT, and its children would inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=heed, start_new_session=True, **pipes) as child:
        deadline = time.time() + 120
        while not (out / "checkpoint").exists() and time.time() < deadline and child.poll() is None:
            time.sleep(0.1)
        os.killpg(child.pid, number)
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, errors
    step = int(re.search(r"interrupted after step (\d+) of 1500, saved; go on with .* --resume", errors)[1])
    assert "Traceback" not in errors
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_meets_starting_workers_does_not_end_them(birds, monkeypatch, number):
    """It comes at the worst moment: a worker is there, and still belongs to the process group that is signalled."""
    if get_start_method() != "fork":
        pytest.skip("what stands for the signal reaches workers through a fork alone")
    monkeypatch.setattr(os, "setpgrp", lambda: (os.kill(os.getpid(), number), os.setpgid(0, 0)))
    images = read_data(birds)["test"]
    batches = list(read(make_loader(images, v2.Compose([v2.Resize((8, 8)), v2.PILToTensor()]), 4, 2)))
    assert [y for _, labels in batches for y in labels.tolist()] == list(images.labels)
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_tracker_gets_the_rows_of_the_log(birds, tmp_path, monkeypatch):
    """The packages are not needed here: one that only takes notes stands for them."""
    notes = []

    class Notes(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None

        def __init__(self, project, name):
            super().__init__()
            notes.append(("project", project, name))

        def store_init_configuration(self, values):
            notes.append(("settings", values))

        def log(self, values, step=None, **_):
            notes.append(("row", values, step))

        def finish(self):
            notes.append(("finished",))

    with pytest.raises(ConfigError, match="unknown tracker 'visdom'; choose from: tensorboard, trackio, wandb"):
        settings(birds, tmp_path, tracker="visdom")
    monkeypatch.setattr(train, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="tracker=wandb needs that package: pip install wandb"):
        train.train(settings(birds, tmp_path / "r", tracker="wandb"), progress=False)
    monkeypatch.setattr(train, "find_spec", lambda _: True)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notes)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.WANDB])
    train.train(settings(birds, tmp_path / "r", tracker="wandb"), progress=False)
    log = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert notes[0] == ("project", "glsim", "r") and notes[-1] == ("finished",)
    assert notes[1][1]["lr"] == 1e-3 and all(isinstance(v, int | float | str) for v in notes[1][1].values())
    assert notes[2:-1] == [("row", row, row["step"]) for row in log]


def test_training_does_not_look_at_the_test_split(birds, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(train, "evaluate", lambda *args: measured.append(args))
    result = train.train(Train(data=str(birds), out=str(tmp_path / "r"), **{**TINY, "epochs": 1}), progress=False)
    assert not measured and result.test is None and not (tmp_path / "r" / "predictions_test.csv").exists()


def test_every_answer_on_test_is_kept(run_folder, birds):
    lines = (run_folder / "predictions_test.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert lines[0] == "path,label,prediction,confidence" and len(rows) == 9
    assert all((birds / path).is_file() and path.split("/")[1] == label for path, label, _, _ in rows)
    right = json.loads((run_folder / "metrics.json").read_text())["test"]["correct"]
    assert sum(label == prediction for _, label, prediction, _ in rows) == right


PARTS = ("model", "averaged", "optimizer", "contents")


@pytest.mark.parametrize("name", ["state.json", *(f"{part}.safetensors" for part in PARTS)])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone", "folder", "fifo"])
def test_a_damaged_checkpoint_is_told_by_name(averaged_run, birds, tmp_path, name, damage):
    out = tmp_path / "r"
    shutil.copytree(averaged_run, out)
    file = out / "checkpoint" / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[:-20])
    elif damage == "empty":
        file.touch()
    elif damage == "other":
        other = json.dumps({"format": resume.FORMAT, "step": "x"}).encode()
        file.write_bytes(other if name == "state.json" else safetensors.torch.save({}))
    elif damage == "folder":
        file.mkdir()
    elif damage == "fifo":
        os.mkfifo(file)
    with pytest.raises(DataError, match="r/checkpoint is damaged: .*; start a new run, with --init-from"):
        train.train(settings(birds, out, ema=0.5, resume=True), progress=False)


@pytest.fixture(scope="module")
def half_run(birds, tmp_path_factory):
    """A run with averaged weights that stands in its second epoch."""
    out = tmp_path_factory.mktemp("half") / "r"
    train.train(settings(birds, out, ema=0.5, epochs=1), progress=False)
    plan_epochs(out / "checkpoint", 2)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in ("2", -1, 1.5, None, [], {}, True, 10**6)),
        *({"history": value} for value in (None, {}, "x", [1], [{}], [None], [{"epoch": "1"}])),
        *({"tally": value} for value in ({}, "x", [], ["a", 1, 2, 3], [None, 1, 2, 3], None)),
        *({"optimizer": value} for value in (None, [], {"pairs": []}, {"pairs": [["state", {"pairs": []}]]})),
        *({"digests": value} for value in (None, {}, {"model": "x"})),
    ],
    ids=str,
)
def test_a_state_that_tells_nonsense_is_damaged(half_run, birds, tmp_path, changes):
    out = Path(shutil.copytree(half_run, tmp_path / "r"))
    rewrite_state(out / "checkpoint", **changes)
    with pytest.raises(DataError, match="r/checkpoint is damaged: .*; start a new run"):
        train.train(settings(birds, out, ema=0.5, epochs=2, resume=True), progress=False)


def test_an_edited_state_is_damaged(half_run, birds, tmp_path):
    """Even where it makes sense: another momentum, another accuracy."""
    out = Path(shutil.copytree(half_run, tmp_path / "r"))
    state = out / "checkpoint" / "state.json"
    text = state.read_text()
    state.write_text(re.sub(r'"train_top1": [0-9.e-]+', '"train_top1": 0.123', text))
    assert state.read_text() != text
    with pytest.raises(DataError, match="is damaged: state.json is not what was saved"):
        train.train(settings(birds, out, ema=0.5, epochs=2, resume=True), progress=False)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["nan", "half", "other run"])
def test_tensors_that_were_not_saved_there_are_damaged(half_run, birds, tmp_path, part, damage):
    out = Path(shutil.copytree(half_run, tmp_path / "r"))
    file = out / "checkpoint" / f"{part}.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(iter(tensors))
    if damage == "nan":
        tensors[name] = torch.full_like(tensors[name], torch.nan if tensors[name].is_floating_point() else -1)
    elif damage == "half":
        tensors[name] = tensors[name].half()
    else:
        tensors[name] = tensors[name] + 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(DataError, match=f"is damaged: {part}.safetensors is not the file that was saved"):
        train.train(settings(birds, out, ema=0.5, epochs=2, resume=True), progress=False)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor", "adafactorbv", "lamb", "madgrad", "muon"])
def test_the_state_of_an_optimizer_comes_back_bit_for_bit(birds, tmp_path, name):
    """What is no tensor too: tuples, dtypes, numbers as keys, Python's random state."""

    def build():
        net = small_model("plain", "resnet18", 32)
        return net, components.make_optimizer(settings(birds, tmp_path, optimizer=name, weight_decay=0.01), net)

    def step(net, optimizer, number):
        torch.manual_seed(number)
        optimizer.zero_grad()
        net(torch.randn(2, 3, 32, 32)).logits.softmax(dim=1).pow(2).mean().backward()
        optimizer.step()

    whole = build()
    for number in range(3):
        step(*whole, number)
    tensors = {}
    kept = json.loads(json.dumps(resume._without_tensors(whole[1].state_dict(), tensors)))
    resume._write(tmp_path, "optimizer", tensors)
    again = build()
    again[0].load_state_dict(whole[0].state_dict())
    again[1].load_state_dict(resume._with_tensors(kept, resume._read(tmp_path, "optimizer")))
    for number in range(3, 6):
        step(*whole, number)
        step(*again, number)
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_of_a_later_version_do_not_stop_an_older_run(birds, tmp_path):
    whole = train.train(settings(birds, tmp_path / "r", epochs=1), progress=False)
    before = json.loads((tmp_path / "r" / "checkpoint" / "state.json").read_text())["settings"]
    assert before.pop("focal") == 0
    rewrite_state(tmp_path / "r" / "checkpoint", settings=before)
    assert train.train(settings(birds, tmp_path / "r", epochs=1, resume=True), progress=False).step == whole.step


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kill_runs_notices_one_bit(run_folder, tmp_path):
    kill_runs, copy = script("kill_runs"), tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    assert kill_runs.steps_of(copy) == 6 and kill_runs.same(run_folder, copy)
    log = (copy / "log.jsonl").read_text()
    (copy / "log.jsonl").write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 99.0', log))
    assert kill_runs.same(run_folder, copy)  # the clock may differ
    (copy / "log.jsonl").write_text(log.replace('"train_top1": ', '"train_top1": 1'))
    assert not kill_runs.same(run_folder, copy)
    (copy / "log.jsonl").write_text(log)
    weights = load_file(copy / "model.safetensors")
    weights["head.linear.bias"][0] = torch.nextafter(weights["head.linear.bias"][0], torch.tensor(9.0))
    save_file(weights, copy / "model.safetensors")
    assert not kill_runs.same(run_folder, copy)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 3), (2, 2)])
def test_killed_runs_end_as_undisturbed(monkeypatch, capfd, processes, kills):
    words = ["--kills", str(kills), "--processes", str(processes), "--epochs", "4"]
    monkeypatch.setattr("sys.argv", ["kill_runs.py", *words])
    assert script("kill_runs").main() == 0
    out = capfd.readouterr().out
    assert len(re.findall("^kill +[0-9]+: ", out, re.M)) == kills and "all bit-identical" in out
