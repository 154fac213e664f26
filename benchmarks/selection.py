"""Time of choosing patches alone: row form against the published matrix form, and GLS, on tokens and attention maps.

    python benchmarks/selection.py                     # ViT-B/16 at 448 pixels
    python benchmarks/selection.py --image-size 224 --repeats 20

One image, float32. `rollout` sees the usual grid, `psm` its own overlapping one (stride 0.75 of the patch) and all
blocks but the last, as published. Both forms are given the maps after the softmax, as the network leaves them; `read`
sums them up, which is the least that reading them takes. The forms have to agree before anything is timed. All have
their turns in rounds; a turn lasts 50 ms or one call, so that what is small (the tokens) stays in the cache, as it is
when a network has just written it, and what is large (the maps) does not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glsim.evaluation.speed import in_turn
from glsim.models.scores import METRICS
from glsim.types import Features

DEPTH, HEADS, DIM, PATCH = 12, 12, 768, 16
GOALS = (
    ("psm, matrices", "psm, rows", "at least 50"),
    ("rollout, matrices", "rollout, rows", ""),
    ("rollout, rows", "rollout, read", "about 1"),
    ("psm, rows", "psm, read", "about 1"),
    ("psm, rows", "gls_cos", "at least 50"),
    ("rollout, rows", "gls_cos", "at least 50"),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, check, time, print; returns the medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    usual = features(given.image_size, PATCH, DEPTH, given.device)
    overlapping = features(given.image_size, PATCH * 3 // 4, DEPTH - 1, given.device)

    apart = {
        "rollout": check("rollout", METRICS["rollout"](usual), rollout_matrix(usual)),
        "psm": check("psm", METRICS["psm"](overlapping), psm_matrix(overlapping)),
    }
    works: dict[str, Callable[[], Tensor]] = {
        "gls_cos": lambda: METRICS["gls_cos"](usual),
        "rollout, rows": lambda: METRICS["rollout"](usual),
        "rollout, matrices": lambda: rollout_matrix(usual),
        "rollout, read": lambda: read(usual),
        "psm, rows": lambda: METRICS["psm"](overlapping),
        "psm, matrices": lambda: psm_matrix(overlapping),
        "psm, read": lambda: read(overlapping),
    }

    calls = {name: calls_in(work) for name, work in works.items()}

    def turn(name: str) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls[name]):
                finish(works[name])

        return repeat

    found = in_turn({name: turn(name) for name in works}, 1, given.repeats)
    medians: dict[str, float] = {}
    for name, times in found.items():
        if isinstance(times, Exception):
            raise times
        medians[name] = 1000 * statistics.median(times) / calls[name]
    patches = [f.patches.shape[1] for f in (usual, overlapping)]
    print(f"{given.image_size} pixels, {patches[0]} patches, psm {patches[1]}; threads: {torch.get_num_threads()}")
    for name, difference in apart.items():
        print(f"{name}: rows and matrices differ by {difference:.0e} of a value at most")
    print("\n| | ms |\n|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} |")
    print("\n| | times | goal |\n|---|---|---|")
    for one, other, goal in GOALS:
        print(f"| {one} : {other} | {medians[one] / medians[other]:.2f} | {goal} |")
    return medians


def finish(work: Callable[[], Tensor]) -> float:
    """Call it and wait for the device."""
    return float(work().flatten()[0])


def calls_in(work: Callable[[], Tensor], seconds: float = 0.05) -> int:
    """How many calls last that long, one at least."""
    finish(work)
    start = time.perf_counter()
    finish(work)
    return max(1, math.ceil(seconds / (time.perf_counter() - start)))


def features(size: int, stride: int, depth: int, device: str) -> Features:
    """Random tokens and attention maps of one image, of ViT-B's shape."""
    side = (size - PATCH) // stride + 1
    n = side * side + 1
    tokens = torch.randn(1, n, DIM, device=device)
    maps = tuple((2 * torch.randn(1, HEADS, n, n, device=device)).softmax(dim=-1) for _ in range(depth))
    return Features(tokens[:, 0], tokens[:, 1:], (side, side), 1, attention_maps=maps)


def read(f: Features) -> Tensor:
    """The sum of every map: each is read once."""
    return torch.stack([a.sum() for a in f.attention_maps or ()])


def rollout_matrix(f: Features) -> Tensor:
    """arXiv 2005.00928: the whole product of (mean over heads + I) with rows normalised; row 0 is read. (1, 1, N)"""
    product = None
    for maps in f.attention_maps or ():
        a = maps.mean(dim=1) + torch.eye(maps.shape[-1], device=maps.device)
        a = a / a.sum(dim=-1, keepdim=True)
        product = a if product is None else a @ product
    assert product is not None
    return product[:, None, 0, 1:]


def psm_matrix(f: Features) -> Tensor:
    """arXiv 2103.07976: the whole product of the maps of each head; row 0 is read. (1, h, N)"""
    product = None
    for maps in f.attention_maps or ():
        product = maps if product is None else maps @ product
    assert product is not None
    return product[:, :, 0, 1:]


def check(name: str, rows: Tensor, matrices: Tensor) -> float:
    """The largest relative difference of both forms; raises unless they agree to float32 rounding."""
    torch.testing.assert_close(rows, matrices, rtol=1e-5, atol=0, msg=lambda text: f"{name}: {text}")
    return float(((rows - matrices) / matrices).abs().max())


if __name__ == "__main__":
    main()
