"""Index of known images: classes without training, by the nearest images and by prototypes of the classes.

The index of one model holds a vector of each image (`index_storage`). Images are added to it without training; an image
is answered by its nearest neighbours (`index_search`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from glsim.checkpoints.bundle import digest, load
from glsim.data.catalog import prepared
from glsim.data.image_files import find_images
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.names import clean_label
from glsim.data.readers import ImageList
from glsim.data.splits import read_splits, take_split
from glsim.files import printable, shorten
from glsim.inference.index_search import encode, nearest, need_faiss, prototypes, vote
from glsim.inference.index_storage import TABLE, Index, read_index
from glsim.inference.predictor import Predictor, without_early_exit
from glsim.models.base import Model
from glsim.types import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class IndexSize:
    """What `build_index` returns: what the index holds now."""

    index: str
    images: int
    classes: int
    embedding: str  # which of the model's vectors
    skipped: list[str]  # files that cannot be read, and why


@dataclass(frozen=True, kw_only=True)
class IndexAddition(IndexSize):
    """What `add_to_index` returns."""

    added: int
    there_before: int  # images given that were in the index already
    new_classes: list[str]
    images_of: dict[str, int]  # images that each class given has now


@dataclass(frozen=True)
class ClassSimilarity:
    """A class, and the similarity of an image to its prototype."""

    label: str
    similarity: float


@dataclass(frozen=True)
class Neighbour:
    """An image of the index, and the similarity of another one to it."""

    path: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Vote:
    """What the neighbours say together."""

    label: str
    share: float  # of the votes, which are weighted by similarity


@dataclass(frozen=True)
class HeadAnswer:
    """What the softmax head says, which knows the classes of its training only."""

    label: str
    probability: float


@dataclass(frozen=True)
class IndexAnswer:
    """What an index says of an image."""

    path: str
    label: str | None  # the class of the nearest prototype; None: unknown
    classes: list[ClassSimilarity]  # best first
    vote: Vote
    neighbours: list[Neighbour]  # nearest first
    head: HeadAnswer


@dataclass(frozen=True)
class IndexAnswers:
    """What `query_index` returns."""

    index: str
    embedding: str
    answers: list[IndexAnswer]
    skipped: list[str]  # files that cannot be read, and why


def build_index(
    source: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    split: str = "train",
    embedding: str | None = None,
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
) -> IndexSize:
    """Make an index of the images of one split of a data set.

    Args:
        source: what `glsim.load` takes; the index remembers it.
        data: what `glsim.data.readers:read_data` takes; with `dataset` prepared as that named data set.
        out: folder to make.
        split: train, val or test.
        embedding: which of the model's vectors (`glsim.types:EMBEDDINGS`); by default what the head reads.
        skip_bad: leave unreadable images out; they are listed in `skipped`.
        max_megapixels: larger images are bad files.
        progress: draw a progress bar.

    Raises:
        ConfigError: without faiss, for an `out` that holds an index, or an embedding that the model does not have.
        DataError: for data or a split that is not there, and BadImage for an image that cannot be read.
    """
    need_faiss()
    if (Path(out) / TABLE).exists():
        raise ConfigError(f"{out} already holds an index; add to it with glsim index add, or name another --out")
    with pixel_limit(max_megapixels):
        model = load(source)
        images = find_split(model, data, dataset, split)
        index = start_index(model, source, out, embedding)
        predictor = Predictor(model, 1, batch_size, workers, device, embedding=index.embedding)
        encoded = encode(predictor, images.paths, index.embedding, skip_bad, progress)
    names = [images.classes[images.labels[i]] for i in encoded.places]
    index = index.add(names, [str(images.paths[i].absolute()) for i in encoded.places], encoded.vectors)
    index.save(out)
    return IndexSize(
        index=str(out),
        images=len(index.paths),
        classes=len(index.classes),
        embedding=index.embedding,
        skipped=encoded.skipped,
    )


def add_to_index(
    index: str | Path,
    images: Sequence[str],
    *,
    label: str | None = None,
    source: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
) -> IndexAddition:
    """Add images to an index, of a new class or a known one. An image that is there already stays as it is.

    Args:
        index: folder of an index.
        images: files, folders or globs.
        label: class of all these images; by default of each the name of its folder.
        source: the model, where it is no longer where it was.

    The others, and what is raised, are those of `build_index`; GlsimError where somebody else changed the index
    meanwhile.
    """
    with pixel_limit(max_megapixels):
        stored, predictor = open_index(index, source, batch_size, workers, device)
        paths = find_images(images)
        encoded = encode(predictor, paths, stored.embedding, skip_bad, progress)
    kept = [paths[i].absolute() for i in encoded.places]
    names = [label if label is not None else path.parent.name for path in kept]
    larger = stored.add(names, [str(path) for path in kept], encoded.vectors)
    larger.save(index)
    counts = np.bincount(larger.labels, minlength=len(larger.classes))
    spelt = {clean_label(name): i for i, name in enumerate(larger.classes)}
    places = dict.fromkeys(spelt[clean_label(name)] for name in names)
    added = len(larger.paths) - len(stored.paths)
    return IndexAddition(
        index=str(index),
        images=len(larger.paths),
        classes=len(larger.classes),
        embedding=larger.embedding,
        added=added,
        there_before=len(kept) - added,
        new_classes=list(larger.classes[len(stored.classes) :]),
        images_of={larger.classes[i]: int(counts[i]) for i in places},
        skipped=encoded.skipped,
    )


def query_index(
    index: str | Path,
    images: Sequence[str],
    *,
    top_k: int = 5,
    neighbours: int = 5,
    below: float = -1.0,
    source: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    device: str | None = None,
    progress: bool = False,
) -> IndexAnswers:
    """Answer images by an index: the classes by their prototypes, the nearest images, their vote, and the head.

    Args:
        index: folder of an index.
        images: files, folders or globs.
        top_k: classes an image.
        neighbours: nearest images that vote, and are returned.
        below: similarity of the best class below which an image is unknown; a cosine.
        source: the model, where it is no longer where it was.

    The others, and what is raised, are those of `build_index`.
    """
    with pixel_limit(max_megapixels):
        stored, predictor = open_index(index, source, batch_size, workers, device)
        paths = find_images(images)
        encoded = encode(predictor, paths, stored.embedding, skip_bad, progress)
    means, classes = prototypes(stored.vectors, stored.labels)
    class_similarities, class_rows = nearest(means, encoded.vectors, top_k)
    similarities, rows = nearest(stored.vectors, encoded.vectors, neighbours)
    winners, shares = vote(similarities, stored.labels[rows])
    answers = []
    for i, place in enumerate(encoded.places):
        ranked = [
            ClassSimilarity(stored.classes[classes[row]], float(x))
            for row, x in zip(class_rows[i], class_similarities[i], strict=True)
        ]
        near = [
            Neighbour(stored.paths[row], stored.classes[stored.labels[row]], float(x))
            for row, x in zip(rows[i], similarities[i], strict=True)
        ]
        answers.append(
            IndexAnswer(
                path=str(paths[place]),
                label=ranked[0].label if class_similarities[i, 0] >= below else None,
                classes=ranked,
                vote=Vote(stored.classes[winners[i]], float(shares[i])),
                neighbours=near,
                head=HeadAnswer(predictor.labels[encoded.guesses[i]], float(encoded.confidences[i])),
            )
        )
    return IndexAnswers(str(index), stored.embedding, answers, encoded.skipped)


def open_index(
    folder: str | Path, source: str | Path | None, batch_size: int, workers: int, device: str | None
) -> tuple[Index, Predictor]:
    """An index and the model it was made with; ConfigError when the model found is another one."""
    need_faiss()
    index = read_index(folder)
    beside = Path(folder) / index.source
    if source is None and not beside.exists():  # what a file names is not fetched unless somebody asks for it
        if ":" in index.source:
            told = printable(shorten(index.source, 200))
            raise DataError(
                f"{folder}: its model is {told}, and nothing is fetched because a file says so; ask for it with "
                f"--source {told}"
            )
        raise DataError(f"{folder}: its model is no longer at {printable(beside)}; say where it is with --source")
    model = load(source if source is not None else beside)
    if digest(model.state_dict()) != index.weights:
        raise ConfigError(
            f"{folder} was made with another model than {source or beside}: vectors of two models cannot be compared; "
            "name its own model with --source, or make an index of this one with glsim index build"
        )
    width = widths(model, index.embedding).get(index.embedding)
    if width != index.vectors.shape[1]:
        raise DataError(
            f"{folder} is damaged: its vectors have {index.vectors.shape[1]} numbers, those of its model "
            f"({index.embedding}) {width}; build the index again"
        )
    return index, Predictor(model, 1, batch_size, workers, device, embedding=index.embedding)


@torch.inference_mode()
def widths(model: Model, embedding: str) -> dict[str, int]:
    """How many numbers each embedding has that `model` gives where `embedding` is asked for."""
    height, width = model.config.image_size
    blank = torch.zeros(1, 3, height, width, device=next(model.parameters()).device)
    told = without_early_exit(model, embedding)(blank).embeddings
    return {name: vectors.shape[1] for name, vectors in told.items()}


def start_index(model: Model, source: str | Path, folder: str | Path, embedding: str | None) -> Index:
    """An empty index for `model`, by default of what its head reads. `source` is remembered relative to `folder`."""
    remembered = str(source)
    if Path(source).exists():
        remembered = Path(os.path.relpath(source, folder)).as_posix()
    weights = digest(model.state_dict())
    told = widths(model, embedding or "fused")
    name = embedding or ("fused" if "fused" in told else "global")
    if name not in told:
        raise ConfigError(f"{model.config.method} has no embedding {name!r}; it has: {', '.join(told) or 'none'}")
    return Index(name, weights, remembered, (), np.empty(0, np.int64), (), np.empty((0, told[name]), np.float32))


def find_split(model: Model, data: str | Path, dataset: str | None, split: str) -> ImageList:
    """The images of `split`, of any classes; DataError when there is no such split, or none in it."""
    return take_split(read_splits(prepared(data, dataset), model.config.data), split, data)
