"""Speed of models, timed in turn so that a busy moment falls on all of them; memory in other processes.

A row is one method on one backbone, image size, batch size and dtype, compiled or not; or a trained bundle. What cannot
be built or run becomes a row that says why, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.data.limits import pixel_limit
from glsim.data.readers import read_data
from glsim.environment import environment, pick_device
from glsim.evaluation.peak_memory import peaks_elsewhere
from glsim.evaluation.plots import draw_accuracy, draw_speed
from glsim.evaluation.speed_settings import SpeedSettings
from glsim.evaluation.workloads import Job, Work, about_source, answering, build, loaded, test_images, training
from glsim.files import document, make_folder, one_line, printable, write_json
from glsim.models.base import Model
from glsim.types import GlsimError, optional

FAILURES = (GlsimError, RuntimeError, OSError)  # of one row: a combination that does not fit, too little memory, ..
SETTINGS = tuple(f.name for f in fields(Job))
ALIKE = SETTINGS[1:]  # what two rows share that are compared; of sources, which have their own network:
ALIKE_SOURCES = ("batch_size", "dtype", "compile")
RATIOS = {
    "latency": "latency_ms",
    "training": "training_ms",
    "memory": "memory_mib",
    "training_memory": "training_memory_mib",
}


@dataclass(frozen=True, kw_only=True)
class SpeedRow(Job):
    """What was measured of one model, or why it could not be."""

    parameters: int | None = optional()  # None: an exported graph does not tell
    accuracy: float | None = optional()  # test top-1 of a source, out of its metrics.json
    memory_mib: float | None = optional()  # at the peak of an answer
    training_memory_mib: float | None = optional()  # at the peak of a training step
    training_ms: float | None = optional()  # median of the rounds, for a whole batch
    training_quartiles_ms: list[float] | None = optional()
    latency_ms: float | None = optional()  # median of the rounds, for a whole batch
    latency_quartiles_ms: list[float] | None = optional()
    images_per_second: float | None = optional()  # answered
    loaded_images_per_second: float | None = optional()  # read, prepared and answered
    error: str | None = optional()


@dataclass(frozen=True, kw_only=True)
class SpeedRatio(Job):
    """What a row took, divided by what the row of `against` took."""

    against: str
    latency: float | None = optional()
    training: float | None = optional()
    memory: float | None = optional()
    training_memory: float | None = optional()


@dataclass(frozen=True)
class SpeedComparison:
    """What `compare_speed` returns."""

    rows: list[SpeedRow]
    ratio: list[SpeedRatio] | None  # with `against`
    environment: dict[str, Any]
    exit_code: int | None = optional()  # 1 where no row could be measured


def compare_speed(s: SpeedSettings, progress: bool = False) -> SpeedComparison:
    """Time models in turn: answers, training steps, images a second, peak memory, and their ratios.

    Args:
        s: what is measured, and how; every setting says what it is.
        progress: draw a progress bar.

    Raises:
        DataError: for `data` that is not there. What goes wrong with a row is its `error`.
    """
    place = pick_device(s.device)
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[s.compile]
    networks: Any = [("", 0)] if s.sources else product(s.backbones, s.sizes)
    shared = [(*net, *rest) for net, rest in product(networks, product(s.batch_sizes, s.dtypes, compiled))]
    names = s.sources or s.methods
    rounds = (s.warmup + s.repeats) * (1 + s.training) + s.memory + (s.data is not None and not s.sources)
    rows: list[SpeedRow] = []
    with pixel_limit(s.max_megapixels):
        if s.sources and s.data is not None:
            read_data(s.data)  # what is not there is no failure of a row
        with tqdm(total=len(shared) * len(names) * rounds, unit="turn", disable=not progress) as bar:
            for values in shared:
                bar.set_description(" ".join(map(printable, filter(None, values[:4]))))
                rows += measure([Job(name, *values) for name in names], s, place, bar.update)
    ratio = ratios(rows, s.against, ALIKE_SOURCES if s.sources else ALIKE) if s.against is not None else None
    nothing = all(row.error is not None for row in rows)
    result = SpeedComparison(rows, ratio, environment(place), 1 if nothing else None)
    if s.out is not None:
        folder = make_folder(s.out)
        write_json(folder / "bench.json", document(result))
        if s.sources:
            draw_accuracy(rows, folder / "accuracy.png")
        else:
            draw_speed(rows, "image_size", "batch_size", folder / "cost.png")
            draw_speed(rows, "batch_size", "image_size", folder / "throughput.png")
    return result


def measure(jobs: list[Job], s: SpeedSettings, device: torch.device, tick: Callable[[], object]) -> list[SpeedRow]:
    """A row for each of `jobs`, which differ in the method alone: memory one by one, then times in turn."""
    rows: dict[Job, dict[str, Any]] = {job: {**vars(job)} for job in jobs}
    models: dict[Job, Model] = {}
    for job, row in rows.items():
        with noted(row):
            models[job] = build(job, s)
            if not isinstance(models[job], GraphModel):
                row["parameters"] = sum(p.numel() for p in models[job].parameters())
            if s.sources:
                row |= about_source(job.method, models[job])
                if s.data is not None:
                    test_images(models[job], s)  # before minutes are spent on the rest
            if s.memory:
                row |= peaks_elsewhere(job, s)
                tick()
    kinds: dict[str, Callable[..., Work]] = {"training": training} if s.training else {}
    kinds["latency"] = answering
    batches = 1
    if s.sources and s.data is not None:
        batches = s.images // jobs[0].batch_size
        kinds["latency"] = lambda model, job, device: answering(model, job, device, test_images(model, s))
    for kind, prepare in kinds.items():
        works: dict[Job, Work] = {}
        for job, row in rows.items():
            if "error" not in row and (kind != "training" or not isinstance(models[job], GraphModel)):
                with noted(row):
                    works[job] = prepare(models[job], job, device)
        for job, times in in_turn(works, s.warmup, s.repeats, tick).items():
            if isinstance(times, Exception):
                rows[job]["error"] = one_line(times)
            else:
                share = 1000 / (batches if kind == "latency" else 1)
                low, median, high = (share * float(t) for t in np.percentile(times, (25, 50, 75)))
                rows[job] |= {f"{kind}_ms": median, f"{kind}_quartiles_ms": [low, high]}
    for job, row in rows.items():
        if "error" not in row:
            row["images_per_second"] = 1000 * job.batch_size / row["latency_ms"]
            if s.data is not None and not s.sources:
                with noted(row):
                    row["loaded_images_per_second"] = loaded(models[job], job, device, s)
                tick()
    return [SpeedRow(**row) for row in rows.values()]


@contextmanager
def noted(row: dict[str, Any]) -> Iterator[None]:
    """What fails inside becomes the `error` of a row."""
    try:
        yield
    except FAILURES as error:
        row["error"] = one_line(error)


def in_turn(
    works: Mapping[Any, Work],
    warmup: int,
    repeats: int,
    tick: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float] | Exception]:
    """Time works round by round, so that a busy moment falls on all of them.

    Args:
        works: by name.
        warmup: rounds that are not counted.
        repeats: rounds that are.
        tick: called after every turn.
        clock: seconds.

    Returns:
        Seconds of every counted turn; or why a work failed, which then has no further turns.
    """
    found: dict[Any, list[float] | Exception] = {name: [] for name in works}
    for turn in range(warmup + repeats):
        for name, work in works.items():
            times = found[name]
            if isinstance(times, list):
                start = clock()
                try:
                    work()
                except FAILURES as error:
                    found[name] = error.with_traceback(None)  # which would keep the tensors of its frames
                if turn >= warmup:
                    times.append(clock() - start)
            tick()
    return found


def ratios(rows: list[SpeedRow], against: str, alike: tuple[str, ...] = ALIKE) -> list[SpeedRatio]:
    """What every other method took, divided by what one took where both are alike: medians and peaks.

    Args:
        rows: measured.
        against: name of the one.
        alike: fields in which two rows have to agree.
    """
    fine = [row for row in rows if row.error is None]
    found = []
    for row, base in product(fine, fine):
        if base.method == against != row.method and all(getattr(row, k) == getattr(base, k) for k in alike):
            both = {name: (getattr(row, key), getattr(base, key)) for name, key in RATIOS.items()}
            parts = {name: a / b for name, (a, b) in both.items() if a is not None and b is not None}
            found.append(SpeedRatio(**{k: getattr(row, k) for k in SETTINGS}, against=against, **parts))
    return found
