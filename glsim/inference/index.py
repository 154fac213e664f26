"""Index of known images: classes without training, by the nearest images and by prototypes of the classes.

The index of one model holds a vector of each image (`index_vectors`). Images are added to it without training; an image
is answered by its nearest neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import numpy as np

from glsim.checkpoints.bundle import digest, labels_of, load
from glsim.data.box_options import Boxed, take_boxed
from glsim.data.catalog import prepared
from glsim.data.detections import find_examples
from glsim.data.readers import ImageList
from glsim.data.regions import Cut, file_of
from glsim.data.splits import read_splits, take_split
from glsim.files import printable, shorten
from glsim.inference.index_vectors import TABLE, Floats, Index, Ints, nearest, prototypes, read_index, unit, vote
from glsim.inference.predictor import Loading, answer_files, embedding_of, probe, without_early_exit
from glsim.models.base import Model
from glsim.models.heads import are_answers
from glsim.types import ConfigError, DataError, Output


@dataclass(frozen=True, kw_only=True)
class IndexSize:
    """What `build_index` returns: what the index holds now."""

    index: str
    images: int
    classes: int
    embedding: str  # which of the model's vectors
    skipped: list[str]  # files that cannot be read, and why

    @classmethod
    def of(cls, folder: str | Path, index: Index, skipped: list[str], **more: Any) -> Self:
        """That of `index` in `folder`, with what a class below tells more."""
        size: dict[str, Any] = {"images": len(index.paths), "classes": len(index.classes), "embedding": index.embedding}
        return cls(index=str(folder), **size, skipped=skipped, **more)


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


class Encoded(NamedTuple):
    """What a model says of the images that could be read."""

    places: list[int]  # which of the images given
    vectors: Floats  # (n, D), unit length
    guesses: Ints  # (n,) the class of the softmax head
    confidences: Floats  # (n,) its probability
    energies: Floats  # (n,) log of the summed exponentials of the logits; high for what the head knows
    skipped: list[str]  # the bad files and why


def encode(model: Model, paths: Sequence[Path], embedding: str, **loading: Unpack[Loading]) -> Encoded:
    """Vectors and answers of image files. Raises BadImage for one that cannot be read, unless `skip_bad`."""

    def read(output: Output, _: Sequence[Cut]) -> list[tuple[np.ndarray, ...] | None]:
        vectors, logits = embedding_of(output, embedding), output.logits.float()
        best = logits.softmax(dim=1).max(dim=1)
        columns = vectors, best.indices, best.values, logits.logsumexp(dim=1)
        rows = zip(*(column.cpu().numpy().copy() for column in columns), strict=True)
        real = are_answers(logits) & vectors.isfinite().all(dim=1)
        return [row if told else None for row, told in zip(rows, real.tolist(), strict=True)]

    found, skipped = answer_files(model, paths, read, embedding=embedding, **loading)
    if not found:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"none of the {len(paths)} images can be read{first}")
    vectors, guesses, confidences, energies = map(np.stack, zip(*found.values(), strict=True))
    return Encoded(list(found), unit(vectors), guesses, confidences, energies, skipped)


def build_index(
    source: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    split: str = "train",
    embedding: str | None = None,
    **loading: Unpack[Loading],
) -> IndexSize:
    """Make an index of the images of one split of a data set.

    Args:
        source: what `glsim.load` takes; the index remembers it.
        data: what `glsim.data.readers:read_data` takes; with `dataset` prepared as that named data set.
        out: folder to make.
        split: train, val or test.
        embedding: which of the model's vectors (`glsim.types:EMBEDDINGS`); by default what the head reads.
        loading: see `glsim.inference.predictor:Loading`.

    Raises:
        ConfigError: for an `out` that holds an index, or an embedding that the model does not have.
        DataError: for data or a split that is not there, and BadImage for an image that cannot be read.
    """
    if (Path(out) / TABLE).exists():
        raise ConfigError(f"{out} already holds an index; add to it with glsim index add, or name another --out")
    model = load(source)
    boxed, others = take_boxed(loading)
    images = find_split(model, data, dataset, split, boxed)
    names = [images.classes[label] for label in images.labels]
    index, encoded = extend(start_index(model, source, out, embedding), out, model, images.paths, names, **others)
    return IndexSize.of(out, index, encoded.skipped)


def add_to_index(
    index: str | Path,
    images: Sequence[str],
    *,
    label: str | None = None,
    source: str | Path | None = None,
    **loading: Unpack[Loading],
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
    stored, model = open_index(index, source)
    boxed, others = take_boxed(loading)
    paths = find_examples(images, boxed)
    names = [label if label is not None else file_of(path).absolute().parent.name for path in paths]
    larger, encoded = extend(stored, index, model, paths, names, **others)
    number = dict(zip(larger.paths, larger.labels.tolist(), strict=True))
    places = dict.fromkeys(number[str(paths[i].absolute())] for i in encoded.places)
    added = len(larger.paths) - len(stored.paths)
    return IndexAddition.of(
        index,
        larger,
        encoded.skipped,
        added=added,
        there_before=len(encoded.places) - added,
        new_classes=list(larger.classes[len(stored.classes) :]),
        images_of={larger.classes[i]: int((larger.labels == i).sum()) for i in places},
    )


def extend(
    index: Index,
    folder: str | Path,
    model: Model,
    paths: Sequence[Path],
    names: Sequence[str],
    **loading: Unpack[Loading],
) -> tuple[Index, Encoded]:
    """`index` with images of the classes `names`, also saved in `folder`; and what the model says of them."""
    encoded = encode(model, paths, index.embedding, **loading)
    absolute = [str(paths[i].absolute()) for i in encoded.places]
    larger = index.add([names[i] for i in encoded.places], absolute, encoded.vectors)
    larger.save(folder)
    return larger, encoded


def query_index(
    index: str | Path,
    images: Sequence[str],
    *,
    top_k: int = 5,
    neighbours: int = 5,
    below: float = -1.0,
    source: str | Path | None = None,
    **loading: Unpack[Loading],
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
    stored, model = open_index(index, source)
    boxed, others = take_boxed(loading)
    paths = find_examples(images, boxed)
    encoded, labels = encode(model, paths, stored.embedding, **others), labels_of(model)
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
                head=HeadAnswer(labels[encoded.guesses[i]], float(encoded.confidences[i])),
            )
        )
    return IndexAnswers(str(index), stored.embedding, answers, encoded.skipped)


def open_index(folder: str | Path, source: str | Path | None = None) -> tuple[Index, Model]:
    """An index and the model it was made with; ConfigError when the model found is another one."""
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
    return index, model


def widths(model: Model, embedding: str) -> dict[str, int]:
    """How many numbers each embedding has that `model` gives where `embedding` is asked for."""
    told = probe(without_early_exit(model, embedding)).embeddings
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


def find_split(
    model: Model, data: str | Path, dataset: str | None, split: str, boxed: Boxed | None = None
) -> ImageList:
    """The images of `split`, of any classes; DataError when there is no such split, or none in it."""
    return take_split(read_splits(prepared(data, dataset), model.config.data, boxed=boxed), split, data)
