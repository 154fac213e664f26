"""Speed of models, timed in turn so that a busy moment falls on all of them; memory in other processes.

A row is one method on one backbone, image size, batch size and dtype, compiled or not; or a trained bundle. What cannot
be built or run becomes a row that says why, and the others go on.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from glsim.checkpoints.bundle import METRICS_FILE, load, preprocessing_of
from glsim.checkpoints.config import read_metrics
from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.config import Bench
from glsim.data.image_files import find_images
from glsim.data.limits import limited, sharing
from glsim.data.loaders import ImageDataset
from glsim.data.readers import read_data
from glsim.data.transforms import Preprocessing, eval_transform
from glsim.environment import environment, pick_device
from glsim.evaluation.plots import save_figure
from glsim.files import make_folder, one_line, printable, write_json
from glsim.inference.predictor import answers
from glsim.models import create_model
from glsim.models.backbone import Model, StagedModel
from glsim.models.losses import objective
from glsim.training import throughput
from glsim.types import ConfigError, DataError, GlsimError

AS_EXPORTED = ("float32", False, "cpu")  # dtype of the images, compiled, device
FAILURES = (GlsimError, RuntimeError, OSError)  # of one row: a combination that does not fit, too little memory, ..


class Job(NamedTuple):
    """What a row measures."""

    method: str  # with its options: glsim:crop_size=112; or a source
    backbone: str  # "" and 0 for a source: it has its own, which its row tells
    image_size: int
    batch_size: int
    dtype: str
    compile: bool


Row = dict[str, Any]
Work = Callable[[], object]
RATIOS = {
    "latency": "latency_ms",
    "training": "training_ms",
    "memory": "memory_mib",
    "training_memory": "training_memory_mib",
}


@limited
def run(s: Bench, progress: bool = True) -> dict[str, Any]:
    """The verb: {"rows": [..], "ratio": [..] or None, "environment": {..}}; exit code 1 where no row could be measured.

    A row holds the fields of its `Job`, `parameters`, `latency_ms` (median of the rounds, for a whole batch),
    `latency_quartiles_ms`, `images_per_second`, the first two for `training`, `memory_mib` and `training_memory_mib`,
    and `loaded_images_per_second` with `data`; or `error`. That of a source has `accuracy` (test top-1 out of its
    metrics.json) where it was measured. With `s.loader` it is what `glsim.training.throughput:run` returns.
    """
    if s.loader is not None:
        return throughput.run(s, progress)
    device = pick_device(s.device)
    if s.sources and s.data is not None:
        read_data(s.data)  # what is not there is no failure of a row
    compiled = {"no": [False], "yes": [True], "both": [False, True]}[s.compile]
    networks = [("", 0)] if s.sources else product(s.backbones, s.sizes)
    settings = [(*net, *rest) for net, rest in product(networks, product(s.batch_sizes, s.dtypes, compiled))]
    names = s.sources or s.methods
    loads = s.data is not None and not s.sources
    rounds = (s.warmup + s.repeats) * (1 + s.training) + s.memory + loads
    rows: list[Row] = []
    with tqdm(total=len(settings) * len(names) * rounds, unit="turn", disable=not progress) as bar:
        for setting in settings:
            bar.set_description(" ".join(map(printable, filter(None, setting[:4]))))
            rows += measure([Job(name, *setting) for name in names], s, device, bar.update)
    alike = ("batch_size", "dtype", "compile") if s.sources else Job._fields[1:]
    ratio = ratios(rows, s.against, alike) if s.against is not None else None
    result: dict[str, Any] = {"rows": rows, "ratio": ratio, "environment": environment(device)}
    if all("error" in row for row in rows):
        result["exit_code"] = 1
    if s.out is not None:
        out = make_folder(s.out)
        write_json(out / "bench.json", result)
        if s.sources:
            draw_accuracy(rows, out / "accuracy.png")
        else:
            draw(rows, "image_size", "batch_size", out / "cost.png")
            draw(rows, "batch_size", "image_size", out / "throughput.png")
    return result


def measure(jobs: list[Job], s: Bench, device: torch.device, tick: Callable[[], object]) -> list[Row]:
    """A row for each of `jobs`, which differ in the method alone: memory one by one, then times in turn."""
    rows: dict[Job, Row] = {job: job._asdict() for job in jobs}
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
                row.update(peaks_elsewhere(job, s))
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
                    row["loaded_images_per_second"] = loaded(models[job], job, s, device)
                tick()
    return list(rows.values())


@contextmanager
def noted(row: Row) -> Iterator[None]:
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
    """Seconds of every turn after the first `warmup` rounds; or why a work failed, which then has no further turns."""
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


def ratios(rows: list[Row], against: str, alike: tuple[str, ...] = Job._fields[1:]) -> list[Row]:
    """What every other method took, divided by what `against` took where both are `alike`: medians and peaks."""
    fine = [row for row in rows if "error" not in row]
    found = []
    for row, base in product(fine, fine):
        if base["method"] == against != row["method"] and all(row[k] == base[k] for k in alike):
            parts = {name: row[key] / base[key] for name, key in RATIOS.items() if key in row and key in base}
            found.append({**{k: row[k] for k in Job._fields}, "against": against, **parts})
    return found


# --- one model --------------------------------------------------------------------------------------------------------


def build(job: Job, s: Bench) -> Model:
    """The model of a row: a trained one out of a source, else one whose weights are random.

    Raises ConfigError for an exported graph that is to be anything but what it is, and for a compiled model with a
    margin, whose two passes `answers` calls one by one.
    """
    model = load(job.method) if job.method in s.sources else untrained(job, s)
    if isinstance(model, GraphModel) and (job.dtype, job.compile, pick_device(s.device).type) != AS_EXPORTED:
        raise ConfigError(f"{job.method} is exported and runs as it is: --device cpu --dtypes float32 --compile no")
    if isinstance(model, StagedModel) and model.margin is not None and job.compile:
        raise ConfigError(f"{job.method} answers early (margin {model.margin:g}), which is not compiled: --compile no")
    return model


def untrained(job: Job, s: Bench) -> Model:
    """The method of a row with its options, random weights."""
    method, _, given = job.method.partition(":")
    options = {}
    for part in re.split(r",(?![^[]*\])", given) if given else []:  # not the comma of crop_size=[96,128]
        key, _, value = part.partition("=")
        options[key.strip()] = yaml.safe_load(value)
    torch.manual_seed(0)
    return create_model(method, job.backbone, s.num_classes, job.image_size, False, s.backbone_args, **options)


def about_source(source: str, model: Model) -> Row:
    """What a trained model says of itself: backbone, side of its images (height and width, if they differ), accuracy.

    Raises DataError for numbers that cannot be read.
    """
    height, width = model.config["image_size"]
    row = {"backbone": model.config["backbone"], "image_size": height if height == width else [height, width]}
    folder = Path(source.removeprefix("local-dir:"))
    test = ((read_metrics(folder / METRICS_FILE) if folder.is_dir() else None) or {}).get("test")
    return row | {"accuracy": test["top1"]} if isinstance(test, dict) and "top1" in test else row


def test_images(model: Model, s: Bench) -> Tensor:
    """`s.images` images, drawn evenly from the test split of `s.data` as `model` was trained, prepared for it."""
    seen = {"split_seed": 0, "test_fraction": 0.2} | (model.config.get("data") or {})
    return _test_images(s.data, seen["split_seed"], seen["test_fraction"], preprocessing_of(model), s.images, s.workers)


@lru_cache(maxsize=2)
def _test_images(
    data: str, seed: int, fraction: float, preprocessing: Preprocessing, count: int, workers: int
) -> Tensor:
    splits = read_data(data, seed=seed, test_fraction=fraction)
    found = splits["test"].paths if "test" in splits else ()
    if len(found) < count:
        raise DataError(f"{data} has {len(found)} test images, {count} were asked for; fewer: --images")
    paths = [found[i * len(found) // count] for i in range(count)]
    dataset: Any = ImageDataset(paths, eval_transform(preprocessing))
    start = sharing() if workers else None
    return torch.cat([images for images, _ in DataLoader(dataset, 32, num_workers=workers, worker_init_fn=start)])


def answering(model: Model, job: Job, device: torch.device, images: Tensor | None = None) -> Work:
    """An answer to a batch, weights and images of the dtype, in inference mode; waits for the device.

    With `images` (.., 3, H, W) an answer to each whole batch of them, second passes regrouped as `predict` does it;
    else the batch is noise.
    """
    dtype = getattr(torch, job.dtype)
    net = prepared(model.eval().to(device, dtype), job)
    if images is None:
        images = torch.randn(job.batch_size, 3, *model.config["image_size"])
    batches = [batch for batch in images.to(device, dtype).split(job.batch_size) if len(batch) == job.batch_size]

    @torch.inference_mode()
    def work() -> None:
        for _ in answers(net, batches):
            pass
        wait(device)

    return work


def training(model: Model, job: Job, device: torch.device) -> Work:
    """A step on a batch with arbitrary labels: forward (autocast where the dtype is not float32), backward, SGD."""
    dtype = getattr(torch, job.dtype)
    net = prepared(model.train().to(device), job)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    images = torch.randn(job.batch_size, 3, *model.config["image_size"], device=device)
    labels = torch.arange(job.batch_size, device=device) % model.config["num_classes"]

    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)

    return work


def prepared(model: Model, job: Job) -> Any:
    """The model, compiled where the row says so."""
    return torch.compile(model) if job.compile else model


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def loaded(model: Model, job: Job, s: Bench, device: torch.device) -> float:
    """Images a second of one pass over the images of `s.data`, at most `s.repeats` batches: read, prepared, answered.

    The start of the processes that load is part of it.
    """
    dtype = getattr(torch, job.dtype)
    net = prepared(model.eval().to(device, dtype), job)
    paths = find_images(str(s.data))[: s.repeats * job.batch_size]
    dataset: Any = ImageDataset(paths, eval_transform(preprocessing_of(model)))
    share = sharing() if s.workers else None
    start = time.perf_counter()
    with torch.inference_mode():
        for images, _ in DataLoader(dataset, job.batch_size, num_workers=s.workers or 0, worker_init_fn=share):
            net(images.to(device, dtype))
        wait(device)
    return len(paths) / (time.perf_counter() - start)


# --- memory -----------------------------------------------------------------------------------------------------------

CHILD = (
    "import json, sys; from glsim.evaluation.speed import peaks_here; "
    "print(json.dumps(peaks_here(*json.loads(sys.argv[1]))))"
)


def peaks_elsewhere(job: Job, s: Bench) -> Row:
    """`peaks_here` in a process of its own, which inherits nobody's peak; raises RuntimeError with its last words."""
    names = ("sources", "num_classes", "backbone_args", "device")
    given = [job._asdict(), {name: getattr(s, name) for name in names}]
    words = [sys.executable, "-c", CHILD, json.dumps([*given, s.training])]
    child = subprocess.run(words, capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines()
        why = said[-1] if said else f"exit status {child.returncode}"
        raise RuntimeError(f"while measuring memory: {why}" + " (out of memory?)" * (child.returncode == -9))
    return json.loads(child.stdout.splitlines()[-1])


def peaks_here(job: Row, settings: Row, train: bool) -> Row:
    """MiB that the model of `job` and a batch took at their peak: `memory_mib`, `training_memory_mib`.

    On an accelerator what was allocated; on a CPU what became resident after the libraries were in.
    """
    s, wanted = Bench(**settings), Job(**job)
    device = pick_device(s.device)
    if wanted.method.endswith(".onnx"):
        import_module("onnxruntime")  # a library too
    before = resident(peak=False) if device.type == "cpu" else 0
    model = build(wanted, s)
    found = {}
    kinds = {"memory_mib": answering, "training_memory_mib": training}
    for name, prepare in list(kinds.items())[: 1 + (train and not isinstance(model, GraphModel))]:
        work = prepare(model.float(), wanted, device)
        work()  # the optimiser's buffers and a compiler's own memory come with the first one
        forget_peak(device)
        work()
        found[name] = (peak(device) - before) / 2**20
    return found


def peak(device: torch.device) -> int:
    """The most bytes held since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident(peak=True)


def forget_peak(device: torch.device) -> None:
    """Count from here on. Where the system cannot, the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now


STATUS = Path("/proc/self/status")


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at most.

    Not `ru_maxrss` where there is a choice: Linux starts it at what the parent held when it started this process.
    """
    if STATUS.exists():
        name = "VmHWM" if peak else "VmRSS"
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, of this process alone
    return most if sys.platform == "darwin" else most * 1024


# --- for people -------------------------------------------------------------------------------------------------------

COLUMNS = {  # key of a row: head, how a number is written
    "accuracy": ("top-1", ".1%"),
    "latency_ms": ("ms", ",.1f"),
    "images_per_second": ("images/s", ",.1f"),
    "loaded_images_per_second": ("loaded/s", ",.1f"),
    "training_ms": ("train ms", ",.1f"),
    "memory_mib": ("MiB", ",.0f"),
    "training_memory_mib": ("train MiB", ",.0f"),
}


def as_text(result: dict[str, Any]) -> str:
    """The rows as a table: what all share above it, medians with half the distance of the quartiles, ratios."""
    rows, compared = result["rows"], result["ratio"] or []
    varying = [k for k in Job._fields if k == "method" or len({str(row[k]) for row in rows}) > 1]
    keys = [k for k in COLUMNS if any(k in row for row in rows)]
    parts = [k for k in RATIOS if any(k in ratio for ratio in compared)]
    heads = [*varying, *(COLUMNS[k][0] for k in keys), *(f"x {k}" for k in parts)]
    table = [[head.replace("_", " ") for head in heads]]
    for row in rows:
        cells = [str(row[k]) for k in varying]
        if "error" in row:
            table.append(cells)
            continue
        for key in keys:
            cells.append(format(row[key], COLUMNS[key][1]) if key in row else "")
            if key.endswith("_ms") and key in row:
                low, high = row[key.replace("_ms", "_quartiles_ms")]
                cells[-1] += f" ±{(high - low) / 2:,.1f}"
        ratio: Row = next((r for r in compared if all(r[k] == row[k] for k in Job._fields)), {})
        table.append(cells + [f"{ratio[k]:.3f}" if k in ratio else "" for k in parts])
    widths = [max(len(line[i]) for line in table if i < len(line)) for i in range(len(heads))]
    failures = ["", *(f"failed: {row['error']}" if "error" in row else "" for row in rows)]
    lines = []
    for line, failure in zip(table, failures, strict=True):
        padded = [cell.ljust(widths[i]) if i < len(varying) else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        lines.append("  ".join([*padded, failure]).rstrip())
    shared = ", ".join(f"{k.replace('_', ' ')} {rows[0][k]}" for k in Job._fields if k not in varying)
    against = f"; x: divided by {compared[0]['against']}" if compared else ""
    head = f"{result['environment']['device']}; of a batch: median ± half the distance of the quartiles{against}"
    return "\n".join([head, *[shared] * bool(shared), "", *lines])


def draw(rows: list[Row], along: str, apart: str, path: Path) -> None:
    """PNG: cost of an image along the image size, or images a second along the batch; a panel per value of `apart`."""
    cost = along == "image_size"
    rows = [row for row in rows if "error" not in row]
    panels = sorted({row[apart] for row in rows})
    if not panels:
        return
    names = ["method", *(k for k in ("backbone", "dtype", "compile") if len({row[k] for row in rows}) > 1)]
    figure = Figure(figsize=(1.2 + 3.8 * len(panels), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=cost, squeeze=False)[0]
    for axes, value in zip(all_axes, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row[apart] == value:
                label = ", ".join(("compiled" if row[k] else "eager") if k == "compile" else row[k] for k in names)
                rate = row["images_per_second"]
                lines.setdefault(label, []).append((row[along], 1000 / rate if cost else rate))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        places = sorted({row[along] for row in rows})
        axes.set(xscale="log", yscale="log" if cost else "linear")
        axes.set_xticks(places, [str(place) for place in places])
        if cost:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set(xlabel=along.replace("_", " "), title=f"{apart.replace('_', ' ')} {value}")
        axes.grid(alpha=0.3)
        if not cost:
            axes.set_ylim(bottom=0)
    all_axes[0].set_ylabel("ms an image" if cost else "images a second")
    all_axes[-1].legend()
    save_figure(figure, path)


def draw_accuracy(rows: list[Row], path: Path) -> None:
    """PNG: test accuracy against images a second, a point a bundle with its name; a panel per batch size."""
    rows = [row for row in rows if "accuracy" in row and "error" not in row]
    panels = sorted({row["batch_size"] for row in rows})
    if not panels:
        return
    several = [k for k in ("dtype", "compile") if len({row[k] for row in rows}) > 1]
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, batch in zip(all_axes, panels, strict=True):
        for row in (r for r in rows if r["batch_size"] == batch):
            place = row["images_per_second"], 100 * row["accuracy"]
            more = ["compiled" * row[k] if k == "compile" else row[k] for k in several]
            name = ", ".join(filter(None, [Path(row["method"]).name, *more]))
            axes.plot(*place, "o", color="tab:blue")
            axes.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="images a second", title=f"batch size {batch}")
        axes.set_xlim(0, 1.4 * max(row["images_per_second"] for row in rows))  # the names stand right of their points
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("test top-1, %")
    save_figure(figure, path)
