"""Floor 4: the training loop. Devices and precision are Accelerate's, optimiser, schedule and EMA are timm's."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tqdm import tqdm

from glsim.backbone import Model
from glsim.bundle import CONFIG, METRICS_FILE, default_preprocessing, init_from, save, write_text
from glsim.config import Train, read_recipe, to_recipe
from glsim.data import ImageList, hold_out, read_data, split_hash
from glsim.evaluate import drop_bad, evaluate, make_accelerator, make_loader
from glsim.figures import draw_curve
from glsim.images import BadImage, find_bad
from glsim.losses import objective
from glsim.models import create_model
from glsim.transforms import Preprocessing, eval_transform, train_transform
from glsim.types import ConfigError, DataError, GlsimError

RECIPE, LOG, CURVE, BAD_IMAGES = "train.yaml", "log.jsonl", "curve.png", "bad_images.txt"
CHECKPOINT, STATE = "checkpoint", "state.json"


def run(s: Train, progress: bool = True) -> dict[str, Any]:
    """The verb: train as `s` says; returns the metrics. `s.out` is a bundle after every epoch."""
    out = Path(s.out)
    _check_out(s, out)
    splits, bad = read_splits(s)
    classes = splits["train"].classes
    accelerator = make_accelerator(None, s.precision)
    set_seed(s.seed)
    model = create_model(
        s.method, s.backbone, len(classes), s.image_size, s.pretrained, s.backbone_args or None, **s.options
    )
    if s.init_from is not None:
        init_from(model, s.init_from)
    p = _preprocessing(s, model)
    to_train = train_transform(p, s.augment, s.crop, s.crop_scale)
    drop_last = len(splits["train"]) > s.batch_size  # a last batch of one image would weigh as much as a full one
    loader = make_loader(splits["train"], to_train, s.batch_size, s.workers, shuffle=True, drop_last=drop_last)
    watched = {
        name: accelerator.prepare(make_loader(images, eval_transform(p), s.batch_size, s.workers))
        for name, images in splits.items()
        if name != "train"
    }
    optimizer = make_optimizer(s, model)
    ema = ModelEmaV3(model, decay=s.ema, use_warmup=True, device=accelerator.device) if s.ema else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = s.epochs * len(loader)
    schedule = make_schedule(s, optimizer, steps)
    final: Any = ema.module if ema is not None else model
    final.config = model.config

    data_hash = split_hash(splits, s.data)
    history = resume(accelerator, out, data_hash) if s.resume else []
    accelerator.wait_for_everyone()  # every process has looked at `out` before the first writes to it
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RECIPE, to_recipe(s))
        write_text(out / BAD_IMAGES, "".join(f"{b}\n" for b in bad))
    about = {
        "data": {
            "source": Path(s.data).name,  # not the path: bundles travel
            "counts": {name: len(images) for name, images in splits.items()},
            "split_hash": data_hash,
            "split_seed": s.split_seed,
            "test_fraction": s.test_fraction,
            "val_fraction": s.val_fraction,
        }
    }
    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds between looks; a log file needs fewer
    with tqdm(
        total=steps, initial=len(history) * len(loader), unit="step", disable=not progress, mininterval=often
    ) as bar:
        for epoch in range(len(history), s.epochs):
            # All randomness of an epoch follows from (seed, epoch): a resumed run repeats the undisturbed one.
            set_seed(s.seed * 10_000 + epoch, device_specific=True)
            row = train_epoch(wrapped, loader, optimizer, schedule, accelerator, ema, s, epoch, bar)
            metrics: dict[str, Any] = {}
            for name, images in watched.items():
                # The test split is measured once, after the last epoch; nothing is chosen by it.
                if name == "val" or epoch + 1 == s.epochs:
                    metrics[name] = evaluate(final, images, len(classes), accelerator).summary(classes)
                    row[f"{name}_top1"] = metrics[name]["top1"]
            history.append(row)
            if accelerator.is_main_process:
                save(final, out, list(classes), preprocessing=p, metrics={**row, **metrics}, **about)
                write_text(out / LOG, "".join(json.dumps(r) + "\n" for r in history))
                draw_curve(history, out / CURVE)
            checkpoint(accelerator, out, history, data_hash)
    return {"out": str(out), **json.loads((out / METRICS_FILE).read_text()), "skipped": [str(b) for b in bad]}


def train_epoch(
    model: Any,
    loader: Any,
    optimizer: Any,
    schedule: CosineLRScheduler,
    accelerator: Accelerator,
    ema: ModelEmaV3 | None,
    s: Train,
    epoch: int,
    bar: tqdm,
) -> dict[str, Any]:
    """One pass over `loader`; returns its row of the log. GlsimError when the loss is no longer a number."""
    model.train()
    start, seen = time.perf_counter(), 0
    right, total_loss = torch.zeros(2, device=accelerator.device)
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        schedule.step_update(step)
        with accelerator.autocast():
            output = model(images)
            loss = objective(output, labels, s.label_smoothing)
        accelerator.backward(loss)
        if s.clip_grad:
            accelerator.clip_grad_norm_(model.parameters(), s.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(accelerator.unwrap_model(model), step=step)
        seen += len(labels)
        right += (output.logits.argmax(dim=1) == labels).sum()
        total_loss += loss.detach() * len(labels)
        bar.update()
        if step % 10 == 0 or step + 1 == (epoch + 1) * len(loader):  # each look waits for the device
            mean_loss = float(total_loss) / seen
            if not math.isfinite(mean_loss):
                raise GlsimError(f"the loss is {mean_loss} at step {step}; try a smaller lr than {s.lr}")
            bar.set_description(f"epoch {epoch + 1}/{s.epochs}", refresh=False)
            speed = seen / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"loss {mean_loss:.3f}, accuracy {float(right) / seen:.1%}, {speed:.0f} images/s", refresh=False
            )
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "step": (epoch + 1) * len(loader),
        "lr": optimizer.param_groups[0]["lr"],
        "train_loss": float(total_loss) / seen,
        "train_top1": float(right) / seen,
        "images_per_second": round(seen / seconds, 1),
        "seconds": round(seconds, 2),
    }


def read_splits(s: Train) -> tuple[dict[str, ImageList], list[BadImage]]:
    """The splits to train, watch and test on, and the unreadable files left out of them (with `skip_bad`)."""
    splits = read_data(s.data, seed=s.split_seed, test_fraction=s.test_fraction)
    if "train" not in splits:
        raise DataError(f"{s.data} has no split 'train'; it has: {', '.join(splits)}")
    if len(splits["train"].classes) < 2:
        raise DataError(f"{s.data} has one class, {splits['train'].classes[0]!r}; there is nothing to tell apart")
    if s.val_fraction:
        if "val" in splits:
            raise ConfigError(f"{s.data} has a val split of its own; leave val_fraction at 0")
        splits["train"], splits["val"] = hold_out(splits["train"], s.val_fraction, s.split_seed)
    bad = []
    if s.skip_bad:
        bad = find_bad([path for images in splits.values() for path in images.paths])
        splits = {name: drop_bad(images, bad) for name, images in splits.items()}
    lacking = [c for i, c in enumerate(splits["train"].classes) if i not in set(splits["train"].labels)]
    if lacking:
        raise DataError(f"{s.data}: no readable training image of {', '.join(lacking[:10])}")
    return splits, bad


def make_optimizer(s: Train, model: Model) -> torch.optim.Optimizer:
    """timm's optimiser of that name; ConfigError lists the names."""
    known = [str(name) for name in list_optimizers()]
    if s.optimizer not in known:
        raise ConfigError(f"unknown optimizer {s.optimizer!r}; choose from: {', '.join(known)}")
    return create_optimizer_v2(model, opt=s.optimizer, lr=s.lr, weight_decay=s.weight_decay, momentum=s.momentum)


def make_schedule(s: Train, optimizer: Any, steps: int) -> CosineLRScheduler:
    """Linear warm-up (at most half of all steps), then cosine down to `min_lr`, set by `step_update(step)`."""
    warmup = min(s.warmup_steps, steps // 2)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=min(s.min_lr, s.lr),
        warmup_t=warmup,
        warmup_lr_init=min(s.warmup_lr, s.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def checkpoint(accelerator: Accelerator, out: Path, history: list[dict[str, Any]], data_hash: str) -> None:
    """Everything that `resume` needs, swapped in by renaming: at every moment one whole checkpoint exists."""
    new, old, final = (out / f"{CHECKPOINT}{end}" for end in (".new", ".old", ""))
    shutil.rmtree(new, ignore_errors=True)
    accelerator.save_state(str(new))
    if accelerator.is_main_process:
        write_text(new / STATE, json.dumps({"history": history, "split_hash": data_hash}))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, out: Path, data_hash: str) -> list[dict[str, Any]]:
    """Load the last whole checkpoint of `out`; returns the log of its finished epochs (empty: none was finished).

    The data may have moved, but ConfigError is raised when an image, a class or a split is another one.
    """
    for folder in (out / CHECKPOINT, out / f"{CHECKPOINT}.old"):
        if (folder / STATE).is_file():
            state = json.loads((folder / STATE).read_text())
            if state["split_hash"] != data_hash:
                raise ConfigError(f"{out} was trained on other images, classes or splits than the data has now")
            accelerator.load_state(str(folder))
            return state["history"]
    return []


def _check_out(s: Train, out: Path) -> None:
    """A run is never overwritten; resuming with other settings is an error that names them."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    go_on = f"glsim train --recipe {out / RECIPE} --resume"
    if not s.resume:
        if (out / CONFIG).exists() or any(out.glob(f"{CHECKPOINT}*")):
            raise ConfigError(f"{out} already holds a run: go on with {go_on}, or name another --out")
        return
    if not (out / RECIPE).exists():
        raise ConfigError(f"nothing to resume: {out} has no {RECIPE}")
    saved, now = read_recipe(out / RECIPE), yaml.safe_load(to_recipe(s))
    free = {"workers", "out", "data"}  # may change without changing the run; resume() looks into the data
    changed = [f"{k}={now[k]!r} (was {saved.get(k)!r})" for k in now if k not in free and now[k] != saved.get(k)]
    if changed:
        raise ConfigError(f"{out} was started with other settings: {', '.join(changed)}; go on with {go_on}")


def _preprocessing(s: Train, model: Model) -> Preprocessing:
    default = default_preprocessing(model.config["backbone"], model.backbone.image_size)
    mean, std = tuple(s.mean or default.mean), tuple(s.std or default.std)
    return Preprocessing(default.image_size, s.resize_ratio, mean, std)
