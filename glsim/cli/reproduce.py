"""`glsim reproduce`: a recipe run by the protocol of the paper, several seeds and a chosen learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import Lines, Settings, positional, required, setting
from glsim.training.config import check_seeds
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.training.reproduce import Reproduction

PURPOSE = "Train"
CALL = "glsim.training.reproduce:reproduce_recipe"


class Options(Settings):
    """Run a recipe by the paper's protocol: choose the lr on images held out of train, then train several seeds."""

    recipe: str = positional("YAML file, or the name of one that glsim recipes lists, as for train", path="reads")
    data: str = required("folder or CSV, as for train", path="reads")
    out: str = required("folder for all the runs; the same command goes on where it was interrupted", path="folder")
    lrs: list[float] = setting(
        [], "learning rates to choose from; default: the recipe's, and nothing is chosen", above=0
    )
    seeds: list[int] = setting([1, 10, 100], "of the runs that are measured on test; the first one's choose the lr")
    val_fraction: float = setting(
        0.2, "share of train held out while choosing, where the data has no val split", least=0, below=1
    )
    train: dict[str, Any] = setting({}, "settings instead of the recipe's, as --train.epochs 10 --train.workers 8")

    def check(self) -> None:
        """Values that are there once, an lr that can be chosen, and no setting that the protocol sets itself."""
        super().check()
        for name in ("lrs", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "seeds" and not values):
                raise ConfigError(f"{name}={values}: {'one or more' if not values else 'each only once'}")
        check_seeds(*self.seeds)
        if self.lrs and not self.val_fraction:
            raise ConfigError("val_fraction=0: the lr is chosen on what is held out of train; above 0 is needed")
        fixed = {"data": "--data", "out": "--out", "lr": "--lrs", "seed": "--seeds", "val_fraction": "--val-fraction"}
        for name in self.train:
            if name in fixed:
                raise ConfigError(f"--train.{name}: use {fixed[name]}")
            if name in ("test", "resume"):
                raise ConfigError(f"--train.{name}: the protocol sets that itself")


def show(r: Reproduction, options: Options) -> Lines:
    """Which lr was chosen by what, every seed's accuracy, mean and std."""
    for run in r.runs.values():
        if run.val is not None:
            yield f"lr {run.lr}: val top-1 {run.val.top1:.2%}{' (chosen)' if run.lr == r.lr else ''}"
        elif run.test is not None:
            yield f"seed {run.seed}: test top-1 {run.test.top1:.2%} ({run.test.correct} of {run.test.count})"
        else:
            yield f"lr {run.lr}: {run.why}"
    if r.test is not None:
        yield f"test top-1 {r.test.top1} % over {r.test.runs} seeds, last epoch, lr {r.lr}"
    yield f"runs: {r.out}; tables: glsim report {r.out}"
