"""Bulk prediction over very many images with Ray Data: Parquet out, part by part.

The list of images is cut into parts. A worker is an actor that holds the model; it answers one part at a time and
writes it. Ray gives the part of a killed worker to another one. A job that was stopped goes on with the parts that are
not finished (`bulk_files`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import psutil
import torch
from PIL import Image
from tqdm import tqdm

from glsim.checkpoints.bundle import load
from glsim.data.box_options import Boxed
from glsim.data.detections import BoxPaths, find_boxes
from glsim.data.images import BadImage
from glsim.data.limits import MAX_MEGAPIXELS
from glsim.files import one_line, printable, shorten
from glsim.inference import bulk_files as files
from glsim.inference.predictor import Prediction, Predictor
from glsim.models.base import Model
from glsim.types import ConfigError, DataError, GlsimError

TRIES = 5  # times a part goes to another worker because one died over it, before the job gives up


@dataclass(frozen=True, kw_only=True)
class BulkPrediction:
    """What `predict_bulk` returns."""

    engine: str = "ray"
    source: str
    out: str
    images: int
    parts: int
    parts_before: int  # parts that were there, finished
    parts_again: dict[str, str]  # name of a part that was made again: what was wrong with the one that was there
    answered: int
    errors: int  # images that could not be read
    workers: int
    seconds: float
    images_per_second: float  # of this run
    steady_images_per_second: float | None  # since the first part was done; None where there is one part or none


def predict_bulk(
    source: str | Path,
    images: Sequence[str],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    top_k: int = 5,
    flip: bool = False,
    embedding: str | None = None,
    address: str | None = None,
    part_size: int = 1000,
    batch_size: int = 32,
    workers: int = 2,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
    **boxed: Unpack[Boxed],
) -> BulkPrediction:
    """Answer very many images with Ray; the answers are Parquet files in `out`, with the columns of `schema`.

    Finished parts stay, whatever happens, and the same call goes on.

    Args:
        source: what `glsim.load` takes.
        images: files, folders, globs, URIs of files or folders, and lists (`find_paths`).
        out: folder, or URI of one in an object store.
        options: options of the method to change.
        address: of a Ray cluster to join (auto, ray://HOST:10001); by default one is started on this machine.
        part_size: images in each Parquet file.
        workers: actors, each with the model and one core.
        max_megapixels: larger images are bad files.
        progress: draw a progress bar.
        boxed: see `glsim.data.box_options:Boxed`; a row is then one box of an image.

    The others are those of `Predictor`.

    Raises:
        ConfigError: for an option that does not fit, an `out` that holds another job, or where Ray is not installed.
        DataError: for images or a model that are not there.
        GlsimError: when Ray gave up.
    """
    ray = need_ray()
    paths: Sequence[Any] = files.find_paths(images)
    if boxed.get("boxes") is not None:
        paths = find_boxes(paths, boxed)
    model = load(source, **options or {})
    asked: dict[str, Any] = {"top_k": top_k, "flip": flip, "embedding": embedding}
    predictor = Predictor(model, **asked, batch_size=batch_size, device="cpu")
    predictor(Image.new("RGB", (64, 64)))  # says what is wrong with the settings, before any worker
    folder = files.folder_uri(str(out))
    parts = [paths[i : i + part_size] for i in range(0, len(paths), part_size)]
    start, ticks = time.perf_counter(), []  # when a part was done in this run, and its images
    settings = {"options": dict(options or {}), **asked, "part_size": part_size}
    settings |= {"boxes": True} if isinstance(paths, BoxPaths) else {}
    job = files.describe_job(model, paths, settings)
    with files.lock_folder(folder, job):
        done, again = files.finished_parts(folder, parts, job)
        errors = sum(done.values())
        todo = [{"part": i, **_columns(part)} for i, part in enumerate(parts) if i not in done]
        before = sum(len(parts[i]) for i in done)
        with (
            cluster(ray, address, workers) if todo else nullcontext(),
            tqdm(total=len(paths), initial=before, unit="image", disable=not progress) as bar,
        ):
            predicting = {**asked, "batch_size": batch_size, "max_megapixels": max_megapixels}
            try:
                for batch in answer_parts(ray, model, folder, todo, workers, device, predicting) if todo else ():
                    ticks.append((time.perf_counter() - start, int(batch["images"].sum())))
                    errors += int(batch["errors"].sum())
                    bar.update(ticks[-1][1])
            except ray.exceptions.RayError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                why = printable(shorten(lines[-1])) if lines else type(error).__name__
                raise GlsimError(
                    f"Ray stopped: {why}; finished parts stay in {out}, the same command goes on"
                ) from error
    seconds = time.perf_counter() - start
    later = sum(count for _, count in ticks[1:])
    return BulkPrediction(
        source=str(source),
        out=str(out),
        images=len(paths),
        parts=len(parts),
        parts_before=len(done),
        parts_again=again,
        answered=len(paths) - errors,
        errors=errors,
        workers=workers,
        seconds=round(seconds, 2),
        images_per_second=round(sum(count for _, count in ticks) / seconds, 2),
        steady_images_per_second=round(later / (ticks[-1][0] - ticks[0][0]), 2) if later else None,
    )


def _columns(part: Sequence[Any]) -> dict[str, Any]:
    """What a worker has to know of the images of a part, or of its boxes."""
    columns: dict[str, Any] = {"paths": list(map(str, part))}
    if isinstance(part, BoxPaths):
        columns["detection_category"] = [part.boxes.category_of(row) for row in range(len(part))]
        columns["detection_confidence"] = [part.boxes.confidence_of(row) for row in range(len(part))]
    return columns


def need_ray() -> Any:
    """The module ray, told to send nothing home; ConfigError says how to get it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters arrives as an exception
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"glsim predict bulk needs Ray Data ({error}): pip install 'glsim[scale]'") from error
    return ray


@contextmanager
def cluster(ray: Any, address: str | None, workers: int) -> Iterator[None]:
    """The cluster at `address`, or one of this machine for as long as it takes. One that runs already stays."""
    if ray.is_initialized():
        yield
        return
    # A worker occupies one core, and Ray's own steps another.
    local = {"num_cpus": workers + 1, "include_dashboard": False} if address is None else {}
    before = set(psutil.Process().children(recursive=True))
    with redirect_stdout(sys.stderr):  # Ray prints there what became of workers, until it is shut down
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # Ray raises bare ones, of a machine too busy to start it in time
            ray.shutdown()
            raise GlsimError(f"no Ray cluster at {address or 'this machine'}: {one_line(error)}") from error
        with end_with_this_process(before):
            try:
                with interrupted_by_sigterm():
                    yield
            finally:
                ray.shutdown()


# Ray's agents outlive by up to a minute a job that is killed; the pipe of this process ends with the job.
WATCH = """
import sys, psutil
sys.stdin.read()
for word in sys.argv[1:]:
    number, created = word.split(":")
    try:
        process = psutil.Process(int(number))
        if process.create_time() == float(created):
            process.kill()
    except psutil.Error:
        pass
"""


@contextmanager
def end_with_this_process(before: set[psutil.Process]) -> Iterator[None]:
    """Inside, what this process has started since `before` ends when it ends, even when it is killed."""
    started = []
    for process in set(psutil.Process().children(recursive=True)) - before:
        with suppress(psutil.Error):
            started.append(f"{process.pid}:{process.create_time()}")
    command = [sys.executable, "-c", WATCH, *started]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        watch.kill()
        watch.communicate()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is, so that Ray is shut down; the handler set by `ray.init` ends in an abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def gpu_share(gpus: float, workers: int) -> float:
    """The share of a GPU that each worker gets, so that all of them find room; several share one where they are more.

    Ray counts GPUs in ten-thousandths.
    """
    if gpus < 1:
        return 0.0
    return int(1e4 / -(-workers // int(gpus))) / 1e4


def answer_parts(
    ray: Any,
    model: Model,
    out: str,
    todo: list[dict[str, Any]],
    workers: int,
    device: str | None,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Have the parts answered by `workers`, with `options` for `Predictor`.

    Yields `images` and `errors` (arrays) of parts as they are finished. The model travels to the workers; their
    machines need neither the bundle nor its folder.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
    wants_gpu = device is None or not device.startswith("cpu")
    gpus = gpu_share(ray.cluster_resources().get("GPU", 0), workers) if wants_gpu else 0.0
    shared = ray.put(model.cpu())  # kept until the last worker is done
    answered = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
        num_cpus=1,
        num_gpus=gpus,
        max_task_retries=TRIES,
        fn_constructor_kwargs={
            "model": shared,
            "out": out,
            "device": device or (None if gpus else "cpu"),
            **options,
        },
    )
    yield from answered.iter_batches(batch_size=None, prefetch_batches=0)


class Worker:
    """An actor of Ray Data: holds the model, answers parts, writes each."""

    def __init__(self, model: Any, out: str, embedding: str | None, **options: Any) -> None:
        if not isinstance(model, Model):  # a reference into Ray's store: this process is the actor's own
            import ray

            model = ray.get(model)
            torch.set_num_threads(1)  # one core a worker; more workers are better than more threads
        self.predictor, self.out, self.embedding = Predictor(model, embedding=embedding, **options), out, embedding

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`part` and `paths` of some parts, and what is told of their boxes -> `part`, `images`, `errors` of each."""
        told = {name: batch[name] for name in batch if name.startswith("detection_")}
        images, errors = [], []
        for i, part in enumerate(batch["part"]):
            more = {name: list(column[i]) for name, column in told.items()}
            count, bad = self.answer(int(part), list(map(str, batch["paths"][i])), more)
            images.append(count)
            errors.append(bad)
        return {"part": batch["part"], "images": images, "errors": errors}

    def answer(self, part: int, paths: list[str], more: Mapping[str, Sequence[Any]] | None = None) -> tuple[int, int]:
        """Write one part, with `more` columns; how many images it has, and how many of them could not be read."""
        import pyarrow as pa
        from pyarrow import parquet

        job = files.read_job(self.out)
        if job is None:
            raise DataError(f"{self.out}: {files.JOB} has gone, which says whose the parts are")
        with suppress(FileNotFoundError, DataError):  # written by a worker that was killed before it could say so
            return len(paths), files.read_part(self.out, part, len(paths), job)
        rows = [files.as_row(path, a) for path, a in zip(paths, self.answers(paths), strict=True)]
        for name, column in (more or {}).items():
            for row, value in zip(rows, column, strict=True):
                row[name] = None if value != value else value  # what is not told comes as NaN
        errors = sum("error" in row for row in rows)
        told = json.dumps({"job": files.job_hash(job), "part": part, "errors": errors}).encode()
        columns = files.schema_of(job).with_metadata({files.OWNER: told})
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows, columns), sink)
        files.write_file(self.out, files.part_name(part), memoryview(sink.getvalue()))
        return len(rows), errors

    def answers(self, paths: list[str]) -> list[Prediction | BadImage]:
        """What there is to say of each image; one of which the model has no answer spoils no other."""
        try:
            return list(self.predictor.stream(paths))
        except DataError as error:
            if len(paths) == 1:
                return [BadImage(paths[0], one_line(error))]
            half = len(paths) // 2
            return self.answers(paths[:half]) + self.answers(paths[half:])
