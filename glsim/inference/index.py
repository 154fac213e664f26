"""An index of known images as vectors: classes without training, by neighbours and prototypes.

An index is a folder: `index.json` (classes, images, the hash of the model's weights) names the `vectors-*.safetensors`
that belongs to it and is replaced last, so that an interrupted change leaves the older state. Vectors have unit length:
similarity is the cosine. faiss searches them, exactly.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from glsim.checkpoints.bundle import digest, load
from glsim.checkpoints.config import COUNT, LABELS, TEXT, Kind, check_kinds, whole
from glsim.config import IndexAdd, IndexBuild, IndexEval, IndexQuery
from glsim.data.catalog import prepared
from glsim.data.image_files import find_images
from glsim.data.images import BadImage
from glsim.data.limits import limited
from glsim.data.names import clean_label
from glsim.data.readers import ImageList
from glsim.evaluation.confidence import NO_ANSWER, are_answers
from glsim.evaluation.evaluate import read_splits, take_split
from glsim.files import (
    make_folder,
    one_line,
    printable,
    read_bytes,
    read_json,
    shorten,
    to_json,
    write_bytes,
    write_text,
)
from glsim.inference.predictor import Predictor, embedding_of, giving
from glsim.models.backbone import Model
from glsim.types import EMBEDDINGS, ConfigError, DataError, GlsimError

FORMAT = 1
TABLE, VECTORS, LOCK = "index.json", "vectors", ".lock"
RECALLS = (1, 5, 10)
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al., arXiv 1805.01978, section 3.4)
DRAWS = 5  # times the images of a new class are drawn anew, for the mean and the deviation of an accuracy
KEPT = 0.95  # share of images of known classes that the proposed threshold lets pass


def _is_image(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and TEXT.holds(value[0]) and COUNT.holds(value[1])


KEYS = {  # of `index.json`
    "format": whole(1),
    "embedding": Kind(f"one of {', '.join(EMBEDDINGS)}", lambda v: isinstance(v, str) and v in EMBEDDINGS),
    "weights": TEXT,
    "source": TEXT,
    "vectors": TEXT,
    "classes": LABELS,
    "images": Kind(
        "a list of [path, number of the class]", lambda v: isinstance(v, list) and bool(v) and all(map(_is_image, v))
    ),
}

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Index:
    """Vectors of images whose classes are known."""

    embedding: str  # which of the model's vectors
    weights: str  # hash of the model's weights
    source: str  # the model; a folder relative to the index, or what `load` takes
    classes: tuple[str, ...]
    labels: Ints  # (n,) indices into `classes`
    paths: tuple[str, ...]  # n, absolute
    vectors: Floats  # (n, D), unit length
    stored: str | None = None  # the vectors file it was read from

    def add(self, names: Sequence[str], paths: Sequence[str], vectors: Floats) -> Index:
        """With more images: class name, path and vector of each. An image that is there already stays as it is. Names
        are compared as `clean_label` makes them, and new ones stored so.

        Raises DataError for one that is there with another class.
        """
        spelt = {clean_label(name): name for name in self.classes}
        names = [spelt.get(clean_label(name), clean_label(name)) for name in names]
        known = dict(zip(self.paths, self.labels, strict=True))
        new: dict[str, int] = {}  # path -> place among those given
        for place, (name, path) in enumerate(zip(names, paths, strict=True)):
            old = self.classes[known[path]] if path in known else names[new[path]] if path in new else None
            if old not in (None, name):
                raise DataError(f"{path} is in the index as {old!r} already; it cannot be {name!r} too")
            if old is None:
                new[path] = place
        places = list(new.values())
        classes = tuple(dict.fromkeys((*self.classes, *(names[i] for i in places))))
        number = {name: i for i, name in enumerate(classes)}
        return replace(
            self,
            classes=classes,
            labels=np.concatenate((self.labels, np.array([number[names[i]] for i in places], np.int64))),
            paths=(*self.paths, *new),
            vectors=np.concatenate((self.vectors, vectors[places])),
        )

    def save(self, folder: str | Path) -> None:
        """Write it whole or not at all. Raises GlsimError when somebody else changed the folder since it was read."""
        folder = make_folder(folder)
        data = safetensors.numpy.save({"vectors": np.ascontiguousarray(self.vectors)})
        name = f"{VECTORS}-{hashlib.sha256(data).hexdigest()}.safetensors"
        table = {
            "format": FORMAT,
            "embedding": self.embedding,
            "weights": self.weights,
            "source": self.source,
            "vectors": name,
            "classes": list(self.classes),
            "images": [[path, int(label)] for path, label in zip(self.paths, self.labels, strict=True)],
        }
        file = folder / TABLE
        with FileLock(folder / LOCK):
            if (read_json(file).get("vectors") if file.exists() else None) != self.stored:
                raise GlsimError(f"{folder} was changed by somebody else meanwhile; nothing was written, try again")
            write_bytes(folder / name, data)
            write_text(file, to_json(table) + "\n")
            for old in folder.glob(f"{VECTORS}-*.safetensors"):
                if old.name != name:
                    old.unlink()


def read_index(folder: str | Path) -> Index:
    """The index in `folder`. Raises DataError for one that is missing, damaged or of a later format."""
    folder = Path(folder)
    try:
        table = read_json(folder / TABLE)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is no index: it has no {TABLE}; make one with glsim index build") from None
    missing = [key for key in KEYS if key not in table]
    if missing:
        raise DataError(f"{folder / TABLE} is damaged: it lacks {', '.join(missing)}")
    check_kinds(table, KEYS, folder / TABLE)
    if table["format"] > FORMAT:
        raise DataError(f"{folder} has format {table['format']}, this glsim reads up to {FORMAT}; upgrade glsim")
    name, classes, images = table["vectors"], table["classes"], table["images"]
    paths, labels = ({image[i] for image in images} for i in (0, 1))
    if len(paths) < len(images) or max(labels) >= len(classes):
        raise DataError(
            f"{folder / TABLE} is damaged: {len(images)} images of {len(paths)} paths, {len(classes)} classes, the "
            f"last of an image {max(labels)}"
        )
    if Path(name).name != name:
        raise DataError(f"{folder / TABLE} was refused: its vectors lie outside, in {name!r}")
    try:
        data = read_bytes(folder / name)
        if name != f"{VECTORS}-{hashlib.sha256(data).hexdigest()}.safetensors":
            raise DataError(f"{folder / name} is damaged: its hash is not that of its name")
        vectors = safetensors.numpy.load(data)["vectors"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{folder / name} is damaged or missing: {one_line(error)}") from error
    if vectors.ndim != 2 or vectors.dtype != np.float32 or len(vectors) != len(images):
        raise DataError(f"{folder / name} is damaged: {vectors.dtype} {vectors.shape} for {len(images)} images")
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)  # no square of a float32 is too large for it
    if not (np.isfinite(lengths).all() and lengths.max() < 1.01):  # zeros stay zeros
        raise DataError(f"{folder / name} was refused: not every vector has unit length; build the index again")
    return Index(
        embedding=table["embedding"],
        weights=table["weights"],
        source=table["source"],
        classes=tuple(classes),
        labels=np.array([label for _, label in images], np.int64),
        paths=tuple(path for path, _ in images),
        vectors=vectors,
        stored=name,
    )


# --- searching --------------------------------------------------------------------------------------------------------


def need_faiss() -> Any:
    """The module faiss; ConfigError says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of SWIG's making
            import faiss
    except ImportError as error:
        raise ConfigError(f"glsim index needs the library faiss ({error}): pip install 'glsim[index]'") from error
    return faiss


def unit(vectors: Floats) -> Floats:
    """Rows (n, D) at unit length; rows of zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def nearest(gallery: Floats, queries: Floats, k: int) -> tuple[Floats, Ints]:
    """The `k` rows of `gallery` (n, D) most similar to each of `queries` (q, D): similarities and rows, (q, min(k, n)).

    Raises ConfigError without faiss.
    """
    flat = need_faiss().IndexFlatIP(gallery.shape[1])
    flat.add(np.ascontiguousarray(gallery))
    return flat.search(np.ascontiguousarray(queries), min(k, len(gallery)))


def prototypes(vectors: Floats, labels: Ints) -> tuple[Floats, Ints]:
    """The mean direction of each class that has images: (C, D) at unit length, and which class it is (C,)."""
    there, place = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(there), vectors.shape[1]), np.float32)
    np.add.at(sums, place, vectors)
    return unit(sums), there


def vote(similarities: Floats, labels: Ints) -> tuple[Ints, Floats]:
    """What neighbours (q, k) with those labels (q, k) say together: the class (q,) and its share of the votes (q,)."""
    weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / TEMPERATURE)
    same = labels[:, :, None] == labels[:, None, :]
    shares = (same * weights[:, None, :]).sum(axis=2) / weights.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)[:, None]
    return np.take_along_axis(labels, best, 1)[:, 0], np.take_along_axis(shares, best, 1)[:, 0]


# --- encoding ---------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What a model says of the images that could be read."""

    places: list[int]  # which of the images given
    vectors: Floats  # (n, D), unit length
    guesses: Ints  # (n,) the class of the softmax head
    confidences: Floats  # (n,) its probability
    energies: Floats  # (n,) log of the summed exponentials of the logits; high for what the head knows
    skipped: list[str]  # the bad files and why


def encode(
    predictor: Predictor, paths: Sequence[str | Path], embedding: str, skip_bad: bool = False, progress: bool = False
) -> Encoded:
    """Vectors and answers of images. Raises BadImage for one that cannot be read, unless `skip_bad`."""
    places: list[int] = []
    skipped: list[str] = []
    parts: list[tuple[Any, ...]] = []
    seen = 0
    with tqdm(total=len(paths), unit="image", disable=not progress) as bar:
        for output, items in predictor.outputs(paths):
            vectors = None
            if output is not None:
                vectors = embedding_of(output, embedding)
                real = are_answers(output.logits) & vectors.isfinite().all(dim=1)
                told = iter(real.tolist())
                items = [
                    item if isinstance(item, BadImage) or next(told) else BadImage(path, NO_ANSWER)
                    for item, path in zip(items, paths[seen:], strict=False)
                ]
            bad = [item for item in items if isinstance(item, BadImage)]
            if bad and not skip_bad:
                raise bad[0]
            skipped += map(str, bad)
            places += [seen + i for i, item in enumerate(items) if not isinstance(item, BadImage)]
            seen += len(items)
            bar.update(len(items))
            if output is not None and vectors is not None:
                logits = output.logits.float()[real]
                best = logits.softmax(dim=1).max(dim=1)
                tensors = (vectors[real], best.indices, best.values, logits.logsumexp(dim=1))
                parts.append(tuple(t.cpu().numpy() for t in tensors))
    if not places:
        raise DataError(f"none of the {len(paths)} images can be read" + f"; the first: {skipped[0]}" * bool(skipped))
    all_vectors, guesses, confidences, energies = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Encoded(places, unit(all_vectors), guesses, confidences, energies, skipped)


def open_index(
    folder: str, source: str | None, batch_size: int, workers: int, device: str | None
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
    height, width = model.config["image_size"]
    blank = torch.zeros(1, 3, height, width, device=next(model.parameters()).device)
    told = giving(model, embedding)(blank).aux.get("embeddings", {})
    return {name: vectors.shape[1] for name, vectors in told.items()}


def start_index(model: Model, source: str, folder: str | Path, embedding: str | None) -> Index:
    """An empty index for `model`, by default of what its head reads. `source` is remembered relative to `folder`."""
    if Path(source).exists():
        source = Path(os.path.relpath(source, folder)).as_posix()
    weights = digest(model.state_dict())
    told = widths(model, embedding or "fused")
    name = embedding or ("fused" if "fused" in told else "global")
    if name not in told:
        raise ConfigError(f"{model.config['method']} has no embedding {name!r}; it has: {', '.join(told) or 'none'}")
    return Index(name, weights, source, (), np.empty(0, np.int64), (), np.empty((0, told[name]), np.float32))


# --- verbs ------------------------------------------------------------------------------------------------------------


@limited
def build(s: IndexBuild, progress: bool = True) -> dict[str, Any]:
    """The verb: the images of one split of a data set become an index."""
    need_faiss()
    if (Path(s.out) / TABLE).exists():
        raise ConfigError(f"{s.out} already holds an index; add to it with glsim index add, or name another --out")
    model = load(s.source)
    images = find_split(model, s)
    index = start_index(model, s.source, s.out, s.embedding)
    predictor = Predictor(model, 1, s.batch_size, s.workers, s.device, embedding=index.embedding)
    encoded = encode(predictor, images.paths, index.embedding, s.skip_bad, progress)
    names = [images.classes[images.labels[i]] for i in encoded.places]
    index = index.add(names, [str(images.paths[i].absolute()) for i in encoded.places], encoded.vectors)
    index.save(s.out)
    return {"index": s.out, **describe(index), "skipped": encoded.skipped}


@limited
def add(s: IndexAdd, progress: bool = True) -> dict[str, Any]:
    """The verb: more images, of a new class or a known one."""
    index, predictor = open_index(s.index, s.source, s.batch_size, s.workers, s.device)
    paths = find_images(s.images)
    encoded = encode(predictor, paths, index.embedding, s.skip_bad, progress)
    kept = [paths[i].absolute() for i in encoded.places]
    names = [s.label if s.label is not None else path.parent.name for path in kept]
    larger = index.add(names, [str(path) for path in kept], encoded.vectors)
    larger.save(s.index)
    counts = np.bincount(larger.labels, minlength=len(larger.classes))
    spelt = {clean_label(name): i for i, name in enumerate(larger.classes)}
    places = dict.fromkeys(spelt[clean_label(name)] for name in names)
    added = {larger.classes[i]: int(counts[i]) for i in places}
    return {
        "index": s.index,
        **describe(larger),
        "added": len(larger.paths) - len(index.paths),
        "there_before": len(kept) - (len(larger.paths) - len(index.paths)),
        "new_classes": list(larger.classes[len(index.classes) :]),
        "images_of": added,
        "skipped": encoded.skipped,
    }


@limited
def query(s: IndexQuery, progress: bool = True) -> dict[str, Any]:
    """The verb: for each image the classes by their prototypes, the neighbours, their vote, and the head's answer."""
    index, predictor = open_index(s.index, s.source, s.batch_size, s.workers, s.device)
    paths = find_images(s.images)
    encoded = encode(predictor, paths, index.embedding, s.skip_bad, progress)
    means, classes = prototypes(index.vectors, index.labels)
    class_similarities, class_rows = nearest(means, encoded.vectors, s.top_k)
    similarities, rows = nearest(index.vectors, encoded.vectors, s.neighbours)
    winners, shares = vote(similarities, index.labels[rows])
    answers = []
    for i, place in enumerate(encoded.places):
        known = class_similarities[i, 0] >= s.below
        ranked = [
            {"label": index.classes[classes[row]], "similarity": float(x)}
            for row, x in zip(class_rows[i], class_similarities[i], strict=True)
        ]
        near = [
            {"path": index.paths[row], "label": index.classes[index.labels[row]], "similarity": float(x)}
            for row, x in zip(rows[i], similarities[i], strict=True)
        ]
        answers.append(
            {
                "path": str(paths[place]),
                "label": ranked[0]["label"] if known else None,  # None: unknown
                "classes": ranked,
                "vote": {"label": index.classes[winners[i]], "share": float(shares[i])},
                "neighbours": near,
                "head": {"label": predictor.labels[encoded.guesses[i]], "probability": float(encoded.confidences[i])},
            }
        )
    return {"index": s.index, "embedding": index.embedding, "answers": answers, "skipped": encoded.skipped}


@limited
def evaluate(s: IndexEval, progress: bool = True) -> dict[str, Any]:
    """The verb: recall, accuracy beside the softmax head, how well the unknown is told, and classes added in steps.

    Images whose class is not in the index count as unknown. Classes of the index that the head does not know are the
    added ones.
    """
    index, predictor = open_index(s.index, s.source, s.batch_size, s.workers, s.device)
    images = find_split(predictor.model, s)
    inside = {str(path.absolute()) for path in images.paths} & set(index.paths)
    if inside:
        raise DataError(f"{len(inside)} of the {len(images)} images are in the index themselves, as {min(inside)}")
    encoded = encode(predictor, images.paths, index.embedding, s.skip_bad, progress)
    number = {name: i for i, name in enumerate(index.classes)}
    names = [images.classes[images.labels[i]] for i in encoded.places]
    truth = np.array([number.get(name, -1) for name in names], np.int64)
    known = truth >= 0
    if not known.any():
        raise DataError(f"{s.data}: no image of a class of the index, {', '.join(index.classes[:5])}, ..")
    queries, y = encoded.vectors[known], truth[known]
    head = np.array([number.get(label, -1) for label in predictor.labels], np.int64)
    guesses = head[encoded.guesses[known]]

    right = index.labels[nearest(index.vectors, queries, max(RECALLS))[1]] == y[:, None]
    rest = np.setdiff1d(np.arange(len(index.classes)), head)
    return {
        "index": s.index,
        "data": s.data,
        "split": s.split,
        **describe(index),
        "count": len(y),
        "recall": {str(k): float(right[:, :k].any(axis=1).mean()) for k in RECALLS},
        **accuracies(index.vectors, index.labels, queries, y, guesses, s.neighbours, rest),
        "unknown": tell_unknown(index, encoded, known),
        "added": add_in_steps(index, queries, y, guesses, rest, s),
        "skipped": encoded.skipped,
    }


def find_split(model: Model, s: IndexBuild | IndexEval) -> ImageList:
    """The images asked for, of any classes; DataError when there is no such split, or none in it."""
    return take_split(read_splits(model, prepared(s.data, s.dataset)), s.split, s.data)


def describe(index: Index) -> dict[str, Any]:
    """Size and kind of an index."""
    return {"images": len(index.paths), "classes": len(index.classes), "embedding": index.embedding}


def accuracies(
    vectors: Floats, labels: Ints, queries: Floats, y: Ints, guesses: Ints, k: int, added: Ints
) -> dict[str, dict[str, Any]]:
    """Top-1 of prototypes, of the vote of `k` neighbours and of the head, over all `queries` of classes `y`; of them
    those whose class is among the `added`, and the others. None where there are none."""
    means, classes = prototypes(vectors, labels)
    similarities, rows = nearest(vectors, queries, k)
    answers = {
        "prototypes": classes[nearest(means, queries, 1)[1][:, 0]],
        "neighbours": vote(similarities, labels[rows])[0],
        "head": guesses,
    }
    new = np.isin(y, added)

    def share(hits: NDArray[np.bool_]) -> float | None:
        return float(hits.mean()) if len(hits) else None

    return {
        name: {"top1": share(a == y), "top1_old": share((a == y)[~new]), "top1_added": share((a == y)[new])}
        for name, a in answers.items()
    }


def tell_unknown(index: Index, encoded: Encoded, known: NDArray[np.bool_]) -> dict[str, Any] | None:
    """AUROC of telling unknown images from known ones by three scores; None where there are no unknown ones.

    `threshold` is the prototype similarity that lets `KEPT` of the known images pass, `passed` the share of unknown
    images that pass it too.
    """
    if known.all():
        return None
    means, _ = prototypes(index.vectors, index.labels)
    similarity = nearest(means, encoded.vectors, 1)[0][:, 0]
    threshold = float(np.quantile(similarity[known], 1 - KEPT))
    scores = {"prototypes": similarity, "softmax": encoded.confidences, "energy": encoded.energies}
    return {
        "count": int((~known).sum()),
        "auroc": {name: auroc(score, known) for name, score in scores.items()},
        "threshold": threshold,
        "passed": float((similarity[~known] >= threshold).mean()),
    }


def auroc(scores: Floats, known: NDArray[np.bool_]) -> float:
    """The chance that a known image has a higher score than an unknown one."""
    # Ranks: torchmetrics would put scores outside [0, 1] through a sigmoid, which ends in ties.
    _, ranks = np.unique(scores, return_inverse=True)
    return float(binary_auroc(torch.from_numpy(ranks / max(1, ranks.max())), torch.from_numpy(known).long()))


def add_in_steps(index: Index, queries: Floats, y: Ints, guesses: Ints, added: Ints, s: IndexEval) -> list[dict]:
    """Accuracies with the old classes alone, then with a few images (`s.shots`) of more and more added ones.

    The images of an added class are drawn `DRAWS` times; a class with fewer gives all it has.
    """
    rng = np.random.default_rng(s.seed)
    old = ~np.isin(index.labels, added)
    images = {c: np.flatnonzero(index.labels == c) for c in added}
    stages = [(0, 0)] * bool(old.any())
    counts = dict.fromkeys(round(len(added) * (i + 1) / s.steps) for i in range(s.steps))
    stages += [(shots, count) for shots in s.shots for count in counts if count]
    rows = []
    for shots, count in stages if len(added) else []:
        asked = np.isin(y, index.labels[old]) | np.isin(y, added[:count])
        draws = []
        for _ in range(DRAWS if count else 1):
            chosen = [rng.permutation(images[c])[:shots] for c in added[:count]]
            gallery = np.concatenate((np.flatnonzero(old), *chosen))
            parts = index.vectors[gallery], index.labels[gallery], queries[asked], y[asked], guesses[asked]
            draws.append(accuracies(*parts, s.neighbours, added))
        rows.append({"shots": shots, "added": count, "count": int(asked.sum()), **average(draws)})
    return rows


def average(draws: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean of every number over draws, and the standard deviation of top-1."""

    def mean(values: Iterable[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return float(np.mean(there)) if there else None

    return {
        name: {key: mean(draw[name][key] for draw in draws) for key in first}
        | {"std": float(np.std([draw[name]["top1"] for draw in draws]))}
        for name, first in draws[0].items()
    }
