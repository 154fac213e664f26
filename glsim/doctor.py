"""Floor 4: a look through a data set before training: what is damaged, double, mislabelled, and whether it will fit.

Every file is read once, in processes of their own. Those import this file, so torch is only imported where a function
needs it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

from glsim.config import Doctor, Train
from glsim.data import EXTENSIONS, ImageList, is_split, read_data
from glsim.images import BadImage, open_as_stored, open_image
from glsim.types import ConfigError, GlsimError

if TYPE_CHECKING:
    import torch

    from glsim.backbone import Model

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
    **dict.fromkeys((".jpg", ".jpeg", ".jfif"), ("JPEG", "MPO")),
    **{f".{name.lower()}": (name,) for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")},
    ".tif": ("TIFF",),
    ".pgm": ("PPM",),
}
HASH_SIDE = (
    16  # a perceptual hash has 16 x 16 bits; with the usual 8 x 8, views of different cars are as near as copies
)
ONE_COLOUR = 2.0  # standard deviation of the grey values (0 to 255) below which a hash says nothing
PAIRS = 100_000  # the search for near duplicates stops at so many; the page would help nobody
SLACK = 1.1  # memory for what a step holds beside what the estimate counts
SHOWN, NAMED = 24, 1000  # findings of a check that the page shows with pictures, and by name


class Photo(NamedTuple):
    """What one reading of an image file tells."""

    size: tuple[int, int]  # width, height, upright
    format: str  # of the content
    mode: str
    pixels: str  # sha256 of size and pixels: equal for the same picture, whatever its file and metadata
    hash: bytes | None  # perceptual hash, 32 bytes; None for pictures of nearly one colour, which have none


class Entry(NamedTuple):
    """Where an image stands in the data set."""

    path: Path
    split: str
    label: str


def run(s: Doctor, progress: bool = True) -> dict[str, Any]:
    """The verb: look at every image of `s.data`, estimate the memory of the planned run, write the page `s.out`.

    The result holds `findings`, `sizes`, `classes`, `memory`, and `exit_code`: 3 where a finding is a problem. Raises
    DataError where the data cannot be listed and ConfigError where the run cannot be planned.
    """
    began, out = time.perf_counter(), Path(s.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={s.out}: name a file, in a folder that is there")
    splits = read_data(s.data, seed=s.split_seed, test_fraction=s.test_fraction)
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
        "unreadable": [_item([e], b.reason) for e, b in bad.items()],
        **find_untrainable(splits, photos),
        **find_copies(photos, pairs),
        "blank": [_item([e]) for e, photo in photos.items() if photo.hash is None],
        "suffix": [
            _item([e], f"{photo.format} named {e.path.suffix}")
            for e, photo in photos.items()
            if photo.format not in FORMAT_OF.get(e.path.suffix.lower(), ())
        ],
        "unseen": [_item([Entry(path, "", "")]) for path in find_unseen(list(entries))],
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
    from glsim.bundle import write_text

    write_text(out, as_html(result))
    return result


def _item(entries: Iterable[Entry], note: str = "") -> dict[str, Any]:
    """One finding: the images it is about and a remark. What is not about a file has no images."""
    images = [{"path": str(e.path), "split": e.split, "label": e.label} for e in entries]
    return {"images": images, "note": note}


# --- reading ----------------------------------------------------------------------------------------------------------


def look_at(path: Path) -> Photo | BadImage:
    """Read and decode one file, once."""
    try:
        image, stored_format, mode = open_as_stored(path)
    except BadImage as error:
        return error.with_traceback(None)
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    grey = image.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0).convert("L")
    bits = None
    if np.asarray(grey, np.float32).std() >= ONE_COLOUR:
        bits = np.packbits(imagehash.phash(grey, hash_size=HASH_SIDE).hash).tobytes()
    return Photo(image.size, stored_format, mode, pixels, bits)


def look_at_all(paths: Sequence[Path], workers: int | None = None) -> Iterator[Photo | BadImage]:
    """`look_at` for every path, in order, in `workers` processes (None: one a core; 0: in this one).

    Raises GlsimError when a process dies, which a decoder's crash or a lack of memory can do.
    """
    if workers is None:
        workers = _cores() if len(paths) > 500 else 0  # to start a process costs as much as some hundred small images
    if not workers:
        yield from map(look_at, paths)
        return
    # Not forked: this process has run torch, whose threads a fork would leave behind with their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(look_at, paths, chunksize=16)
    except BrokenProcessPool as error:
        raise GlsimError(
            "a process that read images died: a decoder crashed or memory ran out; --workers 1 needs the least memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- findings ---------------------------------------------------------------------------------------------------------


def find_near(photos: dict[Entry, Photo], most: int) -> list[tuple[list[Entry], list[Entry], int]]:
    """Pairs of different pictures whose hashes differ in at most `most` bits, nearest first.

    A picture stands for all its exact copies: one entry for every split and label it is found under.
    """
    holders: dict[str, dict[tuple[str, str], Entry]] = {}
    hashes: dict[str, bytes] = {}
    for entry, photo in photos.items():
        if photo.hash is not None:
            holders.setdefault(photo.pixels, {}).setdefault((entry.split, entry.label), entry)
            hashes[photo.pixels] = photo.hash
    owners = [list(holders[pixels].values()) for pixels in hashes]
    table = np.frombuffer(b"".join(hashes.values()), np.uint64).reshape(len(hashes), HASH_SIDE**2 // 64)
    return [(owners[i], owners[j], distance) for i, j, distance in near_pairs(table, most, PAIRS)]


def near_pairs(hashes: np.ndarray, most: int, limit: int, rows: int = 32) -> list[tuple[int, int, int]]:
    """All (i, j, distance) with i < j whose 256 bits, `hashes` (n, 4) uint64, differ in at most `most`, nearest first.

    Every pair is compared (half a million images: 125 thousand million pairs), by the first 128 bits, then, for the few
    that are left, by all. Stops at `limit` pairs.
    """
    first, second = np.ascontiguousarray(hashes[:, 0]), np.ascontiguousarray(hashes[:, 1])

    def block(top: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for left in range(top, len(hashes), 4096):
            down, across = slice(top, top + rows), slice(left, left + 4096)
            differ = np.bitwise_count(first[down, None] ^ first[None, across])
            differ += np.bitwise_count(second[down, None] ^ second[None, across])
            i, j = np.nonzero(differ <= most)
            i, j = i + top, j + left
            i, j = i[i < j], j[i < j]
            distance = np.bitwise_count(hashes[i] ^ hashes[j]).sum(axis=1)
            near = distance <= most
            found += zip(i[near].tolist(), j[near].tolist(), distance[near].tolist(), strict=True)
            if len(found) >= limit:
                break
        return found

    pool = ThreadPoolExecutor(_cores())  # NumPy lets go of the interpreter
    try:
        blocks = pool.map(block, range(0, len(hashes), rows))
        pairs = list(islice((pair for found in blocks for pair in found), limit))
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(pairs, key=lambda pair: (pair[2], pair))


def find_copies(
    photos: dict[Entry, Photo], pairs: Iterable[tuple[list[Entry], list[Entry], int]]
) -> dict[str, list[dict[str, Any]]]:
    """Exact copies in groups and near ones in pairs, by what is wrong with them: leak, clash, else duplicate."""
    groups: dict[str, list[Entry]] = {}
    for entry, photo in photos.items():
        groups.setdefault(photo.pixels, []).append(entry)
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups.values():
        if len(group) > 1:
            for kind in _kinds(group):
                found.setdefault(kind, []).append(_item(group))
    for ours, others, distance in pairs:
        for pair in product(ours, others):
            for kind in _kinds(pair):
                note = f"{distance} of {HASH_SIDE**2} bits differ"
                found.setdefault(f"near_{kind}", []).append(_item(pair, note))
    return found


def _kinds(entries: Iterable[Entry]) -> list[str]:
    leak, clash = len({e.split for e in entries}) > 1, len({e.label for e in entries}) > 1
    return ["leak"] * leak + ["clash"] * clash or ["duplicate"]


def find_untrainable(splits: dict[str, ImageList], photos: Iterable[Entry]) -> dict[str, list[dict[str, Any]]]:
    """What `train` refuses although every file is where it should be."""
    classes = next(iter(splits.values())).classes
    if "train" not in splits:
        return {"untrainable": [_item([], f"no split 'train'; there is: {', '.join(splits)}")]}
    reasons = [f"one class only: {classes[0]}"] if len(classes) < 2 else []
    readable = {e.label for e in photos if e.split == "train"}
    reasons += [f"no readable training image of {label}" for label in classes if label not in readable]
    return {"untrainable": [_item([], reason) for reason in reasons]}


def find_unseen(paths: Iterable[Path]) -> list[Path]:
    """Files in the folders of the images that have no ending of an image."""
    folders = sorted({path.parent for path in paths})
    files = (file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))
    skip = (*EXTENSIONS, ".csv")
    return [f for f in files if f.is_file() and not f.name.startswith(".") and f.suffix.lower() not in skip]


def find_small_classes(
    splits: dict[str, ImageList], photos: Iterable[Entry], least: int
) -> dict[str, list[dict[str, Any]]]:
    """Classes with fewer than `least` readable training images, and classes without an image in another split."""
    classes = next(iter(splits.values())).classes
    counts = Counter((e.split, e.label) for e in photos)
    few = sorted((counts["train", label], label) for label in classes if 0 < counts["train", label] < least)
    absent = [(split, label) for split in splits for label in classes if split != "train" and not counts[split, label]]
    return {
        "few": [_item([], f"{label}: {count}") for count, label in few],
        "absent": [_item([], f"{label}: none in {split}") for split, label in absent],
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


# --- memory -----------------------------------------------------------------------------------------------------------


def estimate_memory(s: Doctor, num_classes: int) -> dict[str, Any]:
    """Bytes that a training step of the planned run needs, the bytes free on its device, and what to change.

    Weights and optimiser state are counted; what the forward pass keeps for the backward pass is measured on the CPU
    with 2 and with 3 images, and goes up by the same amount with every further one. Raises ConfigError as `train` does.
    """
    import torch

    from glsim.bundle import pick_device
    from glsim.models import create_model
    from glsim.train import make_optimizer

    device = pick_device(s.device)
    plan = Train(data=s.data, out=s.out, method=s.method, batch_size=s.batch_size, optimizer=s.optimizer)

    def build(image_size: Any) -> Model:
        args = s.backbone_args or None
        return create_model(s.method, s.backbone, num_classes, image_size, False, args, **s.options).train()

    model = build(s.image_size)
    optimizer = make_optimizer(plan, model)
    fixed, each = measure_activations(model, s.precision, backward=True)
    optimizer.step()
    weights = _bytes([*model.parameters(), *model.buffers()])
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    parts = {"weights": weights, "gradients": _bytes(trained), "optimizer": _bytes(state)}
    size, backbone = model.backbone.image_size, model.config["backbone"]
    parameters = sum(p.numel() for p in model.parameters())
    del model, optimizer, trained, state
    free = free_bytes(device)
    usable = free / SLACK - sum(parts.values()) - fixed  # what is left for activations of images
    largest = max(0, math.floor(usable / each))
    total = math.ceil(SLACK * (sum(parts.values()) + fixed + each * s.batch_size))
    advice = []
    if largest < s.batch_size:
        if largest:
            accumulate = math.ceil(s.batch_size / largest)
            batch = math.ceil(s.batch_size / accumulate)
            advice.append(f"--batch-size {batch} --accumulate {accumulate}: steps of the same size in smaller parts")
        if s.precision == "no":
            half_fixed, half = measure_activations(build(s.image_size), "bf16")
            need = math.ceil(SLACK * (sum(parts.values()) + half_fixed + half * s.batch_size))
            advice.append(f"--precision bf16: {as_gib(need)} instead of {as_gib(total)}")
        if usable > 0:
            # Activations go with the number of pixels; no measurement at the smaller size, which may not fit the model.
            height, width = (int(side * math.sqrt(usable / each / s.batch_size)) // 32 * 32 for side in size)
            if min(height, width) >= 32:
                advice.append(f"--image-size {height if height == width else f'[{height},{width}]'} or smaller")
        advice.append("a smaller --backbone, or a device with more memory")
    return {
        "method": s.method,
        "backbone": backbone,
        "image_size": list(size),
        "batch_size": s.batch_size,
        "precision": s.precision,
        "parameters": parameters,
        **parts,
        "activations": fixed + each * s.batch_size,
        "activations_per_image": each,
        "total": total,
        "device": str(device),
        "free": free,
        "fits": largest >= s.batch_size,
        "largest_batch_size": largest,
        "advice": advice,
    }


def measure_activations(model: Model, precision: str, backward: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: (whatever the batch, for each image).

    With `backward` the gradients are there afterwards.
    """
    two, three = saved_bytes(model, 2, precision), saved_bytes(model, 3, precision, backward)
    return max(0, 3 * two - 2 * three), three - two


def saved_bytes(model: Model, batch: int, precision: str, backward: bool = False) -> int:
    """Bytes of all tensors that autograd keeps for `batch` images, each storage once, the model's own left out."""
    import torch

    from glsim.losses import objective

    kept = {t.untyped_storage().data_ptr(): 0 for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    images = torch.randn(batch, 3, *model.backbone.image_size)
    labels = torch.arange(batch) % model.config["num_classes"]
    # fp16 and bf16 have the same size, and every CPU computes in bf16.
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision != "no")
    with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(model(images), labels)
    if backward:
        loss.backward()
    return sum(kept.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; of the machine where the device has none of its own."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def as_gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.{2 if count < 10 * 2**30 else 0}f} GiB"


# --- the page ---------------------------------------------------------------------------------------------------------


def as_html(r: dict[str, Any]) -> str:
    """The report as one page that needs no other file: what was found, with small pictures."""
    shown = {i["path"] for f in r["findings"] for item in f["items"][:SHOWN] for i in item["images"][:4]}
    pictures = thumbnails(sorted(shown))
    root = Path(r["data"]) if Path(r["data"]).is_dir() else Path(r["data"]).parent
    sections = "".join(_section(f, pictures, root) for f in r["findings"])
    counts = {f["check"]: f["count"] for f in r["findings"]}
    rows = "".join(
        f'<tr class="{severity if counts.get(name) else "none"}"><td>'
        + (f'<a href="#{name}">{title}</a>' if counts.get(name) else title)
        + f"</td><td>{severity}</td><td>{counts.get(name, 0):,}</td></tr>"
        for name, (severity, title, _) in CHECKS.items()
    )
    problems = sum(f["severity"] == PROBLEM for f in r["findings"])
    warnings = len(r["findings"]) - problems
    verdict = f"{_count(problems, 'problem')} and {_count(warnings, 'warning')}" if r["findings"] else "Nothing found"
    colour = PROBLEM if problems else WARNING if warnings else "good"
    stopped = f"<p>The search for near duplicates stopped at {PAIRS:,} pairs.</p>" * r["near_search_stopped"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>glsim doctor: {_text(r["data"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1e }}
table {{ border-collapse: collapse; margin: 1rem 0 }} a {{ color: inherit }}
td, th {{ padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
.number td + td, .number th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem }} .none {{ color: #888 }}
.verdict {{ padding: .6rem 1rem; border-radius: .4rem; font-weight: 600 }}
.verdict.problem {{ background: #fde3e1 }} .verdict.warning {{ background: #fdf1d3 }}
.verdict.good {{ background: #e0f3e4 }} tr.problem td {{ font-weight: 600; color: #a8201a }}
.items {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }}
.item {{ border: 1px solid #ddd; border-radius: .4rem; padding: .6rem }}
.images {{ display: grid; grid-template-columns: 1fr 1fr; gap: .6rem }} figure {{ margin: 0 }}
figure img {{ display: block; width: 100%; height: 8rem; object-fit: contain; background: #f4f4f5 }}
figcaption, .note {{ font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }} .note, .path {{ color: #666 }}
.note {{ margin: .4rem 0 0 }} li {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{_text(Path(r["data"]).name)}</h1>
<p class="path">{_text(r["data"])}</p>
<p class="verdict {colour}">{verdict}</p>
{_about_data(r)}{stopped}
<h2>Checks</h2>
<table><tr><th>check</th><th>kind</th><th>found</th></tr>{rows}</table>
{_about_memory(r["memory"])}
{sections}
</body></html>
"""


def _text(value: Any) -> str:
    # A file name may hold bytes that are no text.
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def thumbnails(paths: Iterable[str], side: int = 192) -> dict[str, str]:
    """Small JPEGs as data addresses; a file that cannot be shown has none."""

    def draw(path: str) -> str:
        try:
            image = open_image(path)
        except BadImage:
            return ""
        image.thumbnail((side, side), reducing_gap=2.0)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=70)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    paths = list(paths)
    with ThreadPoolExecutor(_cores()) as pool:
        return {path: picture for path, picture in zip(paths, pool.map(draw, paths), strict=True) if picture}


def _section(f: dict[str, Any], pictures: dict[str, str], root: Path) -> str:
    """A heading, what to do, the first findings with pictures, the others by name."""
    items = f["items"]
    drawn = [item for item in items[:SHOWN] if any(i["path"] in pictures for i in item["images"])]
    named = [item for item in items[:NAMED] if item not in drawn]
    cards = "".join(_card(item, pictures, root) for item in drawn)
    lines = "".join(f"<li>{_line(item, root)}</li>" for item in named)
    if lines:
        lines = f"<ul>{lines}</ul>"
    if lines and drawn:
        lines = f"<details><summary>{len(named):,} more</summary>{lines}</details>"
    if len(items) > NAMED:
        lines += f"<p>.. and {len(items) - NAMED:,} more: glsim doctor --json lists all.</p>"
    return (
        f'<h2 id="{f["check"]}">{_text(f["title"])}: {f["count"]:,}</h2>\n<p>{_text(f["advice"])}</p>\n'
        f'<div class="items">{cards}</div>{lines}\n'
    )


def _relative(path: str, root: Path) -> str:
    return _text(Path(path).relative_to(root) if Path(path).is_relative_to(root) else path)


def _card(item: dict[str, Any], pictures: dict[str, str], root: Path) -> str:
    figures = "".join(
        f'<figure><img src="{pictures.get(i["path"], "")}" alt=""><figcaption><b>{_text(i["label"])}</b>, '
        f'{_text(i["split"])}<br><span class="path">{_relative(i["path"], root)}</span></figcaption></figure>'
        for i in item["images"][:4]
    )
    hidden = "".join(f"<br>{_relative(i['path'], root)}" for i in item["images"][4:NAMED])
    note = f'<p class="note">{_text(item["note"])}{hidden}</p>' if item["note"] or hidden else ""
    return f'<div class="item"><div class="images">{figures}</div>{note}</div>'


def _line(item: dict[str, Any], root: Path) -> str:
    paths = " = ".join(_relative(i["path"], root) for i in item["images"][:NAMED])
    return ": ".join(part for part in (paths, _text(item["note"])) if part)


def _about_data(r: dict[str, Any]) -> str:
    """Images a class and split, and their sizes."""
    c, z = r["classes"], r["sizes"]
    text = f"<h2>Images</h2>\n<p>{c['count']:,} class{'es' * (c['count'] != 1)}."
    text += " The data has no splits of its own: these were drawn as train draws them." * r["split_drawn"]
    if c.get("imbalance", 1) not in (None, 1):
        smallest, largest = c["train"]["smallest"], c["train"]["largest"]
        text += (
            f" For training, {_text(largest[0])} has {c['imbalance']:g} times the images of {_text(smallest[0])}, the "
            "smallest class."
        )
    text += '</p>\n<table class="number"><tr><th></th><th>images</th>'
    text += "".join(f"<th>{which}</th>" for which in ("smallest class", "median class", "largest class")) + "</tr>"
    for split, count in r["counts"].items():
        numbers = c[split]["smallest"][1], c[split]["median"], c[split]["largest"][1]
        text += f"<tr><td>{split}</td><td>{count:,}</td>" + "".join(f"<td>{n:,g}</td>" for n in numbers) + "</tr>"
    text += "</table>\n"
    if not z:
        return text
    text += '<table class="number"><tr><th>pixels</th>' + "".join(f"<th>{name}</th>" for name in z["width"]) + "</tr>"
    for key, what in (("width", "width"), ("height", "height"), ("aspect", "width / height")):
        text += f"<tr><td>{what}</td>" + "".join(f"<td>{value:g}</td>" for value in z[key].values()) + "</tr>"
    height, width = r["memory"]["image_size"]
    remarks = [
        f"Smaller than the {width} x {height} pixels that the network sees: {z['smaller_than_image_size']:,}",
        f"More than twice as long as wide, or as high (squeezed for the network): {z['elongated']:,}",
        "Formats: " + ", ".join(f"{n:,} {name}" for name, n in z["formats"].items()),
        "Colours: " + ", ".join(f"{n:,} {name}" for name, n in z["modes"].items()),
        *(
            f"{end.title()}: {' x '.join(map(str, z[end]['size']))}, {z[end]['path']}"
            for end in ("smallest", "largest")
        ),
    ]
    return text + "</table>\n<ul>" + "".join(f"<li>{_text(remark)}</li>" for remark in remarks) + "</ul>\n"


def _about_memory(m: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{what}</td><td>{as_gib(m[key])}</td></tr>"
        for key, what in (
            ("weights", f"weights ({m['parameters'] / 1e6:.1f} million)"),
            ("gradients", "gradients"),
            ("optimizer", "optimiser"),
            ("activations", f"activations of {_count(m['batch_size'], 'image')}"),
            ("total", f"together, and {SLACK - 1:.0%} for what comes and goes"),
            ("free", f"free on {m['device']}"),
        )
    )
    height, width = m["image_size"]
    verdict = f"It fits; so do batches of {m['largest_batch_size']:,}." if m["fits"] else "It will not fit. What helps:"
    advice = "".join(f"<li>{_text(line)}</li>" for line in m["advice"])
    advice = f"<ul>{advice}</ul>" if advice else ""
    return (
        f"<h2>Memory</h2>\n<p>{_text(m['method'])} on {_text(m['backbone'])}, {width} x {height} pixels, batches of "
        f"{m['batch_size']}, precision {m['precision']}.</p>\n"
        f'<table class="number">{rows}</table>\n<p>{verdict}</p>{advice}\n'
    )
