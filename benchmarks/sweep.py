"""Search settings of a recipe with Optuna; the same command goes on where it was interrupted.

    pip install -e ".[sweep]"
    python benchmarks/sweep.py recipes/flowers12_glsim.yaml --data flowers12 --out runs/sweep --trials 20 --lr 1e-4 1e-2

A trial trains on a part of the train split and is judged after the last epoch on the rest of it, or on the val split
where the data has one: the test split is never measured. OUT/study.journal holds the study, OUT/trial_N the runs. A
trial that was interrupted is taken up again, with its settings and from its checkpoint. One process at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from glsim.training import train
from glsim.training.components import read_splits
from glsim.training.config import Train, read_recipe
from glsim.training.runs import RECIPE
from glsim.training.tally import Diverged
from glsim.types import GlsimError

FOLDER = "folder"


def main(arguments: list[str] | None = None) -> int:
    """Parse, search, print the best trials; returns the exit status, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier calls included")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="of train, where the data has no val split")
    for name in ("lr", "weight-decay"):
        parser.add_argument(f"--{name}", nargs=2, type=float, metavar=("LOW", "HIGH"), help="range, log-uniform")
    parser.add_argument("--drop-path", nargs=2, type=float, metavar=("LOW", "HIGH"), help="range, uniform")
    given = parser.parse_args(arguments)
    spans = {name: getattr(given, name) for name in ("lr", "weight_decay", "drop_path") if getattr(given, name)}
    if not spans:
        parser.error("nothing to search: give --lr, --weight-decay or --drop-path")
    if any(low <= 0 for name, (low, _) in spans.items() if name != "drop_path"):
        parser.error("a log-uniform range starts above 0")
    recipe = read_recipe(given.recipe) | {"data": given.data, "val_fraction": 0.0, "test": False}
    if "val" not in read_splits(Train(**recipe | {"out": str(given.out)}))[0]:
        recipe["val_fraction"] = given.val_fraction or parser.error("--val-fraction 0: the data has no val split")

    given.out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="glsim",
        direction="maximize",
        storage=JournalStorage(JournalFileBackend(str(given.out / "study.journal"))),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a call that was killed
        study.enqueue_trial(trial.params, {FOLDER: trial.user_attrs.get(FOLDER, f"trial_{trial.number}")})
        study.tell(trial.number, state=TrialState.FAIL)

    def objective(trial: optuna.Trial) -> float:
        values: dict[str, Any] = {
            name: trial.suggest_float(name, *span, log=name != "drop_path") for name, span in spans.items()
        }
        if "drop_path" in values:
            values["options"] = {**(recipe.get("options") or {}), "drop_path": values.pop("drop_path")}
        folder = given.out / trial.user_attrs.get(FOLDER, f"trial_{trial.number}")
        run = {"out": str(folder), "resume": (folder / RECIPE).exists()}
        try:
            result = train.train(Train(**recipe | values | run))
        except Diverged as error:
            print(error, file=sys.stderr)
            raise optuna.TrialPruned from error
        except (GlsimError, KeyboardInterrupt):  # interrupted, or a full disk: the next call takes it up
            study.enqueue_trial(trial.params, {FOLDER: folder.name})
            raise
        return result.val.top1

    done = len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    try:
        study.optimize(objective, n_trials=max(0, given.trials - done))
    except GlsimError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print("| trial | val top-1 |", *(f"{name} |" for name in spans))
    print("|---|---|" + "---|" * len(spans))
    best = sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda t: -(t.value or 0.0))
    for trial in best[:10]:
        numbers = " | ".join(f"{trial.params[name]:.4g}" for name in spans)
        print(f"| {trial.user_attrs.get(FOLDER, f'trial_{trial.number}')} | {trial.value:.2%} | {numbers} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
