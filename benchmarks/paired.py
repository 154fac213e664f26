"""What is the crop worth, and does another rule beat the published one? Runs that differ in one thing, paired.

    python benchmarks/paired.py recipes/flowers12_glsim.yaml --plain recipes/flowers12_plain.yaml --data flowers12 \\
        --epochs 10 --out runs/paired_flowers
    python benchmarks/paired.py recipes/synthetic_glsim.yaml --plain recipes/synthetic_plain.yaml --data birds \\
        --masks birds/masks --epochs 8 --out runs/paired_birds --start runs/cost/synthetic_plain --shard 0/2

For each seed a plain run is trained once (START/seed_SEED; one that is there is taken), and every variant is fine-tuned
from it for `--epochs` epochs with the settings of the first recipe: OUT/VARIANT/seed_SEED. All get its backbone; heads
and what else a method has start anew. Only `plain` and `plain_large` keep the head; `plain_new_head` does not.
`plain_flip` is the run of `plain` asked twice, once mirrored; `plain_large` is trained and asked at `--large` pixels:
sqrt(2) times the side costs about what two passes do. The test split is measured after the last epoch and chooses
nothing.

A finished run is not trained again, an interrupted one goes on. `--shard I/N` trains every N-th run, so that N
processes share them (the plain runs have to be there, or be trained by the first one alone: `--variants`). OUT gets
paired.json, paired.md and paired.png, anew after every run, of all variants that are finished there by then, those of
earlier commands too. `--against NAME` compares with another one than `published`: paired_against_NAME.*.

`difference`: right answers beyond those of `published`, in points, mean over seeds; its 95 % interval is by the
bootstrap over images, an image's seeds kept together: it holds for these networks and says nothing of other seeds;
`by seed` shows how far they lie apart. `p`: McNemar's exact test by seed, and pooled as though seeds were independent,
which they are not. With `--masks` (of the test images, as `glsim localize` takes them) each variant's own box (the
first of two) is held against the part, beside a random box of its size.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cost_accuracy import finish, is_finished
from filelock import FileLock
from matplotlib.figure import Figure
from torch import Tensor

from glsim import load, save
from glsim.checkpoints.bundle import CONFIG
from glsim.data.masks import find_masks
from glsim.environment import pick_device
from glsim.evaluation import evaluate, flops
from glsim.evaluation.localization import measure
from glsim.evaluation.statistics import as_numbers, mcnemar, signed
from glsim.files import write_text
from glsim.interpret.drawing import save_figure
from glsim.models import METHODS
from glsim.training.config import Train, read_recipe
from glsim.training.resume import CHECKPOINT
from glsim.training.runs import PREDICTIONS
from glsim.types import ConfigError

METHODS["ruled"] = "rules"  # the file beside this one
PUBLISHED, PLAIN, FLIP, LARGE, NEW_HEAD = "published", "plain", "plain_flip", "plain_large", "plain_new_head"
DETAIL = "detail"
SIZED = (LARGE, DETAIL)  # at `--large` pixels
WHERE = "where.json"
DRAWS = 10_000  # of the bootstrap


def ruled(rule: str = PUBLISHED, **options: Any) -> dict[str, Any]:
    """A rule of `rules.py`."""
    return {"method": "ruled", "options": {"rule": rule, **options}}


def glsim(**options: Any) -> dict[str, Any]:
    """GLSim with other options, from the rule and the start its results were measured with."""
    return {"method": "glsim", "options": {"rule": "published", "aggregator_start": "published", **options}}


RULES = {
    PUBLISHED: glsim(),
    "mirrored": ruled("mirrored"),
    "detail": ruled("detail"),
    "inclusive": glsim(box="inclusive"),
    "component": ruled("component"),
    "spread": ruled("spread"),
    "quantile": ruled("quantile"),
    "window": ruled("window"),
    "two_boxes": ruled("two_boxes"),
    "soft": ruled("soft"),
    "far": ruled("far"),
    "far_window": ruled("far_window"),
    "centred": ruled("centred"),
    "early": ruled("early"),
    "evidence": ruled("evidence"),
    "evidence_window": ruled("evidence_window"),
    "norm": ruled("norm"),
    "crop_loss": ruled(crop_loss=1.0),
    "early_loss": ruled(early_loss=1.0),
    "evidence_loss": ruled("evidence", early_loss=1.0),
    "window_losses": ruled("window", early_loss=1.0, crop_loss=1.0),
}
CONTROLS = {
    "random": glsim(box="random:exclusive"),
    "centre": glsim(box="centre:exclusive"),
    "whole": glsim(box="whole:exclusive"),
    "corner": glsim(box="corner:exclusive"),
    "none": glsim(box="none"),
    "no_aggregator": glsim(aggregator_depth=0),
    "random_patches": glsim(metric="random"),
    PLAIN: {"method": PLAIN, "options": {}},
    LARGE: {"method": PLAIN, "options": {}},
    NEW_HEAD: {"method": PLAIN, "options": {}},
}
MECHANISMS = {  # the published box by another metric
    name: glsim(metric=name) for name in ("gls_l1", "gls_l2", "attention", "rollout", "psm", "maws", "sacm", "mhv")
}
OTHERS: dict[str, dict[str, Any]] = {  # other methods, as they suit grids from 49 patches on
    "transfg": {"method": "transfg", "options": {"stride": None}},  # over the grid that the plain run has
    "ielt": {"method": "ielt", "options": {"tokens": 40, "votes": 12}},
    **{name: {"method": name, "options": {}} for name in ("ffvt", "rams", "aftrans", "dcal")},
}
VARIANTS = RULES | CONTROLS | MECHANISMS | OTHERS
EXPLAINED = {"random_patches": "box of random patches", "none": "no crop", FLIP: "plain, asked twice, once mirrored"}


def main() -> None:
    """Parse, train what is missing, measure, print."""
    print(as_markdown(follow(parse())))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of glsim: its settings hold for every variant")
    parser.add_argument("--plain", required=True, type=Path, help="recipe of the plain runs that all start from")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path, help="folder of the plain runs, seed_SEED; default: OUT/start")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--epochs", type=int, required=True, help="of the fine-tuning")
    parser.add_argument("--plain-epochs", type=int, help="instead of the plain recipe's")
    parser.add_argument("--variants", nargs="*", default=[*RULES, *CONTROLS], help=f"of: {' '.join(VARIANTS)}")
    parser.add_argument("--large", type=int, help="pixels of plain_large, a multiple of the patches'")
    parser.add_argument("--masks", type=Path, help="folder of masks of the test images")
    parser.add_argument("--against", default=PUBLISHED, choices=[*VARIANTS, FLIP], metavar="NAME")
    parser.add_argument("--shard", default="0/1", help="I/N: train only the runs I, I + N, ..")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    a = parser.parse_args(words)
    wrong = [name for name in a.variants if name not in VARIANTS]
    if wrong:
        parser.error(f"--variants {' '.join(wrong)}: choose from {' '.join(VARIANTS)}")
    try:
        a.turn, a.turns = map(int, a.shard.split("/"))
    except ValueError:
        a.turn = a.turns = 0
    if not 0 <= a.turn < a.turns:
        parser.error(f"--shard {a.shard}: I/N with I from 0 to N - 1 is needed")
    a.start = a.start or a.out / "start"
    return a


def follow(a: argparse.Namespace) -> dict[str, Any]:
    """Train and measure what is this process's part, and summarise all that is there."""
    if a.masks is not None:
        find_masks(Path(a.data) / "test", a.masks)  # before anything is trained
    starts = [settings(a, a.plain, {}, a.start / f"seed_{seed}", seed, a.plain_epochs) for seed in a.seeds]
    if a.turn == 0:
        for start in starts:
            finish(start)
    elif lacking := [s.out for s in starts if not is_finished(s)]:
        raise SystemExit(f"{lacking[0]} is not finished: train the plain runs first, by --shard 0/1 --variants")
    names, left_out = [], {}
    for name in a.variants:
        try:
            operations(a, name)
            names.append(name)
        except ConfigError as error:
            left_out[name] = str(error)
            print(f"{name} left out: {error}", file=sys.stderr)
    work = [(name, seed) for seed in a.seeds for name in names]
    result = summarise(a, names, left_out)
    for name, seed in work[a.turn :: a.turns]:
        out = a.out / name / f"seed_{seed}"
        start = start_of(a.start / f"seed_{seed}", name)
        s = settings(a, a.recipe, variant(a, name), out, seed, a.epochs, init_from=str(start))
        finish(s)
        for checkpoint in out.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(checkpoint)
        if name == PLAIN and not (flip := a.out / FLIP / f"seed_{seed}" / "predictions.csv").exists():
            evaluate.evaluate_bundle(s.out, a.data, flip=True, out=flip.parent, workers=a.workers)
        if a.masks is not None and not (out / WHERE).exists():
            locate(out, a)
        result = summarise(a, names, left_out)
    return result


def start_of(plain: Path, name: str) -> Path:
    """What the variant `name` starts from: the plain run, or, where its head must not be taken over, that without one.

    GLSim has no place for that head; that of most other methods has the same name and shape. A new head is all zeros.
    """
    if name not in (NEW_HEAD, *OTHERS):
        return plain
    bare = plain / "new_head"
    with FileLock(plain / "new_head.lock"):
        if not (bare / CONFIG).exists():
            model = load(plain)
            for parameter in model.head.parameters():
                parameter.data.zero_()
            save(model, bare)
    return bare


def variant(a: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `name` changes of the recipe; ConfigError where it needs an argument that was not given."""
    if name in SIZED and a.large is None:
        raise ConfigError("--large PIXELS is needed, about sqrt(2) times the recipe's image_size")
    return VARIANTS[name] | ({"image_size": a.large} if name in SIZED else {})


def settings(
    a: argparse.Namespace, recipe: Path, changes: dict[str, Any], out: Path, seed: int, epochs: int | None, **more: Any
) -> Train:
    """One run: a recipe, and what a variant changes of it."""
    values = read_recipe(recipe)
    shared = changes.get("method") in (None, "glsim", "ruled")  # the recipe's own options are GLSim's
    options = {**(values.get("options", {}) if shared else {}), **changes.get("options", {})}
    fixed = {"data": a.data, "out": str(out), "seed": seed, "test": True, "workers": a.workers, "cache": "ram"}
    length = {"epochs": epochs} if epochs else {}
    return Train(**{**values, **changes, "options": options, **fixed, **length, **more})


def operations(a: argparse.Namespace, name: str) -> float:
    """Floating point operations of an answer; ConfigError where the backbone does not suit the variant."""
    if name == FLIP:
        return 2 * operations(a, PLAIN)
    s = settings(a, a.recipe, variant(a, name), a.out, 0, None)
    return _operations(s.method, s.backbone, json.dumps([s.image_size, s.backbone_args, s.options]))


@cache
@torch.no_grad()
def _operations(method: str, backbone: str | None, rest: str) -> float:
    size, args, options = json.loads(rest)
    return float(flops.count(flops.build(method, backbone, size, backbone_args=args, **options)))


def locate(out: Path, a: argparse.Namespace) -> None:
    """Write down where a run's own box lies on every test image: {"box": {measure: [images]}, "random": ..}."""
    model = load(out).to(pick_device())
    images = find_masks(Path(a.data) / "test", a.masks)
    found: dict[str, dict[str, list[float]]] = {}
    if model.config.method != PLAIN and model.config.options.get("box") != "none":
        targets = measure(model, images, [None], controls=True).targets
        rows = targets.get("part", next(iter(targets.values())))
        own = next(iter(rows))
        found = {
            which: {
                key: rows[row][name].tolist()
                for key, name in (("area", "area"), ("coverage", "box_recall"), ("holds", "holds"))
            }
            for which, row in (("box", own), ("random", f"{own}/random"))
        }
    write_text(out / WHERE, json.dumps(found) + "\n")


def answers(out: Path) -> tuple[tuple[Any, ...], Tensor] | None:
    """A run's test images, file and label, and whether it is right (images,); None before the run is finished."""
    for file in (out / PREDICTIONS, out / "predictions.csv"):
        if file.exists():
            with file.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
            right = torch.tensor([row["label"] == row["prediction"] for row in rows])
            return tuple((Path(row["path"]).name, row["label"]) for row in rows), right
    return None


Runs = dict[int, tuple[Any, Tensor]]  # by seed: images, and whether each was answered right


def finished(a: argparse.Namespace, name: str) -> Runs:
    """The answers of a variant, of the seeds that are finished."""
    return {seed: told for seed in a.seeds if (told := answers(a.out / name / f"seed_{seed}")) is not None}


def summarise(a: argparse.Namespace, names: list[str], left_out: dict[str, str]) -> dict[str, Any]:
    """A row a variant, of the seeds that are finished, written as JSON, text and picture where there is any.

    Shards take turns: the last one tells all.
    """
    a.out.mkdir(parents=True, exist_ok=True)
    with FileLock(a.out / "paired.lock"):
        return _summarise(a, names, left_out)


def _summarise(a: argparse.Namespace, names: list[str], left_out: dict[str, str]) -> dict[str, Any]:
    found = {name: finished(a, name) for name in (*VARIANTS, FLIP) if name in names or (a.out / name).is_dir()}
    rows = as_rows(a, {name: runs for name, runs in found.items() if runs})
    result = {
        "data": Path(a.data).name,
        "recipe": a.recipe.name,
        "epochs": a.epochs,
        "against": a.against,
        "runs": sum(map(len, found.values())),
        "of": len(found) * len(a.seeds),
        "rows": rows,
        "left_out": left_out,
    }
    if rows:
        stem = "paired" if a.against == PUBLISHED else f"paired_against_{a.against}"
        write_text(a.out / f"{stem}.json", json.dumps(result, indent=2) + "\n")
        write_text(a.out / f"{stem}.md", as_markdown(result) + "\n")
        draw(rows, a.against, a.out / f"{stem}.png")
    return result


def as_rows(a: argparse.Namespace, found: dict[str, Runs]) -> list[dict[str, Any]]:
    """Every variant against that of `a.against`, by the seeds that both have; one bootstrap for all."""
    base, rows, gains = found.get(a.against, {}), [], {}
    for name, runs in found.items():
        row, gain = as_row(a, name, runs, base)
        rows.append(row)
        if gain is not None:
            gains[name] = gain
    differences = as_numbers(gains, DRAWS)
    return [row | {"difference": differences.get(row["name"])} for row in rows]


def as_row(a: argparse.Namespace, name: str, mine: Runs, base: Runs) -> tuple[dict[str, Any], Tensor | None]:
    """One row but for its difference, and what it is the mean of: points (images,), mean over seeds."""
    tops = [float(right.float().mean()) for _, right in mine.values()]
    row: dict[str, Any] = {
        "name": name,
        "seeds": list(mine),
        "correct": [int(right.sum()) for _, right in mine.values()],
        "count": len(next(iter(mine.values()))[1]),
        "top1": statistics.mean(tops),
        "top1_std": statistics.stdev(tops) if len(tops) > 1 else None,
        "cost": cost_of(a, name),
        "differences": [],
        "mcnemar": [],
        "where": as_numbers(whereabouts([a.out / name / f"seed_{seed}" / WHERE for seed in mine]), DRAWS) or None,
    }
    both = [seed for seed in mine if seed in base]
    if name == a.against or not both:
        return row, None
    for seed in both:
        if mine[seed][0] != base[seed][0]:
            raise SystemExit(f"{name} and {a.against} of seed {seed} were measured on other images")
    ours, theirs = (torch.stack([runs[seed][1] for seed in both]) for runs in (mine, base))  # seeds images
    gain = ours.double() - theirs.double()
    row["differences"] = (100 * gain.mean(dim=1)).tolist()
    pairs = [((ours[i] & ~theirs[i]).sum().item(), (theirs[i] & ~ours[i]).sum().item()) for i in range(len(both))]
    pairs += [(sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs))] * (len(pairs) > 1)
    keys: list[Any] = [*both, "pooled"]
    row["mcnemar"] = [
        {"seed": key, "only_it": b, "only_other": c, "p": mcnemar(int(b), int(c))}
        for key, (b, c) in zip(keys, pairs, strict=False)
    ]
    return row, 100 * gain.mean(dim=0)


def cost_of(a: argparse.Namespace, name: str) -> float | None:
    """Operations of an answer over those of the published rule; None where this command does not say enough."""
    try:
        return operations(a, name) / operations(a, PUBLISHED)
    except ConfigError:
        return None


def whereabouts(files: list[Path]) -> dict[str, Tensor]:
    """Of every image (images,), its seeds averaged: the box, and what it holds beyond chance. Empty without a box."""
    told = [found for file in files if file.exists() and (found := json.loads(file.read_text()))]
    if not told:
        return {}

    def mean(which: str, measure: str) -> Tensor:
        return torch.tensor([found[which][measure] for found in told], dtype=torch.double).mean(dim=0)

    columns = {measure: mean("box", measure) for measure in ("area", "coverage", "holds")}
    columns |= {f"random {measure}": mean("random", measure) for measure in ("coverage", "holds")}
    columns["holds - random"] = columns["holds"] - columns["random holds"]
    return columns


def as_markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    located = any(row["where"] for row in result["rows"])
    heads = ["", "top-1, %", "right", "cost", "difference, points", "by seed", "p by seed", "p pooled"]
    heads += ["area", "part: coverage", "part: holds", "random box holds"] * located
    lines = [heads, ["---"] * len(heads)]
    for r in result["rows"]:
        spread = f" +- {100 * r['top1_std']:.2f}" if r["top1_std"] is not None else ""
        cells = [EXPLAINED.get(r["name"], r["name"]), f"{100 * r['top1']:.2f}{spread}"]
        cells += [f"{', '.join(map(str, r['correct']))} of {r['count']}", f"{r['cost']:.2f}" if r["cost"] else ""]
        gap = r["difference"]
        cells.append(signed(*gap, digits=2) if gap else "")
        cells.append(", ".join(f"{points:+.1f}" for points in r["differences"]))
        seeds = [x for x in r["mcnemar"] if x["seed"] != "pooled"]
        cells.append(", ".join(f"{x['p']:.2g}" for x in seeds))
        cells.append("".join(f"{x['p']:.2g}" for x in r["mcnemar"] if x["seed"] == "pooled"))
        if located:
            where = r["where"] or {}
            measures = ("area", "coverage", "holds", "random holds")
            cells += [f"{100 * where[m][0]:.1f} %" if where.get(m) else "" for m in measures]
        lines.append(cells)
    head = f"{result['data']}, {result['recipe']}, {result['epochs']} epochs; {result['runs']} of {result['of']} runs"
    tail = [f"Left out: {name}: {why}" for name, why in result["left_out"].items()]
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines), *tail])


def draw(rows: list[dict[str, Any]], against: str, path: Path) -> None:
    """PNG: the difference of every variant to another one, with its interval; small dots are the seeds."""
    shown = [row for row in rows if row["difference"]]
    if not shown:
        return
    figure = Figure(figsize=(8, 0.32 * len(shown) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(shown):
        mean, low, high = row["difference"]
        colour = "C0" if row["name"] in RULES else "C1" if row["name"] in (*CONTROLS, FLIP) else "C2"
        axes.plot([low, high], [y, y], color=colour)
        axes.plot(mean, y, "o", color=colour)
        axes.plot(row["differences"], [y + 0.25] * len(row["differences"]), ".", color="0.6", markersize=4)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"test top-1 beyond {against}, points; 95 % over images; small dots: the seeds", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
