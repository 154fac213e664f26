"""The paper's protocol: the lr chosen on held-out training images, then several seeds trained on all of them.

`OUT/lr_LR/` are the runs that choose, `OUT/seed_SEED/` those that are measured on test after their last epoch, and
`OUT/reproduce.json` says how far it got: the same command goes on from there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from accelerate import Accelerator

from glsim.data.readers import hold_out, split_hash
from glsim.data.splits import take_split
from glsim.environment import make_accelerator
from glsim.files import document, one_line, printable, read_json, write_json
from glsim.training import train as training
from glsim.training.components import read_splits
from glsim.training.config import WITHOUT_EFFECT, Train, change_recipe, plain_values
from glsim.training.resume import Interrupted, lock_folder
from glsim.training.runs import RECIPE, Measured, read_measured
from glsim.training.tally import Diverged
from glsim.types import ConfigError, DataError, GlsimError, optional

STATE = "reproduce.json"
OWN = (*WITHOUT_EFFECT, "lr", "seed", "val_fraction", "test")  # settings of a run that are not the plan's


@dataclass(frozen=True)
class Plan:
    """What was asked for: the same command with another plan is refused."""

    lrs: list[float]
    seeds: list[int]
    val_fraction: float  # 0 where the data has a val split
    split_hash: str
    train: dict[str, Any]  # settings of every run


@dataclass(frozen=True)
class PlannedRun:
    """A run of the plan, and what came of it."""

    state: str  # waiting, running, done, diverged
    seed: int
    lr: float | None  # None until it is chosen
    val: Measured | None = optional()  # of a run that chooses the lr
    test: Measured | None = optional()  # of a run that is measured
    why: str | None = optional()  # it diverged


class Spread(NamedTuple):
    """Over the seeds."""

    mean: float
    std: float | None  # sample standard deviation; None of one run

    def __str__(self) -> str:  # in percent
        spread = f" +- {100 * self.std:.2f}" if self.std is not None else ""
        return f"{100 * self.mean:.2f}{spread}"


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """Test results of runs that differ in the seed alone."""

    runs: int
    top1: Spread
    per_class_mean: Spread
    correct: list[int]  # of each run
    count: int  # images


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce_recipe` returns, and but for `out` keeps in STATE."""

    out: str
    plan: Plan
    runs: dict[str, PlannedRun]  # by the names of their folders
    lr: float | None
    test: SeedSummary | None  # None until all runs are done


def reproduce_recipe(
    recipe: str | Path,
    data: str,
    out: str | Path,
    *,
    lrs: Sequence[float] = (),
    seeds: Sequence[int] = (1, 10, 100),
    val_fraction: float = 0.2,
    train: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Reproduction:
    """Choose the lr on val, train every seed, measure each on test once.

    Args:
        recipe: YAML file, or the name of one of the package's.
        data: what `glsim.data.readers:read_data` takes.
        out: folder for all the runs; what is done there already is not done again.
        lrs: learning rates to choose from; without any the recipe's, and nothing is chosen.
        seeds: of the runs that are measured on test; the first one's choose the lr.
        val_fraction: share of train held out while choosing, where the data has no val split.
        train: settings instead of the recipe's.
        progress: draw progress bars.

    Raises:
        ConfigError: when `out` was started with other settings or images, or another process is at work in it.
        DataError: when there is no test split.
        GlsimError: when every lr diverged.
        Interrupted: after SIGINT or SIGTERM; the same call goes on.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    fixed = {"data": data, "out": str(out), "seed": seeds[0], "val_fraction": 0.0, "test": True}
    base = change_recipe(recipe, dict(train or {}), **fixed)
    splits, _ = read_splits(replace(base, skip_bad=False))
    if len(lrs) > 1:
        held_out = {"val": hold_out(splits["train"], val_fraction, base.split_seed)[1]}
        take_split(held_out | splits, "val", data)
    plan = Plan(
        lrs=list(lrs) or [base.lr],
        seeds=list(seeds),
        val_fraction=0.0 if "val" in splits else val_fraction,
        split_hash=split_hash(splits, data),
        train=plain_values(base, *OWN),
    )
    accelerator = make_accelerator(None, base.precision, base.accumulate)
    with lock_folder(out, accelerator), _sigterm_as_sigint():
        return _follow(plan, base, out, accelerator, progress)


def _follow(plan: Plan, base: Train, out: Path, accelerator: Accelerator, progress: bool) -> Reproduction:
    """Make the runs of the plan that are not done yet."""
    state = read_state(out, plan)
    accelerator.wait_for_everyone()  # every process has read it before the first one writes

    def keep(changed: Reproduction) -> Reproduction:
        if accelerator.is_main_process:
            write_json(out / STATE, {k: v for k, v in document(changed).items() if k != "out"})
        return changed

    for name, row in state.runs.items():
        if row.test is not None or row.state in ("done", "diverged"):
            continue
        chooses = name.startswith("lr_")
        if not chooses:
            lr = choose_lr(state.runs)
            state, row = replace(state, lr=lr), replace(row, lr=lr)
        row = state.runs[name] = replace(row, state="running")
        assert row.lr is not None
        keep(state)
        folder = out / name
        settings = replace(base, lr=row.lr, seed=row.seed, out=str(folder), resume=(folder / RECIPE).exists())
        if chooses:
            settings = replace(settings, val_fraction=plan.val_fraction, test=False)
        try:
            result = training.train(settings, progress)
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(f"interrupted in {folder}; the same command goes on from there") from stop
        except Diverged as error:
            if not chooses:
                raise
            state.runs[name] = replace(row, state="diverged", why=str(error))
        else:
            split = "val" if chooses else "test"
            measured: dict[str, Any] = {split: read_measured(vars(getattr(result, split)))}
            state.runs[name] = replace(row, state="done", **measured)
        keep(state)
    return keep(replace(state, test=summarise([row.test for row in state.runs.values() if row.test is not None])))


def choose_lr(runs: Mapping[str, PlannedRun]) -> float:
    """The lr with the most right answers on val after the last epoch; of equals the smallest.

    A single one needs no measurement. Raises GlsimError when all of them diverged.
    """
    candidates = [row for name, row in runs.items() if name.startswith("lr_")]
    if not candidates:
        (lr,) = {row.lr for row in runs.values()}
        assert lr is not None
        return lr
    finished = [(row.val.correct, -row.lr) for row in candidates if row.val is not None and row.lr is not None]
    if not finished:
        raise GlsimError(f"every lr diverged: {'; '.join(row.why or '' for row in candidates)}")
    return -max(finished)[1]


def summarise(measured: Sequence[Measured]) -> SeedSummary:
    """Mean and sample standard deviation of top-1 and per-class mean, and the counts."""

    def spread(values: list[float]) -> Spread:
        return Spread(mean(values), stdev(values) if len(values) > 1 else None)

    return SeedSummary(
        runs=len(measured),
        top1=spread([m.top1 for m in measured]),
        per_class_mean=spread([m.per_class_mean for m in measured]),
        correct=[m.correct for m in measured],
        count=measured[0].count,
    )


def read_state(out: Path, plan: Plan) -> Reproduction:
    """What STATE in `out` holds, or the beginning; ConfigError when it was started by another plan."""
    file = out / STATE
    several = plan.lrs if len(plan.lrs) > 1 else []
    only = None if several else plan.lrs[0]
    runs = {f"lr_{lr}": PlannedRun("waiting", plan.seeds[0], lr) for lr in several}
    runs |= {f"seed_{seed}": PlannedRun("waiting", seed, only) for seed in plan.seeds}
    if not file.exists():
        return Reproduction(str(out), plan, runs, only, None)
    state, advice = read_json(file), "remove it, finished runs are kept"
    try:
        kept = Train(**state["plan"]["train"], data="-", out="-")  # settings of later versions: their defaults
        before = plain_values(kept, *OWN) | {k: v for k, v in state["plan"].items() if k != "train"}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {one_line(error)}; {advice}") from error
    now = {**plan.train, **{k: v for k, v in vars(plan).items() if k != "train"}}
    changed = [f"{k}={v!r} (was {before.get(k)!r})" for k, v in now.items() if v != before.get(k)]
    if changed:
        said = printable(", ".join(changed))
        raise ConfigError(f"{out} was started with other settings: {said}; name another --out")
    rows = state.get("runs")
    found = {name: _read_row(row) for name, row in rows.items()} if isinstance(rows, dict) else {}
    whole = {name: row for name, row in found.items() if row is not None}
    if whole.keys() != runs.keys() or len(whole) < len(found):
        raise DataError(f"{file} is damaged: its runs are not those of its plan; {advice}")
    return Reproduction(str(out), plan, whole, state.get("lr"), None)


def _read_row(row: Any) -> PlannedRun | None:
    """What is kept of a run; None where it is something else."""
    if not isinstance(row, dict) or not isinstance(row.get("state"), str) or not {"lr", "seed"} <= row.keys():
        return None
    measured = {split: read_measured(row[split]) for split in ("val", "test") if split in row}
    if None in measured.values():
        return None
    return PlannedRun(row["state"], row["seed"], row["lr"], why=row.get("why"), **measured)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Between the steps of training, SIGTERM interrupts at once, as SIGINT does."""
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
