"""The paper's protocol: the lr chosen on held-out training images, then several seeds trained on all of them.

`OUT/lr_LR/` are the runs that choose, `OUT/seed_SEED/` those that are measured on test after their last epoch, and
`OUT/reproduce.json` says how far it got: the same command goes on from there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accelerate import Accelerator

from glsim.config import Reproduce, Train, change_recipe
from glsim.data.readers import hold_out, split_hash
from glsim.data.splits import take_split
from glsim.environment import make_accelerator
from glsim.files import one_line, printable, read_json, write_json
from glsim.training import train
from glsim.training.resume import Interrupted, held
from glsim.training.train import plain
from glsim.types import ConfigError, DataError, GlsimError

STATE = "reproduce.json"
OWN = (*train.FREE, "lr", "seed", "val_fraction", "test")  # settings of a run that are not the plan's
MEASURED = ("count", "correct", "top1", "per_class_mean")


def run(s: Reproduce, progress: bool = True) -> dict[str, Any]:
    """The verb: choose the lr on val, train every seed, measure each on test once; returns what `reproduce.json` holds.

    Raises ConfigError when OUT was started with other settings or images, or another process is at work in it,
    DataError when there is no test split, GlsimError when every lr diverged, and Interrupted after SIGINT or SIGTERM,
    which the same command goes on from.
    """
    out = Path(s.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; name a folder")
    fixed = {"data": s.data, "out": s.out, "seed": s.seeds[0], "val_fraction": 0.0, "test": True}
    base = change_recipe(s.recipe, s.train, **fixed)
    splits, _ = train.read_splits(replace(base, skip_bad=False))
    if len(s.lrs) > 1:
        held_out = {"val": hold_out(splits["train"], s.val_fraction, base.split_seed)[1]}
        take_split(held_out | splits, "val", s.data)
    plan = {
        "lrs": s.lrs or [base.lr],
        "seeds": s.seeds,
        "val_fraction": 0.0 if "val" in splits else s.val_fraction,
        "split_hash": split_hash(splits, s.data),
        "train": plain(base, *OWN),
    }
    accelerator = make_accelerator(None, base.precision, base.accumulate)
    with held(out, accelerator):
        return _follow(plan, base, out, accelerator, progress)


def _follow(plan: dict[str, Any], base: Train, out: Path, accelerator: Accelerator, progress: bool) -> dict[str, Any]:
    """Make the runs of the plan that are not done yet."""
    state = _read(out, plan)
    accelerator.wait_for_everyone()  # every process has read it before the first one writes
    main = accelerator.is_main_process

    def keep() -> None:
        if main:
            write_json(out / STATE, state)

    def finish(name: str, **changes: Any) -> dict[str, Any]:
        row = state["runs"][name]
        row["state"] = "running"
        keep()
        folder = out / name
        try:
            resume = (folder / train.RECIPE).exists()
            result = train.run(replace(base, **changes, out=str(folder), resume=resume), progress)
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(f"interrupted in {folder}; the same command goes on from there") from stop
        row["state"] = "done"
        return result

    with _sigterm_as_sigint():
        for name, row in state["runs"].items():
            if "test" in row or row["state"] in ("done", "diverged"):
                continue
            if name.startswith("lr_"):
                changes = {"lr": row["lr"], "seed": row["seed"], "val_fraction": plan["val_fraction"], "test": False}
                try:
                    row["val"] = _measured(finish(name, **changes)["val"])
                except train.Diverged as error:
                    row |= {"state": "diverged", "why": str(error)}
            else:
                state["lr"] = row["lr"] = choose_lr(state["runs"])
                changes = {"lr": row["lr"], "seed": row["seed"], "val_fraction": 0.0, "test": True}
                row["test"] = _measured(finish(name, **changes)["test"])
            keep()
        state["test"] = summary([row["test"] for row in state["runs"].values() if "test" in row])
        keep()
    return {"out": str(out), **state}


def choose_lr(runs: dict[str, dict[str, Any]]) -> float:
    """The lr with the most right answers on val after the last epoch; of equals the smallest.

    A single one needs no measurement. Raises GlsimError when all of them diverged.
    """
    lrs = {name: row for name, row in runs.items() if name.startswith("lr_")}
    if not lrs:
        (lr,) = {row["lr"] for row in runs.values()}
        return lr
    finished = [row for row in lrs.values() if row["state"] == "done"]
    if not finished:
        raise GlsimError(f"every lr diverged: {'; '.join(row['why'] for row in lrs.values())}")
    return max(finished, key=lambda row: (row["val"]["correct"], -row["lr"]))["lr"]


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None: of one run) of top-1 and per-class mean, and the counts."""
    result: dict[str, Any] = {"runs": len(measured)}
    for name in ("top1", "per_class_mean"):
        values = [m[name] for m in measured]
        result[name] = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
    return result | {"correct": [m["correct"] for m in measured], "count": measured[0]["count"]}


def _read(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What `reproduce.json` holds, or the beginning; ConfigError when it was started by another plan."""
    file = out / STATE
    several = plan["lrs"] if len(plan["lrs"]) > 1 else []
    only = None if several else plan["lrs"][0]
    first = {"state": "waiting", "seed": plan["seeds"][0]}
    runs = {f"lr_{lr}": {**first, "lr": lr} for lr in several}
    runs |= {f"seed_{seed}": {"state": "waiting", "seed": seed, "lr": only} for seed in plan["seeds"]}
    if not file.exists():
        return {"plan": plan, "runs": runs, "lr": only, "test": None}
    state, advice = read_json(file), "remove it, finished runs are kept"
    try:
        kept = Train(**state["plan"]["train"], data="-", out="-")  # settings of later versions: their defaults
        before = plain(kept, *OWN) | {k: v for k, v in state["plan"].items() if k != "train"}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {one_line(error)}; {advice}") from error
    now = {**plan["train"], **{k: v for k, v in plan.items() if k != "train"}}
    changed = [f"{k}={v!r} (was {before.get(k)!r})" for k, v in now.items() if v != before.get(k)]
    if changed:
        said = printable(", ".join(changed))
        raise ConfigError(f"{out} was started with other settings: {said}; name another --out")
    rows = state.get("runs")
    if not isinstance(rows, dict) or rows.keys() != runs.keys() or not all(map(_is_row, rows.values())):
        raise DataError(f"{file} is damaged: its runs are not those of its plan; {advice}")
    return state


def _is_row(row: Any) -> bool:
    """Whether this is what is kept of a run."""
    if not isinstance(row, dict) or not isinstance(row.get("state"), str):
        return False
    return {"lr", "seed"} <= row.keys() and all(is_measured(row[split]) for split in ("val", "test") if split in row)


def is_measured(result: Any) -> bool:
    """Whether this is what is kept of a measurement."""
    return isinstance(result, dict) and all(isinstance(result.get(name), int | float) for name in MEASURED)


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in MEASURED}


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
