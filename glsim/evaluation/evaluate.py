"""Evaluation of a model on a split: accuracies, counts, confidence; CSV tables and plots."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from glsim.checkpoints.bundle import labels_of, load, names_of, preprocessing_of, temperature_of, threshold_of
from glsim.data.box_options import Boxed
from glsim.data.catalog import prepared
from glsim.data.class_names import ClassName
from glsim.data.hierarchy import Taxonomy, decide, flat, read_taxonomy
from glsim.data.images import find_bad
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.loaders import make_loader, read
from glsim.data.readers import ImageList, split_hash
from glsim.data.sources import located
from glsim.data.splits import drop_bad, read_splits, take_split
from glsim.data.transforms import eval_transform
from glsim.environment import make_accelerator
from glsim.evaluation.confidence import calibration_error, reliability, risk_coverage
from glsim.evaluation.error_page import PAGE, find_mistakes, write_page
from glsim.evaluation.plots import draw_confidence, draw_confusion
from glsim.files import csv_text, document, make_folder, write_json, write_text
from glsim.inference.predictor import answers
from glsim.models.base import Model
from glsim.models.heads import NO_ANSWER, are_answers
from glsim.types import DataError, optional

FILES = ("evaluation.json", "predictions.csv", "confidence.png", "confusion.csv", "confusion.png")
MOST_CLASSES_DRAWN = 60  # in confusion.png; more names and numbers cannot be read
MOST_CONFUSED = 20  # pairs of classes that the summary names


@dataclass(frozen=True)
class Summary:
    """Measurements of a model on the images of a split."""

    count: int
    correct: int
    top1: float
    correct_top5: int
    top5: float
    per_class_mean: float  # of the accuracies of the classes that have images
    per_class_std: float  # standard deviation, of the same
    per_class: dict[str, list[int]]  # correct answers and images of each class
    ece: float  # expected calibration error
    aurc: float  # area under the risk-coverage curve
    second_pass_share: float | None  # of the images that had one; None where the method does not choose
    images_per_second: float


@dataclass(frozen=True)
class Answered:
    """What is answered at or above a threshold of confidence, and how much of it is wrong."""

    count: int
    coverage: float  # share of the images
    correct: int
    error: float | None  # share of the answers; None without any
    level: str | None = optional()  # of the taxonomy, where the answers are of one level


@dataclass(frozen=True, kw_only=True)
class SureAnswers(Answered):
    """What is answered in all, and by the level of the taxonomy that answers, from fine to coarse."""

    threshold: float
    levels: list[Answered]


@dataclass(frozen=True)
class LevelAccuracy:
    """How often the likeliest group of a level of the taxonomy is the right one."""

    level: str
    groups: int
    correct: int
    top1: float


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another one."""

    label: str
    prediction: str
    count: int  # images of the label so answered
    of: int  # images of the label


@dataclass(frozen=True, kw_only=True)
class BundleEvaluation(Summary):
    """What `evaluate_bundle` returns: the summary, with what was measured and what was written."""

    source: str
    data: str
    split: str
    flip: bool
    split_drawn: bool  # the data has no splits of its own, so that the images were drawn
    split_hash: str
    temperature: float
    risk_coverage: list[dict[str, float]]  # 20 points of coverage, error and threshold
    answered: SureAnswers | None  # with `reject`
    levels: list[LevelAccuracy] | None  # with `taxonomy`
    confused: list[Confusion]  # the classes most often taken for another, worst first
    skipped: list[str]  # files that cannot be read, and why
    errors: str | None  # the page of the mistakes
    written: list[str]  # names of the files in `out`
    class_names: dict[str, ClassName] | None = optional()  # that people use, by label


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

    def summary(self, classes: Sequence[str]) -> Summary:
        """The measurements over all images; `classes` are the names of the labels."""
        right, count = (y.bincount(minlength=len(classes)) for y in (self.labels[self.right], self.labels))
        of_classes = right[count > 0] / count[count > 0]
        total = int(count.sum())
        return Summary(
            count=total,
            correct=int(right.sum()),
            top1=int(right.sum()) / total,
            correct_top5=self.correct_top5,
            top5=self.correct_top5 / total,
            per_class_mean=float(of_classes.mean()),
            per_class_std=float(of_classes.std(correction=0)),
            per_class={c: [int(r), int(n)] for c, r, n in zip(classes, right, count, strict=True)},
            ece=calibration_error(self.confidences, self.right),
            aurc=risk_coverage(self.confidences, self.right).area,
            second_pass_share=float(self.second_pass.float().mean()) if self.second_pass is not None else None,
            images_per_second=round(total / self.seconds, 2),
        )


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
    """Run a model over a split; every image of a sharded loader counts once.

    Args:
        model: logits (B, C) in its output.
        loader: batches of images (B, 3, H, W) and labels (B,).
        num_classes: C.
        accelerator: gathers what the processes found.
        flip: average the logits of each image and of its mirror image.
        temperature: divides the logits before the softmax that confidences are.
        taxonomy: coarser levels of the classes; None: the classes alone.

    Raises:
        DataError: naming the first image whose answer is no number.
    """
    model.eval()
    taxonomy = taxonomy or flat(range(num_classes))
    start = time.perf_counter()
    columns: list[list[Tensor]] = []
    answered: list[Tensor] = []
    truth: deque[Tensor] = deque()  # of the batches whose answers are to come; their images are not kept

    def batches() -> Iterator[Tensor]:
        for images, labels in read(loader):
            truth.append(labels)
            yield images

    with accelerator.autocast():
        for output in answers(model, batches(), flip):
            unsure = output.needs_second_pass
            own = (output.logits.float(), truth.popleft(), *([] if unsure is None else [unsure]))
            logits, labels, *again = (t.cpu() for t in accelerator.gather(own))
            answered.append(are_answers(logits, temperature))
            probabilities = (logits / temperature).softmax(dim=1)
            best = probabilities.max(dim=1)
            true = probabilities.gather(1, labels[:, None])[:, 0]
            in_top5 = (logits.topk(min(5, num_classes)).indices == labels[:, None]).any(dim=1)
            columns.append([in_top5, labels, best.indices, best.values, true, *taxonomy.best(probabilities), *again])
    dataset: Any = getattr(loader, "dataset", ())
    count = len(dataset) or None  # processes fill up their last batches with the first images
    real = torch.cat(answered)[:count]
    if wrong := (~real).nonzero()[:, 0].tolist():
        first = getattr(dataset, "images", {wrong[0]: f"image {wrong[0]}"})[wrong[0]]
        raise DataError(f"{first}: {NO_ANSWER}; so for {len(wrong)} of {len(real)} images")
    in_top5, *told = (torch.cat(column)[:count] for column in zip(*columns, strict=True))
    found: list[Any] = [int(in_top5.sum()), *told[:4], time.perf_counter() - start, *told[4:]]
    return Evaluation(*found)


def read_split(
    model: Model, data: str | Path, split: str, boxed: Boxed | None = None
) -> tuple[ImageList, dict[str, ImageList]]:
    """The images of a split as the run that trained a model saw it, val held out of train.

    Args:
        model: with the splits of its run in its config.
        data: a folder, list, shards or Hugging Face data.
        split: its name, or all.
        boxed: the boxes that are examples, where images are not.

    Returns:
        The images of the split, and all splits by name.

    Raises:
        DataError: as `take_split` does, or where the classes are not those of the model.
    """
    named, labels = model.config.label_names, labels_of(model)
    splits = read_splits(data, model.config.data, named, boxed)
    images = take_split(splits, split, data)
    if named is None and len(images.classes) != len(labels):
        raise DataError(f"{data} has {len(images.classes)} classes, the model {len(labels)} without names")
    return images, splits


def evaluate_bundle(
    source: str | Path,
    data: str | Path,
    *,
    dataset: str | None = None,
    split: str = "test",
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    errors: str | Path | None = None,
    flip: bool = False,
    reject: bool = False,
    taxonomy: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    **boxed: Unpack[Boxed],
) -> BundleEvaluation:
    """Measure a model on one split of a data set.

    Args:
        source: what `glsim.load` takes.
        data: what `glsim.data.readers:read_data` takes; with `dataset` prepared as that named data set.
        split: train, val, test, or all.
        options: options of the method to change.
        out: folder for evaluation.json, predictions.csv, confusion.csv and plots.
        errors: folder for the page of the mistakes.
        flip: average the logits of each image and its mirror image.
        reject: also measure the answers at or above the threshold of the bundle.
        taxonomy: CSV file of `glsim.data.hierarchy:read_taxonomy`; every level is measured.
        skip_bad: leave unreadable images out; they are listed in `skipped`.
        max_megapixels: larger images are bad files.
        boxed: see `glsim.data.box_options:Boxed`.

    Raises:
        ConfigError: for an option that does not fit, or a bundle without the threshold that `reject` needs.
        DataError: for data or a split that is not there, other classes than the model's, unreadable images.
    """
    for made in (out, errors):
        if made is not None:
            make_folder(made)  # first, for a folder that cannot be made must not come late
    with pixel_limit(max_megapixels):
        model = load(source, **options or {})
        threshold = threshold_of(model) if reject else None
        place = prepared(data, dataset)
        images, splits = read_split(model, place, split, boxed)
        labels = list(images.classes)  # an unnamed model's classes are taken to be in the order of the data's
        groups = read_taxonomy(taxonomy, labels) if taxonomy is not None else flat(labels)
        if bad := find_bad(images.paths) if skip_bad else []:
            images = drop_bad(images, bad)
        accelerator = make_accelerator(device)
        loader: Any = make_loader(images, eval_transform(preprocessing_of(model)), batch_size, workers)
        model, temperature = model.to(accelerator.device), temperature_of(model)
        loader = accelerator.prepare(loader)
        measured = evaluate(model, loader, len(labels), accelerator, flip, temperature, groups)
        result = BundleEvaluation(
            **vars(measured.summary(labels)),
            source=str(source),
            data=str(data),
            split=split,
            flip=flip,
            split_drawn=split != "all" and images.drawn,
            split_hash=split_hash({split: images}, place),
            temperature=temperature,
            risk_coverage=risk_coverage(measured.confidences, measured.right).points(),
            answered=sure_answers(measured, groups, threshold) if threshold is not None else None,
            levels=by_level(measured, groups) if taxonomy is not None else None,
            confused=most_confused(measured, labels),
            skipped=[str(b) for b in bad],
            errors=str(Path(errors) / PAGE) if errors is not None else None,
            written=[] if out is None else list(FILES) if len(labels) <= MOST_CLASSES_DRAWN else list(FILES[:-1]),
            class_names=names_of(model) or None,
        )
        if errors is not None and accelerator.is_main_process:
            numbers = (t.tolist() for t in (measured.predictions, measured.confidences, measured.true_confidences))
            write_page(Path(errors), model, find_mistakes(images, *numbers), labels, splits.get("train"), result)
    if out is not None and accelerator.is_main_process:
        write_evaluation(Path(out), result, measured, images)
    return result


def write_evaluation(folder: Path, result: BundleEvaluation, measured: Evaluation, images: ImageList) -> None:
    """Write those of FILES that `result` names."""
    labels, threshold = list(images.classes), result.answered.threshold if result.answered else None
    write_json(folder / "evaluation.json", document(result))
    write_text(folder / "predictions.csv", predictions_table(images, measured))
    write_text(folder / "confusion.csv", confusion_table(measured, labels))
    bins = reliability(measured.confidences, measured.right)
    curve = risk_coverage(measured.confidences, measured.right)
    draw_confidence(bins, curve, result.ece, threshold, folder / "confidence.png")
    if "confusion.png" in result.written:
        confusion = multiclass_confusion_matrix(measured.predictions, measured.labels, len(labels))
        draw_confusion(confusion, labels, folder / "confusion.png")


def by_level(result: Evaluation, taxonomy: Taxonomy) -> list[LevelAccuracy]:
    """How often the likeliest group of each level is the right one, from fine to coarse."""
    right = (result.groups == taxonomy.truth(result.labels)).sum(dim=0).tolist()
    rows = zip(taxonomy.levels, taxonomy.groups, right, strict=True)
    total = len(result.labels)
    return [LevelAccuracy(level, len(names), n, n / total) for level, names, n in rows]


def sure_answers(result: Evaluation, taxonomy: Taxonomy, threshold: float) -> SureAnswers:
    """What is answered at or above `threshold`, and how much of it is wrong, in all and by the level that answers."""
    levels = decide(result.group_confidences, threshold)
    right = result.groups == taxonomy.truth(result.labels)

    def counted(given: Tensor, correct: Tensor, level: str | None = None) -> Answered:
        count, good = int(given.sum()), int(correct[given].sum())
        return Answered(count, count / len(levels), good, (count - good) / count if count else None, level)

    by_level = [counted(levels == i, right[:, i], name) for i, name in enumerate(taxonomy.levels)]
    chosen = counted(levels >= 0, right.gather(1, levels.clamp(min=0)[:, None])[:, 0])
    return SureAnswers(**vars(chosen), threshold=threshold, levels=by_level)


def most_confused(result: Evaluation, labels: Sequence[str]) -> list[Confusion]:
    """The classes most often taken for another one, worst first, at most MOST_CONFUSED."""
    images = result.labels.bincount().tolist()
    wrong = [row for row in result.confusions().tolist() if row[0] != row[1]]
    worst = sorted(wrong, key=lambda row: -row[2])[:MOST_CONFUSED]
    return [Confusion(labels[y], labels[x], n, images[y]) for y, x, n in worst]


def confusion_table(result: Evaluation, labels: Sequence[str]) -> str:
    """The confusion matrix as CSV: one line for each pair of label and prediction that occurs."""
    rows = [[labels[y], labels[x], n] for y, x, n in result.confusions().tolist()]
    return csv_text([["label", "prediction", "count"], *rows])


def predictions_table(images: ImageList, result: Evaluation, root: str | Path | None = None) -> str:
    """One line an image, by `csv_text`.

    Args:
        images: in the order of the result.
        result: what `evaluate` found.
        root: folder, or list in one, that paths count from; None: as they were given.
    """
    labels = images.classes
    if root is not None:
        root = located(root)
        root = root.parent if root.is_file() else root
    paths = [path if root is None else Path(os.path.relpath(path, root)).as_posix() for path in images.paths]
    columns = images.labels, result.predictions.tolist(), result.confidences.tolist()
    rows = [(path, labels[y], labels[x], f"{p:.6f}") for path, y, x, p in zip(paths, *columns, strict=True)]
    return csv_text([("path", "label", "prediction", "confidence"), *rows])
