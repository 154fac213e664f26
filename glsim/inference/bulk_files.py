"""Files of a bulk job: its images (files and folders, object stores by URI, lists in CSV and Parquet), and its folder
of Parquet files of answers (parts), with the one that says which job they belong to.

A part is written whole or not at all. Its footer names its job; a part of another job, or a damaged one, does not
count as finished.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from glsim.checkpoints.bundle import digest, labels_of, preprocessing_of, temperature_of
from glsim.checkpoints.config import MODEL_KEYS
from glsim.data.image_files import LISTS, find_images, is_image
from glsim.data.images import EXTENSIONS, BadImage
from glsim.data.lists import as_listed, read_columns
from glsim.data.uri import is_uri, locate, open_uri
from glsim.files import make_folder, one_line, open_regular, parse_json, printable, shorten, write_bytes
from glsim.inference.predictor import Prediction
from glsim.models.base import Model
from glsim.types import ConfigError, DataError

JOB, LOCK = "job.json", ".lock"  # the job that the parts in a folder belong to; there while a process works on it
FORMAT = 2  # in 1, parts did not name their job
OWNER = b"glsim"  # the key in a part's footer: job, number of the part, how many of its images could not be read
LEFTOVER = re.compile(r"\.(part-\d+\.parquet|job\.json)\..+")  # a file that was not finished
READERS = 32  # threads that read footers, each of which is a wait for a store
LIST = "a list needs a column path"
STALE = 3600  # seconds after which a file that a worker began in a store is taken to be of a dead one


# --- images -----------------------------------------------------------------------------------------------------------


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


# --- parts ------------------------------------------------------------------------------------------------------------


def schema(embedding: bool, boxes: bool = False) -> Any:
    """The columns of a part; labels and what follows are null where `error` is not.

    A row of `boxes` is one box of an image, and `path` the name of that region (`glsim.data.regions`).
    """
    import pyarrow as pa

    columns = [
        ("path", pa.string()),
        ("labels", pa.list_(pa.string())),  # best first
        ("probabilities", pa.list_(pa.float32())),
        ("confidence", pa.float32()),  # the first of them
        ("box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels of the upright image
        ("second_pass", pa.bool_()),  # whether the crop was looked into; null where the method does not choose
    ]
    if boxes:
        columns += [
            ("detection", pa.list_(pa.float64())),  # the box that is answered, as `box`
            ("detection_category", pa.string()),
            ("detection_confidence", pa.float64()),
        ]
    if embedding:
        columns.append(("embedding", pa.list_(pa.float32())))
    return pa.schema([*columns, ("error", pa.string())])


def schema_of(job: Mapping[str, Any]) -> Any:
    """The columns of the parts of a job."""
    return schema(bool(job["embedding"]), bool(job.get("boxes")))


def as_row(path: str, answer: Prediction | BadImage) -> dict[str, Any]:
    """An answer, or why there is none, as a row of a part; bytes of `path` that are no text become `\\udcff`."""
    path = path.encode("utf-8", "backslashreplace").decode()
    if isinstance(answer, BadImage):
        return {"path": path, "error": printable(answer.reason)}
    found = answer.detection and list(answer.detection.box)
    return answer._asdict() | {"path": path, "confidence": answer.probabilities[0], "detection": found}


def folder_uri(out: str) -> str:
    """`out` as a URI, so that one way of writing serves both."""
    return out.rstrip("/") if is_uri(out) else "file://" + Path(out).absolute().as_posix()


def part_name(part: int) -> str:
    """The file of a part."""
    return f"part-{part:06d}.parquet"


def finished_parts(
    out: str, parts: Sequence[Sequence[str]], job: dict[str, Any]
) -> tuple[dict[int, int], dict[str, str]]:
    """The parts that are there: number -> images of it that could not be read; and those to be made again, with why.

    A folder in the way of one is put aside, under a name that says so.
    """

    def look(part: int) -> int | str | None:
        try:
            return read_part(out, part, len(parts[part]), job)
        except FileNotFoundError:
            return None
        except DataError as error:
            return f"{error}{put_aside(out, part_name(part))}"

    there = sorted(part_numbers(out) & set(range(len(parts))))
    with ThreadPoolExecutor(READERS) as pool:
        found = list(zip(there, pool.map(look, there), strict=True))
    done = {part: errors for part, errors in found if isinstance(errors, int)}
    return done, {part_name(part): why for part, why in found if isinstance(why, str)}


def part_numbers(out: str) -> set[int]:
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

    system, path = locate(f"{out}/{part_name(part)}")
    try:
        with open_regular(path) if system.type_name == "local" else system.open_input_file(path) as file:
            footer = parquet.read_metadata(file)
        told = parse_json((footer.metadata or {}).get(OWNER, b"{}"))
    except FileNotFoundError:
        raise
    except (OSError, ArrowException, ValueError) as error:
        raise DataError(f"damaged ({one_line(error)})") from error
    errors = told.pop("errors", None)
    if told != {"job": job_hash(job), "part": part} or not isinstance(errors, int):
        raise DataError("not of this job")
    if footer.num_rows != images or footer.schema.to_arrow_schema().names != schema_of(job).names:
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


def write_file(out: str, name: str, data: bytes | memoryview) -> None:
    """Write a file into the folder `out`, whole or not at all."""
    system, path = locate(out)
    if system.type_name == "local":
        write_bytes(f"{path}/{name}", bytes(data))
        return
    temporary = f"{path}/.{name}.{uuid.uuid4().hex}"
    with system.open_output_stream(temporary) as stream:
        stream.write(data)
    system.move(temporary, f"{path}/{name}")


def describe_job(model: Model, paths: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for a job to go on: the model, the images, and the `settings` that answers depend on."""
    listed = hashlib.sha256("\n".join(map(str, paths)).encode("utf-8", "surrogateescape")).hexdigest()
    config = {key: getattr(model.config, key) for key in MODEL_KEYS} | {
        "preprocessing": preprocessing_of(model).as_dict(),
        "labels": labels_of(model),
        "temperature": temperature_of(model),
    }
    told = {"model": digest(model.state_dict()), "config": job_hash(config), "images": len(paths), "list": listed}
    return {"format": FORMAT, **told, **settings}


def job_hash(job: dict[str, Any]) -> str:
    """A job, or a part of what describes it, in a few characters, the same for equal ones."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def read_job(out: str) -> dict[str, Any] | None:
    """The job whose folder `out` is; None where no file says so. Raises DataError where it is damaged."""
    try:
        return parse_json(open_uri(f"{out}/{JOB}").read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out}/{JOB}, which says whose the parts are, is damaged ({one_line(error)}); name another --out"
        ) from error


@contextmanager
def lock_folder(out: str, job: dict[str, Any]) -> Iterator[None]:
    """Inside, `out` is the folder of `job` (`claim_folder`), and of this process alone.

    An object store has no locks. The kernel's lock ends with the process, however it ends. Raises ConfigError where
    another process has it.
    """
    system, path = locate(out)
    if system.type_name != "local":
        claim_folder(out, job)
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
        claim_folder(out, job)
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: after it, somebody else may have the lock
        lock.release()


def claim_folder(out: str, job: dict[str, Any]) -> None:
    """Make `out` the folder of `job`, or check that it is; ConfigError says in what an older job there differs."""
    from pyarrow.fs import FileSelector, FileType

    system, path = locate(out)
    try:
        system.create_dir(path, recursive=True)
        for info in system.get_file_info(FileSelector(path)):
            # Of a worker that was killed while it wrote; in a store perhaps of one that writes now.
            old = system.type_name == "local" or time.time() - (info.mtime_ns or 0) / 1e9 > STALE
            if info.type == FileType.File and LEFTOVER.fullmatch(info.base_name) and old:
                system.delete_file(info.path)
        older = read_job(out)
        if older is None:
            if part_numbers(out):
                raise ConfigError(f"{out} holds parts, but no {JOB} that says of what; name another --out")
            write_file(out, JOB, (json.dumps(job, indent=2) + "\n").encode())
            return
    except OSError as error:
        raise DataError(f"{out}: {one_line(error)}") from error
    keys = job if older.get("format") == FORMAT else ["format"]  # of another one, keys may mean something else
    differ = [f"{k} (was {printable(shorten(older.get(k), 80))}, is {job[k]})" for k in keys if older.get(k) != job[k]]
    if differ:
        raise ConfigError(f"{out} holds another job: {', '.join(differ)}; repeat that one, or name another --out")
