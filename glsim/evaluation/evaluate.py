"""Evaluation of a model on a split: accuracies, counts, confidence, tables."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from glsim.checkpoints.bundle import labels_of, load, pick_device, preprocessing_of, temperature_of, threshold_of
from glsim.config import Eval
from glsim.data.catalog import prepared
from glsim.data.hierarchy import Taxonomy, decide, flat, read_taxonomy
from glsim.data.images import BadImage, find_bad, limited
from glsim.data.loaders import make_loader, read
from glsim.data.readers import ImageList, hold_out_val, is_split, read_data, split_hash
from glsim.data.sources import located
from glsim.data.transforms import eval_transform
from glsim.evaluation.confidence import NO_ANSWER, are_answers, calibration_error, reliability, risk_coverage
from glsim.evaluation.error_page import find_mistakes, write_page
from glsim.evaluation.plots import draw_confidence, draw_confusion
from glsim.files import csv_text, make_folder, write_json, write_text
from glsim.inference.predictor import answers
from glsim.models.backbone import Model
from glsim.types import ConfigError, DataError

MOST_CLASSES_DRAWN = 60  # in confusion.png; more names and numbers cannot be read
MOST_CONFUSED = 20  # pairs of classes that the summary names


class Evaluation(NamedTuple):
    """What a model said of every image of a split, in the split's order."""

    correct_top5: int
    labels: Tensor  # (images,)
    predictions: Tensor  # (images,)
    confidences: Tensor  # (images,) probability of the prediction
    true_confidences: Tensor  # (images,) probability of the true class
    seconds: float
    groups: Tensor  # (images, levels) the likeliest group at each level of the taxonomy; without one, the prediction
    group_confidences: Tensor  # (images, levels)
    second_pass: Tensor | None = None  # (images,) whether the crop was looked into; None: the method does not choose

    @property
    def right(self) -> Tensor:
        """Whether the prediction is the label (images,)."""
        return self.predictions == self.labels

    def confusions(self) -> Tensor:
        """How often each class is taken for which: rows of (label, prediction, images), in order, without zeros.

        Not as a matrix (C, C), which of 10,000 classes would hold 100 million numbers.
        """
        pairs, counts = torch.stack((self.labels, self.predictions), dim=1).unique(dim=0, return_counts=True)
        return torch.cat((pairs, counts[:, None]), dim=1)

    def summary(self, classes: tuple[str, ...] | list[str]) -> dict[str, Any]:
        """Top-1, top-5, mean and standard deviation over the classes that have images, exact counts, calibration
        error, area under the risk-coverage curve: plain values."""
        right, count = (y.bincount(minlength=len(classes)) for y in (self.labels[self.right], self.labels))
        of_classes = right[count > 0] / count[count > 0]
        total = int(count.sum())
        return {
            "count": total,
            "correct": int(right.sum()),
            "top1": int(right.sum()) / total,
            "correct_top5": self.correct_top5,
            "top5": self.correct_top5 / total,
            "per_class_mean": float(of_classes.mean()),
            "per_class_std": float(of_classes.std(correction=0)),
            "per_class": {c: [int(r), int(n)] for c, r, n in zip(classes, right, count, strict=True)},
            "ece": calibration_error(self.confidences, self.right),
            "aurc": risk_coverage(self.confidences, self.right).area,
            "second_pass_share": float(self.second_pass.float().mean()) if self.second_pass is not None else None,
            "images_per_second": round(total / self.seconds, 2),
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    accelerator: Accelerator,
    flip: bool = False,
    temperature: float = 1.0,
    taxonomy: Taxonomy | None = None,
) -> Evaluation:
    """Run `model` over batches (images (B, 3, H, W), labels (B,)); every image of a sharded loader counts once.

    With `flip` the logits of each image and of its mirror image are averaged. Confidences are the softmax of the
    logits divided by `temperature`. Raises DataError naming the first image whose answer is no number.
    """
    model.eval()
    taxonomy = taxonomy or flat(range(num_classes))
    start = time.perf_counter()
    truth: deque[Tensor] = deque()
    columns: list[list[Tensor]] = []
    answered: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for images, labels in read(loader):
            truth.append(labels)
            yield images

    with accelerator.autocast():
        for output in answers(model, batches(), flip):
            own = (output.logits.float(), truth.popleft(), *[v for k, v in output.aux.items() if k == "unsure"])
            logits, labels, *again = (t.cpu() for t in accelerator.gather(own))
            answered.append(are_answers(logits, temperature))
            probabilities = (logits / temperature).softmax(dim=1)
            best = probabilities.max(dim=1)
            true = probabilities.gather(1, labels[:, None])[:, 0]
            in_top5 = (logits.topk(min(5, num_classes)).indices == labels[:, None]).any(dim=1)
            columns.append([best.indices, best.values, true, labels, in_top5, *taxonomy.best(probabilities), *again])
    dataset: Any = getattr(loader, "dataset", ())
    count = len(dataset) or None  # processes fill up their last batches with the first images
    wrong = (~torch.cat(answered)[:count]).nonzero()[:, 0].tolist()
    if wrong:
        first = getattr(dataset, "images", {wrong[0]: f"image {wrong[0]}"})[wrong[0]]
        raise DataError(f"{first}: {NO_ANSWER}; so for {len(wrong)} of {len(torch.cat(answered)[:count])} images")
    predictions, confidences, true_confidences, labels, in_top5, groups, group_confidences, *again = (
        torch.cat(column)[:count] for column in zip(*columns, strict=True)
    )
    return Evaluation(
        int(in_top5.sum()),
        labels,
        predictions,
        confidences,
        true_confidences,
        time.perf_counter() - start,
        groups,
        group_confidences,
        *again,
    )


def join(lists: Iterable[ImageList]) -> ImageList:
    """Several splits of one data set as one."""
    lists = list(lists)
    paths, labels = (tuple(chain(*parts)) for parts in zip(*((i.paths, i.labels) for i in lists), strict=True))
    return ImageList(paths, labels, lists[0].classes)


def drop_bad(images: ImageList, bad: list[BadImage]) -> ImageList:
    """`images` without the unreadable files; DataError when nothing is left."""
    gone = {str(b.path) for b in bad}
    kept = [(p, y) for p, y in zip(images.paths, images.labels, strict=True) if str(p) not in gone]
    if not kept:
        raise DataError(f"none of the {len(images)} images can be read; the first: {bad[0]}")
    return ImageList(tuple(p for p, _ in kept), tuple(y for _, y in kept), images.classes)


def make_accelerator(device: str | None = None, precision: str = "no", accumulate: int = 1, **more: Any) -> Accelerator:
    """Accelerate's choice of devices and precision, anew each time; ConfigError for what is not there.

    Gradients are averaged over `accumulate` batches; `more` goes to Accelerate.
    """
    chosen = pick_device(device)
    if precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("precision=fp16 needs an accelerator, there is only a CPU; use no or bf16")
    if chosen.index is not None and chosen.type != "cpu":
        torch.accelerator.set_device_index(chosen.index)
    if PartialState(cpu=chosen.type == "cpu").num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this very process
    try:
        cpu = chosen.type == "cpu"
        return Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=accumulate, **more)
    except ValueError as error:
        raise ConfigError(f"precision={precision}: {error}") from error


def read_splits(model: Model, data: str | Path, classes: Sequence[str] | None = None) -> dict[str, ImageList]:
    """All splits, as the run that trained `model` saw them, val held out of train; `classes` goes to `read_data`."""
    seen = {"split_seed": 0, "test_fraction": 0.2, "val_fraction": 0.0} | (model.config.get("data") or {})
    splits = read_data(data, classes=classes, seed=seen["split_seed"], test_fraction=seen["test_fraction"])
    return hold_out_val(splits, seen["val_fraction"], seen["split_seed"])


def take_split(splits: Mapping[str, ImageList], split: str, data: str | Path) -> ImageList:
    """The images of `split` of the data set `data`, or of all splits, to measure or to keep.

    Raises DataError when there is no such split, or none of a class could be held out for it.
    """
    if split == "all":
        return join(splits.values())
    if not len(splits.get(split, ())):
        there = ", ".join(name for name, images in splits.items() if len(images))
        hint = "; train with --val-fraction 0.1 to hold some images out, of classes that have two or more"
        raise DataError(f"{data} has no split {split!r}; it has: {there}{hint if split == 'val' else ''}")
    return splits[split]


def read_split(model: Model, data: str | Path, split: str) -> tuple[ImageList, dict[str, ImageList]]:
    """The images of `split`, or all, and all splits, as the run that trained `model` saw them, val held out of train.

    Raises DataError as `take_split` does, or when the classes are not those of `model`.
    """
    named, labels = model.config.get("label_names"), labels_of(model)
    splits = read_splits(model, data, named)
    images = take_split(splits, split, data)
    if named is None and len(images.classes) != len(labels):
        raise DataError(f"{data} has {len(images.classes)} classes, the model {len(labels)} without names")
    return images, splits


@limited
def run(s: Eval) -> dict[str, Any]:
    """The verb: measure a bundle on one split of a data set; returns the summary and writes it under `s.out`.

    The page of the mistakes goes under `s.errors`.
    """
    for made in filter(None, (s.out, s.errors)):
        make_folder(made)  # first, for a folder that cannot be made must not come late
    model = load(s.source, **s.options)
    threshold = threshold_of(model) if s.reject else None
    data = prepared(s.data, s.dataset)
    images, splits = read_split(model, data, s.split)
    labels = list(images.classes)  # an unnamed model's classes are taken to be in the order of the data's
    taxonomy = read_taxonomy(s.taxonomy, labels) if s.taxonomy is not None else flat(labels)
    bad = find_bad(images.paths) if s.skip_bad else []
    if bad:
        images = drop_bad(images, bad)
    accelerator = make_accelerator(s.device)
    loader: Any = make_loader(images, eval_transform(preprocessing_of(model)), s.batch_size, s.workers)
    loader = accelerator.prepare(loader)
    model, temperature = model.to(accelerator.device), temperature_of(model)
    result = evaluate(model, loader, len(labels), accelerator, s.flip, temperature, taxonomy)
    curve = risk_coverage(result.confidences, result.right)
    summary = {
        "source": str(s.source),
        "data": str(s.data),
        "split": s.split,
        "flip": s.flip,
        "split_drawn": s.split != "all" and not is_split(data),
        "split_hash": split_hash({s.split: images}, data),
        **result.summary(labels),
        "temperature": temperature,
        "risk_coverage": curve.points(),
        "answered": sure_answers(result, taxonomy, threshold) if threshold is not None else None,
        "levels": by_level(result, taxonomy) if s.taxonomy is not None else None,
        "confused": most_confused(result, labels),
        "skipped": [str(b) for b in bad],
        "errors": None,
        "written": [],
    }
    if s.errors is not None and accelerator.is_main_process:
        numbers = (t.tolist() for t in (result.predictions, result.confidences, result.true_confidences))
        mistakes = find_mistakes(images, *numbers)
        page = write_page(Path(s.errors), model, mistakes, labels, splits.get("train"), summary)
        summary["errors"] = str(page)
    if s.out is not None and accelerator.is_main_process:
        folder = Path(s.out)
        drawn = ["confusion.png"] if len(labels) <= MOST_CLASSES_DRAWN else []
        summary["written"] = ["evaluation.json", "predictions.csv", "confidence.png", "confusion.csv", *drawn]
        write_json(folder / "evaluation.json", summary)
        write_text(folder / "predictions.csv", predictions_table(images, result))
        write_text(folder / "confusion.csv", confusion_table(result, labels))
        bins = reliability(result.confidences, result.right)
        draw_confidence(bins, curve, summary["ece"], threshold, folder / "confidence.png")
        if drawn:
            confusion = multiclass_confusion_matrix(result.predictions, result.labels, len(labels))
            draw_confusion(confusion, labels, folder / "confusion.png")
    return summary


def by_level(result: Evaluation, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """How often the likeliest group of each level is the right one, from fine to coarse."""
    right = (result.groups == taxonomy.truth(result.labels)).sum(dim=0).tolist()
    rows = zip(taxonomy.levels, taxonomy.groups, right, strict=True)
    total = len(result.labels)
    return [{"level": level, "groups": len(names), "correct": n, "top1": n / total} for level, names, n in rows]


def sure_answers(result: Evaluation, taxonomy: Taxonomy, threshold: float) -> dict[str, Any]:
    """What is answered at or above `threshold`, and how much of it is wrong, in all and by the level that answers."""
    levels = decide(result.group_confidences, threshold)
    right = result.groups == taxonomy.truth(result.labels)

    def counted(given: Tensor, correct: Tensor) -> dict[str, Any]:
        count, good = int(given.sum()), int(correct[given].sum())
        error = (count - good) / count if count else None
        return {"count": count, "coverage": count / len(levels), "correct": good, "error": error}

    by_level = [{"level": name, **counted(levels == i, right[:, i])} for i, name in enumerate(taxonomy.levels)]
    chosen = right.gather(1, levels.clamp(min=0)[:, None])[:, 0]
    return {"threshold": threshold, **counted(levels >= 0, chosen), "levels": by_level}


def most_confused(result: Evaluation, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The classes most often taken for another one: label, prediction, images of the label so answered, and in all."""
    images = result.labels.bincount().tolist()
    wrong = [row for row in result.confusions().tolist() if row[0] != row[1]]
    worst = sorted(wrong, key=lambda row: -row[2])[:MOST_CONFUSED]
    return [{"label": labels[y], "prediction": labels[x], "count": n, "of": images[y]} for y, x, n in worst]


def confusion_table(result: Evaluation, labels: Sequence[str]) -> str:
    """The confusion matrix as CSV: one line for each pair of label and prediction that occurs."""
    rows = [[labels[y], labels[x], n] for y, x, n in result.confusions().tolist()]
    return csv_text([["label", "prediction", "count"], *rows])


def predictions_table(images: ImageList, result: Evaluation, root: str | Path | None = None) -> str:
    """One line an image, by `csv_text`. Paths are as they were given, or count from `root` (a list's folder)."""
    labels = images.classes
    if root is not None:
        root = located(root)
        root = root.parent if root.is_file() else root
    rows: list[list[object]] = [["path", "label", "prediction", "confidence"]]
    for path, label, guess, p in zip(
        images.paths, images.labels, result.predictions.tolist(), result.confidences.tolist(), strict=True
    ):
        shown = path if root is None else Path(os.path.relpath(path, root)).as_posix()
        rows.append([shown, labels[label], labels[guess], f"{p:.6f}"])
    return csv_text(rows)
