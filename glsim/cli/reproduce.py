"""`glsim reproduce`: a recipe run by the protocol of the paper, several seeds and a chosen learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import MISSING, Settings, dataclass, positional, required, setting
from glsim.training.config import check_seeds
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.training.reproduce import Reproduction

PURPOSE = "Train"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Run a recipe by the paper's protocol: choose the lr on images held out of train, then train several seeds."""

    recipe: str = positional(
        MISSING, "YAML file, or the name of one that glsim recipes lists, as for train", path="reads"
    )
    data: str = required("folder or CSV, as for train", path="reads")
    out: str = required("folder for all the runs; the same command goes on where it was interrupted", path="folder")
    lrs: list[float] = setting([], "learning rates to choose from; default: the recipe's, and nothing is chosen")
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
        if any(lr <= 0 for lr in self.lrs):
            raise ConfigError(f"lrs={self.lrs}: above 0")
        check_seeds(*self.seeds)
        if self.lrs and not self.val_fraction:
            raise ConfigError("val_fraction=0: the lr is chosen on what is held out of train; above 0 is needed")
        fixed = {"data": "--data", "out": "--out", "lr": "--lrs", "seed": "--seeds", "val_fraction": "--val-fraction"}
        for name in self.train:
            if name in fixed:
                raise ConfigError(f"--train.{name}: use {fixed[name]}")
            if name in ("test", "resume"):
                raise ConfigError(f"--train.{name}: the protocol sets that itself")


def run(options: Options, progress: bool) -> Reproduction:
    """Make the runs that are not done yet."""
    from glsim.training.reproduce import reproduce_recipe

    return reproduce_recipe(**vars(options), progress=progress)


def show(r: Reproduction, options: Options) -> str:
    """Which lr was chosen by what, every seed's accuracy, mean and std."""
    lines = []
    for run in r.runs.values():
        if run.val is not None:
            chosen = " (chosen)" if run.lr == r.lr else ""
            lines.append(f"lr {run.lr}: val top-1 {run.val.top1:.2%}{chosen}")
        elif run.test is not None:
            lines.append(f"seed {run.seed}: test top-1 {run.test.top1:.2%} ({run.test.correct} of {run.test.count})")
        else:
            lines.append(f"lr {run.lr}: {run.why}")
    if r.test is not None:
        mean, std = r.test.top1
        spread = f" +- {100 * std:.2f}" if std is not None else ""
        lines.append(f"test top-1 {100 * mean:.2f}{spread} % over {r.test.runs} seeds, last epoch, lr {r.lr}")
    return "\n".join([*lines, f"runs: {r.out}; tables: glsim report {r.out}"])
