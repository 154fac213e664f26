"""Train recipes one after the other and print one table: accuracy, parameters, images a second, peak memory.

    python benchmarks/compare_methods.py recipes/flowers12_*.yaml --data flowers12 --out runs/compare

Every recipe is trained in a process of its own; a finished run under OUT is not trained again. Speed is measured
afterwards, all models in turn and several rounds, so that a busy moment of the machine falls on all of them: images a
second of one batch, network only (a training step: forward, backward, AdamW), median of the rounds. Memory is the
training process's largest resident set (on an accelerator: allocated memory), without the loader's workers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glsim import load
from glsim.environment import pick_device
from glsim.files import document, write_text
from glsim.models.base import Model
from glsim.models.losses import objective
from glsim.training.config import Train, read_recipe
from glsim.training.runs import LOG, RECIPE
from glsim.training.train import train

ROW = "compare.json"


def main() -> None:
    """Parse, train what is missing, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, default=32, help="of the timing")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # train the one recipe, in this process
    arguments = parser.parse_args()
    if arguments.one:
        train_one(arguments.recipes[0], arguments.data, arguments.out, arguments.seed)
        return
    for recipe in arguments.recipes:
        if not (arguments.out / recipe.stem / ROW).exists():
            print(f"training {recipe.stem}", file=sys.stderr)
            words = [recipe, "--data", arguments.data, "--out", arguments.out, "--one"]
            words += [] if arguments.seed is None else ["--seed", arguments.seed]
            subprocess.run([sys.executable, __file__, *map(str, words)], check=True)
    folders = [arguments.out / recipe.stem for recipe in arguments.recipes]
    models = [load(folder).to(pick_device()) for folder in folders]
    trains = time_in_turn(models, training, arguments.batch_size, arguments.rounds)
    answers = time_in_turn(models, inference, arguments.batch_size, arguments.rounds)
    print("| recipe | top-1 | parameters | training images/s | inference images/s | peak memory, training |")
    print("|---|---|---|---|---|---|")
    for folder, trained, answered in zip(folders, trains, answers, strict=True):
        r = json.loads((folder / ROW).read_text())
        accuracy = f"{r['test']['top1']:.1%} ({r['test']['correct']} of {r['test']['count']})"
        print(
            f"| {folder.name} | {accuracy} | {r['parameters'] / 1e6:.2f} M | {trained:.0f} | {answered:.0f} "
            f"| {r['peak_bytes'] / 2**20:.0f} MiB |"
        )


def train_one(recipe: Path, data: str, out: Path, seed: int | None) -> None:
    """Train one recipe in this process and leave its row beside the run."""
    values = read_recipe(recipe) | ({} if seed is None else {"seed": seed})
    folder = out / recipe.stem
    resumed = (folder / RECIPE).exists()
    result = train(Train(**values, data=data, out=str(folder), resume=resumed))
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    row: dict[str, Any] = {
        "test": document(result.test),
        "parameters": sum(p.numel() for p in load(folder).parameters()),
        "seconds": sum(r["seconds"] for r in log),
        "peak_bytes": peak_bytes(),
    }
    write_text(folder / ROW, json.dumps(row, indent=2) + "\n")


def peak_bytes() -> int:
    """The most memory this process has held: on the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def training(model: Model) -> Callable[[torch.Tensor], float]:
    """A step of training on arbitrary labels."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def step(images: torch.Tensor) -> float:
        labels = torch.arange(len(images), device=images.device) % model.config.num_classes
        loss = objective(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return step


def inference(model: Model) -> Callable[[torch.Tensor], float]:
    """The answers to a batch."""
    model.eval()

    @torch.inference_mode()
    def answer(images: torch.Tensor) -> float:
        return float(model(images).logits.sum())

    return answer


def time_in_turn(models: list[Model], kind: Any, batch_size: int, rounds: int) -> list[float]:
    """Images a second of every model at `kind` of work, median over rounds in which all take turns."""
    device = pick_device()
    work = [kind(model) for model in models]
    batches = [torch.randn(batch_size, 3, *model.config.image_size, device=device) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):  # the first round warms up
        for i, images in enumerate(batches):
            start = time.perf_counter()
            work[i](images)
            if turn:
                seconds[i].append(time.perf_counter() - start)
    return [batch_size / statistics.median(times) for times in seconds]


if __name__ == "__main__":
    main()
