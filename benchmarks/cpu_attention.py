"""Training steps and answers on a CPU with torch's fused attention and with attention in three steps, in turn.

    python benchmarks/cpu_attention.py --sizes 168 224 --rounds 3

One network, batches of random pixels; every round runs each way once, and the ratio of a round is its fused time over
the other. Printed: the median ratio of training steps (forward, backward, no optimiser) and of answers, for float32 and
bf16. Above 1 the three steps are faster. `glsim train` takes them for bf16 on CPUs (`glsim.training.adapt`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from glsim.environment import environment
from glsim.models import create_model
from glsim.training.adapt import unfuse_attention


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--sizes", nargs="+", type=int, default=[168, 224])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    a = parser.parse_args()
    print(environment(torch.device("cpu")))
    print("pixels  precision  training step  answer")
    for size in a.sizes:
        images, labels = torch.randn(a.batch_size, 3, size, size), torch.arange(a.batch_size)
        models = [create_model("plain", a.backbone, a.batch_size, size) for _ in range(2)]
        unfuse_attention(models[1])
        for precision in ("float32", "bf16"):
            ways = (partial(way, images, labels, precision == "bf16") for way in (train, answer))
            ratios = [ratio(way, models, a.rounds) for way in ways]
            print(f"{size:6}  {precision:9}  {ratios[0]:13.2f}  {ratios[1]:6.2f}", flush=True)


def train(images: Tensor, labels: Tensor, mixed: bool, model: nn.Module) -> None:
    """Forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = nn.functional.cross_entropy(model(images).logits, labels)
    loss.backward()


def answer(images: Tensor, labels: Tensor, mixed: bool, model: nn.Module) -> None:
    """Forward pass alone."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(images)


def ratio(work: Callable[[nn.Module], None], models: list[nn.Module], rounds: int) -> float:
    """Median over rounds of the first model's seconds over the second's."""
    found = []
    for turn in range(rounds + 1):
        seconds = []
        for model in models:
            start = time.perf_counter()
            work(model)
            seconds.append(time.perf_counter() - start)
        if turn:
            found.append(seconds[0] / seconds[1])
    return statistics.median(found)


if __name__ == "__main__":
    main()
