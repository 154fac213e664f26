"""What is the crop worth after fine-tuning? Plain, GLSim, its controls and other methods from the same weights, paired.

    python benchmarks/study.py --data cub20 --boxes cub20/boxes.csv --weights dinov2_small.safetensors --out runs/study

Every arm is a recipe of the package with what ARMS changes of it, trained from the weights that --init-from takes:
OUT/ARM/seed_SEED. A finished run is not trained again, an interrupted one goes on; `--shard I/N` trains every N-th run,
so that N processes share them. `--val` holds a fifth of train out and measures that instead of test: for choosing, into
a folder of its own. Test is measured after the last epoch and chooses nothing.

`--rounds N` trains nothing: it times every arm's answers, all arms in turn in each of N rounds, on decoded images in
batches of 32, into OUT/cost.json. The cost of an arm is the median over rounds of its time over that of `plain`.

OUT gets study.json, study.md and study.png after every run, of what is finished by then. Differences are right answers
beyond those of another arm in points, mean over the seeds that both have, with the 95 % interval by the bootstrap over
images (the seeds of an image kept together) and McNemar's exact test, pooled over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from annotated import given_boxes
from cost_accuracy import finish
from filelock import FileLock
from matplotlib.figure import Figure
from paired import answers
from torch import Tensor

from glsim import load
from glsim.checkpoints.bundle import preprocessing_of
from glsim.data.images import read_image
from glsim.data.readers import read_data
from glsim.data.transforms import eval_transform
from glsim.environment import environment
from glsim.evaluation.localization import evaluate_localization
from glsim.evaluation.statistics import as_numbers, mcnemar, signed
from glsim.files import write_text
from glsim.interpret.drawing import save_figure
from glsim.models import METHODS
from glsim.training.config import Train, read_recipe
from glsim.training.resume import CHECKPOINT

METHODS["annotated"] = "annotated"  # the file beside this one
PLAIN, GLSIM, GLANCE = "cub20_plain", "cub20_glsim", "cub20_glsim_glance"
Arm = tuple[str, dict[str, Any]]  # a recipe, and what is changed of it


def plain(size: int) -> Arm:
    """The plain network at another size."""
    return PLAIN, {"image_size": size}


def glsim(**options: Any) -> Arm:
    """GLSim of the recipe, other options."""
    return GLSIM, {"options": options}


def small(**options: Any) -> Arm:
    """GLSim without detail: crops come out of the pixels that the first pass sees."""
    return GLSIM, {"image_size": 168, "options": {"first_size": None, **options}}


def other(method: str, **options: Any) -> Arm:
    """Another method at plain's size."""
    return PLAIN, {"method": method, "options": options}


ARMS: dict[str, Arm] = {
    "plain": plain(168),
    "plain_large": plain(252),
    "glsim": glsim(),
    "annotated": (GLSIM, {"method": "annotated", "options": {"rule": None}}),
    "centre": glsim(box="centre"),
    "glance": (GLANCE, {}),
    "glance_centre": (GLANCE, {"options": {"box": "centre"}}),
    "published": small(rule="published"),
    "random": glsim(box="random"),
    "no_detail": small(),
    "whole": small(box="whole"),
    "plain_224": plain(224),
    "published_start": small(rule="published", aggregator_start="published", classifier="cls"),
    "transfg": other("transfg", stride=None),
    "ffvt": other("ffvt"),
    "rams": other("rams"),
    "ielt": other("ielt"),
    "dcal": other("dcal"),
    "cal": other("cal"),
}
TITLES = {
    "plain": "plain, 168 pixels",
    "plain_large": "plain, 252 pixels: more measured compute than GLSim",
    "glsim": "GLSim: `gls_border`, `moments`, detail",
    "annotated": "the annotators' box, detail",
    "centre": "box of GLSim's size in the middle, detail",
    "glance": "GLSim: glance at 112, crop of 168, detail",
    "glance_centre": "glance: box of GLSim's size in the middle",
    "published": "GLSim, published rule (cosine, 8 patches, exclusive)",
    "random": "box of GLSim's size at a random place, detail",
    "no_detail": "GLSim: `gls_border`, `moments`, crop out of the 168 pixels",
    "whole": "the whole image as crop",
    "plain_224": "plain, 224 pixels",
    "published_start": "GLSim, published rule and start of the aggregator",
}
DRAWS = 10_000  # of the bootstrap
PAIRS = (
    *(("glsim", other) for other in ("plain_large", "plain_224", "centre")),
    *(("glance", other) for other in ("plain_large", "plain_224")),
)


def main() -> None:
    """Parse, train what is missing, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--boxes", required=True, type=Path, help="the annotators', as glsim localize takes them")
    parser.add_argument("--weights", required=True, help="of the backbone: what --init-from takes")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=" ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--val", action="store_true", help="choose on a fifth of train instead of measuring test")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of every recipe")
    parser.add_argument("--shard", default="0/1", help="I/N: train only the runs I, I + N, ..")
    parser.add_argument("--rounds", type=int, default=0, help="time the arms instead of training")
    a = parser.parse_args()
    if a.rounds:
        measure_cost(a)
    else:
        turn, turns = map(int, a.shard.split("/"))
        for seed, arm in [(seed, arm) for seed in a.seeds for arm in a.arms][turn::turns]:
            run(a, arm, seed)
            write(a)
    print(write(a), end="")


def settings(a: argparse.Namespace, arm: str, seed: int) -> Train:
    """The run of an arm and seed."""
    recipe, changes = ARMS[arm]
    values = read_recipe(Path(f"recipes/{recipe}.yaml"))
    options = values.get("options", {}) | changes.get("options", {})
    values |= changes | {"options": {name: value for name, value in options.items() if value is not None}}
    values |= {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in a.set)}
    values |= {"val_fraction": 0.2, "test": False} if a.val else {}
    out = str(a.out / arm / f"seed_{seed}")
    return Train(**values | {"data": a.data, "init_from": a.weights, "out": out, "seed": seed})


def run(a: argparse.Namespace, arm: str, seed: int) -> None:
    """Train an arm's run, and measure where its boxes lie."""
    s = settings(a, arm, seed)
    given = arm == "annotated"
    with given_boxes(a.boxes) if given else nullcontext():
        finish(s)
    for checkpoint in Path(s.out).glob(f"{CHECKPOINT}*"):
        shutil.rmtree(checkpoint)
    where = Path(s.out) / "where.json"
    if not given and not a.val and "glsim" in s.method and not where.exists():
        evaluate_localization(s.out, Path(a.data) / "test", boxes=a.boxes, resamples=100, out=where)


# --- summary ----------------------------------------------------------------------------------------------------------


def gain_of(ours: dict[int, Any], theirs: dict[int, Any]) -> tuple[Tensor, dict[str, Any]] | None:
    """Points (images,) of one arm beyond another, mean over the seeds of both, and the counts of McNemar's test."""
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    if any(ours[seed][0] != theirs[seed][0] for seed in both):
        raise SystemExit("two arms were measured on other images")
    mine, other = (torch.stack([runs[seed][1] for seed in both]) for runs in (ours, theirs))
    won, lost = int((mine & ~other).sum()), int((other & ~mine).sum())
    by_seed = [100 * float(gain) for gain in (mine.double() - other.double()).mean(dim=1)]
    told = {"seeds": both, "by_seed": by_seed, "won": won, "lost": lost, "p": mcnemar(won, lost)}
    return 100 * (mine.double() - other.double()).mean(dim=0), told


def summarise(a: argparse.Namespace) -> dict[str, Any]:
    """A row an arm and a row a pair, of what is finished."""
    found = {
        arm: {seed: told for seed in a.seeds if (told := answers(a.out / arm / f"seed_{seed}")) is not None}
        for arm in ARMS
    }
    found = {arm: runs for arm, runs in found.items() if runs}
    cost = json.loads((a.out / "cost.json").read_text())["cost"] if (a.out / "cost.json").exists() else {}
    pairs = [(arm, "plain") for arm in found if arm != "plain"] + list(PAIRS)
    gains = {pair: gain for pair in pairs if (gain := gain_of(*(found.get(arm, {}) for arm in pair))) is not None}
    intervals = as_numbers({pair: gain[0] for pair, gain in gains.items()}, DRAWS)
    rows = []
    for arm, runs in found.items():
        tops = [100 * float(right.float().mean()) for _, right in runs.values()]
        logs = [a.out / arm / f"seed_{seed}" for seed in runs]
        told = [(log / "log.jsonl").read_text().splitlines() for log in logs]
        seconds = [sum(json.loads(line)["seconds"] for line in lines) for lines in told]
        rows.append(
            {
                "arm": arm,
                "seeds": list(runs),
                "correct": [int(right.sum()) for _, right in runs.values()],
                "count": len(next(iter(runs.values()))[1]),
                "top1": statistics.mean(tops),
                "top1_std": statistics.stdev(tops) if len(tops) > 1 else None,
                "cost": cost.get(arm),
                "minutes": statistics.mean(seconds) / 60,
                "where": where_of(logs),
            }
        )
    differences = [
        {"arm": arm, "against": other, "difference": intervals[arm, other], **gain[1]}
        for (arm, other), gain in gains.items()
    ]
    return {"environment": environment(torch.device("cpu")), "rows": rows, "differences": differences}


def where_of(runs: list[Path]) -> dict[str, float] | None:
    """Where the boxes of runs lie: means of area, coverage and IoU."""
    told = [json.loads((run / "where.json").read_text()) for run in runs if (run / "where.json").exists()]
    rows = [next(iter(next(iter(one["targets"].values()))["rows"].values())) for one in told]
    names = [name for name in ("area", "coverage", "iou") if rows and name in rows[0]]
    return {name: statistics.mean(row[name][0] for row in rows) for name in names} or None


def write(a: argparse.Namespace) -> str:
    """study.json, study.md and study.png; returns the table."""
    if a.val:
        return "".join(
            f"{arm} {seed} {(log.read_text().splitlines() or ['{}'])[-1]}\n"
            for arm in ARMS
            for seed in a.seeds
            if (log := a.out / arm / f"seed_{seed}" / "log.jsonl").exists()
        )
    with FileLock(a.out / "study.lock"):
        result = summarise(a)
        table = as_markdown(result)
        write_text(a.out / "study.json", json.dumps(result, indent=2) + "\n")
        write_text(a.out / "study.md", table)
        draw(result["rows"], a.out / "study.png")
    return table


def as_markdown(result: dict[str, Any]) -> str:
    """Both tables for people."""
    against = {row["arm"]: row for row in result["differences"] if row["against"] == "plain"}
    lines = ["| | top-1, % | right | cost | minutes | beyond plain | box: area, IoU, covered |", "|" + "---|" * 7]
    for row in result["rows"]:
        spread = f" +- {row['top1_std']:.2f}" if row["top1_std"] is not None else ""
        where = row["where"]
        cells = [
            TITLES.get(row["arm"], row["arm"]),
            f"{row['top1']:.2f}{spread}",
            f"{', '.join(map(str, row['correct']))} of {row['count']}",
            f"{row['cost']:.2f}" if row["cost"] else "",
            f"{row['minutes']:.1f}",
            signed(*against[row["arm"]]["difference"]) if row["arm"] in against else "",
            ", ".join(f"{100 * where[k]:.0f}" for k in ("area", "iou", "coverage") if k in where) if where else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | difference, points | by seed | +a -b | p |", "|---|---|---|---|---|"]
    for row in result["differences"]:
        name = f"{row['arm']} - {row['against']}"
        seeds = ", ".join(f"{points:+.1f}" for points in row["by_seed"])
        counts = f"+{row['won']} -{row['lost']}"
        lines.append(f"| {name} | {signed(*row['difference'])} | {seeds} | {counts} | {row['p']:.2g} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PNG: accuracy along the measured cost; nothing before costs are measured."""
    if not (shown := [row for row in rows if row["cost"]]):
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(shown):
        style: dict[str, Any] = {"color": f"C{i % 10}", "marker": "os^D"[i // 10], "linestyle": "none"}
        axes.errorbar(row["cost"], row["top1"], yerr=row["top1_std"], capsize=3, label=row["arm"], **style)
    larger = [row for row in shown if row["arm"].startswith("plain")]
    larger.sort(key=lambda row: row["cost"])
    axes.plot([row["cost"] for row in larger], [row["top1"] for row in larger], color="0.7", zorder=0)
    axes.set(xlabel="measured time to answer, plain at 168 pixels = 1", ylabel="test top-1, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(figure, path)


# --- cost -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_cost(a: argparse.Namespace) -> None:
    """Seconds that each trained arm takes to answer 32 images, in turn; the first round warms up."""
    folders = {arm: a.out / arm / f"seed_{a.seeds[0]}" for arm in a.arms}
    models = {arm: load(folder) for arm, folder in folders.items() if answers(folder) is not None}
    test = read_data(a.data)["test"]
    pixels: dict[Any, Tensor] = {}
    for model in models.values():
        if (p := preprocessing_of(model)) not in pixels:
            paths = test.paths[:: len(test) // 32][:32]
            pixels[p] = torch.stack([read_image(path, eval_transform(p)) for path in paths])
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    for turn in range(a.rounds + 1):
        for arm, model in models.items():
            images = pixels[preprocessing_of(model)]
            start = time.perf_counter()
            model(images)
            if turn:
                seconds[arm].append(time.perf_counter() - start)
    cost = {
        arm: statistics.median(own / base for own, base in zip(times, seconds["plain"], strict=True))
        for arm, times in seconds.items()
    }
    told = {"environment": environment(torch.device("cpu")), "cost": cost, "seconds": seconds}
    write_text(a.out / "cost.json", json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
