"""Classes held out of training: are they told from the known ones, and recognised once a few images are added?

    python benchmarks/new_classes.py recipes/cars196_plain.yaml --data cars196 --out runs/new_classes

Trains the recipe on KNOWN classes of DATA drawn by SEED (OUT/known.csv), or takes a trained one (--run; its labels are
the known classes). Then, for every embedding the model has:

- "unknown": over the test images of all classes, the chance that one of a known class has a higher score than one of a
  new class (AUROC), by largest softmax probability, energy, and similarity to the nearest class prototype;
- the new classes are added from 1, 5 and 20 of their training images, in steps, to an index of the known training
  images: top-1 over all classes added so far by prototypes and neighbours, beside the head, which cannot learn them.

Calibration: ECE (15 bins) on the test images of the known classes, before and after one temperature fitted on the val
split by L-BFGS. Everything goes to OUT/new_classes.json. A finished training is not repeated, an interrupted one goes
on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from glsim import Predictor
from glsim.checkpoints.bundle import labels_of, load
from glsim.data.readers import ImageList, hold_out, read_data
from glsim.data.splits import join
from glsim.evaluation.calibration import fit_temperature
from glsim.evaluation.confidence import calibration_error, graded
from glsim.files import document, write_text
from glsim.inference.index import build_index, encode, find_split, open_index
from glsim.inference.index_evaluation import Accuracies, Queries, accuracies, match_classes, measure_index
from glsim.inference.index_vectors import Index
from glsim.models.base import Model
from glsim.training.config import Train, read_recipe
from glsim.training.runs import LOG, RECIPE
from glsim.training.train import train

RESULT = "new_classes.json"
NEIGHBOURS = 5  # that vote
DRAWS = 5  # times the images of a new class are drawn anew, for the mean and the deviation of an accuracy


def main() -> None:
    """Parse, train what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("--run", type=Path, help="a trained bundle instead of a recipe")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--known", type=int, default=150, help="classes to train on")
    parser.add_argument("--seed", type=int, default=0, help="of which classes these are, and which images are added")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 20], help="images of each added class")
    parser.add_argument("--steps", type=int, default=4, help="steps in which the new classes are added")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings instead of the recipe's")
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    if (a.recipe is None) == (a.run is None):
        parser.error("name a recipe to train, or a trained --run")
    splits = read_data(a.data)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.run is None:
        classes = sorted(random.Random(a.seed).sample(splits["train"].classes, a.known))
        a.run = a.out / "run"
        fit(a, {name: only(images, classes) for name, images in splits.items()})
    model = load(a.run)
    classes = labels_of(model)
    every = {
        name: only(images, [*classes, *(c for c in images.classes if c not in classes)])
        for name, images in splits.items()
    }
    write_list(a.out / "all.csv", every)
    write_list(a.out / "known.csv", {name: only(images, classes) for name, images in every.items()})
    result = {
        "run": str(a.run),
        "known": len(classes),
        "new": len(every["train"].classes) - len(classes),
        "calibration": calibrate(model, a.out / "known.csv", a.workers),
        "embeddings": {name: measure(a, name, classes, every["train"]) for name in embeddings_of(model)},
    }
    write_text(a.out / RESULT, json.dumps(result, indent=2) + "\n")
    print(as_markdown(result))


def only(images: ImageList, classes: list[str]) -> ImageList:
    """The images of `classes`, numbered by that list."""
    number = {images.classes.index(name): i for i, name in enumerate(classes)}
    kept = [(path, number[label]) for path, label in zip(images.paths, images.labels, strict=True) if label in number]
    return ImageList(tuple(p for p, _ in kept), tuple(y for _, y in kept), tuple(classes))


def write_list(file: Path, splits: dict[str, ImageList]) -> None:
    """A CSV list path,label,split that --data takes."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "label", "split"])
        for split, images in splits.items():
            for path, label in zip(images.paths, images.labels, strict=True):
                writer.writerow([os.path.relpath(path, file.parent), images.classes[label], split])


def fit(a: argparse.Namespace, splits: dict[str, ImageList]) -> None:
    """Train the recipe on the known classes, or go on with it."""
    values = read_recipe(a.recipe) | {k: yaml.safe_load(v) for k, _, v in (word.partition("=") for word in a.set)}
    write_list(a.out / "known.csv", splits)
    settings = {**values, "data": str(a.out / "known.csv"), "out": str(a.run), "workers": a.workers}
    log = a.run / LOG
    if not log.exists() or len(log.read_text().splitlines()) < Train(**settings).epochs:
        print(f"training {a.recipe.stem} on {a.known} classes", file=sys.stderr)
        train(Train(**settings, resume=(a.run / RECIPE).exists()))


def embeddings_of(model: Model) -> list[str]:
    """The names of the vectors it hands out."""
    with torch.inference_mode():
        return list(model(torch.zeros(1, 3, *model.config.image_size)).embeddings)


def measure(a: argparse.Namespace, name: str, classes: list[str], images: ImageList) -> dict[str, Any]:
    """Unknown and added classes by one embedding: measured before all new images are in the index, and with them."""
    folder = a.out / f"index_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    build_index(a.run, a.out / "known.csv", folder, embedding=name, workers=a.workers)
    known, model = open_index(folder)
    test = find_split(model, a.out / "all.csv", None, "test")
    asked = encode(model, test.paths, name, workers=a.workers, progress=True)
    new = only(images, [c for c in images.classes if c not in classes])
    encoded = encode(model, new.paths, name, workers=a.workers, progress=True)
    paths = [str(path.absolute()) for path in new.paths]
    larger = known.add([new.classes[label] for label in new.labels], paths, encoded.vectors)
    before, after = (match_classes(index, model, test, asked) for index in (known, larger))
    return {
        "before": document(measure_index(known, before, NEIGHBOURS)),
        "after": {
            **document(measure_index(larger, after, NEIGHBOURS)),
            "added": add_in_steps(larger, after, a.shots, a.steps, a.seed),
        },
    }


def add_in_steps(
    index: Index, queries: Queries, shots: Sequence[int], steps: int, seed: int, k: int = NEIGHBOURS
) -> list[dict[str, Any]]:
    """Accuracies with the old classes alone, then with a few images (`shots`) of more and more added ones.

    The images of an added class are drawn `DRAWS` times; a class with fewer gives all it has.
    """
    rng, added, y = np.random.default_rng(seed), queries.added, queries.truth
    if not len(added):
        return []
    old = ~np.isin(index.labels, added)
    images = {c: np.flatnonzero(index.labels == c) for c in added}
    counts = dict.fromkeys(round(len(added) * (i + 1) / steps) for i in range(steps))
    stages = [(0, 0)] if old.any() else []
    stages += [(n, count) for n in shots for count in counts if count]
    rows = []
    for n, count in stages:
        asked = np.isin(y, index.labels[old]) | np.isin(y, added[:count])
        questions = queries.encoded.vectors[asked], y[asked], queries.guesses[asked]
        draws = []
        for _ in range(DRAWS if count else 1):
            chosen = [rng.permutation(images[c])[:n] for c in added[:count]]
            gallery = np.concatenate((np.flatnonzero(old), *chosen))
            draws.append(accuracies(index.vectors[gallery], index.labels[gallery], *questions, k, added))
        rows.append({"shots": n, "added": count, "count": int(asked.sum()), **average(draws)})
    return rows


def average(draws: Sequence[Accuracies]) -> dict[str, dict[str, float | None]]:
    """Mean of every accuracy over draws, and the standard deviation of top-1."""

    def mean(values: Iterable[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return float(np.mean(there)) if there else None

    found = {}
    for way in (field.name for field in fields(Accuracies)):
        rows = [getattr(draw, way) for draw in draws]
        found[way] = {key: mean(getattr(row, key) for row in rows) for key in ("top1", "top1_old", "top1_added")}
        found[way]["std"] = float(np.std([row.top1 for row in rows]))
    return found


def calibrate(model: Model, data: Path, workers: int) -> dict[str, Any]:
    """ECE on test before and after a temperature fitted on the images that training held out as val."""
    about = model.config.data
    splits = read_data(data, classes=labels_of(model))
    if "val" not in splits:
        if not about["val_fraction"]:
            raise SystemExit("the run held out no val images to fit a temperature on; train with val_fraction: 0.1")
        splits["val"] = hold_out(splits["train"], about["val_fraction"], about["split_seed"])[1]
    both = join([splits["val"], splits["test"]])
    logits, labels = answers(model, both, workers), torch.tensor(both.labels)
    val, test = slice(0, len(splits["val"])), slice(len(splits["val"]), None)
    temperature = fit_temperature(logits[val], labels[val]).value
    scaled = logits[test] / temperature
    return {
        "val": len(splits["val"]),
        "test": len(splits["test"]),
        "top1": float((logits[test].argmax(1) == labels[test]).float().mean()),
        "temperature": temperature,
        "ece_before": calibration_error(*graded(logits[test], labels[test])),
        "ece_after": calibration_error(*graded(scaled, labels[test])),
        "nll_before": float(torch.nn.functional.cross_entropy(logits[test], labels[test])),
        "nll_after": float(torch.nn.functional.cross_entropy(scaled, labels[test])),
    }


def answers(model: Model, images: ImageList, workers: int) -> Tensor:
    """Logits (n, C) of all images."""
    outputs = [output for output, _ in Predictor(model, workers=workers).outputs(images.paths)]
    return torch.cat([output.logits.float().cpu() for output in outputs if output is not None]).clone()


def as_markdown(r: dict[str, Any]) -> str:
    """Three tables."""
    c = r["calibration"]
    lines = [
        f"{r['known']} classes known, {r['new']} new; {c['test']} test images of known classes: "
        f"top-1 {c['top1']:.1%}, ECE {c['ece_before']:.1%}, at temperature {c['temperature']:.2f} {c['ece_after']:.1%}",
        "",
        "| embedding | AUROC of unknown: softmax | energy | prototypes |",
        "|---|---|---|---|",
    ]
    for name, m in r["embeddings"].items():
        scores = m["before"]["unknown"]["auroc"]
        lines.append(f"| {name} | {scores['softmax']:.3f} | {scores['energy']:.3f} | {scores['prototypes']:.3f} |")
    lines += [
        "",
        "| embedding | images each | classes added | prototypes | neighbours | head |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in r["embeddings"].items():
        for row in m["after"]["added"]:
            cells = [cell(row[way], row["added"]) for way in ("prototypes", "neighbours", "head")]
            lines.append(f"| {name} | {row['shots'] or '-'} | {row['added']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any], added: int) -> str:
    """Top-1 over all classes, and of the added ones."""
    spread = f" +- {100 * row['std']:.1f}" if row["std"] else ""
    return f"{row['top1']:.1%}{spread}" + (f" ({row['top1_added']:.1%} of added)" if added else "")


if __name__ == "__main__":
    main()
