"""Data sets whose examples are boxes: splits and classes of the images, or of the boxes where those have labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from glsim.data.box_options import Boxed
from glsim.data.detections import BoxPaths, find_boxes, read_chosen
from glsim.data.image_files import LeftOut, find_images
from glsim.data.lists import read_list
from glsim.data.names import SPLITS, clean_label, split_of
from glsim.data.readers import ImageList, held_out, read_data
from glsim.data.sources import located
from glsim.types import DataError


@dataclass(frozen=True)
class BoxList(ImageList):
    """One split of boxes."""

    paths: BoxPaths

    def only(self, keep: Iterable[bool]) -> BoxList:
        """The boxes for which `keep` says so."""
        rows = np.flatnonzero(np.fromiter(keep, bool))
        return replace(self, paths=self.paths.take(rows), labels=tuple(self.labels[row] for row in rows))


def read_boxed(
    source: str | Path,
    boxed: Boxed | None = None,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
    left: LeftOut | None = None,
) -> dict[str, ImageList]:
    """The splits of a data set, an example a box where `boxed` names a file of boxes.

    Boxes without labels have those of their images, and `source` is what `read_data` takes. With labels of their own,
    `source` is a folder of images (or a list), however they lie in it: they are in a split where each image with a box
    lies in a folder that has the name of one, and else drawn, all boxes of an image into the same.

    The others, and what is raised, are those of `glsim.data.readers:read_data`; DataError too for a box without a label
    among boxes that have one.
    """
    if boxed is None or boxed.get("boxes") is None:
        return read_data(source, classes=classes, seed=seed, test_fraction=test_fraction, left=left)
    place, boxes = located(source), read_chosen(boxed)
    if not boxes.labelled:
        splits = read_data(source, classes=classes, seed=seed, test_fraction=test_fraction, left=left)
        paths = find_boxes([path for images in splits.values() for path in images.paths], boxed, boxes)
        of_image = np.array(list(chain.from_iterable(images.labels for images in splits.values())))
        split_of_image = np.repeat(list(splits), [len(images) for images in splits.values()])
        known, drawn = next(iter(splits.values())).classes, next(iter(splits.values())).drawn
        return _parted(paths, split_of_image[paths.image], of_image[paths.image], known, drawn)
    listed = read_list(place) if place.is_file() else []
    images = [row.path for row in listed] if listed else find_images(place)
    paths = find_boxes(images, boxed, boxes)
    boxes = paths.boxes
    if not boxes.label.all():
        raise DataError(f"{boxes.where(int(boxes.label.argmin()))}: no label, but others have one")
    splits_told = [row.split for row in listed] or [_split_of(path, place) for path in images]
    drawn = any(splits_told[i] is None for i in np.unique(paths.image))
    told: np.ndarray = np.array([split or "train" for split in splits_told])[paths.image]
    if drawn:
        keys = [path.relative_to(place if place.is_dir() else place.parent).as_posix() for path in images]
        held = held_out(((keys[i], n) for i, n in zip(paths.image, boxes.label, strict=True)), test_fraction, seed)
        told = np.array(["test" if key in held else "train" for key in keys])[paths.image]
    basis = boxes.label[told == "train"] if (told == "train").any() else boxes.label
    known = tuple(classes or sorted({boxes.labels[i] for i in np.unique(basis)}))
    number = {clean_label(name): i for i, name in enumerate(known)}
    numbers = np.array([number.get(name, -1) for name in boxes.labels])[boxes.label]
    if (numbers < 0).any():
        row = int(numbers.argmin())
        whose = "of the train split" if classes is None else "given (the model's)"
        raise DataError(
            f"{boxes.where(row)}: class {boxes.labels[boxes.label[row]]!r} is not one of the {len(known)} classes "
            f"{whose}: {', '.join(known[:5])}"
        )
    return _parted(paths, told, numbers, known, drawn)


def _parted(
    paths: BoxPaths, splits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], drawn: bool
) -> dict[str, ImageList]:
    parts = {split: np.flatnonzero(splits == split) for split in SPLITS}
    return {
        split: BoxList(paths.take(rows), tuple(labels[rows].tolist()), classes, drawn)
        for split, rows in parts.items()
        if len(rows)
    }


def _split_of(path: Path, folder: Path) -> str | None:
    """The split that the first folder below `folder` names; None for a file directly in it."""
    first, *below = path.relative_to(folder).parts
    return split_of(first) if below else None
