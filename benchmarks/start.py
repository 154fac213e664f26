"""Does GLSim's training loss follow plain's from the first epoch on? One recipe, one start of the weights, each method.

    python benchmarks/start.py --data cub20 --weights dinov2_small.safetensors --epochs 3 --out runs/start

Every method is trained by the recipe beside this file from the same weights (what --init-from takes): `plain`; `glsim`,
whose aggregator starts as the identity; `published`, whose aggregator starts as the paper's. Runs are
OUT/METHOD/seed_SEED; a finished one is not trained again, an interrupted one goes on. OUT gets start.csv (a row for
every epoch that is there by then), start.json (with the machine) and start.png, anew after every run.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from cost_accuracy import finish
from matplotlib.figure import Figure

from glsim.environment import environment
from glsim.files import write_text
from glsim.interpret.drawing import save_figure
from glsim.training.config import Train, read_recipe
from glsim.training.runs import LOG, RUN

RECIPE = Path(__file__).with_suffix(".yaml")
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "plain"},
    "glsim": {"method": "glsim", "options": {"aggregator_start": "identity"}},
    "published": {"method": "glsim", "options": {"aggregator_start": "published"}},
}
COLUMNS = ("method", "seed", "epoch", "train_loss", "train_top1", "test_top1")


def main() -> None:
    """Parse, train what is missing, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True, help="of the backbone: what --init-from takes")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="instead of the one beside this file")
    a = parser.parse_args()
    for seed in a.seeds:
        for method in a.methods:
            values = read_recipe(a.recipe) | METHODS[method] | {"epochs": a.epochs, "seed": seed}
            finish(
                Train(**values | {"data": a.data, "init_from": a.weights, "out": str(run_folder(a.out, method, seed))})
            )
            write(a.out)
    print((a.out / "start.csv").read_text(), end="")


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where the run of a method and seed lies."""
    return out / method / f"seed_{seed}"


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The epochs of all runs in `out`, those of unfinished ones too, in the order of METHODS."""
    rows = []
    for method in METHODS:
        for log in sorted((out / method).glob(f"seed_*/{LOG}"), key=lambda log: int(log.parent.name[5:])):
            told = [json.loads(line) for line in log.read_text().splitlines()]
            rows += [{"method": method, "seed": int(log.parent.name[5:]), **epoch} for epoch in told]
    return rows


def write(out: Path) -> None:
    """start.csv, start.json and start.png of what is there."""
    rows = [{name: row.get(name) for name in COLUMNS} for row in read_rows(out)]
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(out / "start.csv", text.getvalue())
    starts = {
        run.parent.relative_to(out).as_posix(): json.loads(run.read_text())["starts"] for run in out.glob(f"*/*/{RUN}")
    }
    told = {"environment": environment(torch.device("cpu")), "starts": starts, "rows": rows}
    write_text(out / "start.json", json.dumps(told, indent=2) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, method in enumerate(METHODS):
        for i, seed in enumerate(sorted({row["seed"] for row in rows if row["method"] == method})):
            own = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
            epochs, losses = [row["epoch"] for row in own], [row["train_loss"] for row in own]
            axes.plot(epochs, losses, marker=".", color=f"C{colour}", label=method if i == 0 else None)
    axes.set(xlabel="epoch", ylabel="training loss, mean over the epoch", title="One recipe, one start of the weights")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, out / "start.png")


if __name__ == "__main__":
    main()
