"""Files of a run folder beside the bundle, written and read back; the origin of a run's weights."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from glsim.checkpoints.bundle import METRICS_FILE, WHERE_FROM, read_config
from glsim.checkpoints.card import UNKNOWN
from glsim.data.catalog import SETS
from glsim.environment import environment
from glsim.evaluation.evaluate import Summary
from glsim.files import csv_plain, one_line, read_json, read_text
from glsim.interpret.drawing import save_figure
from glsim.models.base import Model
from glsim.training.config import Train
from glsim.types import DataError, optional

RECIPE = "train.yaml"  # the settings of the run, all of them
RUN = "run.json"  # seed, split hash, and the machine and versions of every start
LOG = "log.jsonl"  # a line an epoch
CURVE = "curve.png"  # loss and accuracy over the epochs
BAD_IMAGES = "bad_images.txt"  # files that cannot be read
TOLD = ("epochs", "optimizer", "lr")  # settings that the config of the bundle repeats
PREDICTIONS = "predictions_test.csv"  # the answer for every test image


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A row of the log: an epoch, and the accuracies after it."""

    epoch: int  # from 1
    step: int  # steps done
    lr: float  # the highest of all parameters
    train_loss: float
    train_top1: float
    images_per_second: float
    seconds: float
    val_top1: float | None = optional()  # where there is a val split
    test_top1: float | None = optional()  # of the last epoch, where test is measured


@dataclass(frozen=True, kw_only=True)
class RunMetrics(Epoch):
    """What `metrics.json` of a run holds: the last epoch, with all that was measured after it."""

    val: Summary | None = optional()
    test: Summary | None = optional()


@dataclass(frozen=True)
class Measured:
    """What runs are compared by."""

    count: int
    correct: int
    top1: float
    per_class_mean: float


def read_run_metrics(out: Path) -> RunMetrics:
    """`metrics.json` of a run; DataError where it is damaged, FileNotFoundError where it is not there."""
    values = read_json(out / METRICS_FILE)
    try:
        measured = {name: Summary(**_known(Summary, values[name])) for name in ("val", "test") if name in values}
        return RunMetrics(**_known(RunMetrics, values) | measured)
    except (TypeError, AttributeError) as error:
        raise DataError(f"{out / METRICS_FILE} is not what training writes: {one_line(error)}") from error


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def read_measured(value: Any) -> Measured | None:
    """The counts and accuracies of a measurement in a JSON file; None where that is something else."""
    names = [f.name for f in dataclasses.fields(Measured)]
    if not isinstance(value, dict) or not all(isinstance(value.get(name), int | float) for name in names):
        return None
    return Measured(**{name: value[name] for name in names})


def read_predictions(folder: Path, test: Measured) -> dict[str, tuple[str, str]]:
    """Label and prediction of every test image of a run, by its path.

    Raises DataError where they are not there, or do not agree with `test`, what the run's metrics say.
    """
    file = folder / PREDICTIONS
    try:
        lines = csv.DictReader(io.StringIO(read_text(file), newline=""))
        rows = [{name: csv_plain(cell) for name, cell in row.items()} for row in lines]
        answers = {row["path"]: (row["label"], row["prediction"]) for row in rows}
    except FileNotFoundError:
        raise DataError(f"{folder} has no {PREDICTIONS}: it was trained by an earlier glsim; train again") from None
    except (OSError, UnicodeDecodeError, AttributeError, KeyError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error!r}") from error
    right = sum(label == prediction for label, prediction in answers.values())
    if (right, len(answers)) != (test.correct, test.count):
        said = f"{test.correct} of {test.count}"
        raise DataError(f"{file} has {right} of {len(answers)} images right, {METRICS_FILE} beside it {said}")
    return answers


def run_record(s: Train, device: torch.device, processes: int, data_hash: str) -> dict[str, Any]:
    """The content of `run.json`: seed, split hash, and the conditions under which the run was started and resumed.

    Args:
        s: the recipe.
        device: where it trains.
        processes: how many train it.
        data_hash: of images, classes and splits.

    Raises:
        DataError: where the record of a resumed run is damaged.
    """
    file = Path(s.out) / RUN
    before = read_json(file).get("starts") if s.resume and file.exists() else []
    if not isinstance(before, list):
        raise DataError(f"{file} is damaged: it has no list of starts; remove it")
    start = {**environment(device), "processes": processes, "precision": s.precision}
    return {"seed": s.seed, "split_hash": data_hash, "starts": [*before, start]}


def provenance(s: Train, model: Model, step: int) -> dict[str, Any]:
    """What the config of a run's bundle says of the origin of its weights and of the licences of what went into them.

    Args:
        s: the recipe.
        model: as it was made.
        step: images of an optimiser step.
    """
    start, licence = "nothing", "none, trained from nothing"
    if s.init_from is not None:
        start, licence = Path(s.init_from).name, UNKNOWN
        if Path(s.init_from).is_dir():
            licence = read_config(Path(s.init_from)).licence.get("model", UNKNOWN)
    elif s.pretrained and not WHERE_FROM & set(s.backbone_args):
        cfg = model.backbone.net.pretrained_cfg
        start, licence = cfg.get("hf_hub_id") or model.config.backbone, cfg.get("license") or UNKNOWN
    elif s.pretrained:
        start, licence = "weights named in backbone_args", UNKNOWN
    named = SETS[s.dataset].licence if s.dataset is not None else UNKNOWN
    return {
        "training": {"start": start, **{n: getattr(s, n) for n in TOLD}, "batch_size": step, "seed": s.seed},
        "licence": {"data": s.data_licence or named, "backbone": licence},
    }


def draw_curve(history: Sequence[Epoch], path: Path) -> None:
    """Loss and accuracy over the epochs, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot([row.epoch for row in history], [row.train_loss for row in history], marker=".", label="train")
    loss.set(xlabel="epoch", ylabel="loss", title="Loss")
    for name in ("train", "val", "test"):
        values = [(row.epoch, getattr(row, f"{name}_top1")) for row in history]
        points = [(epoch, 100 * top1) for epoch, top1 in values if top1 is not None]
        if points:
            accuracy.plot(*zip(*points, strict=True), marker="." if len(points) > 1 else "*", label=name)
    accuracy.set(xlabel="epoch", ylabel="top-1, %", title="Accuracy", ylim=(0, 101))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
