"""Floor 3: a run that survives: whole checkpoints, exact resume, a signal heard at the end of a step, a folder kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from glsim.files import MARKER, make_folder, write_text
from glsim.types import ConfigError, DataError, GlsimError

CHECKPOINT, STATE = "checkpoint", "state.json"
LOCK, HOLDER = ".lock", ".holder"  # there while a run is at work
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # a file system that has none says one of them
FORMAT = 2  # of state.json and of how randomness follows from the seed; a run of another one cannot go on


class Interrupted(GlsimError):
    """The run was asked to stop, and can go on."""

    exit_code = 130


@contextmanager
def held(out: Path, accelerator: Accelerator) -> Iterator[None]:
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
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}")
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
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
    except (OSError, ValueError, RuntimeError, LookupError, EOFError, UnpicklingError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{folder} is damaged: {why}; start a new run, with --init-from {out} if its weights will do"
        ) from error


def save_checkpoint(accelerator: Accelerator, out: Path, progress: dict[str, Any]) -> None:
    """Everything that `load_checkpoint` needs, swapped in by renaming: at every moment one whole checkpoint exists.

    Raises GlsimError when it cannot be written (a full disk, a folder without permission); the last one stays whole.
    """
    new, old, final = (out / f"{CHECKPOINT}{end}" for end in (".new", ".old", ""))
    progress = {"format": FORMAT, "processes": accelerator.num_processes, **progress}
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()  # each process puts its own random state into the folder
    with writing(out):
        accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writing(out):
            write_text(new / STATE, json.dumps(progress))
            _to_disk(new)
            if final.exists():  # if not, a run died between the two renames, and `old` is all there is
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _to_disk(folder: Path) -> None:
    """Wait until the disk has every file of `folder`: after a power cut a new name must not stand for half a file."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def load_checkpoint(accelerator: Accelerator, out: Path, data_hash: str) -> dict[str, Any]:
    """Load the last whole checkpoint of `out`; returns what was saved as its progress (empty: there is none).

    The data may have moved, but ConfigError is raised when an image, a class, a split or the number of processes is
    another one.
    """
    for folder in (out / CHECKPOINT, out / f"{CHECKPOINT}.old"):
        if (folder / STATE).is_file():
            with reading(folder, out):
                progress = json.loads((folder / STATE).read_text())
            if progress.get("format") != FORMAT:
                raise ConfigError(f"{folder} was written by another version of glsim, whose runs cannot go on here")
            processes = progress.get("processes", 1)
            if processes != accelerator.num_processes:
                raise ConfigError(
                    f"{out} was trained by {processes} processes, now there are {accelerator.num_processes}, whose "
                    "batches would be others; start as many, or a new run with --init-from"
                )
            if progress["split_hash"] != data_hash:
                raise ConfigError(f"{out} was trained on other images, classes or splits than the data has now")
            with reading(folder, out):
                accelerator.load_state(str(folder))
            return progress
    return {}


class StopSignal:
    """Whether SIGINT or SIGTERM has come, in this process or another one of the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.name = accelerator, ""

    def heard(self) -> bool:
        """The same answer in all processes: they stop after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.name)
        import torch

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
