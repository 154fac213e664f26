"""The training loop. Devices and precision are Accelerate's, optimiser, schedule and EMA are timm's."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from glsim.checkpoints.bundle import CONFIG, METRICS_FILE, WHERE_FROM, default_preprocessing, read_config, save
from glsim.checkpoints.card import UNKNOWN
from glsim.checkpoints.init_from import init_from
from glsim.config import Train, read_recipe, to_recipe
from glsim.data.catalog import SETS, prepared
from glsim.data.images import BadImage, find_bad
from glsim.data.limits import limited
from glsim.data.loaders import CachedImages, ImageDataset, TrainBatches, make_loader, mix, read, train_loader
from glsim.data.readers import ImageList, hold_out_val, read_data, split_hash
from glsim.data.transforms import Preprocessing, batch_mixing, eval_transform, train_steps
from glsim.environment import environment
from glsim.evaluation.evaluate import drop_bad, evaluate, make_accelerator, predictions_table, take_split
from glsim.evaluation.plots import draw_curve
from glsim.files import document, one_line, printable, read_json, write_json, write_text
from glsim.models import create_model
from glsim.models.backbone import Model
from glsim.models.losses import objective
from glsim.training.adapt import adapt, merged
from glsim.training.resume import (
    CHECKPOINT,
    Interrupted,
    Parts,
    find_checkpoint,
    fingerprints,
    held,
    load_checkpoint,
    read_progress,
    reading,
    save_checkpoint,
    stop_signal,
    writing,
)
from glsim.types import ConfigError, DataError, GlsimError

RECIPE, LOG, CURVE, BAD_IMAGES = "train.yaml", "log.jsonl", "curve.png", "bad_images.txt"
RUN, PREDICTIONS = "run.json", "predictions_test.csv"
# Settings that change nothing; the data is watched by hashes.
FREE = {"workers", "out", "data", "cache", "tracker", "data_licence", "max_megapixels"}


@limited
def run(s: Train, progress: bool = True) -> dict[str, Any]:
    """The verb: train as `s` says; returns the metrics. `s.out` is a bundle after every epoch.

    Raises ConfigError when another run is at work in `s.out`, Interrupted after SIGINT or SIGTERM, the state saved, and
    GlsimError when the loss is no longer a number or a file cannot be written.
    """
    out = Path(s.out)
    check_out(s, out)
    if s.tracker is not None and find_spec(s.tracker) is None:
        raise ConfigError(f"tracker={s.tracker} needs that package: pip install {s.tracker}")
    accelerator = make_accelerator(None, s.precision, s.accumulate, log_with=s.tracker, project_dir=s.out)
    with held(out, accelerator):
        check_out(s, out)  # again: another run may just have ended there
        return _fit(s, out, accelerator, progress)


def _fit(s: Train, out: Path, accelerator: Accelerator, progress: bool) -> dict[str, Any]:
    splits, bad = read_splits(s)
    used = [name for name in splits if s.test or name != "test"]
    paths = [path for name in used for path in splits[name].paths]
    contents = fingerprints(paths, accelerator)
    classes = splits["train"].classes
    set_seed(s.seed)
    model = create_model(
        s.method, s.backbone, len(classes), s.image_size, s.pretrained, s.backbone_args or None, **s.options
    )
    if s.init_from is not None:
        init_from(model, s.init_from)
    how = {name: getattr(s, name) for name in ("freeze", "lora", "supcon", "grad_checkpointing", "compile")}
    adapt(model, **how)
    p = make_preprocessing(s, model)
    group = accelerator.num_processes * s.accumulate
    batches = TrainBatches(len(splits["train"]), s.batch_size, group, s.seed, s.repeats)
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as the launcher tells
    loader = train_loader(train_images(s, splits["train"], p, copies), batches, s.workers)
    mixing = batch_mixing(s.mixup, s.cutmix, len(classes))
    watched = {
        name: accelerator.prepare(make_loader(splits[name], eval_transform(p), s.batch_size, s.workers))
        for name in used
        if name != "train"
    }
    optimizer = make_optimizer(s, model)
    ema = ModelEmaV3(model, decay=s.ema, use_warmup=True, device=accelerator.device) if s.ema else None
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = make_schedule(s, optimizer, s.epochs * batches.steps)
    averaged = ema.module if ema is not None else None
    final: Any = model if averaged is None else averaged
    final.config = model.config

    parts, data_hash = Parts(model, optimizer, averaged, contents), split_hash(splits, s.data)
    state = load_checkpoint(accelerator, out, parts, data_hash, paths) if s.resume else {}
    history, step = state.get("history", []), state.get("step", 0)
    tally = Tally(accelerator, state.get("tally"))
    accelerator.wait_for_everyone()  # every process has looked at `out` before the first writes to it
    if accelerator.is_main_process:
        write_text(out / RECIPE, to_recipe(s))
        write_text(out / BAD_IMAGES, "".join(f"{b}\n" for b in bad))
        write_json(out / RUN, _run_record(s, accelerator, data_hash))
    named = {"name": out.name}
    accelerator.init_trackers("glsim", _flat(s), {"trackio": named, "wandb": named})
    about = {
        "data": {
            "source": Path(s.data).name,  # not the path: bundles travel
            "counts": {name: len(images) for name, images in splits.items()},
            "split_hash": data_hash,
            "split_seed": s.split_seed,
            "test_fraction": s.test_fraction,
            "val_fraction": s.val_fraction,
        },
        **provenance(s, model, batches.size),
    }

    def keep() -> None:
        tally.check(batches, splits["train"], s.lr)
        done = {"step": step, "history": history, "tally": tally.sums()}
        save_checkpoint(accelerator, out, {"settings": plain(s), "split_hash": data_hash, **done}, parts)

    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds between looks; a log file needs fewer
    total, quiet = s.epochs * batches.steps, not (progress and accelerator.is_main_process)
    with (
        stop_signal(accelerator) as stop,
        explaining(batches, s.workers),
        tqdm(total=total, initial=step, unit="step", disable=quiet, mininterval=often) as bar,
    ):
        for epoch in range(step // batches.steps, s.epochs):
            batches.epoch, batches.start = epoch, step % batches.steps
            wrapped.train()
            if s.freeze == "backbone":
                model.backbone.eval()
            for part, (images, labels) in enumerate(read(loader)):
                # All randomness follows from seed, step and image: a resumed run repeats the undisturbed one.
                torch.manual_seed(mix(s.seed, step, part % s.accumulate, accelerator.process_index))
                schedule.step_update(step)
                images, labels = mixing(images, labels)
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        output = wrapped(images)
                        loss = objective(output, labels, s.label_smoothing, s.focal)
                    accelerator.backward(loss)
                    norm = None
                    if accelerator.sync_gradients and s.clip_grad:
                        norm = accelerator.clip_grad_norm_(wrapped.parameters(), s.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                tally.add(output.logits, labels, loss, step, norm)
                if not accelerator.sync_gradients:
                    continue
                if ema is not None:
                    ema.update(accelerator.unwrap_model(wrapped), step=step)
                step += 1
                bar.update()
                if step % 10 == 0:  # each look waits for the device
                    tally.check(batches, splits["train"], s.lr)
                    bar.set_description(f"epoch {epoch + 1}/{s.epochs}", refresh=False)
                    bar.set_postfix_str(str(tally), refresh=False)
                stopped = stop.heard()
                if step % batches.steps and (stopped or (s.save_steps and step % s.save_steps == 0)):
                    keep()
                if stopped and step % batches.steps:
                    raise Interrupted(_stopped(out, step, total))
            tally.check(batches, splits["train"], s.lr)
            share_buffers(final, accelerator)
            answering = merged(final)
            row = {"epoch": epoch + 1, "step": step, "lr": max(g["lr"] for g in optimizer.param_groups), **tally.row()}
            metrics: dict[str, Any] = {}
            for name, images in watched.items():
                # The test split is measured once, after the last epoch; nothing is chosen by it.
                if name == "val" or epoch + 1 == s.epochs:
                    measured = evaluate(answering, images, len(classes), accelerator)
                    metrics[name] = document(measured.summary(classes))
                    row[f"{name}_top1"] = metrics[name]["top1"]
                    if name == "test" and accelerator.is_main_process:
                        with writing(out):
                            write_text(out / PREDICTIONS, predictions_table(splits[name], measured, s.data))
            history.append(row)
            accelerator.log(row, step)
            tally = Tally(accelerator)
            if accelerator.is_main_process:
                with writing(out):
                    save(answering, out, list(classes), preprocessing=p, metrics={**row, **metrics}, **about)
                    write_text(out / LOG, "".join(json.dumps(r) + "\n" for r in history))
                    draw_curve(history, out / CURVE)
            keep()
            if stop.heard():  # also after the last epoch: who runs several must hear of it
                raise Interrupted(_stopped(out, step, total))
    for tracker in accelerator.trackers:  # accelerator.end_training() would part the processes too
        tracker.finish()
    result = {"out": str(out), **read_json(out / METRICS_FILE), "batch_size": batches.batch_size}
    return {**result, "splits": list(splits), "skipped": [str(b) for b in bad]}


@contextmanager
def explaining(batches: TrainBatches, workers: int) -> Iterator[None]:
    """Inside, what torch says of two settings that do not suit model or machine is said as what to change in them.

    ConfigError where a norm is left a single value, which depends on the last map of the backbone and so on no setting
    alone; GlsimError where one of the `workers`, the processes that load images, was killed.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"batches of {batches.batch_size} {'image' if batches.batch_size == 1 else 'images'} leave batch norm one "
            "value a channel, which has no deviation; try a larger batch_size or image_size, a smaller accumulate "
            f"({batches.images} training images are shared by {batches.group} batches a step), freeze=backbone, or a "
            "backbone without batch norm"
        ) from error
    except RuntimeError as error:  # raised wherever the main process is when the signal of its end comes
        if not str(error).startswith("DataLoader worker"):
            raise
        raise GlsimError(
            f"one of the {workers} processes that load images was killed, most often because memory ran out "
            f"({one_line(error)}); try fewer --workers (0: none) or a smaller batch_size; a run that has saved "
            "something goes on with --resume"
        ) from error


class Diverged(GlsimError):
    """The loss, or its gradient, is no longer a number."""


class Tally:
    """What an epoch adds up to: loss, right answers, images, seconds; and the first step at which a number was none."""

    def __init__(self, accelerator: Accelerator, sums: list[float] | None = None) -> None:
        self.accelerator, self.start, self.seconds = accelerator, time.perf_counter(), 0.0
        self.values = torch.zeros(3, device=accelerator.device)  # loss, right, images: of this process
        self.bad = torch.tensor(-1, device=accelerator.device)
        if sums is not None:
            own = 3 * accelerator.process_index
            self.seconds = sums[-1]
            self.values += torch.tensor(sums[own : own + 3], device=accelerator.device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, step: int, norm: Tensor | None = None) -> None:
        """One batch: logits (B, C), labels (B,) or shares (B, C), the mean loss, the gradient's norm where a step ends.

        Of a mixed image the class with the largest share is right. Does not wait for the device.
        """
        right = (logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))).sum()
        self.values += torch.stack((loss.detach() * len(labels), right, torch.full_like(loss, len(labels))))
        sound = loss.isfinite()
        if norm is not None and self.accelerator.scaler is None:  # which leaves such a step out, and scales less
            sound = sound & norm.isfinite()
        self.bad = torch.where((self.bad < 0) & ~sound, step, self.bad)

    def sums(self) -> list[float]:
        """Loss, right answers and images of each process in turn, and seconds: what a resumed epoch begins with."""
        return [*self.accelerator.gather(self.values).tolist(), self.elapsed()]

    def elapsed(self) -> float:
        """Seconds of the epoch so far, without those it lay still."""
        return self.seconds + time.perf_counter() - self.start

    def row(self) -> dict[str, float]:
        """The epoch as a row of the log."""
        loss, right, images = self.accelerator.reduce(self.values.clone(), "sum").tolist()
        seconds = self.elapsed()
        return {
            "train_loss": loss / images,
            "train_top1": right / images,
            "images_per_second": round(images / seconds, 1),
            "seconds": round(seconds, 2),
        }

    def __str__(self) -> str:
        loss, right, images = self.values.tolist()
        speed = images * self.accelerator.num_processes / self.elapsed()
        return f"loss {loss / images:.3f}, accuracy {right / images:.1%}, {speed:.0f} images/s"

    def check(self, batches: TrainBatches, images: ImageList, lr: float) -> None:
        """Raise Diverged naming step and files once a loss or gradient was no number, in all processes alike."""
        bad = [step for step in self.accelerator.gather(self.bad).view(-1).tolist() if step >= 0]
        if bad:
            step = min(bad)
            names = ", ".join(str(images.paths[i]) for i in batches.step(step))
            raise Diverged(
                f"the loss or its gradient is no number at step {step}; try a smaller lr than {lr}, a longer warm-up, "
                f"or clip_grad. The images of that step: {names}"
            )


def provenance(s: Train, model: Model, step: int) -> dict[str, Any]:
    """What a run's bundle says of how its weights came about, `step` images at a time, and of the licences of what
    went into them."""
    start, licence = "nothing", "none, trained from nothing"
    if s.init_from is not None:
        start, licence = Path(s.init_from).name, UNKNOWN
        if Path(s.init_from).is_dir():
            licence = read_config(Path(s.init_from)).get("licence", {}).get("model", UNKNOWN)
    elif s.pretrained and not WHERE_FROM & set(s.backbone_args):
        cfg = model.backbone.net.pretrained_cfg
        start, licence = cfg.get("hf_hub_id") or model.config["backbone"], cfg.get("license") or UNKNOWN
    elif s.pretrained:
        start, licence = "weights named in backbone_args", UNKNOWN
    named = SETS[s.dataset].licence if s.dataset is not None else UNKNOWN
    return {
        "training": {
            "start": start,
            "epochs": s.epochs,
            "optimizer": s.optimizer,
            "lr": s.lr,
            "batch_size": step,
            "seed": s.seed,
        },
        "licence": {"data": s.data_licence or named, "backbone": licence},
    }


def _stopped(out: Path, step: int, total: int) -> str:
    return f"interrupted after step {step} of {total}, saved; go on with glsim train --recipe {out / RECIPE} --resume"


def read_splits(s: Train) -> tuple[dict[str, ImageList], list[BadImage]]:
    """The splits to train, watch and test on, and the unreadable files left out of them (with `skip_bad`)."""
    splits = read_data(prepared(s.data, s.dataset), seed=s.split_seed, test_fraction=s.test_fraction)
    take_split(splits, "train", s.data)
    if len(splits["train"].classes) < 2:
        raise DataError(f"{s.data} has one class, {splits['train'].classes[0]!r}; there is nothing to tell apart")
    if s.val_fraction:
        if "val" in splits:
            raise ConfigError(f"{s.data} has a val split of its own; leave val_fraction at 0")
        splits = hold_out_val(splits, s.val_fraction, s.split_seed)
        take_split(splits, "val", s.data)
    if s.test:
        take_split(splits, "test", s.data)
    bad = []
    if s.skip_bad:
        bad = find_bad([path for images in splits.values() for path in images.paths])
        splits = {name: drop_bad(images, bad) for name, images in splits.items()}
    present = set(splits["train"].labels)
    lacking = [c for i, c in enumerate(splits["train"].classes) if i not in present]
    if lacking:
        raise DataError(f"{s.data}: no readable training image of {', '.join(lacking[:10])}")
    return splits, bad


def train_images(s: Train, images: ImageList, p: Preprocessing, copies: int = 1) -> ImageDataset:
    """What the loader reads: augmented images, out of files or, `copies` times on this machine, out of memory."""
    always, chance = train_steps(p, s.augment, s.crop, s.crop_scale)
    if s.cache == "ram":
        return CachedImages(images, always, chance, copies)
    return ImageDataset(images, v2.Compose([always, chance]))


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the first one's buffers (batch norm's means, ..): what is measured is what is saved."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


def make_optimizer(s: Train, model: Model) -> torch.optim.Optimizer:
    """timm's optimiser of that name; ConfigError lists the names."""
    known = [str(name) for name in list_optimizers()]
    if s.optimizer not in known:
        raise ConfigError(f"unknown optimizer {s.optimizer!r}; choose from: {', '.join(known)}")
    return create_optimizer_v2(
        model,
        opt=s.optimizer,
        lr=s.lr,
        weight_decay=s.weight_decay,
        momentum=s.momentum,
        layer_decay=s.layer_decay if s.layer_decay < 1 else None,
    )


def make_schedule(s: Train, optimizer: Any, steps: int) -> Scheduler:
    """Linear warm-up (at most half of all steps), then cosine down to `min_lr` or decay by steps.

    `step_update(step)` sets the rate, which follows from the number of the step alone.
    """
    warmup = min(s.warmup_steps, steps // 2)
    start = min(s.warmup_lr, s.lr)
    common: Any = {"warmup_t": warmup, "warmup_lr_init": start, "warmup_prefix": True, "t_in_epochs": False}
    if s.schedule == "step":
        every = max(1, round(s.decay_epochs * steps / s.epochs))
        return StepLRScheduler(optimizer, decay_t=every, decay_rate=s.decay_rate, **common)
    return CosineLRScheduler(optimizer, t_initial=steps - warmup, lr_min=min(s.min_lr, s.lr), **common)


def check_out(s: Train, out: Path) -> None:
    """A run is never overwritten; resuming with other settings than its checkpoint has is an error that names them."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    if not s.resume:
        if (out / CONFIG).exists() or any(out.glob(f"{CHECKPOINT}*")):
            go_on = f"glsim train --recipe {out / RECIPE} --resume"
            raise ConfigError(f"{out} already holds a run: go on with {go_on}, or name another --out")
        return
    folder = find_checkpoint(out)
    if folder is None and not (out / RECIPE).exists():
        raise ConfigError(
            f"nothing to resume: {out} has no {RECIPE}; of a run that was moved, name the folder: --out NEW"
        )
    # Not train.yaml, which anybody may edit; it is all there is of a run that has saved nothing yet.
    with reading(folder or out, out):
        saved = read_progress(out)["settings"] if folder else read_recipe(out / RECIPE)
        before = plain(Train(**saved))  # settings of later versions: their defaults
    changed = [f"{k}={v!r} (was {before[k]!r})" for k, v in plain(s, *FREE).items() if v != before[k]]
    if changed:
        raise ConfigError(
            f"{out} was started with other settings: {printable(', '.join(changed))}; go on with the old ones, or "
            f"start a new run with another --out, from these weights with --init-from {out}"
        )


def plain(s: Train, *without: str) -> dict[str, Any]:
    """The settings as JSON and YAML hold them, some left out."""
    return {k: v for k, v in yaml.safe_load(to_recipe(s)).items() if k not in without}


def _flat(s: Train) -> dict[str, Any]:
    """The settings as trackers take them."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(s).items()}


def _run_record(s: Train, accelerator: Accelerator, data_hash: str) -> dict[str, Any]:
    """`run.json`: seed, split hash, and under which conditions the run was started and resumed."""
    file = Path(s.out) / RUN
    before = read_json(file).get("starts") if s.resume and file.exists() else []
    if not isinstance(before, list):
        raise DataError(f"{file} is damaged: it has no list of starts; remove it")
    start = environment(accelerator.device)
    start |= {"processes": accelerator.num_processes, "precision": s.precision}
    return {"seed": s.seed, "split_hash": data_hash, "starts": [*before, start]}


def make_preprocessing(s: Train, model: Model) -> Preprocessing:
    """The backbone's, with what the settings say otherwise."""
    default = default_preprocessing(model.config["backbone"], model.backbone.image_size)
    mean, std = tuple(s.mean or default.mean), tuple(s.std or default.std)
    return Preprocessing(default.image_size, s.resize_ratio, mean, std, s.resize)
