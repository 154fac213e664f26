"""Versions, commit and devices: what a number was measured with, and where models run."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glsim import __version__
from glsim.types import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def environment(device: torch.device) -> dict[str, Any]:
    """Date, command line, commit, versions and device of this process, as plain values."""
    name = f"cpu ({processor()}, threads: {torch.get_num_threads()})"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = ("torch", "torchvision", "timm", "accelerate")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit(Path(__file__).parents[1]),
        "versions": {
            "python": platform.python_version(),
            "glsim": __version__,
            **{package: version(package) for package in packages},
        },
        "device": name,
    }


def processor() -> str:
    """The model of the processor and the vector instructions that torch uses on it, which decide how sums are rounded.

    As far as the system tells; at least the machine's kind.
    """
    model = platform.machine()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            model = found[1].strip()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def commit(root: Path) -> str | None:
    """The git commit of a source tree, "+changes" where tracked files differ from it; None: it is no checkout."""
    if not (root / ".git").exists():  # installed, perhaps below somebody else's checkout
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or somebody else's files
        return None


def pick_device(name: str | None = None) -> torch.device:
    """The device `name` ("cpu", "cuda:1"), by default the best there is; ConfigError when it is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = accelerator or torch.device("cpu")
    try:
        device = torch.device(name) if name is not None else best
    except RuntimeError as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", best.type):
        raise ConfigError(f"device={name} is not here; the best there is: {best.type}")
    return device


def make_accelerator(device: str | None = None, precision: str = "no", accumulate: int = 1, **more: Any) -> Accelerator:
    """Accelerate's choice of devices and precision, anew each time; ConfigError for what is not there.

    Gradients are averaged over `accumulate` batches; `more` goes to Accelerate.
    """
    from accelerate import Accelerator, PartialState  # imported here: an answer needs a device, and not this
    from accelerate.state import AcceleratorState

    chosen = pick_device(device)
    cpu = chosen.type == "cpu"
    if precision == "fp16" and cpu:
        raise ConfigError("precision=fp16 needs an accelerator, there is only a CPU; use no or bf16")
    if chosen.index is not None and not cpu:
        torch.accelerator.set_device_index(chosen.index)
    if PartialState(cpu=cpu).num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this very process
    try:
        return Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=accumulate, **more)
    except ValueError as error:
        raise ConfigError(f"precision={precision}: {error}") from error
