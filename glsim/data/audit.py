"""The audit of a data set before training: damaged files, duplicates, leaks, labels, sizes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from glsim.config import Doctor
from glsim.data.audit_page import as_html
from glsim.data.duplicates import PAIRS, Entry, Photo, find_copies, find_near, item, look_at_all
from glsim.data.image_files import LeftOut
from glsim.data.images import EXTENSIONS, HEIF, BadImage
from glsim.data.limits import limited
from glsim.data.readers import ImageList, is_split, read_data
from glsim.files import is_junk, write_text
from glsim.training.memory import estimate_memory
from glsim.types import ConfigError

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
        "Compare them by eye: resized, compressed or trimmed copies leak just as exact ones do.",
    ),
    "near_clash": (
        WARNING,
        "Nearly the same picture under two labels",
        "Compare them by eye: a copy with another label is a wrong label.",
    ),
    "duplicate": (
        WARNING,
        "The same picture twice in a class",
        "It counts twice, in training or in the test: remove the copies.",
    ),
    "near_duplicate": (WARNING, "Nearly the same picture twice in a class", "Remove those that are only copies."),
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


@limited
def run(s: Doctor, progress: bool = True) -> dict[str, Any]:
    """The verb: look at every image of `s.data`, estimate the memory of the planned run, write the page `s.out`.

    The result holds `findings`, `sizes`, `classes`, `memory`, and `exit_code`: 3 where a finding is a problem. Raises
    DataError where the data cannot be listed and ConfigError where the run cannot be planned.
    """
    began, out = time.perf_counter(), Path(s.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={s.out}: name a file, in a folder that is there")
    left = LeftOut()
    splits = read_data(s.data, seed=s.split_seed, test_fraction=s.test_fraction, left=left)
    unseen = list(map(Path, left.files))
    left.files.clear()  # a finding of its own
    left.tell(s.data)
    classes = next(iter(splits.values())).classes
    memory = estimate_memory(s, len(classes))  # first, for a wrong setting must not wait for the images
    entries = {
        path: Entry(path, split, classes[label])
        for split, images in splits.items()
        for path, label in zip(images.paths, images.labels, strict=True)
    }
    often = 0.2 if sys.stderr.isatty() else 30.0  # seconds between looks; a log file needs fewer
    with tqdm(total=len(entries), unit="image", disable=not progress, mininterval=often) as bar:

        def each(results: Iterator[Photo | BadImage]) -> Iterator[Photo | BadImage]:
            for result in results:
                bar.update()
                yield result

        looks = list(each(look_at_all(list(entries), s.workers)))
    photos = {e: look for e, look in zip(entries.values(), looks, strict=True) if isinstance(look, Photo)}
    bad = {e: look for e, look in zip(entries.values(), looks, strict=True) if isinstance(look, BadImage)}
    pairs = find_near(photos, s.near)
    found = {
        "unreadable": [item([e], b.reason) for e, b in bad.items()],
        **find_untrainable(splits, photos),
        **find_copies(photos, pairs),
        "blank": [item([e]) for e, photo in photos.items() if photo.hash is None],
        "suffix": [
            item([e], f"{photo.format} named {e.path.suffix}")
            for e, photo in photos.items()
            if photo.format not in FORMAT_OF.get(e.path.suffix.lower(), ())
        ],
        "unseen": [item([Entry(path, "", "")]) for path in sorted({*find_unseen(list(entries)), *unseen})],
        **find_small_classes(splits, photos, s.min_images),
    }
    findings: list[dict[str, Any]] = [
        {"check": name, "severity": severity, "title": title, "advice": advice, "count": len(found[name])}
        | {"items": found[name]}
        for name, (severity, title, advice) in CHECKS.items()
        if found.get(name)
    ]
    result = {
        "data": s.data,
        "exit_code": 3 if any(f["severity"] == PROBLEM for f in findings) else 0,
        "counts": {split: len(images) for split, images in splits.items()},
        "split_drawn": not is_split(s.data),
        "classes": count_classes(splits, photos),
        "sizes": measure_sizes(photos, memory["image_size"]),
        "findings": findings,
        "near_search_stopped": len(pairs) == PAIRS,
        "memory": memory,
        "out": str(out),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_text(out, as_html(result, CHECKS))
    return result


def find_untrainable(splits: dict[str, ImageList], photos: Iterable[Entry]) -> dict[str, list[dict[str, Any]]]:
    """What `train` refuses although every file is where it should be."""
    classes = next(iter(splits.values())).classes
    if "train" not in splits:
        return {"untrainable": [item([], f"no split 'train'; there is: {', '.join(splits)}")]}
    reasons = [f"one class only: {classes[0]}"] if len(classes) < 2 else []
    readable = {e.label for e in photos if e.split == "train"}
    reasons += [f"no readable training image of {label}" for label in classes if label not in readable]
    return {"untrainable": [item([], reason) for reason in reasons]}


def find_unseen(paths: Iterable[Path]) -> list[Path]:
    """Files in the folders of the images that have no ending of an image."""
    folders = sorted({path.parent for path in paths})
    files = (file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))
    skip = (*EXTENSIONS, ".csv")
    return [f for f in files if f.is_file() and not is_junk(f.name) and f.suffix.lower() not in skip]


def find_small_classes(
    splits: dict[str, ImageList], photos: Iterable[Entry], least: int
) -> dict[str, list[dict[str, Any]]]:
    """Classes with fewer than `least` readable training images, and classes without an image in another split."""
    classes = next(iter(splits.values())).classes
    counts = Counter((e.split, e.label) for e in photos)
    few = sorted((counts["train", label], label) for label in classes if 0 < counts["train", label] < least)
    absent = [(split, label) for split in splits for label in classes if split != "train" and not counts[split, label]]
    return {
        "few": [item([], f"{label}: {count}") for count, label in few],
        "absent": [item([], f"{label}: none in {split}") for split, label in absent],
    }


def count_classes(splits: dict[str, ImageList], photos: Iterable[Entry]) -> dict[str, Any]:
    """Readable images a class: smallest, median and largest class of every split; in `train` also their ratio."""
    classes = next(iter(splits.values())).classes
    counts = Counter((e.split, e.label) for e in photos)
    about: dict[str, Any] = {"count": len(classes)}
    for split in splits:
        numbers = [counts[split, label] for label in classes]
        smallest, largest = min(numbers), max(numbers)
        about[split] = {
            "smallest": [classes[numbers.index(smallest)], smallest],
            "median": median(numbers),
            "largest": [classes[numbers.index(largest)], largest],
        }
        if split == "train":
            about["imbalance"] = round(largest / smallest, 2) if smallest else None
    return about


def measure_sizes(photos: dict[Entry, Photo], image_size: Sequence[int]) -> dict[str, Any]:
    """Percentiles of width, height and width / height; how many are smaller than the network's input."""
    if not photos:
        return {}
    ranks = {"smallest": 0, "5 %": 5, "median": 50, "95 %": 95, "largest": 100}
    wide, high = np.array([photo.size for photo in photos.values()]).T
    entries, area, aspect = list(photos), wide * high, wide / high

    def percentiles(values: np.ndarray, digits: int) -> dict[str, float]:
        return {name: round(float(np.percentile(values, rank)), digits) for name, rank in ranks.items()}

    height, width = image_size
    return {
        "width": percentiles(wide, 0),
        "height": percentiles(high, 0),
        "aspect": percentiles(aspect, 2),
        "smallest": {"path": str(entries[area.argmin()].path), "size": list(photos[entries[area.argmin()]].size)},
        "largest": {"path": str(entries[area.argmax()].path), "size": list(photos[entries[area.argmax()]].size)},
        "smaller_than_image_size": int(((wide < width) | (high < height)).sum()),
        "elongated": int(((aspect > 2) | (aspect < 0.5)).sum()),
        "formats": dict(Counter(photo.format for photo in photos.values()).most_common()),
        "modes": dict(Counter(photo.mode for photo in photos.values()).most_common()),
    }
