"""The audit of a data set before training: damaged files, duplicates, leaks, labels, sizes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from glsim.data.box_options import Boxed
from glsim.data.boxed import read_boxed
from glsim.data.duplicates import PAIRS, Entry, Item, Photo, find_duplicates, find_near, look_at_all
from glsim.data.image_files import LeftOut
from glsim.data.images import EXTENSIONS, HEIF, BadImage
from glsim.data.limits import MAX_MEGAPIXELS, pixel_limit
from glsim.data.readers import ImageList
from glsim.data.regions import file_of
from glsim.files import is_junk
from glsim.types import optional

PROBLEM, WARNING = "problem", "warning"
CHECKS = {  # name -> (severity, what was found, what to do); the order is that of the report
    "unreadable": (
        PROBLEM,
        "Files that cannot be read",
        "Replace or remove them; train --skip-bad leaves them out and lists them.",
    ),
    "untrainable": (PROBLEM, "What train will refuse", "Add the images that are missing."),
    "leak": (
        PROBLEM,
        "The same picture in two splits",
        "Keep it in one of them: a test image that was trained on makes the test result too good.",
    ),
    "clash": (
        PROBLEM,
        "The same picture under two labels",
        "One of the labels is wrong, or the classes overlap: keep the picture where it belongs.",
    ),
    "near_leak": (
        WARNING,
        "Nearly the same picture in two splits",
        "Compare them by eye: resized, compressed or trimmed duplicates leak just as exact ones do.",
    ),
    "near_clash": (
        WARNING,
        "Nearly the same picture under two labels",
        "Compare them by eye: a duplicate with another label is a wrong label.",
    ),
    "duplicate": (
        WARNING,
        "The same picture twice in a class",
        "It counts twice, in training or in the test: remove the others.",
    ),
    "near_duplicate": (WARNING, "Nearly the same picture twice in a class", "Remove those that only repeat another."),
    "blank": (WARNING, "Pictures of nearly one colour", "Look whether a camera or a download failed."),
    "suffix": (
        WARNING,
        "Files whose content is another format than their name says",
        "glsim goes by the content; other programs may not: rename them.",
    ),
    "unseen": (
        WARNING,
        "Files beside the images that no verb will look at",
        f"If they are images, convert or rename them; known endings: {' '.join(EXTENSIONS)}.",
    ),
    "few": (WARNING, "Classes with few training images", "Add images, or expect little of these classes."),
    "absent": (WARNING, "Classes without an image in a split", "Their accuracy cannot be measured there."),
}
FORMAT_OF = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    **dict.fromkeys(HEIF, ("HEIF",)),
    **{f".{name.lower()}": (name,) for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")},
    ".tif": ("TIFF",),
    ".pgm": ("PPM",),
}


RANKS = {"smallest": 0, "5 %": 5, "median": 50, "95 %": 95, "largest": 100}  # percentiles of sizes


class Listing(NamedTuple):
    """The images of a data set, before any of them is read."""

    data: str
    splits: dict[str, ImageList]
    classes: tuple[str, ...]
    unseen: list[Path]  # files that are no images by their names


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str  # of `CHECKS`
    severity: str
    title: str
    advice: str
    count: int
    items: list[Item]


class ClassSizes(NamedTuple):
    """Readable images a class in one split; a class and its number where it is one class."""

    smallest: tuple[str, int]
    median: float
    largest: tuple[str, int]


@dataclass(frozen=True)
class ClassCounts:
    """The classes, and how many images they have in each split that there is."""

    count: int
    imbalance: float | None = None  # largest class of train by the smallest; None where that is empty
    train: ClassSizes | None = optional()
    val: ClassSizes | None = optional()
    test: ClassSizes | None = optional()


class SizedImage(NamedTuple):
    """An image and its size."""

    path: str
    size: tuple[int, int]  # width, height


Percentiles = dict[str, float]  # by the names of RANKS


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of the readable images; everything is left out where there is none."""

    width: Percentiles | None = optional()
    height: Percentiles | None = optional()
    aspect: Percentiles | None = optional()  # width / height
    smallest: SizedImage | None = optional()
    largest: SizedImage | None = optional()
    smaller_than_image_size: int | None = optional()  # than what the network sees, in width or height
    elongated: int | None = optional()  # more than twice as wide as high, or the other way round
    formats: dict[str, int] | None = optional()
    modes: dict[str, int] | None = optional()


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit_images` returns."""

    data: str
    exit_code: int  # 3 where a finding is a problem
    counts: dict[str, int]  # images of each split
    split_drawn: bool  # the data has no splits of its own
    classes: ClassCounts
    sizes: ImageSizes
    findings: list[Finding]  # in the order of `CHECKS`
    near_search_stopped: bool  # at `PAIRS` pairs


def list_images(
    data: str | Path, *, split_seed: int = 0, test_fraction: float = 0.2, boxed: Boxed | None = None
) -> Listing:
    """List the images of a data set as `train` would take them; DataError where that cannot be done.

    Args:
        data: what `glsim.data.readers:read_data` takes.
        split_seed, test_fraction: of the test split, where the data has none.
        boxed: the boxes that are examples, where images are not.
    """
    left = LeftOut()
    splits = read_boxed(data, boxed, seed=split_seed, test_fraction=test_fraction, left=left)
    unseen = list(map(Path, left.files))
    left.files.clear()  # a finding of its own
    left.tell(data)
    return Listing(str(data), splits, next(iter(splits.values())).classes, unseen)


def audit_images(
    listing: Listing,
    *,
    image_size: Sequence[int],
    near: int = 32,
    min_images: int = 5,
    workers: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    progress: bool = False,
) -> Audit:
    """Read every image of a data set once, and look for what is wrong with them.

    Args:
        listing: from `list_images`.
        image_size: (height, width) that the network is to see, in pixels.
        near: images are nearly the same when at most so many of the 256 bits of their hashes differ.
        min_images: training images that a class should have.
        workers: processes that read images; None: one a core; 0: none beside this one.
        max_megapixels: larger images are bad files.
        progress: draw a progress bar.
    """
    entries = {
        path: Entry(str(path), split, listing.classes[label])
        for split, images in listing.splits.items()
        for path, label in zip(images.paths, images.labels, strict=True)
    }
    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds between looks; a log file needs fewer
    bar = partial(tqdm, total=len(entries), unit="image", disable=not progress, mininterval=often)
    with pixel_limit(max_megapixels):
        looks = dict(zip(entries.values(), bar(look_at_all(list(entries), workers)), strict=True))
    photos = {entry: look for entry, look in looks.items() if isinstance(look, Photo)}
    pairs = find_near(photos, near)
    found = {
        "unreadable": [Item([e], look.reason) for e, look in looks.items() if isinstance(look, BadImage)],
        **find_duplicates(photos, pairs),
        "blank": [Item([e]) for e, photo in photos.items() if photo.hash is None],
        "suffix": [
            Item([e], f"{photo.format} named {suffix}")
            for e, photo in photos.items()
            if photo.format not in FORMAT_OF.get((suffix := Path(file_of(e.path)).suffix).lower(), ())
        ],
        "unseen": [Item([Entry(str(path), "", "")]) for path in sorted({*find_unseen(entries), *listing.unseen})],
        **check_classes(listing, photos, min_images),
    }
    findings = [
        Finding(name, severity, title, advice, len(found[name]), found[name])
        for name, (severity, title, advice) in CHECKS.items()
        if found.get(name)
    ]
    return Audit(
        data=listing.data,
        exit_code=3 if any(f.severity == PROBLEM for f in findings) else 0,
        counts={split: len(images) for split, images in listing.splits.items()},
        split_drawn=next(iter(listing.splits.values())).drawn,
        classes=count_classes(listing, photos),
        sizes=measure_sizes(photos, image_size),
        findings=findings,
        near_search_stopped=len(pairs) == PAIRS,
    )


def find_unseen(paths: Iterable[Path]) -> list[Path]:
    """Files in the folders of the images that have no ending of an image."""
    folders = sorted({path.parent for path in paths})
    files = (file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))
    skip = (*EXTENSIONS, ".csv")
    return [f for f in files if f.is_file() and not is_junk(f.name) and f.suffix.lower() not in skip]


def check_classes(listing: Listing, photos: Iterable[Entry], least: int) -> dict[str, list[Item]]:
    """What `train` refuses although every file is where it should be; classes with fewer than `least` readable training
    images, but one or more; classes without a readable image in a split other than train."""
    classes, splits = listing.classes, listing.splits
    images = Counter((e.split, e.label) for e in photos)
    if "train" in splits:
        untrainable = [f"one class only: {classes[0]}"] if len(classes) < 2 else []
        untrainable += [f"no readable training image of {label}" for label in classes if not images["train", label]]
    else:
        untrainable = [f"no split 'train'; there is: {', '.join(splits)}"]
    few = sorted((images["train", label], label) for label in classes if 0 < images["train", label] < least)
    others = [(split, label) for split in splits if split != "train" for label in classes]
    notes = {
        "untrainable": untrainable,
        "few": [f"{label}: {count}" for count, label in few],
        "absent": [f"{label}: none in {split}" for split, label in others if not images[split, label]],
    }
    return {name: [Item([], note) for note in of_check] for name, of_check in notes.items()}


def count_classes(listing: Listing, photos: Iterable[Entry]) -> ClassCounts:
    """Readable images a class: smallest, median and largest class of every split; in `train` also their ratio."""
    counts = Counter((e.split, e.label) for e in photos)
    imbalance, sizes = None, {}
    for split in listing.splits:
        images = {label: counts[split, label] for label in listing.classes}
        smallest, largest = (choose(images.items(), key=itemgetter(1)) for choose in (min, max))
        sizes[split] = ClassSizes(smallest, median(images.values()), largest)
        if split == "train" and smallest[1]:
            imbalance = round(largest[1] / smallest[1], 2)
    return ClassCounts(len(listing.classes), imbalance, **sizes)


def measure_sizes(photos: dict[Entry, Photo], image_size: Sequence[int]) -> ImageSizes:
    """Percentiles of width, height and width / height; how many are smaller than `image_size` (height, width)."""
    if not photos:
        return ImageSizes()
    wide, high = np.array([photo.size for photo in photos.values()]).T
    entries, area, aspect = list(photos), wide * high, wide / high

    def percentiles(values: np.ndarray, digits: int) -> Percentiles:
        return {name: round(float(np.percentile(values, rank)), digits) for name, rank in RANKS.items()}

    def sized(entry: Entry) -> SizedImage:
        return SizedImage(entry.path, photos[entry].size)

    height, width = image_size
    return ImageSizes(
        width=percentiles(wide, 0),
        height=percentiles(high, 0),
        aspect=percentiles(aspect, 2),
        smallest=sized(entries[area.argmin()]),
        largest=sized(entries[area.argmax()]),
        smaller_than_image_size=int(((wide < width) | (high < height)).sum()),
        elongated=int(((aspect > 2) | (aspect < 0.5)).sum()),
        formats=dict(Counter(photo.format for photo in photos.values()).most_common()),
        modes=dict(Counter(photo.mode for photo in photos.values()).most_common()),
    )
