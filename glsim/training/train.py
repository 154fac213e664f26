"""The training loop. Devices and precision are Accelerate's, optimiser, schedule and EMA are timm's."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from glsim.checkpoints.bundle import CONFIG, save
from glsim.checkpoints.init_from import Start, init_from
from glsim.data.class_names import read_class_names
from glsim.data.images import BadImage
from glsim.data.limits import pixel_limit
from glsim.data.loaders import TrainBatches, make_loader, mix, read, train_loader
from glsim.data.readers import ImageList, split_hash
from glsim.data.transforms import Preprocessing, batch_mixing, eval_transform
from glsim.environment import make_accelerator
from glsim.evaluation.evaluate import evaluate, predictions_table
from glsim.files import document, one_line, printable, write_json, write_text
from glsim.models import create_model
from glsim.models.base import Model
from glsim.models.losses import objective
from glsim.training.adapt import SETTINGS as ADAPTATIONS
from glsim.training.adapt import adapt, merged
from glsim.training.components import make_optimizer, make_preprocessing, make_schedule, read_splits, train_images
from glsim.training.config import WITHOUT_EFFECT, Train, plain_values, read_recipe, to_recipe
from glsim.training.resume import (
    CHECKPOINT,
    Interrupted,
    Parts,
    find_checkpoint,
    fingerprints,
    load_checkpoint,
    lock_folder,
    read_progress,
    reading,
    save_checkpoint,
    stop_signal,
    writing,
)
from glsim.training.runs import (
    BAD_IMAGES,
    CURVE,
    LOG,
    PREDICTIONS,
    RECIPE,
    RUN,
    Epoch,
    RunMetrics,
    draw_curve,
    provenance,
    read_run_metrics,
    run_record,
)
from glsim.training.tally import Tally
from glsim.types import ConfigError, GlsimError, optional

CURVE_SECONDS = 30.0  # between drawings of the curve, which take as long as an epoch of a small model


@dataclass(frozen=True, kw_only=True)
class TrainedRun(RunMetrics):
    """What `train` returns: the last epoch with all that was measured after it, and what it was trained on."""

    out: str  # the run folder, a bundle
    batch_size: int  # fewer than asked for where train has no more images for a step
    splits: list[str]  # that the data has
    skipped: list[str]  # files that cannot be read, and why
    start: Start | None = optional()  # what became of the tensors of `init_from`


@dataclass
class Run:
    """A run at work: what `prepare` made of its settings, and how far it has got."""

    out: Path
    accelerator: Accelerator
    splits: dict[str, ImageList]
    bad: list[BadImage]  # left out of the splits
    preprocessing: Preprocessing
    batches: TrainBatches
    loader: Any  # of train
    watched: dict[str, Any]  # loaders of the splits that are measured
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # mixup, cutmix
    model: Model
    wrapped: Any  # `model` as Accelerate trains it
    ema: ModelEmaV3 | None
    final: Model  # the one that is measured and saved: `model`, or that of the averaged weights
    optimizer: Any
    schedule: Scheduler
    parts: Parts  # of a checkpoint
    data_hash: str  # of images, classes and splits
    about: dict[str, Any]  # what the config of the bundle says of the run
    start: Start | None  # where it began from other weights
    history: list[Epoch]
    step: int
    tally: Tally
    curve_drawn: float = -math.inf  # when, on the clock of `time.monotonic`


def train(settings: Train, progress: bool = True) -> TrainedRun:
    """Train a model; `settings.out` is a bundle after every epoch.

    Args:
        settings: the recipe, whole, with data and run folder.
        progress: draw a progress bar.

    Raises:
        ConfigError: for a setting that does not fit, or a run folder that is in use, or holds another run.
        DataError: for data that cannot be read or is not enough, or a damaged checkpoint.
        Interrupted: after SIGINT or SIGTERM, the state saved.
        Diverged: when the loss is no longer a number.
        GlsimError: when a file cannot be written.
    """
    s, out = settings, Path(settings.out)
    with pixel_limit(s.max_megapixels):
        check_out(s, out)
        if s.tracker is not None and find_spec(s.tracker) is None:
            raise ConfigError(f"tracker={s.tracker} needs that package: pip install {s.tracker}")
        accelerator = make_accelerator(None, s.precision, s.accumulate, log_with=s.tracker, project_dir=s.out)
        with lock_folder(out, accelerator):
            check_out(s, out)  # again: another run may just have ended there
            run = prepare(s, out, accelerator)
            fit(s, run, progress)
            for tracker in accelerator.trackers:  # accelerator.end_training() would part the processes too
                tracker.finish()
            return TrainedRun(
                **vars(read_run_metrics(out)),
                out=str(out),
                batch_size=run.batches.batch_size,
                splits=list(run.splits),
                skipped=[str(b) for b in run.bad],
                start=run.start,
            )


def prepare(s: Train, out: Path, accelerator: Accelerator) -> Run:
    """Data, model and optimiser of a run, in the state of its last checkpoint where it is resumed.

    Recipe and record of the run are written.

    Args:
        s: the recipe.
        out: the run folder, locked.
        accelerator: devices, precision and processes.

    Raises:
        ConfigError, DataError: as `train`.
    """
    splits, bad = read_splits(s)
    used = [name for name in splits if s.test or name != "test"]
    paths = [path for name in used for path in splits[name].paths]
    contents = fingerprints(paths, accelerator)
    classes = splits["train"].classes
    set_seed(s.seed)
    pretrained = s.pretrained and s.init_from is None
    model = create_model(
        s.method, s.backbone, len(classes), s.image_size, pretrained, s.backbone_args or None, **s.options
    )
    start = init_from(model, s.init_from) if s.init_from is not None else None
    adapt(model, **{name: getattr(s, name) for name in ADAPTATIONS}, device=accelerator.device)
    preprocessing = make_preprocessing(s, model)
    group = accelerator.num_processes * s.accumulate
    batches = TrainBatches(len(splits["train"]), s.batch_size, group, s.seed, s.repeats)
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as the launcher tells
    loader = train_loader(train_images(s, splits["train"], preprocessing, copies), batches, s.workers)
    watched = {
        name: accelerator.prepare(make_loader(splits[name], eval_transform(preprocessing), s.batch_size, s.workers))
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
    accelerator.wait_for_everyone()  # every process has looked at `out` before the first writes to it
    if accelerator.is_main_process:
        write_text(out / RECIPE, to_recipe(s))
        write_text(out / BAD_IMAGES, "".join(f"{b}\n" for b in bad))
        write_json(out / RUN, run_record(s, accelerator.device, accelerator.num_processes, data_hash))
    named = {"name": out.name}
    shown = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(s).items()}
    accelerator.init_trackers("glsim", shown, {"trackio": named, "wandb": named})
    names = read_class_names(s.class_names, classes) if s.class_names is not None else {}
    about = {
        **({"class_names": {label: name._asdict() for label, name in names.items()}} if names else {}),
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
    with reading(out / CHECKPOINT, out):
        history, step, sums = _reached(state, s.epochs * batches.steps, accelerator.num_processes)
    return Run(
        out=out,
        accelerator=accelerator,
        splits=splits,
        bad=bad,
        preprocessing=preprocessing,
        batches=batches,
        loader=loader,
        watched=watched,
        mixing=batch_mixing(s.mixup, s.cutmix, len(classes)),
        model=model,
        wrapped=wrapped,
        ema=ema,
        final=final,
        optimizer=optimizer,
        schedule=schedule,
        parts=parts,
        data_hash=data_hash,
        about=about,
        start=start,
        history=history,
        step=step,
        tally=Tally(accelerator, sums),
    )


def _reached(state: dict[str, Any], steps: int, processes: int) -> tuple[list[Epoch], int, list[float] | None]:
    """The epochs, steps and sums that a checkpoint tells of; an error that `reading` knows where it tells nonsense."""
    if not state:
        return [], 0, None
    step, sums, history = state["step"], state["tally"], [Epoch(**row) for row in state["history"]]
    if not isinstance(state["history"], list) or type(step) is not int or not 0 <= step <= steps:
        raise ValueError(f"step is {step!r}, of {steps}")
    numbers = [*sums, *(value for row in history for value in vars(row).values() if value is not None)]
    if len(sums) != 3 * processes + 1 or not all(type(value) in (int, float) for value in numbers):
        raise ValueError("history and tally are not those of a run")
    return history, step, sums


def fit(s: Train, run: Run, progress: bool) -> None:
    """The loop: from the step that `run` has reached to the last one.

    Args:
        s: the recipe.
        run: as `prepare` made it; changed in place.
        progress: draw a progress bar.

    Raises:
        Interrupted: after SIGINT or SIGTERM, at the end of a step, the state saved.
        Diverged: when the loss is no longer a number.
    """
    accelerator, batches, model = run.accelerator, run.batches, run.wrapped
    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds between looks; a log file needs fewer
    total, quiet = s.epochs * batches.steps, not (progress and accelerator.is_main_process)
    with (
        stop_signal(accelerator) as stop,
        explain_failures(batches, s.workers),
        tqdm(total=total, initial=run.step, unit="step", disable=quiet, mininterval=often) as bar,
    ):
        for epoch in range(run.step // batches.steps, s.epochs):
            batches.epoch, batches.start = epoch, run.step % batches.steps
            model.train()
            accelerator.unwrap_model(model).start_epoch(epoch)
            for part, (images, labels) in enumerate(read(run.loader)):
                # All randomness follows from seed, step and image: a resumed run repeats the undisturbed one.
                torch.manual_seed(mix(s.seed, run.step, part % s.accumulate, accelerator.process_index))
                run.schedule.step_update(run.step)
                images, labels = run.mixing(images, labels)
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        output = model(images)
                        loss = objective(output, labels, s.label_smoothing, s.focal)
                    accelerator.backward(loss)
                    norm = None
                    if accelerator.sync_gradients and s.clip_grad:
                        norm = accelerator.clip_grad_norm_(model.parameters(), s.clip_grad)
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                run.tally.add(output.logits, labels, loss, run.step, norm)
                if not accelerator.sync_gradients:
                    continue
                if run.ema is not None:
                    run.ema.update(accelerator.unwrap_model(model), step=run.step)
                run.step += 1
                bar.update()
                if run.step % 10 == 0:  # each look waits for the device
                    run.tally.check(batches, run.splits["train"], s.lr)
                    bar.set_description(f"epoch {epoch + 1}/{s.epochs}", refresh=False)
                    bar.set_postfix_str(str(run.tally), refresh=False)
                stopped, inside = stop.heard(), run.step % batches.steps != 0
                if inside and (stopped or (s.save_steps and run.step % s.save_steps == 0)):
                    save_state(s, run)
                if inside and stopped:
                    raise Interrupted(_stopped(run, total))
            finish_epoch(s, run, epoch)
            save_state(s, run)
            if stop.heard():  # also after the last epoch: who runs several must hear of it
                raise Interrupted(_stopped(run, total))


def finish_epoch(s: Train, run: Run, epoch: int) -> None:
    """Measure the model after an epoch, counted from 0, and write bundle, log and curve."""
    accelerator, out = run.accelerator, run.out
    run.tally.check(run.batches, run.splits["train"], s.lr)
    if accelerator.num_processes > 1:  # the first one's buffers (batch norm's means, ..): what is measured is saved
        for buffer in run.final.buffers():
            broadcast(buffer)
    answering, classes = merged(run.final), run.splits["train"].classes
    lr = max(g["lr"] for g in run.optimizer.param_groups)
    means = run.tally.means()
    measured = {}
    for name, images in run.watched.items():
        # The test split is measured once, after the last epoch; nothing is chosen by it.
        if name == "val" or epoch + 1 == s.epochs:
            found = evaluate(answering, images, len(classes), accelerator)
            measured[name] = found.summary(classes)
            if name == "test" and accelerator.is_main_process:
                with writing(out):
                    write_text(out / PREDICTIONS, predictions_table(run.splits[name], found, s.data))
    top1 = {f"{name}_top1": summary.top1 for name, summary in measured.items()}
    row = Epoch(epoch=epoch + 1, step=run.step, lr=lr, **means._asdict(), **top1)
    run.history.append(row)
    accelerator.log(document(row), run.step)
    run.tally = Tally(accelerator)
    if accelerator.is_main_process:
        metrics = document(RunMetrics(**vars(row), val=measured.get("val"), test=measured.get("test")))
        with writing(out):
            save(answering, out, list(classes), preprocessing=run.preprocessing, metrics=metrics, **run.about)
            write_text(out / LOG, "".join(json.dumps(document(r)) + "\n" for r in run.history))
            if epoch + 1 == s.epochs or time.monotonic() - run.curve_drawn >= CURVE_SECONDS:
                draw_curve(run.history, out / CURVE)
                run.curve_drawn = time.monotonic()


def save_state(s: Train, run: Run) -> None:
    """Write the checkpoint from which the run goes on; Diverged where there is nothing worth going on from."""
    run.tally.check(run.batches, run.splits["train"], s.lr)
    done = {"step": run.step, "history": [document(row) for row in run.history], "tally": run.tally.sums()}
    what = {"settings": plain_values(s), "split_hash": run.data_hash, **done}
    save_checkpoint(run.accelerator, run.out, what, run.parts)


def _stopped(run: Run, total: int) -> str:
    go_on = f"glsim train --recipe {run.out / RECIPE} --resume"
    return f"interrupted after step {run.step} of {total}, saved; go on with {go_on}"


@contextmanager
def explain_failures(batches: TrainBatches, workers: int) -> Iterator[None]:
    """Inside, two errors of torch about settings that do not suit model or machine say what to change in them.

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


def check_out(s: Train, out: Path) -> None:
    """Refuse a run folder that is in use: a run is never overwritten, and only resumed with the settings it began with.

    Raises ConfigError, naming what to do, or the settings that are others.
    """
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
        before = plain_values(Train(**saved))  # settings of later versions: their defaults
    changed = [f"{k}={v!r} (was {before[k]!r})" for k, v in plain_values(s, *WITHOUT_EFFECT).items() if v != before[k]]
    if changed:
        raise ConfigError(
            f"{out} was started with other settings: {printable(', '.join(changed))}; go on with the old ones, or "
            f"start a new run with another --out, from these weights with --init-from {out}"
        )
