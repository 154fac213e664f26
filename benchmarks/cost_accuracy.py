"""Accuracy against cost: train recipes with several seeds, calibrate those that may answer early, time all in turn.

    python benchmarks/cost_accuracy.py recipes/flowers12_{plain,glsim,glsim_adaptive,glsim_small}.yaml \\
        --data flowers12 --seeds 1 10 100 --against flowers12_plain --out runs/cost

Runs are OUT/RECIPE/seed_SEED; a finished one is not trained again, an interrupted one goes on. A recipe with
`early_loss` needs a margin. Where the data has a val split, `glsim calibrate` finds it for every run there. Elsewhere
one run of the first seed trains on 80 % of train (OUT/RECIPE/val) and is calibrated on the rest; its margin serves all
seeds. The test split chooses nothing. Such a recipe has three rows: as calibrated, always both passes, never a second.

Speed is that of answering the whole test split in batches, from images that are decoded already; every row of every
seed has its turn in each round, and the median round counts. `cost` is the time of the row over the time of `--against`
with the same seed, mean over seeds. `--once` names recipes of which one seed will do. OUT gets cost.json and cost.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from glsim import load
from glsim.checkpoints.bundle import METRICS_FILE, amend, preprocessing_of
from glsim.data.loaders import ImageDataset
from glsim.data.readers import read_data
from glsim.data.transforms import eval_transform
from glsim.environment import environment, pick_device
from glsim.evaluation.calibration import calibrate_bundle
from glsim.files import write_text
from glsim.inference.predictor import answers
from glsim.interpret.drawing import save_figure
from glsim.models import METHODS
from glsim.models.base import EarlyExitModel, Model
from glsim.training.config import Train, read_recipe
from glsim.training.runs import LOG, RECIPE
from glsim.training.train import check_out, train

METHODS["tokens"] = "one_pass"  # the file beside this one


@dataclass
class Row:
    """One way to answer with the run of one seed."""

    name: str
    seed: int
    model: Model
    margin: float | None = None
    seconds: list[float] = field(default_factory=list)
    right: torch.Tensor | None = None  # (images,) bool
    share: float | None = None  # of second passes

    def answer(self, batches: list[torch.Tensor]) -> list[Any]:
        """All outputs, with the margin of this row."""
        if isinstance(self.model, EarlyExitModel):
            self.model.margin = self.margin
        return list(answers(self.model, batches))


def main() -> None:
    """Parse, train what is missing, calibrate, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--once", nargs="*", type=Path, default=[], help="recipes to train with the first seed only")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--against", required=True, help="recipe (its stem) whose time is 1")
    parser.add_argument("--max-loss", type=float, default=0.1, help="of accuracy, in points, for the margin")
    parser.add_argument("--epochs", type=int, default=None, help="instead of the recipes'")
    parser.add_argument("--batch-size", type=int, default=32, help="of the timing")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing; 0: train and calibrate only")
    arguments = parser.parse_args()
    plan = [(recipe, seed) for recipe in arguments.recipes for seed in arguments.seeds]
    plan += [(recipe, arguments.seeds[0]) for recipe in arguments.once]
    if arguments.against not in {recipe.stem for recipe, _ in plan}:
        parser.error(f"--against {arguments.against}: none of the recipes")
    has_val = "val" in read_data(arguments.data)
    for recipe, seed in plan:
        prepare(recipe, seed, has_val, arguments)
    if arguments.rounds:
        rows = [row for recipe, seed in plan for row in ways(arguments.out / recipe.stem / f"seed_{seed}", seed)]
        measure(rows, arguments)
        result = {"environment": environment(pick_device()), "rows": summarise(rows, arguments.against)}
        write_text(arguments.out / "cost.json", json.dumps(result, indent=2) + "\n")
        draw(result["rows"], arguments.against, arguments.out / "cost.png")
        print(as_markdown(result["rows"]))


def prepare(recipe: Path, seed: int, has_val: bool, a: argparse.Namespace) -> None:
    """Train the run of `seed`; give it a margin where its recipe wants one."""
    values = read_recipe(recipe) | ({"epochs": a.epochs} if a.epochs else {})
    base = Train(**{**values, "data": a.data, "out": str(a.out / recipe.stem / f"seed_{seed}"), "seed": seed})
    finish(base)
    if not base.options.get("early_loss"):
        return
    judge = base
    if not has_val:
        judge = replace(base, out=str(a.out / recipe.stem / "val"), seed=a.seeds[0], val_fraction=0.2, test=False)
        finish(judge)
    found = calibrate_bundle(judge.out, a.data, max_loss=a.max_loss)
    amend(base.out, {"margin": found.margin})
    print(f"{base.out}: margin {found.margin}, by {found.count} images of {judge.out}", file=sys.stderr)


def finish(s: Train) -> None:
    """Train, go on training, or leave a finished run alone; ConfigError for a run that began with other settings."""
    folder = Path(s.out)
    s = replace(s, resume=(folder / RECIPE).exists())
    check_out(s, folder)
    if not is_finished(s):
        print(f"training {folder}", file=sys.stderr)
        train(s)


def is_finished(s: Train) -> bool:
    """Whether all epochs of a run are written down: its metrics alone are there after the first one."""
    log = Path(s.out) / LOG
    return (Path(s.out) / METRICS_FILE).exists() and log.exists() and len(log.read_text().splitlines()) == s.epochs


def ways(folder: Path, seed: int) -> list[Row]:
    """The rows of a run: one, or three where the first pass can answer."""
    model, name = load(folder).to(pick_device()), folder.parent.name
    if not isinstance(model, EarlyExitModel):
        return [Row(name, seed, model)]
    several = {"": model.margin, ", both passes": None, ", first pass": 0.0}
    return [Row(name + words, seed, model, margin) for words, margin in several.items()]


@torch.inference_mode()
def measure(rows: list[Row], a: argparse.Namespace) -> None:
    """Who is right, and the seconds of each round; the first round warms up."""
    test = read_data(a.data, classes=rows[0].model.config.label_names)["test"]
    labels, pixels = torch.tensor(test.labels), dict[Any, list[torch.Tensor]]()
    for turn in range(a.rounds + 1):
        for row in rows:
            p = preprocessing_of(row.model)
            if p not in pixels:
                images = ImageDataset(test, eval_transform(p))
                parts = torch.arange(len(test)).split(a.batch_size)
                pixels[p] = [torch.stack([images[int(i)][0] for i in part]).to(pick_device()) for part in parts]
            start = time.perf_counter()
            outputs = row.answer(pixels[p])
            guesses = torch.cat([output.logits.argmax(dim=1) for output in outputs]).cpu()  # waits for the device
            if turn:
                row.seconds.append(time.perf_counter() - start)
                continue
            row.right = guesses == labels
            if outputs[0].needs_second_pass is not None:
                row.share = float(torch.cat([output.needs_second_pass for output in outputs]).float().mean())


def summarise(rows: list[Row], against: str) -> list[dict[str, Any]]:
    """A row a name: means over its seeds."""
    base = {row.seed: statistics.median(row.seconds) for row in rows if row.name == against}
    result = []
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        accuracies = [float(row.right.float().mean()) for row in mine if row.right is not None]
        costs = [statistics.median(row.seconds) / base[row.seed] for row in mine]
        shares = [row.share for row in mine if row.share is not None]
        result.append(
            {
                "name": name,
                "seeds": [row.seed for row in mine],
                "correct": [int(row.right.sum()) for row in mine if row.right is not None],
                "count": len(mine[0].right) if mine[0].right is not None else 0,
                "top1": statistics.mean(accuracies),
                "top1_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "second_pass_share": statistics.mean(shares) if shares else None,
                "cost": statistics.mean(costs),
                "costs": costs,
                "throughput": statistics.mean(1 / cost for cost in costs),
            }
        )
    return result


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| | top-1, % | right answers | second passes | throughput, x | cost, x |", "|---|---|---|---|---|---|"]
    for r in rows:
        spread = f" +- {100 * r['top1_std']:.2f}" if r["top1_std"] is not None else ""
        share = f"{r['second_pass_share']:.1%}" if r["second_pass_share"] is not None else ""
        right = ", ".join(map(str, r["correct"])) + f" of {r['count']}"
        name = f"| {r['name']} | {100 * r['top1']:.2f}{spread} | {right} | {share} "
        lines.append(name + f"| {r['throughput']:.2f} | {r['cost']:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], against: str, path: Path) -> None:
    """PNG: accuracy along the cost, on a scale where twice as much is always as far."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        spread = 100 * row["top1_std"] if row["top1_std"] is not None else None
        style = {"color": f"C{i % 10}", "marker": "os^D"[i // 10 % 4], "markersize": 7, "linestyle": "none"}
        name = row["name"].split("_", 1)[-1].replace("_", " ")
        axes.errorbar(row["cost"], 100 * row["top1"], yerr=spread, elinewidth=0.8, capsize=3, label=name, **style)
    axes.set(xlabel=f"time to answer, {against} = 1", ylabel="test top-1, %", xscale="log")
    reach = [
        tick for tick in (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if tick < 1.2 * axes.get_xlim()[1]
    ]
    axes.set_xticks([tick for tick in reach if tick > axes.get_xlim()[0] / 1.2], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
