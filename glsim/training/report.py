"""Tables of finished runs: mean and standard deviation over seeds, McNemar's test between two rows."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from glsim.checkpoints.bundle import CONFIG, METRICS_FILE
from glsim.evaluation.statistics import mcnemar
from glsim.files import csv_text, make_folder, markdown, read_json, real, write_text
from glsim.interpret.drawing import save_figure
from glsim.training.config import WITHOUT_EFFECT, Train, plain_values, read_recipe
from glsim.training.reproduce import STATE, SeedSummary, summarise
from glsim.training.runs import RECIPE, Measured, read_measured, read_predictions
from glsim.types import ConfigError, DataError


@dataclass(frozen=True)
class FinishedRun:
    """A run that is measured on test; `settings` are those that make it comparable: all but the seed and what changes
    nothing."""

    folder: Path
    data: str
    seed: int
    settings: dict[str, Any]
    test: Measured


@dataclass(frozen=True, kw_only=True)
class Row(SeedSummary):
    """Runs that differ in the seed alone."""

    method: str
    backbone: str | None
    lr: float
    settings: dict[str, Any]  # the others that are not the same in all rows
    seeds: list[int]
    folders: list[str]


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images, or all pairs of seeds together."""

    seed: str  # pooled: of all of them
    images: int
    only_baseline: int  # images that only the baseline gets right
    only_other: int
    p: float  # McNemar's exact test, two-sided


@dataclass(frozen=True)
class Comparison:
    """A row beside the baseline, seed by seed."""

    baseline: str
    other: str
    rows: list[Pair]


@dataclass(frozen=True)
class DataTable:
    """The runs on one data set."""

    name: str
    rows: list[Row]
    comparisons: list[Comparison]


@dataclass(frozen=True)
class RunReport:
    """What `report_runs` returns."""

    data: list[DataTable]
    left_out: list[str]  # folders without a result, and why


def report_runs(runs: Sequence[str], *, against: str | None = None, out: str | Path | None = None) -> RunReport:
    """Group runs that differ in the seed alone, summarise each group, and pair them.

    Args:
        runs: run folders, folders of `glsim reproduce`, or globs of them.
        against: a method or a run folder, with whose row every other one of its data set is paired.
        out: folder for report.md, report.csv and report.png.

    Raises:
        DataError: for what is no run, twice the same, or measured on other images than its partner.
        ConfigError: when `against` names no row or several.
    """
    found, left_out = find_runs(runs)
    groups = group(found)
    tables = []
    for name in dict.fromkeys(run.data for run in found):
        here = [g for g in groups if g[0].data == name]
        names = differing(here)
        rows = [as_row(g, names) for g in here]
        comparisons = []
        if against is not None and (base := find_baseline(against, here)) is not None:
            labels = label(rows)
            baseline = labels[here.index(base)]
            others = [(other, text) for other, text in zip(here, labels, strict=True) if other is not base]
            comparisons = [Comparison(baseline, text, compare(base, other)) for other, text in others]
        tables.append(DataTable(name, rows, comparisons))
    if against is not None and all(find_baseline(against, [g]) is None for g in groups):
        methods = sorted({run.settings["method"] for run in found})
        raise ConfigError(f"against={against}: no run of that method or folder; methods here: {', '.join(methods)}")
    report = RunReport(tables, left_out)
    if out is not None:
        folder = make_folder(out)
        write_text(folder / "report.md", as_markdown(report))
        write_text(folder / "report.csv", as_csv(report))
        draw(report, folder / "report.png")
    return report


def find_runs(given: Sequence[str]) -> tuple[list[FinishedRun], list[str]]:
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
                rows = read_json(folder / STATE).get("runs")
                if not isinstance(rows, dict):
                    raise DataError(f"{folder / STATE} is damaged: it has no runs")
                inner = [folder / name for name in rows if name.startswith("seed_")]
            folders |= dict.fromkeys(real(path) for path in inner)
    runs, left_out = [], []
    for folder in folders:
        if not (folder / RECIPE).is_file() or not (folder / METRICS_FILE).is_file():
            left_out.append(f"{folder}: no run, or one without a finished epoch")
            continue
        settings, metrics = Train(**read_recipe(folder / RECIPE)), read_json(folder / METRICS_FILE)
        if "test" not in metrics:
            left_out.append(f"{folder}: not measured on test (not finished, no test split, or trained without --test)")
            continue
        if not (folder / CONFIG).is_file():
            raise DataError(f"{folder / CONFIG} is missing")
        data, test = read_json(folder / CONFIG).get("data"), read_measured(metrics["test"])
        told = isinstance(data, dict) and all(isinstance(data.get(name), str) for name in ("source", "split_hash"))
        if test is None or not told:
            raise DataError(f"{folder} is damaged: its {METRICS_FILE} or {CONFIG} is not what training writes")
        kept = plain_values(settings, *WITHOUT_EFFECT, "seed") | {"split": data["split_hash"][:8]}
        runs.append(FinishedRun(folder, settings.dataset or data["source"], settings.seed, kept, test))
    if not runs:
        raise DataError(f"no finished run; left out: {'; '.join(left_out)}")
    return runs, left_out


def group(runs: Iterable[FinishedRun]) -> list[list[FinishedRun]]:
    """Runs that differ in the seed alone, by seed; DataError when two do not differ at all."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        same = groups.setdefault(json.dumps([run.data, run.settings], sort_keys=True), [])
        if twin := next((r for r in same if r.seed == run.seed), None):
            raise DataError(f"{twin.folder} and {run.folder} have the same seed and settings; give one of them")
        same.append(run)
    return [sorted(same, key=lambda r: r.seed) for same in groups.values()]


def differing(groups: list[list[FinishedRun]]) -> list[str]:
    """The settings besides method, backbone and lr that are not the same in all `groups`."""
    first, *others = [g[0].settings for g in groups]
    names = [k for k in first if any(s[k] != first[k] for s in others) and k not in ("method", "backbone", "lr")]
    methods = [g[0].settings["method"] for g in groups]
    if len(set(methods)) == len(methods):
        names = [k for k in names if k != "options"]  # every method has its own
    return names


def as_row(runs: list[FinishedRun], names: list[str]) -> Row:
    """A group: the settings `names`, and the summary of its test results."""
    settings = runs[0].settings
    return Row(
        method=settings["method"],
        backbone=settings["backbone"],
        lr=settings["lr"],
        settings={name: settings[name] for name in names},
        seeds=[run.seed for run in runs],
        folders=[str(run.folder) for run in runs],
        **vars(summarise([run.test for run in runs])),
    )


def label(rows: Sequence[Row]) -> list[str]:
    """A name for each row: the method, and as much more as tells it from the others."""
    names = [row.method for row in rows]
    for parts in ([str(row.backbone) for row in rows], [f"lr {row.lr}" for row in rows], [_settings(r) for r in rows]):
        if len(set(names)) < len(names) and len(set(parts)) > 1:
            names = [f"{name}, {part}" for name, part in zip(names, parts, strict=True)]
    return names


def find_baseline(against: str, groups: list[list[FinishedRun]]) -> list[FinishedRun] | None:
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


def compare(base: list[FinishedRun], other: list[FinishedRun]) -> list[Pair]:
    """McNemar's test of two groups, seed by seed on the same images, and pooled over the seeds.

    Two single runs are paired whatever their seeds. Raises ConfigError when no seed is in both groups, and DataError
    when the images or their labels differ.
    """
    by_seed = {run.seed: run for run in other}
    pairs = [(run, by_seed[run.seed]) for run in base if run.seed in by_seed]
    if not pairs and len(base) == len(other) == 1:
        pairs = [(base[0], other[0])]
    if not pairs:
        raise ConfigError(f"{base[0].folder} and {other[0].folder} belong to groups without a seed in common")
    rows: list[tuple[str, int, int, int]] = []
    for a, b in pairs:
        ours, theirs = (read_predictions(run.folder, run.test) for run in (a, b))
        if {k: label for k, (label, _) in ours.items()} != {k: label for k, (label, _) in theirs.items()}:
            raise DataError(f"{a.folder} and {b.folder} were measured on other images or labels; they cannot be paired")
        right = Counter((ours[k][0] == ours[k][1], theirs[k][0] == theirs[k][1]) for k in ours)
        seed = str(a.seed) if a.seed == b.seed else f"{a.seed}, {b.seed}"
        rows.append((seed, len(ours), right[True, False], right[False, True]))
    if len(rows) > 1:
        _, *counts = zip(*rows, strict=True)
        images, only_base, only_other = map(sum, counts)
        rows.append(("pooled", images, only_base, only_other))
    return [Pair(*row, mcnemar(*row[2:])) for row in rows]


# --- writing ----------------------------------------------------------------------------------------------------------


def as_markdown(report: RunReport) -> str:
    """The report for people: one table a data set, then the pairs."""
    lines = [
        "Top-1 and per-class mean on test after the last epoch, mean +- sample standard deviation over seeds, in %."
    ]
    for data in report.data:
        counts = sorted({row.count for row in data.rows})
        lines += ["", f"## {markdown(data.name)} ({' or '.join(map(str, counts))} test images)", ""]
        cells = [_cells(row) for row in data.rows]
        columns = [name for name in cells[0] if name != "settings" or any(c[name] for c in cells)]
        lines += table(columns, [[c[name] for name in columns] for c in cells])
        if data.comparisons:
            base = data.comparisons[0].baseline
            lines += ["", f"### Against {markdown(base)}", ""]
            pairs = [(other.other, x) for other in data.comparisons for x in other.rows]
            rows = [[name, x.seed, x.only_other, x.only_baseline, f"{x.p:.3g}"] for name, x in pairs]
            lines += table(["row", "seed", "only it right", f"only {base} right", "p"], rows)
    if any(data.comparisons for data in report.data):
        lines += [
            "",
            "p: McNemar's exact test, two-sided, on the same images. Pooled counts every image once a seed as",
            "though these were independent, which they are not: its p is too small.",
        ]
    if report.left_out:
        lines += ["", "Left out:", "", *(f"- {markdown(what)}" for what in report.left_out)]
    return "\n".join(lines) + "\n"


def as_csv(report: RunReport) -> str:
    """The tables as `csv_text` writes them, one line a group; shares from 0 to 1."""
    measured = ("top1_mean", "top1_std", "per_class_mean_mean", "per_class_mean_std", "correct", "count")
    rows: list[list[object]] = [["data", "method", "backbone", "lr", "settings", "seeds", *measured]]
    for data in report.data:
        for row in data.rows:
            what = [data.name, row.method, row.backbone, row.lr, _settings(row), _words(row.seeds)]
            rows.append([*what, *row.top1, *row.per_class_mean, _words(row.correct), row.count])
    return csv_text(rows)


def draw(report: RunReport, path: Path) -> None:
    """Top-1 of every row as PNG, a panel a data set: mean with standard deviation, and the seeds as small dots."""
    heights = [len(data.rows) + 1.6 for data in report.data]
    figure = Figure(figsize=(8, 0.42 * sum(heights) + 0.3), layout="constrained")
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for data, axes in zip(report.data, panels[:, 0], strict=True):
        for y, row in enumerate(data.rows):
            mean, std = 100 * row.top1.mean, 100 * (row.top1.std or 0)
            axes.errorbar(mean, y, xerr=std or None, fmt="o", color="C0", capsize=4, markersize=6)
            seeds = [100 * correct / row.count for correct in row.correct]
            axes.plot(seeds, [y + 0.22] * len(seeds), ".", color="0.55", markersize=5)
            axes.annotate(str(row.top1), (mean, y), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        axes.set_yticks(range(len(data.rows)), label(data.rows), parse_math=False)
        axes.set_ylim(len(data.rows) - 0.4, -0.7)
        axes.margins(x=0.15)
        axes.set_title(data.name, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("top-1 on test, %: mean and standard deviation over seeds; small dots: the seeds", fontsize=9)
    save_figure(figure, path)


def _cells(row: Row) -> dict[str, str]:
    return {
        "method": row.method,
        "backbone": str(row.backbone),
        "lr": str(row.lr),
        "settings": _settings(row),
        "seeds": ", ".join(map(str, row.seeds)),
        "top-1": str(row.top1),
        "per-class mean": str(row.per_class_mean),
        "right": f"{', '.join(map(str, row.correct))} of {row.count}",
    }


def _settings(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.settings.items())


def _words(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *lines = [f"| {' | '.join(map(markdown, line))} |" for line in [columns, *rows]]
    return [head, f"|{' --- |' * len(columns)}", *lines]
