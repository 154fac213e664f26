"""Floor 4: tables of finished runs: mean and standard deviation over seeds, McNemar's test between two rows."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from glsim.bundle import CONFIG, METRICS_FILE
from glsim.config import Report, Train, read_recipe
from glsim.figures import save_figure
from glsim.files import csv_plain, csv_text, make_folder, markdown, read_json, read_text, real, write_text
from glsim.reproduce import STATE, is_measured, summary
from glsim.train import FREE, PREDICTIONS, RECIPE, plain
from glsim.types import ConfigError, DataError


@dataclass(frozen=True)
class Run:
    """A finished run; `settings` are those that make it comparable: all but the seed and what changes nothing."""

    folder: Path
    data: str
    seed: int
    settings: dict[str, Any]
    test: dict[str, Any]


def run(s: Report) -> dict[str, Any]:
    """The verb: group runs that differ in the seed alone, summarise each group, pair them with `against`; write `out`.

    Raises DataError for what is no run, twice the same, or measured on other images than its partner, and ConfigError
    when `against` names no row or several.
    """
    runs, left_out = find_runs(s.runs)
    groups = group(runs)
    result: dict[str, Any] = {"data": [], "left_out": left_out}
    for name in dict.fromkeys(run.data for run in runs):
        here = [g for g in groups if g[0].data == name]
        names = differing(here)
        rows = [as_row(g, names, s.best_on_test) for g in here]
        result["data"].append({"name": name, "rows": rows, "comparisons": []})
        if s.against is not None and (base := find_baseline(s.against, here)) is not None:
            labels = label(rows)
            for other, other_label in zip(here, labels, strict=True):
                if other is not base:
                    pair = {"baseline": labels[here.index(base)], "other": other_label}
                    result["data"][-1]["comparisons"].append(pair | compare(base, other))
    if s.against is not None and all(find_baseline(s.against, [g]) is None for g in groups):
        methods = sorted({run.settings["method"] for run in runs})
        raise ConfigError(f"against={s.against}: no run of that method or folder; methods here: {', '.join(methods)}")
    if s.out is not None:
        out = make_folder(s.out)
        write_text(out / "report.md", as_markdown(result))
        write_text(out / "report.csv", as_csv(result))
        draw(result, out / "report.png")
    return result


def find_runs(given: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The finished runs in `given` (run folders, folders of `glsim reproduce`, globs), and what was left out, and why.

    Raises DataError for a path that is not there, and when nothing is left.
    """
    folders: dict[Path, None] = {}
    for name in given:
        found = [Path(name)] if Path(name).exists() else [Path(p) for p in sorted(glob.glob(name))]  # noqa: PTH207
        if not found:
            raise DataError(f"{name}: there is no such folder; give run folders or folders of glsim reproduce")
        for folder in found:
            inner = [folder]
            if (folder / STATE).is_file():
                rows = _read_json(folder / STATE).get("runs")
                if not isinstance(rows, dict):
                    raise DataError(f"{folder / STATE} is damaged: it has no runs")
                inner = [folder / name for name in rows if name.startswith("seed_")]
            folders |= dict.fromkeys(real(path) for path in inner)
    runs, left_out = [], []
    for folder in folders:
        if not (folder / RECIPE).is_file() or not (folder / METRICS_FILE).is_file():
            left_out.append(f"{folder}: no run, or one without a finished epoch")
            continue
        settings, metrics = Train(**read_recipe(folder / RECIPE)), _read_json(folder / METRICS_FILE)
        if "test" not in metrics:
            left_out.append(f"{folder}: not measured on test (not finished, no test split, or trained without --test)")
            continue
        data: dict[str, Any] = _read_json(folder / CONFIG).get("data", {})
        if not is_measured(metrics["test"]) or not _is_told(data):
            raise DataError(f"{folder} is damaged: its {METRICS_FILE} or {CONFIG} is not what training writes")
        kept = plain(settings, *FREE, "seed") | {"split": data["split_hash"][:8]}
        runs.append(Run(folder, settings.dataset or data["source"], settings.seed, kept, metrics["test"]))
    if not runs:
        raise DataError(f"no finished run; left out: {'; '.join(left_out)}")
    return runs, left_out


def group(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, by seed; DataError when two do not differ at all."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = groups.setdefault(json.dumps([run.data, run.settings], sort_keys=True), [])
        if twin := next((r for r in same if r.seed == run.seed), None):
            raise DataError(f"{twin.folder} and {run.folder} have the same seed and settings; give one of them")
        same.append(run)
    return [sorted(same, key=lambda r: r.seed) for same in groups.values()]


def differing(groups: list[list[Run]]) -> list[str]:
    """The settings besides method, backbone and lr that are not the same in all `groups`."""
    first, *others = [g[0].settings for g in groups]
    names = [k for k in first if any(s[k] != first[k] for s in others) and k not in ("method", "backbone", "lr")]
    methods = [g[0].settings["method"] for g in groups]
    if len(set(methods)) == len(methods):
        names = [k for k in names if k != "options"]  # every method has its own
    return names


def as_row(runs: list[Run], names: list[str], best_on_test: bool) -> dict[str, Any]:
    """A group as plain values: what it is, and the summary of its test results."""
    settings = runs[0].settings
    row = {name: settings[name] for name in ("method", "backbone", "lr")}
    row |= {"settings": {name: settings[name] for name in names}, "seeds": [run.seed for run in runs]}
    row |= {"folders": [str(run.folder) for run in runs], **summary([run.test for run in runs])}
    if best_on_test:
        best = max(runs, key=lambda run: run.test["correct"])
        row["best on test"] = {"top1": best.test["top1"], "seed": best.seed}
    return row


def label(rows: list[dict[str, Any]]) -> list[str]:
    """A name for each row: the method, and as much more as tells it from the others."""
    names = [row["method"] for row in rows]
    for parts in ([row["backbone"] for row in rows], [f"lr {row['lr']}" for row in rows], [_settings(r) for r in rows]):
        if len(set(names)) < len(names) and len(set(parts)) > 1:
            names = [f"{name}, {part}" for name, part in zip(names, parts, strict=True)]
    return names


def find_baseline(against: str, groups: list[list[Run]]) -> list[Run] | None:
    """The group that `against` (a method, a run folder or a folder of `glsim reproduce`) names, if any.

    Raises ConfigError when it names several.
    """
    folder = real(against)
    found = [
        g for g in groups if g[0].settings["method"] == against or any(folder in (r.folder, r.folder.parent) for r in g)
    ]
    if len(found) > 1:
        several = ", ".join(str(g[0].folder) for g in found)
        raise ConfigError(f"against={against} stands in {len(found)} rows; name one of these folders: {several}")
    return found[0] if found else None


def compare(base: list[Run], other: list[Run]) -> dict[str, Any]:
    """McNemar of two groups, seed by seed on the same images, and pooled over the seeds.

    Two single runs are paired whatever their seeds. Raises ConfigError when no seed is in both groups, and DataError
    when the images or their labels differ.
    """
    by_seed = {run.seed: run for run in other}
    pairs = [(run, by_seed[run.seed]) for run in base if run.seed in by_seed]
    if not pairs and len(base) == len(other) == 1:
        pairs = [(base[0], other[0])]
    if not pairs:
        raise ConfigError(f"{base[0].folder} and {other[0].folder} belong to groups without a seed in common")
    rows = []
    for a, b in pairs:
        ours, theirs = read_predictions(a), read_predictions(b)
        if {k: label for k, (label, _) in ours.items()} != {k: label for k, (label, _) in theirs.items()}:
            raise DataError(f"{a.folder} and {b.folder} were measured on other images or labels; they cannot be paired")
        only_base = sum(ours[k][0] == ours[k][1] and theirs[k][0] != theirs[k][1] for k in ours)
        only_other = sum(ours[k][0] != ours[k][1] and theirs[k][0] == theirs[k][1] for k in ours)
        seed = str(a.seed) if a.seed == b.seed else f"{a.seed}, {b.seed}"
        rows.append(_mcnemar_row(seed, len(ours), only_base, only_other))
    if len(rows) > 1:
        sums = [sum(row[k] for row in rows) for k in ("images", "only_baseline", "only_other")]
        rows.append(_mcnemar_row("pooled", *sums))
    return {"rows": rows}


def _mcnemar_row(seed: str, images: int, only_base: int, only_other: int) -> dict[str, Any]:
    p = mcnemar(only_base, only_other)
    return {"seed": seed, "images": images, "only_baseline": only_base, "only_other": only_other, "p": p}


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: how likely `b` and `c` images that only one of two models gets right are at
    least as uneven by chance, each of them falling to either side with probability 1/2."""
    n, term, total = b + c, 1, 0
    for i in range(min(b, c) + 1):
        total += term  # n choose i
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def read_predictions(run: Run) -> dict[str, tuple[str, str]]:
    """Label and prediction of every test image by its path; DataError when they do not agree with the run's metrics."""
    file = run.folder / PREDICTIONS
    try:
        lines = csv.DictReader(io.StringIO(read_text(file), newline=""))
        rows = [{name: csv_plain(cell) for name, cell in row.items()} for row in lines]
        answers = {row["path"]: (row["label"], row["prediction"]) for row in rows}
    except FileNotFoundError:
        raise DataError(f"{run.folder} has no {PREDICTIONS}: it was trained by an earlier glsim; train again") from None
    except (OSError, UnicodeDecodeError, AttributeError, KeyError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error!r}") from error
    right = sum(label == prediction for label, prediction in answers.values())
    if (right, len(answers)) != (run.test["correct"], run.test["count"]):
        said = f"{run.test['correct']} of {run.test['count']}"
        raise DataError(f"{file} has {right} of {len(answers)} images right, {METRICS_FILE} beside it {said}")
    return answers


# --- writing ----------------------------------------------------------------------------------------------------------


def as_markdown(r: dict[str, Any]) -> str:
    """The report for people: one table a data set, then the pairs."""
    lines = [
        "Top-1 and per-class mean on test after the last epoch, mean +- sample standard deviation over seeds, in %."
    ]
    for data in r["data"]:
        counts = sorted({row["count"] for row in data["rows"]})
        lines += ["", f"## {markdown(data['name'])} ({' or '.join(map(str, counts))} test images)", ""]
        columns = ["method", "backbone", "lr", "settings", "seeds", "top-1", "per-class mean", "right"]
        columns += ["best on test"] * ("best on test" in data["rows"][0])
        cells = [_cells(row) for row in data["rows"]]
        if not any(c["settings"] for c in cells):
            columns.remove("settings")
        lines += _table(columns, [[c[name] for name in columns] for c in cells])
        if data["comparisons"]:
            base = data["comparisons"][0]["baseline"]
            lines += ["", f"### Against {markdown(base)}", ""]
            rows = [
                [pair["other"], x["seed"], x["only_other"], x["only_baseline"], f"{x['p']:.3g}"]
                for pair in data["comparisons"]
                for x in pair["rows"]
            ]
            lines += _table(["row", "seed", "only it right", f"only {base} right", "p"], rows)
    if any("best on test" in row for data in r["data"] for row in data["rows"]):
        lines += ["", "best on test: the best seed, picked by the test split itself; no result to compare methods by."]
    if any(data["comparisons"] for data in r["data"]):
        lines += [
            "",
            "p: McNemar's exact test, two-sided, on the same images. Pooled counts every image once a seed as",
        ]
        lines += ["though these were independent, which they are not: its p is too small."]
    if r["left_out"]:
        lines += ["", "Left out:", "", *(f"- {markdown(what)}" for what in r["left_out"])]
    return "\n".join(lines) + "\n"


def as_csv(r: dict[str, Any]) -> str:
    """The tables as `csv_text` writes them, one line a group; shares from 0 to 1."""
    best = ["best on test"] * any("best on test" in row for data in r["data"] for row in data["rows"])
    measured = ("top1_mean", "top1_std", "per_class_mean_mean", "per_class_mean_std", "correct", "count")
    rows: list[list[object]] = [["data", "method", "backbone", "lr", "settings", "seeds", *measured, *best]]
    for data in r["data"]:
        for row in data["rows"]:
            numbers = [row[name][part] for name in ("top1", "per_class_mean") for part in ("mean", "std")]
            what = [data["name"], row["method"], row["backbone"], row["lr"], _settings(row), _words(row["seeds"])]
            more = [row["best on test"]["top1"]] if best else []
            rows.append([*what, *numbers, _words(row["correct"]), row["count"], *more])
    return csv_text(rows)


def draw(r: dict[str, Any], path: Path) -> None:
    """Top-1 of every row as PNG, a panel a data set: mean with standard deviation, and the seeds as small dots."""
    heights = [len(data["rows"]) + 1.6 for data in r["data"]]
    figure = Figure(figsize=(8, 0.42 * sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for data, axes in zip(r["data"], panels[:, 0], strict=True):
        rows = data["rows"]
        for y, row in enumerate(rows):
            mean, std = 100 * row["top1"]["mean"], 100 * (row["top1"]["std"] or 0)
            axes.errorbar(mean, y, xerr=std or None, fmt="o", color="C0", capsize=4, markersize=6)
            seeds = [100 * correct / row["count"] for correct in row["correct"]]
            axes.plot(seeds, [y + 0.22] * len(seeds), ".", color="0.55", markersize=5)
            axes.annotate(_percent(row["top1"]), (mean, y), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        axes.set_yticks(range(len(rows)), label(rows), parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.margins(x=0.15)
        axes.set_title(data["name"], loc="left", fontsize=10, fontweight="bold", parse_math=False)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("top-1 on test, %: mean and standard deviation over seeds; small dots: the seeds", fontsize=9)
    save_figure(figure, path)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {name: str(row[name]) for name in ("method", "backbone", "lr")}
    cells |= {"settings": _settings(row), "seeds": ", ".join(map(str, row["seeds"]))}
    cells |= {"top-1": _percent(row["top1"]), "per-class mean": _percent(row["per_class_mean"])}
    cells["right"] = f"{', '.join(map(str, row['correct']))} of {row['count']}"
    if best := row.get("best on test"):
        cells["best on test"] = f"{100 * best['top1']:.2f} (seed {best['seed']})"
    return cells


def _percent(value: dict[str, Any]) -> str:
    spread = f" +- {100 * value['std']:.2f}" if value["std"] is not None else ""
    return f"{100 * value['mean']:.2f}{spread}"


def _settings(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in row["settings"].items())


def _words(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    head, *lines = [f"| {' | '.join(map(markdown, line))} |" for line in [columns, *rows]]
    return [head, f"|{' --- |' * len(columns)}", *lines]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing") from error


def _is_told(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(name), str) for name in ("source", "split_hash"))
