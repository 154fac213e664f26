"""Peak memory of a model, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from glsim.checkpoints.onnx_runtime import GraphModel
from glsim.environment import pick_device
from glsim.evaluation.speed_settings import SpeedSettings
from glsim.evaluation.workloads import Job, answering, build, training

CHILD = """import json, sys
from glsim.evaluation.peak_memory import Job, SpeedSettings, peaks_here
job, settings = json.loads(sys.argv[1])
print(json.dumps(peaks_here(Job(**job), SpeedSettings(**settings))))"""


def peaks_elsewhere(job: Job, s: SpeedSettings) -> dict[str, float]:
    """`peaks_here` in a process of its own, which inherits nobody's peak; raises RuntimeError with its last words."""
    words = [sys.executable, "-c", CHILD, json.dumps([vars(job), vars(s)])]
    child = subprocess.run(words, capture_output=True, text=True)
    if child.returncode:
        said = child.stderr.strip().splitlines()
        why = said[-1] if said else f"exit status {child.returncode}"
        if child.returncode == -9:
            why += " (out of memory?)"
        raise RuntimeError(f"while measuring memory: {why}")
    return json.loads(child.stdout.splitlines()[-1])


def peaks_here(job: Job, s: SpeedSettings) -> dict[str, float]:
    """MiB that a model and a batch took at their peak, by the names `memory_mib` and `training_memory_mib`.

    Without `s.training` only answers are measured. On an accelerator what was allocated; on a CPU what became resident
    after the libraries were in.
    """
    device = pick_device(s.device)
    if job.method.endswith(".onnx"):
        import_module("onnxruntime")  # a library too
    before = resident(peak=False) if device.type == "cpu" else 0
    model = build(job, s)
    found = {}
    for name, prepare in (("memory_mib", answering), ("training_memory_mib", training)):
        if prepare is training and (isinstance(model, GraphModel) or not s.training):
            break
        work = prepare(model.float(), job, device)
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
