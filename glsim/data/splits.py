"""Splits of a data set as a training run saw them, taken, joined, and freed of unreadable images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from glsim.data.box_options import Boxed
from glsim.data.boxed import read_boxed
from glsim.data.images import BadImage
from glsim.data.readers import ImageList, hold_out_val
from glsim.types import DataError


def read_splits(
    data: str | Path,
    seen: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    boxed: Boxed | None = None,
) -> dict[str, ImageList]:
    """All splits of a data set as a training run saw them, val held out of train.

    Args:
        data: what `glsim.data.readers:read_data` takes.
        seen: how that run drew them, as a bundle's config holds it under `data`: split_seed, test_fraction and
            val_fraction; by default 0, 0.2 and 0.
        classes: names of the classes, in the order of the labels; by default the data's own.
        boxed: the boxes that are examples, where images are not.
    """
    drawn = {"split_seed": 0, "test_fraction": 0.2, "val_fraction": 0.0} | dict(seen or {})
    splits = read_boxed(data, boxed, classes=classes, seed=drawn["split_seed"], test_fraction=drawn["test_fraction"])
    return hold_out_val(splits, drawn["val_fraction"], drawn["split_seed"])


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


def join(lists: Iterable[ImageList]) -> ImageList:
    """Several splits of one data set as one."""
    lists = list(lists)
    paths, labels = (tuple(chain(*parts)) for parts in zip(*((i.paths, i.labels) for i in lists), strict=True))
    return ImageList(paths, labels, lists[0].classes, lists[0].drawn)


def drop_bad(images: ImageList, bad: list[BadImage]) -> ImageList:
    """`images` without the unreadable files; DataError when nothing is left."""
    gone = {str(b.path) for b in bad}
    kept = images.only(str(path) not in gone for path in images.paths)
    if not kept:
        raise DataError(f"none of the {len(images)} images can be read; the first: {bad[0]}")
    return kept
