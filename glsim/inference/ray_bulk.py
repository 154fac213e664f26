"""Bulk prediction over very many images with Ray Data: Parquet out, part by part.

The list of images is cut into parts. A worker is an actor that holds the model; it answers one part at a time and
renames the finished file to its own name, so a part is there whole or not at all. What a killed worker had in hand Ray
gives to another; a job that was stopped finds its parts there and goes on with the others. A part says in its footer
whose it is; one that does not, or is damaged, is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from glsim.checkpoints.bundle import digest, labels_of, load, preprocessing_of, temperature_of
from glsim.checkpoints.config import MODEL_KEYS
from glsim.config import Predict
from glsim.data.image_files import LISTS, find_images, is_image
from glsim.data.images import EXTENSIONS, BadImage
from glsim.data.lists import as_listed, read_columns
from glsim.data.uri import is_uri, locate, open_uri
from glsim.files import make_folder, one_line, open_regular, parse_json, printable, read_bytes, shorten, write_bytes
from glsim.inference.predictor import Prediction, Predictor
from glsim.models.backbone import Model
from glsim.types import ConfigError, DataError, GlsimError

JOB, LOCK = "job.json", ".lock"  # what the parts in a folder belong to; there while they are made
FORMAT = 2  # in 1, parts did not say whose they are
OWNER = b"glsim"  # the key in a part's footer: job, number of the part, how many of its images could not be read
LEFT = re.compile(r"\.(part-\d+\.parquet|job\.json)\..+")  # what `put` writes to first
READERS = 32  # threads that read footers, each of which is a wait for a store
TRIES = 5  # times a part goes to another worker because one died over it, before the job gives up
STALE = 3600  # seconds after which a file that a worker began in a store is taken to be of a dead one
LIST = "a list needs a column path"


def run(s: Predict, progress: bool = True) -> dict[str, Any]:
    """The verb with --engine ray. Raises what `load` and `find_paths` do, ConfigError for an OUT of another job, and
    GlsimError when Ray gave up; finished parts stay, and the same command goes on."""
    ray = need_ray()
    paths = find_paths(s.images)
    model = load(s.source, **s.options)
    predictor = Predictor(model, s.top_k, s.batch_size, device="cpu", embedding=s.embedding)
    predictor(Image.new("RGB", (64, 64)))  # says what is wrong with the settings, before any worker
    out = folder_uri(str(s.out))
    parts = [paths[i : i + s.part_size] for i in range(0, len(paths), s.part_size)]
    start, looked_at = time.perf_counter(), 0  # images, in this run
    first = (0, 0.0)  # images, and seconds, when the first part was done
    last = 0.0
    with held(out, job := job_of(s, model, paths)):
        done, again = finished(out, parts, job)
        errors = sum(done.values())
        todo = [{"part": i, "paths": part} for i, part in enumerate(parts) if i not in done]
        before = sum(len(parts[i]) for i in done)
        with (
            cluster(ray, s) if todo else nullcontext(),
            tqdm(total=len(paths), initial=before, unit="image", disable=not progress) as bar,
        ):
            try:
                for batch in answer_parts(ray, s, model, out, todo) if todo else ():
                    looked_at += int(batch["images"].sum())
                    errors += int(batch["errors"].sum())
                    bar.update(int(batch["images"].sum()))
                    last = time.perf_counter() - start
                    first = first if first[0] else (looked_at, last)
            except ray.exceptions.RayError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                why = printable(shorten(lines[-1])) if lines else type(error).__name__
                raise GlsimError(
                    f"Ray stopped: {why}; finished parts stay in {s.out}, the same command goes on"
                ) from error
    seconds = time.perf_counter() - start
    steady = round((looked_at - first[0]) / (last - first[1]), 2) if looked_at > first[0] else None
    return {
        "engine": "ray",
        "source": str(s.source),
        "out": str(s.out),
        "images": len(paths),
        "parts": len(parts),
        "parts_before": len(done),
        "parts_again": again,  # name: what was wrong with the one that was there
        "answered": len(paths) - errors,
        "errors": errors,
        "workers": s.workers,
        "seconds": round(seconds, 2),
        "images_per_second": round(looked_at / seconds, 2),  # of this run
        "steady_images_per_second": steady,  # since the first part was done
    }


# --- what goes in -----------------------------------------------------------------------------------------------------


def find_paths(inputs: Sequence[str]) -> list[str]:
    """The images: files, folders, globs, URIs of files or folders, and lists (CSV, Parquet) with a column `path`, whose
    relative paths count from the list's folder. Each comes once, local ones as absolute paths.

    Raises DataError naming the first input that yields nothing.
    """
    found: dict[str, None] = {}
    for given in inputs:
        if given.lower().endswith(LISTS):
            paths = read_list(given)
        elif is_uri(given):
            paths = images_below(given)
        else:
            paths = [str(path.absolute()) for path in find_images(given)]
        if not paths:
            raise DataError(f"{given}: no image found; known endings: {' '.join(EXTENSIONS)}")
        found |= dict.fromkeys(paths)
    return list(found)


def read_list(file: str) -> list[str]:
    """The column `path` of a list (CSV as `glsim.files:read_table` takes it, or Parquet), local or by URI."""
    uri = is_uri(file)
    try:
        stream = open_uri(file) if uri else open_regular(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
    if file.lower().endswith(".parquet"):
        paths = _parquet_paths(file, stream)
    else:
        (column,), rows = read_columns(file, ("path",), ("dir",), stream=stream, wanted=LIST)
        paths = [cells[column] for _, cells in rows]
    paths = [p if is_uri(p) else as_listed(p) for p in paths]
    if uri:
        return [p if is_uri(p) else f"{file.rpartition('/')[0]}/{p}" for p in paths]
    return [p if is_uri(p) else str((Path(file).parent / p).absolute()) for p in paths]


def _parquet_paths(file: str, stream: BinaryIO) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        with stream:
            paths = parquet.read_table(stream, columns=["path"]).column("path").to_pylist()
    except (OSError, ArrowException, KeyError) as error:
        raise DataError(f"{file}: not readable as a Parquet file ({one_line(error)}); {LIST}") from error
    for row, path in enumerate(paths, start=1):
        if not isinstance(path, str) or not path:
            raise DataError(f"{file}: row {row} has no path")
    return paths


def images_below(uri: str) -> list[str]:
    """The image files in a folder of a store, or the file itself, as URIs, sorted."""
    from pyarrow.fs import FileSelector, FileType

    try:
        system, path = locate(uri)
        info = system.get_file_info(path.rstrip("/"))
        if info.type == FileType.File:
            return [uri]
        inside = system.get_file_info(FileSelector(path.rstrip("/"), recursive=True))
    except OSError as error:
        raise DataError(f"{uri}: {one_line(error)}") from error
    files = [f.path for f in inside if f.type == FileType.File]
    below = [f[len(path.rstrip("/")) :] for f in files]
    return sorted(uri.rstrip("/") + f for f in below if is_image(f))


# --- what comes out ---------------------------------------------------------------------------------------------------


def schema(embedding: bool) -> Any:
    """The columns of a part; labels and what follows are null where `error` is not."""
    import pyarrow as pa

    columns = [
        ("path", pa.string()),
        ("labels", pa.list_(pa.string())),  # best first
        ("probabilities", pa.list_(pa.float32())),
        ("confidence", pa.float32()),  # the first of them
        ("box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels of the upright image
        ("second_pass", pa.bool_()),  # whether the crop was looked into; null where the method does not choose
        *([("embedding", pa.list_(pa.float32()))] * embedding),
        ("error", pa.string()),
    ]
    return pa.schema(columns)


def as_row(path: str, answer: Prediction | BadImage) -> dict[str, Any]:
    """An answer, or why there is none, as a row of a part; bytes of `path` that are no text become `\\udcff`."""
    path = path.encode("utf-8", "backslashreplace").decode()
    if isinstance(answer, BadImage):
        return {"path": path, "error": printable(answer.reason)}
    return {
        "path": path,
        "labels": answer.labels,
        "probabilities": answer.probabilities,
        "confidence": answer.probabilities[0],
        "box": answer.box,
        "second_pass": answer.second_pass,
        "embedding": answer.embedding,
    }


def folder_uri(out: str) -> str:
    """`out` as a URI, so that one way of writing serves both."""
    return out.rstrip("/") if is_uri(out) else "file://" + Path(out).absolute().as_posix()


def name_of(part: int) -> str:
    """The file of a part."""
    return f"part-{part:06d}.parquet"


def finished(out: str, parts: Sequence[Sequence[str]], job: dict[str, Any]) -> tuple[dict[int, int], dict[str, str]]:
    """The parts that are there: number -> images of it that could not be read; and those to be made again, with why.

    A folder in the way of one is put aside, under a name that says so.
    """
    done: dict[int, int] = {}
    again: dict[str, str] = {}

    def look(part: int) -> int | DataError | None:
        try:
            return read_part(out, part, len(parts[part]), job)
        except FileNotFoundError:
            return None
        except DataError as error:
            return error

    there = sorted(numbers(out) & set(range(len(parts))))
    with ThreadPoolExecutor(READERS) as pool:
        for part, found in zip(there, pool.map(look, there), strict=True):
            if isinstance(found, DataError):
                again[name_of(part)] = str(found) + put_aside(out, name_of(part))
            elif found is not None:
                done[part] = found
    return done, again


def numbers(out: str) -> set[int]:
    """The parts that are there by their names."""
    from pyarrow.fs import FileSelector

    system, path = locate(out)
    names = [info.base_name for info in system.get_file_info(FileSelector(path, allow_not_found=True))]
    return {int(found[1]) for name in names if (found := re.fullmatch(r"part-(\d{6,9})\.parquet", name, re.ASCII))}


def read_part(out: str, part: int, images: int, job: dict[str, Any]) -> int:
    """How many of a part's images could not be read; only its footer is read.

    Raises FileNotFoundError where it is not there, and DataError for what is not that part of that job, whole.
    """
    from pyarrow import ArrowException, parquet

    system, path = locate(f"{out}/{name_of(part)}")
    try:
        with open_regular(path) if system.type_name == "local" else system.open_input_file(path) as file:
            footer = parquet.read_metadata(file)
        told = parse_json((footer.metadata or {}).get(OWNER, b"{}"))
    except FileNotFoundError:
        raise
    except (OSError, ArrowException, ValueError) as error:
        raise DataError(f"damaged ({one_line(error)})") from error
    errors = told.pop("errors", None)
    if told != {"job": id_of(job), "part": part} or not isinstance(errors, int):
        raise DataError("not of this job")
    if footer.num_rows != images or footer.schema.to_arrow_schema().names != schema(bool(job["embedding"])).names:
        raise DataError(f"{footer.num_rows} rows for {images} images, or other columns")
    return errors


def put_aside(out: str, name: str) -> str:
    """Rename a folder that is in the way of the file `name`; says what it is called now, nothing where there is none.

    All else that may be there is replaced by the file.
    """
    system, path = locate(out)
    if system.type_name != "local" or not (Path(path) / name).is_dir():
        return ""
    aside = f".aside-{name}-{uuid.uuid4().hex[:8]}"
    (Path(path) / name).rename(Path(path) / aside)
    return f"; it is now {aside}"


def put(out: str, name: str, data: bytes | memoryview) -> None:
    """Write a file into the folder `out`, whole or not at all."""
    system, path = locate(out)
    if system.type_name == "local":
        write_bytes(f"{path}/{name}", bytes(data))
        return
    temporary = f"{path}/.{name}.{uuid.uuid4().hex}"
    with system.open_output_stream(temporary) as stream:
        stream.write(data)
    system.move(temporary, f"{path}/{name}")


def job_of(s: Predict, model: Model, paths: Sequence[str]) -> dict[str, Any]:
    """What has to be the same for a job to go on."""
    listed = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
    kept = {name: getattr(s, name) for name in ("options", "top_k", "flip", "embedding", "part_size")}
    config = {key: model.config[key] for key in MODEL_KEYS} | {"preprocessing": preprocessing_of(model).as_dict()}
    config |= {"labels": labels_of(model), "temperature": temperature_of(model)}
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    told = {"model": digest(model.state_dict()), "config": hashed, "images": len(paths), "list": listed}
    return {"format": FORMAT, **told, **kept}


def id_of(job: dict[str, Any]) -> str:
    """A job in a few characters, the same for equal ones."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def read_job(out: str) -> dict[str, Any] | None:
    """The job whose folder `out` is; None where no file says so. Raises DataError where it is damaged."""
    system, path = locate(f"{out}/{JOB}")
    try:
        return parse_json(read_bytes(path) if system.type_name == "local" else open_uri(f"{out}/{JOB}").read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out}/{JOB}, which says whose the parts are, is damaged ({one_line(error)}); name another --out"
        ) from error


@contextmanager
def held(out: str, job: dict[str, Any]) -> Iterator[None]:
    """Inside, `out` is the folder of `job` (`claim`), and of this process alone; not so in a store, which has no locks.

    The kernel's lock ends with the process, however it ends. Raises ConfigError where another one has it.
    """
    system, path = locate(out)
    if system.type_name != "local":
        claim(out, job)
        yield
        return
    file = Path(path) / LOCK
    lock = FileLock(file)
    try:
        make_folder(file.parent)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{out} is in use by another job; wait for it, end it, or name another --out") from None
    except OSError as error:
        raise DataError(f"{out}: {one_line(error)}") from error
    try:
        claim(out, job)
        yield
    finally:
        file.unlink(missing_ok=True)  # first, for then somebody else may hold it
        lock.release()


def claim(out: str, job: dict[str, Any]) -> None:
    """Make `out` the folder of `job`, or check that it is; ConfigError says in what an older job there differs."""
    from pyarrow.fs import FileSelector, FileType

    system, path = locate(out)
    try:
        system.create_dir(path, recursive=True)
        for info in system.get_file_info(FileSelector(path)):
            # Of a worker that was killed while it wrote; in a store perhaps of one that writes now.
            old = system.type_name == "local" or time.time() - (info.mtime_ns or 0) / 1e9 > STALE
            if info.type == FileType.File and LEFT.fullmatch(info.base_name) and old:
                system.delete_file(info.path)
        older = read_job(out)
        if older is None:
            if numbers(out):
                raise ConfigError(f"{out} holds parts, but no {JOB} that says of what; name another --out")
            put(out, JOB, (json.dumps(job, indent=2) + "\n").encode())
            return
    except OSError as error:
        raise DataError(f"{out}: {one_line(error)}") from error
    keys = job if older.get("format") == FORMAT else ["format"]  # of another one, keys may mean something else
    differ = [f"{k} (was {printable(shorten(older.get(k), 80))}, is {job[k]})" for k in keys if older.get(k) != job[k]]
    if differ:
        raise ConfigError(f"{out} holds another job: {', '.join(differ)}; repeat that one, or name another --out")


# --- Ray --------------------------------------------------------------------------------------------------------------


def need_ray() -> Any:
    """The module ray, told to send nothing home; ConfigError says how to get it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters arrives as an exception
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--engine ray needs Ray Data ({error}): pip install 'glsim[scale]'") from error
    return ray


@contextmanager
def cluster(ray: Any, s: Predict) -> Iterator[None]:
    """The cluster at `s.address`, or one of this machine for as long as it takes. One that runs already stays."""
    if ray.is_initialized():
        yield
        return
    # A worker occupies one core, and Ray's own steps another.
    local = {"num_cpus": s.workers + 1, "include_dashboard": False} if s.address is None else {}
    before = set(psutil.Process().children(recursive=True))
    with redirect_stdout(sys.stderr):  # Ray prints there what became of workers, until it is shut down
        try:
            ray.init(s.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # Ray raises bare ones, of a machine too busy to start it in time
            ray.shutdown()
            raise GlsimError(f"no Ray cluster at {s.address or 'this machine'}: {one_line(error)}") from error
        with ended_with_us(before):
            try:
                with termination_heard():
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
def ended_with_us(before: set[psutil.Process]) -> Iterator[None]:
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
def termination_heard() -> Iterator[None]:
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


def answer_parts(ray: Any, s: Predict, model: Model, out: str, todo: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Have the parts answered; yields `images` and `errors` (arrays) of parts as they are finished.

    The model travels to the workers; their machines need neither the bundle nor its folder.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
    wants_gpu = s.device is None or not s.device.startswith("cpu")
    gpus = gpu_share(ray.cluster_resources().get("GPU", 0), s.workers) if wants_gpu else 0.0
    workers = min(s.workers, len(todo))
    shared = ray.put(model.cpu())  # kept until the last worker is done
    answered = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
        max_task_retries=TRIES,
        fn_constructor_kwargs={
            "model": shared,
            "out": out,
            "device": s.device or (None if gpus else "cpu"),
            **{name: getattr(s, name) for name in ("top_k", "batch_size", "flip", "embedding", "max_megapixels")},
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
        """`part` and `paths` of some parts -> `part`, `images`, `errors` of each."""
        parts = zip(batch["part"], batch["paths"], strict=True)
        images, errors = zip(*(self.answer(int(part), [str(p) for p in paths]) for part, paths in parts), strict=True)
        return {"part": batch["part"], "images": list(images), "errors": list(errors)}

    def answer(self, part: int, paths: list[str]) -> tuple[int, int]:
        """Write one part; how many images it has, and how many of them could not be read."""
        import pyarrow as pa
        from pyarrow import parquet

        job = read_job(self.out)
        if job is None:
            raise DataError(f"{self.out}: {JOB} has gone, which says whose the parts are")
        with suppress(FileNotFoundError, DataError):  # written by a worker that was killed before it could say so
            return len(paths), read_part(self.out, part, len(paths), job)
        rows = [as_row(path, a) for path, a in zip(paths, self.answers(paths), strict=True)]
        errors = sum("error" in row for row in rows)
        told = json.dumps({"job": id_of(job), "part": part, "errors": errors}).encode()
        columns = schema(self.embedding is not None).with_metadata({OWNER: told})
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows, columns), sink)
        put(self.out, name_of(part), memoryview(sink.getvalue()))
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
