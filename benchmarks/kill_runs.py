"""Kill a short training run at random moments (SIGKILL), resume it, and compare the weights it ends with.

    python benchmarks/kill_runs.py --kills 30
    python benchmarks/kill_runs.py --kills 5 --processes 2      # torchrun with gloo, all processes killed at once

Everything runs on the CPU, on drawn birds made for it. One run is left undisturbed; the others are killed, resumed,
and perhaps killed again, until KILLS moments have passed; each ends, and its weights and its log must be those of the
undisturbed run, bit for bit. One kill in five comes in start-up, the start of Python included. The others wait until a
step is saved, drawn evenly from those that are left, and then up to twice the mean time of a step. All processes are
stopped before they are killed, to see what they were at. The exit code is 4 where a run differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from glsim.data import synthetic
from glsim.training.config import Train, to_recipe

NOT_EQUAL = 4
EARLY = 0.2  # share of the kills in start-up
PHASES = ("training", "saving", "starting")


def main() -> int:
    """Parse, train undisturbed, kill and resume, compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "birds")
        synthetic.write(data, classes=3, train=16, test=5, size=64, seed=0)
        whole = Path(place, "undisturbed")
        recipe = write_recipe(Path(place), data, arguments.epochs)
        began = time.perf_counter()
        child = start(recipe, whole, arguments.processes)
        reach(child, whole, 1)
        starting = time.perf_counter() - began
        child.wait()
        steps = steps_of(whole)
        pace = (time.perf_counter() - began - starting) / steps
        print(f"undisturbed: {starting:.1f} s to the first step, then {pace:.2f} s for each of {steps}", flush=True)
        phases, runs, different = Counter[str](), 0, 0
        while phases.total() < arguments.kills:
            runs += 1
            out, landed = Path(place, f"run{runs}"), 0
            while True:
                before = steps_of(out)
                child = start(recipe, out, arguments.processes)
                if phases.total() == arguments.kills or before == steps:  # let it end
                    child.wait()
                    break
                if moments.random() < EARLY:
                    moment = moments.uniform(0, starting)
                    when = f"{moment:5.2f} s after its start"
                else:
                    wanted, moment = moments.randint(before + 1, steps), moments.uniform(0, 2 * pace)
                    when = f"{moment:5.2f} s after step {wanted:2}"
                    if not reach(child, out, wanted):
                        break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(moment)
                    break
                phase = kill(child, out, before)
                phases[phase], landed = phases[phase] + 1, landed + 1
                saved = f"{steps_of(out):2} steps saved"
                print(f"kill {phases.total():2}: run {runs}, {when}, {phase}; {saved}", flush=True)
            equal = child.returncode == 0 and same(whole, out)
            different += not equal
            print(f"run {runs}: killed {landed} times, ended with {'the same' if equal else 'OTHER'} weights and log")
            if child.returncode:
                said = out.with_name(f"{out.name}.txt").read_text()
                print(f"run {runs}: exit status {child.returncode}: {said[-2000:]}")
                break  # the next one would fail too
    verdict = "all bit-identical" if not different else f"{different} DIFFER"
    counts = ", ".join(f"{phases[phase]} {phase}" for phase in PHASES)
    print(f"{phases.total()} kills ({counts}) in {runs} runs of {arguments.processes} process(es): {verdict}")
    return NOT_EQUAL if different else 0


def write_recipe(place: Path, data: Path, epochs: int) -> Path:
    """Everything that has a state: dropout, augmentation, workers, averaged weights, accumulation, mixing."""
    settings = Train(
        data=str(data),
        out="-",
        backbone="vit_tiny_patch16_224",
        pretrained=False,
        backbone_args={"depth": 2, "embed_dim": 64, "num_heads": 2},
        image_size=64,
        options={"top_o": 4, "dropout": 0.1},
        epochs=epochs,
        batch_size=4,
        accumulate=2,
        optimizer="adamw",
        lr=1e-3,
        warmup_steps=4,
        workers=1,
        ema=0.9,
        mixup=0.2,
        save_steps=1,
    )
    recipe = place / "recipe.yaml"
    recipe.write_text(to_recipe(settings), encoding="utf-8")
    return recipe


def start(recipe: Path, out: Path, processes: int) -> subprocess.Popen:
    """`glsim train`, resumed where there is something to resume."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "glsim.cli", "train", "--recipe", str(recipe), "--out", str(out), "--json"]
    command += ["--resume"] if (out / "train.yaml").exists() else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (out.parent / f"{out.name}.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def reach(child: subprocess.Popen, out: Path, step: int) -> bool:
    """Wait until `step` is saved; False when the run ended without it."""
    while steps_of(out) < step:
        if child.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def kill(child: subprocess.Popen, out: Path, before: int) -> str:
    """SIGKILL for the process and all below it; returns the phase that a run that had begun at step `before` was in.

    torchrun puts its workers into sessions of their own, so it is not enough to kill a group.
    """
    launcher = psutil.Process(child.pid)
    launcher.suspend()  # or it would answer the death of a worker
    family = [*launcher.children(recursive=True), launcher]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    phase = "starting"  # what an earlier kill left half-written still lies there
    if steps_of(out) > before:
        saving = any(out.glob("*.tmp")) or {f.name for f in out.glob("checkpoint*")} != {"checkpoint"}
        phase = "saving" if saving else "training"
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()
    return phase


def steps_of(out: Path) -> int:
    """Optimiser steps of the last whole checkpoint, 0 without one."""
    for folder in ("checkpoint", "checkpoint.old", "checkpoint"):  # a run that lives may rename it between two looks
        with contextlib.suppress(FileNotFoundError):
            return json.loads((out / folder / "state.json").read_text())["step"]
    return 0


def same(whole: Path, out: Path) -> bool:
    """Whether weights, last checkpoint and log (its clock apart) are equal bit for bit."""
    for name in ("model.safetensors", "checkpoint/model.safetensors"):
        a, b = load_file(whole / name), load_file(out / name)
        if set(a) != set(b) or not all(torch.equal(a[k], b[k]) for k in a):
            return False
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, out)]
    clock = {"seconds", "images_per_second"}
    left, right = ([{k: v for k, v in row.items() if k not in clock} for row in log] for log in logs)
    return left == right


if __name__ == "__main__":
    sys.exit(main())
