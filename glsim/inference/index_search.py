"""Vectors of images, and search among them: nearest images, class prototypes, votes of neighbours.

Vectors have unit length: similarity is the cosine. faiss searches them, exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from glsim.data.images import BadImage
from glsim.inference.index_storage import Floats, Ints
from glsim.inference.predictor import Predictor, embedding_of
from glsim.models.heads import NO_ANSWER, are_answers
from glsim.types import ConfigError, DataError

TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al., arXiv 1805.01978, section 3.4)


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
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"none of the {len(paths)} images can be read{first}")
    all_vectors, guesses, confidences, energies = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Encoded(places, unit(all_vectors), guesses, confidences, energies, skipped)
