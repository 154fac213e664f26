"""Memory and speed of boxes as examples, at more and more rows of MegaDetector's results.

    python benchmarks/boxes_growth.py --out runs/boxes_growth

Each size is measured in a process of its own and written to OUT/results.json at once; what is there is not measured
again. A file has 10 boxes for every 3 images. The first images exist, as links to one photograph of 12 megapixels that
is drawn, and some boxes of them are cut out in batches as a loader does it; a box with a margin of 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from glsim.data.detections import find_boxes
from glsim.data.images import by_file, read_regions
from glsim.files import read_json, write_json

SIZE = 4000, 3000  # pixels of the photograph, as cameras in the field take them
EXIST = 300  # images that are there
BATCH = 32


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--cut", type=int, default=200, help="boxes that are cut out of their images")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.out, a.measure, a.cut)))
        return
    a.out.mkdir(parents=True, exist_ok=True)
    results = a.out / "results.json"
    found = read_json(results) if results.exists() else {}
    for rows in a.rows:
        if str(rows) not in found:
            write_boxes(a.out, rows)
            command = [sys.executable, __file__, "--out", str(a.out), "--measure", str(rows), "--cut", str(a.cut)]
            found[str(rows)] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            write_json(results, found)
    print("| boxes | file, MB | read, boxes/s | peak while reading, MB | kept, bytes a box | cut, boxes/s | decoded |")
    print("|---|---|---|---|---|---|---|")
    for rows, r in sorted(found.items(), key=lambda item: int(item[0])):
        kept = r["kept"] / int(rows)
        speed = f"{r['read_per_second']:,.0f} | {r['peak'] / 1e6:,.0f} | {kept:,.0f} | {r['cut_per_second']:,.1f}"
        print(f"| {int(rows):,} | {r['file'] / 1e6:,.1f} | {speed} | {r['decoded']} images for {r['cut']} boxes |")


def image_path(folder: Path, number: int) -> Path:
    """Where an image lies: a thousand in a folder."""
    return folder / "photos" / f"cam{number // 1000:04d}" / f"IMG_{number:07d}.jpg"


def write_boxes(out: Path, rows: int) -> None:
    """The photograph, its links, and a file of so many boxes; what is there stays."""
    photograph = out / "photograph.jpg"
    if not photograph.exists():
        draws = np.random.default_rng(0).integers(0, 255, (SIZE[1] // 50, SIZE[0] // 50, 3), np.uint8)
        Image.fromarray(draws).resize(SIZE, Image.Resampling.BICUBIC).save(photograph, quality=90)
    for number in range(EXIST):
        path = image_path(out, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(os.path.relpath(photograph, path.parent))
    file = out / f"boxes_{rows}.json"
    if file.exists():
        return
    draw, left = random.Random(0), rows
    with file.with_suffix(".tmp").open("w") as text:
        text.write('{"info": {"format_version": "1.5"}, "detection_categories": {"1": "animal"}, "images": [\n')
        for number in range(images_of(rows)):
            count = min(left, 4 if number % 3 == 0 else 3)
            left -= count
            boxes = [[round(draw.uniform(0, 0.7), 4), round(draw.uniform(0, 0.7), 4), 0.2, 0.25] for _ in range(count)]
            found = [{"category": "1", "conf": round(draw.random(), 3), "bbox": box} for box in boxes]
            name = image_path(Path(), number).relative_to("photos").as_posix()
            text.write(",\n" * bool(number) + json.dumps({"file": name, "detections": found}))
        text.write("\n]}\n")
    file.with_suffix(".tmp").rename(file)


def images_of(rows: int) -> int:
    """Images of a file of so many boxes."""
    return -(-3 * rows // 10)


def measure(out: Path, rows: int, cut: int) -> dict[str, float]:
    """Bytes and seconds of one size."""
    file, process = out / f"boxes_{rows}.json", psutil.Process()
    images = [str(image_path(out, number)) for number in range(images_of(rows))]
    before, start = process.memory_info().rss, time.process_time()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    paths = find_boxes(images, {"boxes": file})
    seconds, kept = time.process_time() - start, process.memory_info().rss - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - max(before, peak_before)
    assert len(paths) == rows
    some, start, decoded = paths[:cut], time.process_time(), 0
    for first in range(0, len(some), BATCH):
        for group in by_file(some[first : first + BATCH]):
            decoded += 1
            assert all(isinstance(size, tuple) for size in read_regions(group, lambda picture: picture.size))
    cut_seconds = time.process_time() - start
    return {
        "file": file.stat().st_size,
        "read_per_second": round(rows / seconds, 1),
        "peak": peak,
        "kept": kept,
        "cut": len(some),
        "decoded": decoded,
        "cut_per_second": round(len(some) / cut_seconds, 2),
    }


if __name__ == "__main__":
    main()
