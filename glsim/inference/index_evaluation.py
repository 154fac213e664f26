"""Evaluation of an index beside the softmax head: recall, accuracies, and how well unknown classes are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc

from glsim.checkpoints.bundle import labels_of
from glsim.data.box_options import take_boxed
from glsim.data.readers import ImageList
from glsim.inference.index import Encoded, IndexSize, encode, find_split, open_index
from glsim.inference.index_vectors import Floats, Index, Ints, nearest, prototypes, vote
from glsim.inference.predictor import Loading
from glsim.models.base import Model
from glsim.types import DataError

RECALLS = (1, 5, 10)
KEPT = 0.95  # share of images of known classes that the proposed threshold lets pass

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 over all images, over those of classes that the head knows, and over those of classes added since."""

    top1: float
    top1_old: float | None  # None where there are no such images
    top1_added: float | None


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Accuracies of three ways to answer."""

    prototypes: Accuracy  # the class of the nearest prototype
    neighbours: Accuracy  # the vote of the nearest images
    head: Accuracy  # the softmax head, which knows no added classes


@dataclass(frozen=True)
class ScoreAuroc:
    """The chance that a known image has a higher score than an unknown one, by three scores."""

    prototypes: float  # similarity of the nearest prototype
    softmax: float  # probability of the head's answer
    energy: float  # log of the summed exponentials of the logits


@dataclass(frozen=True)
class UnknownImages:
    """How well images of classes that are not in the index are told from the others."""

    count: int
    auroc: ScoreAuroc
    threshold: float  # similarity of the nearest prototype that KEPT of the known images reach
    passed: float  # share of the unknown images that reach it too


@dataclass(frozen=True, kw_only=True)
class IndexMeasurements(Accuracies):
    """Measurements of an index on encoded images."""

    count: int  # images whose class is in the index
    recall: dict[str, float]  # share of them with an image of their class among the 1, 5, 10 nearest
    unknown: UnknownImages | None  # None where the class of every image is in the index


@dataclass(frozen=True, kw_only=True)
class IndexEvaluation(IndexMeasurements, IndexSize):
    """What `evaluate_index` returns."""

    data: str
    split: str


class Queries(NamedTuple):
    """Encoded images of a data set, with their classes among those of an index."""

    encoded: Encoded  # n images
    truth: Ints  # (n,) the class in the index; -1: it is not there
    guesses: Ints  # (n,) the class in the index that the head answers; -1: it is not there
    added: Ints  # classes of the index that the head does not know

    @property
    def known(self) -> Bools:
        """Whether the class of each image is in the index (n,)."""
        return self.truth >= 0


def evaluate_index(
    index: str | Path,
    data: str | Path,
    *,
    dataset: str | None = None,
    split: str = "test",
    neighbours: int = 5,
    source: str | Path | None = None,
    **loading: Unpack[Loading],
) -> IndexEvaluation:
    """Measure an index on one split of a data set. Images whose class is not in the index count as unknown.

    Args:
        index: folder of an index.
        data: what `glsim.data.readers:read_data` takes; with `dataset` prepared as that named data set.
        split: train, val or test.
        neighbours: nearest images that vote.
        source: the model, where it is no longer where it was.

    The others are those of `glsim.inference.index:build_index`.

    Raises:
        ConfigError: for another model than that of the index.
        DataError: for data or a split that is not there, images that are in the index themselves, and where no image
            is of a class of the index; BadImage for an image that cannot be read.
    """
    stored, model = open_index(index, source)
    boxed, others = take_boxed(loading)
    images = find_split(model, data, dataset, split, boxed)
    inside = {str(path.absolute()) for path in images.paths} & set(stored.paths)
    if inside:
        raise DataError(f"{len(inside)} of the {len(images)} images are in the index themselves, as {min(inside)}")
    encoded = encode(model, images.paths, stored.embedding, **others)
    queries = match_classes(stored, model, images, encoded)
    if not queries.known.any():
        raise DataError(f"{data}: no image of a class of the index, {', '.join(stored.classes[:5])}, ..")
    measured = vars(measure_index(stored, queries, neighbours))
    return IndexEvaluation.of(index, stored, encoded.skipped, data=str(data), split=split, **measured)


def match_classes(index: Index, model: Model, images: ImageList, encoded: Encoded) -> Queries:
    """The classes of encoded `images`, and those that the head answers, among the classes of `index`, by name."""
    number = {name: i for i, name in enumerate(index.classes)}
    names = [images.classes[images.labels[i]] for i in encoded.places]
    head = np.array([number.get(label, -1) for label in labels_of(model)], np.int64)
    return Queries(
        encoded,
        truth=np.array([number.get(name, -1) for name in names], np.int64),
        guesses=head[encoded.guesses],
        added=np.setdiff1d(np.arange(len(index.classes)), head),
    )


def measure_index(index: Index, queries: Queries, k: int) -> IndexMeasurements:
    """Recall, accuracies by the `k` nearest images, and how well the unknown is told; at least one image is known."""
    known = queries.known
    vectors, y = queries.encoded.vectors[known], queries.truth[known]
    right = index.labels[nearest(index.vectors, vectors, max(RECALLS))[1]] == y[:, None]
    found = accuracies(index.vectors, index.labels, vectors, y, queries.guesses[known], k, queries.added)
    return IndexMeasurements(
        count=len(y),
        recall={str(n): float(right[:, :n].any(axis=1).mean()) for n in RECALLS},
        **vars(found),
        unknown=tell_unknown(index, queries.encoded, known),
    )


def accuracies(
    vectors: Floats, labels: Ints, queries: Floats, y: Ints, guesses: Ints, k: int, added: Ints
) -> Accuracies:
    """Top-1 of prototypes, of the vote of `k` neighbours and of the head, over `queries` (q, D) of classes `y` (q,).

    `vectors` (n, D) and their `labels` (n,) are the index, `guesses` (q,) the head's answers, `added` the classes that
    the head does not know.
    """
    means, classes = prototypes(vectors, labels)
    similarities, rows = nearest(vectors, queries, k)
    new = np.isin(y, added)

    def share(hits: Bools) -> float | None:
        return float(hits.mean()) if len(hits) else None

    def accuracy(answers: Ints) -> Accuracy:
        hits = answers == y
        return Accuracy(float(hits.mean()), share(hits[~new]), share(hits[new]))

    return Accuracies(
        prototypes=accuracy(classes[nearest(means, queries, 1)[1][:, 0]]),
        neighbours=accuracy(vote(similarities, labels[rows])[0]),
        head=accuracy(guesses),
    )


def tell_unknown(index: Index, encoded: Encoded, known: Bools) -> UnknownImages | None:
    """How well unknown images are told from `known` ones (n,) by three scores; None where there are no unknown ones."""
    if known.all():
        return None
    means, _ = prototypes(index.vectors, index.labels)
    similarity = nearest(means, encoded.vectors, 1)[0][:, 0]
    threshold = float(np.quantile(similarity[known], 1 - KEPT))
    return UnknownImages(
        count=int((~known).sum()),
        auroc=ScoreAuroc(auroc(similarity, known), auroc(encoded.confidences, known), auroc(encoded.energies, known)),
        threshold=threshold,
        passed=float((similarity[~known] >= threshold).mean()),
    )


def auroc(scores: Floats, known: Bools) -> float:
    """The chance that a known image has a higher score than an unknown one."""
    # Ranks: torchmetrics would put scores outside [0, 1] through a sigmoid, which ends in ties.
    _, ranks = np.unique(scores, return_inverse=True)
    return float(binary_auroc(torch.from_numpy(ranks / max(1, ranks.max())), torch.from_numpy(known).long()))
