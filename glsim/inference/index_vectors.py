"""Storage of an index, a folder with vectors of images, their classes and their paths; and exact search among vectors.

`index.json` (classes, images, the hash of the model's weights) names the `vectors-*.safetensors` that belongs to it and
is replaced last, so that an interrupted change leaves the older state. Vectors have unit length: similarity is the
cosine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError

from glsim.checkpoints.config import COUNT, LABELS, TEXT, Kind, check_kinds, whole
from glsim.data.names import clean_label
from glsim.files import make_folder, one_line, read_bytes, read_json, to_json, write_bytes, write_text
from glsim.types import EMBEDDINGS, DataError, GlsimError

FORMAT = 1
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al., arXiv 1805.01978, section 3.4)
QUERIES, ROWS = 1024, 16384  # compared at a time: 64 MiB of similarities
LARGEST_TABLE = 2**30  # bytes of index.json: ten million images
TABLE, VECTORS, LOCK = "index.json", "vectors", ".lock"


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
        label_of = dict(zip(self.paths, (self.classes[label] for label in self.labels), strict=True))
        places = []  # of the new images, among those given
        for place, (given, path) in enumerate(zip(names, paths, strict=True)):
            name = spelt.get(clean_label(given), clean_label(given))
            if path not in label_of:
                label_of[path] = name
                places.append(place)
            elif label_of[path] != name:
                raise DataError(f"{path} is in the index as {label_of[path]!r} already; it cannot be {name!r} too")
        classes = tuple(dict.fromkeys((*self.classes, *label_of.values())))
        number = {name: i for i, name in enumerate(classes)}
        return replace(
            self,
            classes=classes,
            labels=np.array([number[name] for name in label_of.values()], np.int64),
            paths=tuple(label_of),
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
            if (read_json(file, most=LARGEST_TABLE).get("vectors") if file.exists() else None) != self.stored:
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
        table = read_json(folder / TABLE, most=LARGEST_TABLE)
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
    if len({clean_label(label) for label in classes}) < len(classes):
        raise DataError(f"{folder / TABLE} is damaged: two of its classes are one name in two spellings")
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


# --- search -----------------------------------------------------------------------------------------------------------


def unit(vectors: Floats) -> Floats:
    """Rows (n, D) at unit length; rows of zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def nearest(gallery: Floats, queries: Floats, k: int) -> tuple[Floats, Ints]:
    """The `k` rows of `gallery` (n, D) most similar to each of `queries` (q, D): similarities and rows, (q, min(k, n)),
    best first. Exact; the memory it takes beside them does not grow with n or q."""
    rows, found = torch.from_numpy(gallery), []
    for asked in torch.from_numpy(queries).split(QUERIES):
        best, at = asked.new_empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.long)
        for start in range(0, len(rows), ROWS):
            near = asked @ rows[start : start + ROWS].T
            near, here = near.topk(min(k, near.shape[1]))
            best, at = torch.cat((best, near), dim=1), torch.cat((at, here + start), dim=1)
            best, order = best.topk(min(k, best.shape[1]))
            at = at.gather(1, order)
        found.append((best, at))
    similarities, places = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return similarities, places


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
