"""Checkpoints of a run and exact resume; signals heard at the end of a step; the lock of a run folder.

A checkpoint is a folder of tensors (safetensors) and `state.json`: nothing in it is ever unpickled, whoever wrote it.
Random states are not kept, for every draw of training follows from seed, step and image.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import socket
import tarfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from glsim.data.images import BadImage
from glsim.data.regions import file_of
from glsim.data.uri import open_file
from glsim.files import (
    MARKER,
    make_folder,
    one_line,
    open_regular,
    parse_json,
    printable,
    read_bytes,
    read_text,
    shorten,
    to_json,
    write_text,
)
from glsim.types import ConfigError, DataError, GlsimError

CHECKPOINT, STATE = "checkpoint", "state.json"
MODEL, AVERAGED, OPTIMIZER, CONTENTS = "model", "averaged", "optimizer", "contents"  # .safetensors
LOCK, HOLDER = ".lock", ".holder"  # there while a run is at work
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # a file system that has none says one of them
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of an optimiser's state
FORMAT = 4  # of the checkpoint and of how randomness follows from the seed; a run of another one cannot go on


class Interrupted(GlsimError):
    """The run was asked to stop, and can go on."""

    exit_code = 130


@contextmanager
def lock_folder(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Inside, the folder `out` belongs to this run alone; it is made where it is not there.

    The first process of the run holds the kernel's lock on `out`/.lock, which ends with that process, however it ends.
    Where the file system has no locks, a file stands for one, which outlives a killed run; a warning says so.
    A folder in which nothing was made is removed again. Raises ConfigError naming the process that holds `out`, and
    OSError where nothing can be written, in all processes of the run alike.
    """
    file, holder, fresh = out / LOCK, out / HOLDER, not out.exists()
    lock: BaseFileLock = FileLock(file, fallback_to_soft=False)
    problem: Exception | None = None
    if accelerator.is_main_process:
        try:
            make_folder(out)
            try:
                lock.acquire(timeout=0)
            except OSError as error:  # a Timeout too, which has no number
                if error.errno not in NO_LOCKS:
                    raise
                lock = SoftFileLock(out / f".soft{LOCK}")  # `file` is there already, by the attempt to lock it
                warnings.warn(f"flock not supported on this filesystem, {lock.lock_file} has to do", stacklevel=3)
                lock.acquire(timeout=0)
            with suppress(OSError):  # a full disk: then nobody knows who holds it
                write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}")
        except Timeout:
            who = "another process"
            with suppress(OSError, UnicodeDecodeError):
                who = printable(shorten(read_text(holder)))
            advice = "wait for it, end it, or name another --out"
            if isinstance(lock, SoftFileLock):
                advice += f"; if it is dead, remove {lock.lock_file}"
            problem = ConfigError(f"{out} is in use by {who}; {advice}")
        except OSError as error:
            problem = error
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # a folder that can no longer be written
                holder.unlink(missing_ok=True)
                file.unlink()  # first, for then somebody else may hold it
            lock.release()
            with suppress(OSError):  # it is not empty
                if list(out.iterdir()) == [out / MARKER]:
                    (out / MARKER).unlink()
                if fresh:
                    out.rmdir()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Inside, what goes wrong with a file is a GlsimError that says that the last checkpoint is whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as a RuntimeError
        shutil.rmtree(out / f"{CHECKPOINT}.new", ignore_errors=True)
        raise GlsimError(
            f"{out} cannot be written: {error}; the last checkpoint is whole, --resume goes on from it"
        ) from error


@contextmanager
def reading(folder: Path, out: Path) -> Iterator[None]:
    """Inside, a file of a checkpoint that is not what was written is a DataError."""
    try:
        yield
    except GlsimError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, LookupError, SafetensorError) as error:
        raise DataError(
            f"{folder} is damaged: {one_line(error)}; start a new run, with --init-from {out} if its weights will do"
        ) from error


class Parts(NamedTuple):
    """What a checkpoint holds of a run besides its progress."""

    model: nn.Module
    optimizer: Any
    averaged: nn.Module | None  # the model of averaged weights
    contents: Tensor  # (images,) int64: see `fingerprints`


def save_checkpoint(accelerator: Accelerator, out: Path, progress: dict[str, Any], parts: Parts) -> None:
    """Everything that `load_checkpoint` needs, swapped in by renaming: at every moment one whole checkpoint exists.

    Args:
        accelerator: of the run.
        out: the run folder.
        progress: plain values: settings, split hash, step, history, sums of the epoch.
        parts: of the checkpoint.

    Raises:
        GlsimError: when it cannot be written (a full disk, a folder without permission); the last one stays whole.
    """
    new, old, final = (out / f"{CHECKPOINT}{end}" for end in (".new", ".old", ""))
    if accelerator.is_main_process:
        tensors: dict[str, Tensor] = {}
        progress = {
            "format": FORMAT,
            "processes": accelerator.num_processes,
            **progress,
            "optimizer": _without_tensors(parts.optimizer.state_dict(), tensors),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        with writing(out):
            shutil.rmtree(new, ignore_errors=True)
            make_folder(new)
            written = {MODEL: parts.model.state_dict(), OPTIMIZER: tensors, CONTENTS: {CONTENTS: parts.contents}}
            if parts.averaged is not None:
                written[AVERAGED] = parts.averaged.state_dict()
            progress["digests"] = {name: _write(new, name, some) for name, some in written.items()}
            write_text(new / STATE, seal(progress))
            _to_disk(new)
            if final.exists():  # if not, a run died between the two renames, and `old` is all there is
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def read_progress(out: Path) -> dict[str, Any]:
    """What `save_checkpoint` was last given as the progress of the run in `out`; empty where it saved nothing yet.

    Raises ConfigError for a checkpoint of another version of glsim, DataError for one that is damaged.
    """
    folder = find_checkpoint(out)
    if folder is None:
        return {}
    with reading(folder, out):
        progress = parse_json(read_bytes(folder / STATE))
    if progress.get("format") != FORMAT:
        raise ConfigError(
            f"{folder} was written by another version of glsim (format {shorten(progress.get('format'), 20)}, here "
            f"{FORMAT}): finish the run with that one, or start a new one with --init-from {out}"
        )
    with reading(folder, out):
        if progress.pop("seal") != hashlib.sha256(to_json(progress).encode()).hexdigest():
            raise ValueError(f"{STATE} is not what was saved")
    return progress


def seal(progress: dict[str, Any]) -> str:
    """The content of a checkpoint's state.json: progress, with a checksum of it, by which an edited one is known."""
    return to_json({**progress, "seal": hashlib.sha256(to_json(progress).encode()).hexdigest()})


def find_checkpoint(out: Path) -> Path | None:
    """The folder of the last whole checkpoint of the run in `out`."""
    places = (out / CHECKPOINT, out / f"{CHECKPOINT}.old")
    return next((folder for folder in places if os.path.lexists(folder)), None)


def load_checkpoint(accelerator: Accelerator, out: Path, parts: Parts, data_hash: str, paths: Sequence[Path]) -> dict:
    """Load the last whole checkpoint of a run. The data may have moved.

    Args:
        accelerator: of the run.
        out: the run folder.
        parts: loaded in place.
        data_hash: of images, classes and splits.
        paths: of the images, in the order of `parts.contents`.

    Returns:
        Its progress; empty where there is none.

    Raises:
        ConfigError: where an image, a class, a split, the bytes in an image, or the number of processes is another one.
        DataError: for a damaged checkpoint.
    """
    progress, folder = read_progress(out), find_checkpoint(out)
    if folder is None:
        return {}
    processes = progress.get("processes")
    if processes != accelerator.num_processes:
        raise ConfigError(
            f"{out} was trained by {processes} processes, now there are {accelerator.num_processes}, whose "
            "batches would be others; start as many, or a new run with --init-from"
        )
    if progress.get("split_hash") != data_hash:
        raise ConfigError(f"{out} was trained on other images, classes or splits than the data has now")
    with reading(folder, out):
        _check_digests(folder, progress["digests"], parts)
        changed = (_read(folder, CONTENTS)[CONTENTS] != parts.contents).nonzero().flatten().tolist()
    if changed:
        raise ConfigError(
            f"{out} was trained on other images than the data has now: the content of {len(changed)} of {len(paths)} "
            f"files, or their order in a list, has changed, first {printable(paths[changed[0]])}; put them back, or "
            f"start a new run with --init-from {out}"
        )
    with reading(folder, out):
        parts.model.load_state_dict(_read(folder, MODEL))
        if parts.averaged is not None:
            parts.averaged.load_state_dict(_read(folder, AVERAGED))
        parts.optimizer.load_state_dict(_with_tensors(progress["optimizer"], _read(folder, OPTIMIZER)))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(progress["scaler"])
    return progress


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors; returns its digest."""
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(whole, folder / f"{name}.safetensors")
    return _digest(folder, name)


def _digest(folder: Path, name: str) -> str:
    with open_regular(folder / f"{name}.safetensors") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _check_digests(folder: Path, digests: Mapping[str, str], parts: Parts) -> None:
    """ValueError for a file of tensors that is not the one that was saved with the state."""
    for name in (MODEL, OPTIMIZER, CONTENTS, *([AVERAGED] if parts.averaged is not None else [])):
        if _digest(folder, name) != digests[name]:
            raise ValueError(f"{name}.safetensors is not the file that was saved")


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    with open_regular(path):  # first: safetensors would wait for a FIFO
        return safetensors.torch.load_file(path)


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The state of an optimiser as JSON can hold it; its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.clone()  # two names for the same memory are no safetensors
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):  # whose keys need not be texts
        return {"pairs": [[key, _without_tensors(inside, tensors)] for key, inside in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_without_tensors(inside, tensors) for inside in value]}
    return [_without_tensors(inside, tensors) for inside in value] if isinstance(value, list) else value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_without_tensors` was given."""
    if isinstance(value, list):
        return [_with_tensors(inside, tensors) for inside in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[content]
    if kind == "tuple":
        return tuple(_with_tensors(content, tensors))
    return {key: _with_tensors(inside, tensors) for key, inside in content}


def _to_disk(folder: Path) -> None:
    """Wait until the disk has every file of `folder`: after a power cut a new name must not stand for half a file."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def fingerprints(paths: Sequence[Path], accelerator: Accelerator) -> Tensor:
    """64 bits of a hash of the bytes in each file (images,) int64: whether they are those of an earlier start.

    The processes of a run share the reading. Raises BadImage for a file that cannot be read.
    """

    def read(path: Path) -> int:
        try:
            with open_file(path) as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))  # type: ignore[arg-type]
        except (OSError, ValueError, tarfile.TarError) as error:
            raise BadImage(path, f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error
        return int.from_bytes(found.digest(), "big", signed=True)

    share = -(-len(paths) // accelerator.num_processes)
    own = paths[accelerator.process_index * share :][:share]
    found = torch.zeros(share, dtype=torch.int64)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(own), 1000):  # a pool keeps something of every item it was given
            part = [file_of(path) for path in own[start : start + 1000]]  # of many regions one file
            files = dict.fromkeys(part)
            files |= zip(files, pool.map(read, files), strict=True)
            found[start : start + len(part)] = torch.tensor([files[path] for path in part])
    return accelerator.gather(found.to(accelerator.device)).cpu()[: len(paths)]


class StopSignal:
    """Whether SIGINT or SIGTERM has come, in this process or another one of the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.name = accelerator, ""

    def heard(self) -> bool:
        """The same answer in all processes: they stop after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.name)
        flag = torch.tensor(float(bool(self.name)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))


@contextmanager
def stop_signal(accelerator: Accelerator) -> Iterator[StopSignal]:
    """Inside, the first SIGINT or SIGTERM is only noted; a second SIGINT interrupts at once, as ever."""
    stop = StopSignal(accelerator)
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield stop
        return

    def note(number: int, _: FrameType | None) -> None:
        if stop.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
