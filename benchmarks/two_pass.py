"""GLSim's two passes against the bare timm backbone, and where their time goes: goals and profile in one run.

    python benchmarks/two_pass.py                                    # ViT-S and ViT-B, 224 and 448, batch 1 and 8
    python benchmarks/two_pass.py --backbones vit_small_patch16_224 --sizes 224 --repeats 20
    python benchmarks/two_pass.py --device cuda --dtype bfloat16 --batch-sizes 1 8 64

timm's model, `plain`, `glsim` and `glsim` step by step have their turns in rounds, so that a busy moment falls on all;
inference mode, eager. The first table divides by timm's model at the same settings: GLSim whole, goal 2.05 (2 is the
arithmetic floor), and all of it but the two passes in percent, goal 2.5. The second one is the profile: ms of the
median round and percent of their sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from glsim import create_model
from glsim.environment import environment, pick_device
from glsim.evaluation.speed import in_turn, wait
from glsim.models.boxes import crop_and_resize, select
from glsim.models.scores import needs_attention, score

CLASSES = 200
PASSES = ("first pass", "second pass")  # the rest is what GLSim adds to them


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, time, print; returns a row a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    s = parser.parse_args(arguments)
    device, dtype = pick_device(s.device), getattr(torch, s.dtype)
    settings = list(product(s.backbones, s.sizes, s.batch_sizes))
    rows = []
    with tqdm(total=len(settings) * 4 * (s.warmup + s.repeats), unit="turn", disable=None) as bar:
        for backbone, size, batch in settings:
            bar.set_description(f"{backbone} {size} {batch}")
            rows.append(measure(backbone, size, batch, dtype, device, s.warmup, s.repeats, bar.update))
    about = environment(device)
    print(json.dumps({"rows": rows, "environment": about}) if s.json else f"{about['device']}\n\n{as_text(rows)}")
    return rows


@torch.inference_mode()
def measure(
    backbone: str,
    size: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    warmup: int,
    repeats: int,
    tick: Callable[[], object],
) -> dict[str, Any]:
    """Medians in ms: of `timm`, `plain`, `glsim`, and of every part of the last; their ratios to timm."""
    torch.manual_seed(0)
    models: dict[str, Any] = {"timm": timm.create_model(backbone, num_classes=CLASSES, img_size=size)}
    models |= {name: create_model(name, backbone, CLASSES, size) for name in ("plain", "glsim")}
    for model in models.values():
        model.eval().to(device, dtype)
    glsim = models["glsim"]
    torch.nn.init.normal_(glsim.head.linear.weight, std=0.02)  # or all answers would be equal
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    torch.testing.assert_close(step_by_step(glsim, images, device)[0], glsim(images).logits)
    rounds: list[dict[str, float]] = []

    def whole(model: Any) -> Callable[[], None]:
        return lambda: (model(images), wait(device))[1]

    works = {name: whole(model) for name, model in models.items()}
    works["parts"] = lambda: rounds.append(step_by_step(glsim, images, device)[1])
    medians: dict[str, float] = {}
    for name, times in in_turn(works, warmup, repeats, tick).items():
        if isinstance(times, Exception):
            raise times
        medians[name] = 1000 * statistics.median(times)
    rounds = rounds[warmup:]
    parts = {name: 1000 * statistics.median(r[name] for r in rounds) for name in rounds[0]}
    added = 1000 * statistics.median(sum(t for name, t in r.items() if name not in PASSES) for r in rounds)
    row = {"backbone": backbone, "image_size": size, "batch_size": batch}
    row |= {f"{name}_ms": medians[name] for name in models}
    row |= {"plain_ratio": medians["plain"] / medians["timm"], "glsim_ratio": medians["glsim"] / medians["timm"]}
    return row | {"added_percent": 100 * added / medians["timm"], "parts_ms": parts}


def step_by_step(model: Any, images: Tensor, device: torch.device) -> tuple[Tensor, dict[str, float]]:
    """The forward of GLSim with a clock between its lines: logits, and the seconds of every part."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def done(part: str) -> None:
        nonlocal start
        wait(device)
        now = time.perf_counter()
        seconds[part], start = now - start, now

    f = model.features(images, attention=needs_attention(model.metric))
    done("first pass")
    scores = score(model.metric, f)
    done("score")
    selection = select(scores, model.top_o, f.grid, images.shape[-2:], model.box)
    done("box")
    crops = crop_and_resize(images, selection.boxes, model.crop_size)
    done("crop")
    local = model.backbone.class_token(crops)
    done("second pass")
    logits = model.head(model.aggregator(torch.stack((f.cls, local), dim=1)))
    done("aggregator, head")
    return logits, seconds


def as_text(rows: list[dict[str, Any]]) -> str:
    """Goals and profile as tables."""
    lines = ["| backbone | size | batch | timm ms | plain | GLSim (goal 2.05) | added (goal 2.5 %) |"]
    lines.append("|" + "---|" * 7)
    for r in rows:
        where = f"| {r['backbone']} | {r['image_size']} | {r['batch_size']} |"
        ratios = f"{r['plain_ratio']:.3f} | {r['glsim_ratio']:.3f} | {r['added_percent']:.2f} %"
        lines.append(f"{where} {r['timm_ms']:,.1f} | {ratios} |")
    names = list(rows[0]["parts_ms"])
    lines += ["", f"| backbone | size | batch | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for r in rows:
        total = sum(r["parts_ms"].values())
        cells = [f"{ms:,.2f} ({100 * ms / total:.2f} %)" for ms in r["parts_ms"].values()]
        lines.append(f"| {r['backbone']} | {r['image_size']} | {r['batch_size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
