"""As the part shrinks and clutter grows: does the crop of each mechanism hold the part, and how often is it right?

    python benchmarks/sweep_synthetic.py recipes/synthetic_glsim.yaml --plain recipes/synthetic_plain.yaml --epochs 8 \\
        --mechanisms published inclusive far_window evidence attention rollout random plain --out runs/sweep_synthetic
    python benchmarks/sweep_synthetic.py recipes/synthetic_glsim.yaml --plain recipes/synthetic_plain.yaml --epochs 2 \\
        --plain-epochs 6 --scales 0.7 1.4 --clutter 0.5 --mechanisms published plain --out runs/sweep_cheap

One cell for each of `--scales` x `--clutter`: OUT/scale_S_clutter_C holds its drawn birds (`data`), its plain runs
(`start`) and one run a mechanism and seed, fine-tuned and paired by `paired.py`, whose variants `--mechanisms` are.
They learn with their crops: accuracy is of those runs. Where the crop of any other metric would lie in the run of
`published` is asked without training (`where_all.json`, every metric of `glsim localize`, with controls).

What is finished is not done again. OUT gets sweep.json, sweep.md and sweep.png, anew after every cell; in the last rows
the images of all cells are one set. A second table has the boxes asked without training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import paired
import torch
from matplotlib.figure import Figure
from torch import Tensor

from glsim.data import synthetic
from glsim.evaluation.localization import evaluate_localization
from glsim.evaluation.statistics import as_numbers, signed
from glsim.files import write_text
from glsim.interpret.drawing import save_figure

MECHANISMS = ["published", "far", "evidence", "rollout", "random", "plain"]
EVERYTHING = "where_all.json"
CELL = "scale_{:g}_clutter_{:g}"
SHOWN = ("top1", "difference", "area", "coverage", "holds", "random holds", "holds - random")
DIFFERENCES = ("difference", "holds - random")
COLUMNS = {"top1": "test top-1, %", "holds": "crops that hold the part, %"}


def main() -> None:
    """Parse, follow the cells, print."""
    print(as_markdown(follow(parse())))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of glsim: its settings hold for every mechanism")
    parser.add_argument("--plain", required=True, help="recipe of the plain runs that all start from")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.4, 1.0, 0.6], help="of the parts, 0.3 to 2")
    parser.add_argument("--clutter", nargs="+", type=float, default=[0.0, 0.5, 1.5], help="0 to 3")
    parser.add_argument("--mechanisms", nargs="+", default=MECHANISMS, help="variants of paired.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--epochs", type=int, required=True, help="of the fine-tuning")
    parser.add_argument("--plain-epochs", type=int, help="instead of the plain recipe's")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--train", type=int, default=120, help="images a class")
    parser.add_argument("--test", type=int, default=40, help="images a class")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    return parser.parse_args(words)


def follow(a: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Draw, train and measure cell by cell: `rows` for each mechanism of each, and of all together, and `boxes`."""
    cells: dict[tuple[float, float], Cell] = {}
    for scale in a.scales:
        for clutter in a.clutter:
            cells[scale, clutter] = cell(a, scale, clutter)
            rows = [{"scale": s, "clutter": c, **row} for (s, c), found in cells.items() for row in as_rows(found)]
            draw(rows, a.out / "sweep.png")
            rows += [{"scale": None, "clutter": None, **row} for row in as_rows(together(list(cells.values())))]
            result = {"rows": rows, "boxes": [box for (s, c) in cells for box in boxes(a.out, s, c)]}
            write_text(a.out / "sweep.json", json.dumps(result, indent=2) + "\n")
            write_text(a.out / "sweep.md", as_markdown(result) + "\n")
    return result


Cell = dict[str, dict[str, Tensor]]  # by mechanism: columns of numbers of the test images (images,), seeds averaged


def cell(a: argparse.Namespace, scale: float, clutter: float) -> Cell:
    """One set of birds, and all mechanisms on it: what is right, beyond the published rule, and where the box lies."""
    out = a.out / CELL.format(scale, clutter)
    data = out / "data"
    drawn = {"classes": a.classes, "train": a.train, "test": a.test, "size": a.size}
    drawn |= {"part_scale": scale, "clutter": clutter}
    if not data.exists():
        synthetic.write(data, **drawn)
    told = json.loads((data / "species.json").read_text())["arguments"]
    if changed := [f"{k}={told[k]} (now {v})" for k, v in drawn.items() if told[k] != v]:
        raise SystemExit(f"{data} was drawn with {', '.join(changed)}; name another --out")
    words = [a.recipe, "--plain", a.plain, "--data", str(data), "--out", str(out), "--masks", str(data / "masks")]
    words += ["--seeds", *map(str, a.seeds), "--epochs", str(a.epochs)]
    words += ["--plain-epochs", str(a.plain_epochs)] if a.plain_epochs else []
    asked = paired.parse([*words, "--variants", *a.mechanisms])
    names = [row["name"] for row in paired.follow(asked)["rows"]]
    everything = out / EVERYTHING
    if paired.PUBLISHED in a.mechanisms and not everything.exists():
        source = str(out / paired.PUBLISHED / f"seed_{a.seeds[0]}")
        images, masks = data / "test", data / "masks"
        evaluate_localization(source, images, masks, metrics=["all"], controls=True, out=everything)
    found: Cell = {}
    runs = {name: [right for _, right in paired.finished(asked, name).values()] for name in names}
    right = {name: torch.stack(seeds).double().mean(dim=0) for name, seeds in runs.items()}
    for name in names:
        files = [out / name / f"seed_{seed}" / paired.WHERE for seed in a.seeds]
        found[name] = {"top1": right[name], **paired.whereabouts(files)}
        if paired.PUBLISHED in right and name != paired.PUBLISHED:
            found[name]["difference"] = right[name] - right[paired.PUBLISHED]
    return found


def boxes(out: Path, scale: float, clutter: float) -> list[dict[str, Any]]:
    """What `glsim localize` said of every metric's box and the part in one cell: percent, points, intervals."""
    file = out / CELL.format(scale, clutter) / EVERYTHING
    if not file.exists():
        return []
    part = json.loads(file.read_text())["targets"]["part"]
    found = []
    for metric, gains in part["gains"].items():
        told = part["rows"][metric] | gains
        columns = {name: [100 * value for value in told[name]] for name in ("auc", "area", "holds", "holds - random")}
        found.append({"scale": scale, "clutter": clutter, "metric": metric, **columns})
    return found


def together(cells: list[Cell]) -> Cell:
    """The images of all cells as one set, of the mechanisms that every cell has."""
    names = [name for name in cells[0] if all(name in found for found in cells)]
    return {name: {key: torch.cat([found[name][key] for found in cells]) for key in cells[0][name]} for name in names}


def as_rows(found: Cell) -> list[dict[str, Any]]:
    """Percent: mean, and low and high of its 95 % interval by the bootstrap over images; None where there is none."""
    rows: list[dict[str, Any]] = []
    for name, columns in found.items():
        told = as_numbers({key: 100 * values for key, values in columns.items()}, paired.DRAWS)
        rows.append({"mechanism": name, **{key: told.get(key) for key in SHOWN}})
    return rows


def as_markdown(result: dict[str, list[dict[str, Any]]]) -> str:
    """The tables for people: a line a cell and mechanism; then a line a metric, and a column a cell."""
    heads = ["part scale", "clutter", "mechanism", "top-1, %", "beyond published, points"]
    heads += ["area", "holds", "beyond a random box, points"]
    lines = [heads, ["---"] * len(heads)]
    for r in result["rows"]:
        where = ["all", ""] if r["scale"] is None else [f"{r['scale']:g}", f"{r['clutter']:g}"]
        gap, held = (signed(*r[name]) if r[name] else "" for name in DIFFERENCES)
        boxes = [f"{r[name][0]:.0f} %" if r[name] else "" for name in ("area", "holds")]
        lines.append([*where, r["mechanism"], f"{r['top1'][0]:.1f}", gap, *boxes, held])
    told = {(box["metric"], box["scale"], box["clutter"]): box for box in result["boxes"]}
    cells = list(dict.fromkeys(key[1:] for key in told))
    if cells:
        lines += [[], ["holds, % (beyond a random box, points)", *(f"{s:g}, {c:g}" for s, c in cells)]]
        lines.append(["---"] * len(lines[-1]))
    for metric in dict.fromkeys(key[0] for key in told):
        lines.append([metric, *(as_cell(told[metric, *cell]) for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def as_cell(box: dict[str, Any]) -> str:
    """How often a box holds the part and how much more often than a random one; * where 0 is not in the interval."""
    gain, low, high = box["holds - random"]
    return f"{box['holds'][0]:.0f} ({round(gain):+d}{'*' * (low is not None and (low > 0 or high < 0))})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PNG: accuracy, and crops that hold the part, along the size of the part; a column for each clutter."""
    clutters = list(dict.fromkeys(row["clutter"] for row in rows))
    figure = Figure(figsize=(3.4 * len(clutters) + 1.6, 6), layout="constrained")
    panels = figure.subplots(2, len(clutters), squeeze=False, sharex=True, sharey="row")
    names = list(dict.fromkeys(row["mechanism"] for row in rows))
    for column, clutter in zip(panels.T, clutters, strict=True):
        for axes, measure in zip(column, ("top1", "holds"), strict=True):
            for number, name in enumerate(names):
                mine = [r for r in rows if r["mechanism"] == name and r["clutter"] == clutter and r[measure]]
                axes.plot(
                    [r["scale"] for r in mine],
                    [r[measure][0] for r in mine],
                    marker="o",
                    color=f"C{number}",
                    label=name,
                )
            axes.grid(alpha=0.3)
        column[0].set_title(f"clutter {clutter:g}", fontsize=10)
        column[1].set_xlabel("scale of the part")
    for axes, measure in zip(panels[:, 0], ("top1", "holds"), strict=True):
        axes.set_ylabel(COLUMNS[measure])
    panels[0, 0].invert_xaxis()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
