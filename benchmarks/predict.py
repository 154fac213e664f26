"""What bounds `glsim predict`: its time on many images, beside the model alone and decoding alone.

    python benchmarks/predict.py RUN photos --images 1000 --workers 2

RUN is a bundle, `photos` a folder or glob; its images are taken again from the start where it has fewer than
`--images`. The three are timed one after the other, each over all images: `predict` as the verb does it, the model on
as many batches of images that are in memory, and the loading processes with nothing behind them. On a CPU these share
the cores with the model, so that predict cannot be faster than the cores that both need: its floor is printed too.
Memory is what the process of the model held at most, of `predict`, after a tenth of the images and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from glsim.data.image_files import find_images
from glsim.data.images import BadImage
from glsim.evaluation.peak_memory import resident
from glsim.evaluation.workloads import wait
from glsim.inference.predictor import Predictor


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    s = parser.parse_args(arguments)
    paths = list(islice(cycle(find_images(s.data)), s.images))
    predictor = Predictor(s.source, batch_size=s.batch_size, workers=s.workers, device=s.device)

    found: dict[str, Any] = {"images": s.images, "batch_size": s.batch_size, "workers": s.workers}
    start, used = time.perf_counter(), cpu_seconds()
    for place, answer in enumerate(predictor.stream(paths), start=1):
        if isinstance(answer, BadImage):
            raise answer
        if place == max(1, s.images // 10):
            found["memory_early_mib"] = resident(peak=True) / 2**20
    found["predict_s"] = time.perf_counter() - start
    found["memory_mib"] = resident(peak=True) / 2**20
    found["cpu_s"] = cpu_seconds() - used  # of this process and of the loading ones, which have ended
    found["model_s"] = time_model(predictor, s.images)
    found["decode_s"] = time_decoding(predictor, paths)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found |= {"cores": cores, "floor_s": max(found["model_s"], found["decode_s"], found["cpu_s"] / cores)}
    print(json.dumps(found) if s.json else as_text(found))
    return found


def cpu_seconds() -> float:
    """Seconds that cores worked for this process and for those it started that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@torch.inference_mode()
def time_model(predictor: Predictor, images: int) -> float:
    """Seconds of the model alone on as many images, of noise."""
    batch = torch.randn(predictor.batch_size, 3, *predictor.model.backbone.image_size, device=predictor.device)
    sizes = [predictor.batch_size] * (images // predictor.batch_size) + [images % predictor.batch_size]
    start = time.perf_counter()
    for size in filter(None, sizes):
        predictor.model(batch[:size])
    wait(predictor.device)
    return time.perf_counter() - start


def time_decoding(predictor: Predictor, paths: list[Path]) -> float:
    """Seconds of reading and preparing all images alone."""
    start = time.perf_counter()
    for _ in predictor.loader(paths):
        pass
    return time.perf_counter() - start


def as_text(found: dict[str, Any]) -> str:
    """The seconds as a table, memory below."""
    lines = [f"{found['images']} images, batches of {found['batch_size']}, {found['workers']} loading processes", ""]
    lines += ["| | s | images/s |", "|---|---|---|"]
    names = {"predict_s": "predict", "model_s": "model alone", "decode_s": "decoding alone", "floor_s": "floor"}
    lines += [f"| {name} | {found[key]:.2f} | {found['images'] / found[key]:.1f} |" for key, name in names.items()]
    lines += ["", f"predict: {found['predict_s'] / found['floor_s']:.2f} x its floor, {found['cpu_s']:.2f} s of work"]
    lines[-1] += f" on {found['cores']} cores; memory {found['memory_early_mib']:.0f} MiB after a tenth of the images, "
    return "\n".join([*lines[:-1], f"{lines[-1]}{found['memory_mib']:.0f} MiB at the end"])


if __name__ == "__main__":
    main()
