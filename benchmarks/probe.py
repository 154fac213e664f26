"""What is a crop worth? Rules of selection screened on a frozen network: linear classifiers on image and crop tokens.

    python benchmarks/probe.py --data cub20 --weights dinov2_small.safetensors --out probe          # choose, on train
    python benchmarks/probe.py --data cub20 --weights dinov2_small.safetensors --out probe --test   # measure

The network stays as it is; a rule costs one more pass over the images instead of a fine-tuning. Images are squeezed to
`--size` for the first pass, and to `--detail` times that for what crops are cut out of; a crop is `--size` again. The
features are the class token of the image, and of the crop behind it; the classifier is multinomial logistic regression
(L-BFGS, features standardised, `--l2`).

Without `--test` accuracy is that of `--folds` stratified folds of train, each answered by a classifier of the others:
rules are chosen by it. With `--test` the classifier of all of train answers test, once. `+a -b` are the images that
image and crop answer right and the image alone does not, and the reverse; p is McNemar's exact test. With `boxes.csv`
(`path,left,top,right,bottom`, paths relative to the data) beside the data the rows say how well a rule's box matches,
and the rule `annotated` crops it: the upper bound.

Tokens are kept in OUT by rule, so that a rule is encoded once; OUT/cv.json and OUT/test.json are written after every
rule. A rule is `SCORES/SHAPE[/detail]`; `--rules` takes patterns of fnmatch.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from glsim.data.images import read_image
from glsim.data.readers import read_data
from glsim.evaluation.statistics import mcnemar
from glsim.files import write_json
from glsim.models.backbone import Backbone, build_backbone
from glsim.models.boxes import crop_and_resize, place_boxes
from glsim.models.scores import largest_component

MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


class Seen(NamedTuple):
    """What the first pass over all images left: the class token, patches after the final norm, attention rows."""

    cls: Tensor  # (B, D)
    patches: Tensor  # (B, N, D)
    rows: Tensor  # (B, L, N): attention of the class token in every block, mean over heads
    middle: Tensor  # (B, N, D): patches after block 9 of 12, before the norm
    grid: tuple[int, int]


# --- scores: Seen -> (B, N), higher is better --------------------------------------------------------------------------


def gls(cls: Tensor, patches: Tensor) -> Tensor:
    return torch.einsum("bd,bnd->bn", F.normalize(cls, dim=-1), F.normalize(patches, dim=-1))


def centred(s: Seen) -> Tensor:
    mean = s.patches.mean(dim=1)
    return gls(s.cls - mean, s.patches - mean[:, None])


def component(s: Seen) -> Tensor:
    """First principal component of the patches, its sign such that the border is low."""
    x = s.patches - s.patches.mean(dim=1, keepdim=True)
    _, _, v = torch.linalg.svd(x, full_matrices=False)
    p = torch.einsum("bnd,bd->bn", x, v[:, 0]).unflatten(1, s.grid)
    border = torch.cat((p[:, 0], p[:, -1], p[:, :, 0], p[:, :, -1]), dim=1).mean(dim=1)
    return (p * -(border - p.mean(dim=(1, 2))).sign()[:, None, None]).flatten(1)


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)


SCORES: dict[str, Callable[[Seen], Tensor]] = {
    "gls": lambda s: gls(s.cls, s.patches),
    "centred": centred,
    "l2": lambda s: -(s.cls[:, None] - s.patches).square().mean(dim=-1),
    "att12": lambda s: s.rows[:, -1],
    "att11": lambda s: s.rows[:, -2],
    "att10": lambda s: s.rows[:, -3],
    "pca": component,
    "both": lambda s: standard(centred(s)) + standard(s.rows[:, -2].log()),
    "border": lambda s: -gls(border_mean(s), s.patches),
    "contrast": lambda s: gls(s.cls, s.patches) - gls(border_mean(s), s.patches),
    "object": lambda s: standard(centred(s)) - standard(gls(border_mean(s), s.patches)),
}


def border_mean(s: Seen) -> Tensor:
    """Mean patch of the border (B, D), which mostly shows what is not the object."""
    p = s.patches.unflatten(1, s.grid)
    return torch.cat((p[:, 0], p[:, -1], p[:, 1:-1, 0], p[:, 1:-1, -1]), dim=1).mean(dim=1)


# --- shapes: (scores (B, N), grid, side) -> boxes (B, 4) in pixels of a square of `side` ----------------------------------


def extent(mask: Tensor, side: int, wider: int = 0, published: bool = False) -> Tensor:
    """The box around what is True in `mask` (B, rows, cols), `wider` patches wider."""
    ends = []
    for lines in (mask.any(dim=1), mask.any(dim=2)):  # columns, rows
        count = lines.shape[1]
        first = lines.long().argmax(dim=1)
        last = count - 1 - lines.long().flip(1).argmax(dim=1)
        end = torch.maximum(last, first + 1) if published else last + 1
        ends.append(((first - wider).clamp(min=0) * side // count, (end + wider).clamp(max=count) * side // count))
    (left, right), (top, bottom) = ends
    return torch.stack((left, top, right, bottom), dim=1)


def top(count: float, group: bool = False, wider: int = 0, published: bool = False) -> Callable[..., Tensor]:
    """Around the best `count` patches (a share of the grid below 1), or the largest connected group of them."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        k = round(count * scores.shape[1]) if count < 1 else int(count)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)
        mask = largest_component(mask, grid) if group else mask
        return extent(mask.unflatten(1, grid), side, wider, published)

    return draw


def otsu(wider: int = 0) -> Callable[..., Tensor]:
    """Around the largest group above the threshold that parts scores best in two (Otsu 1979)."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        ordered = scores.sort(dim=1).values
        n = scores.shape[1]
        k = torch.arange(1, n)
        total = ordered.cumsum(dim=1)
        low = total[:, :-1] / k
        high = (total[:, -1:] - total[:, :-1]) / (n - k)
        best = (k * (n - k) * (high - low).square()).argmax(dim=1, keepdim=True)
        mask = scores > ordered.gather(1, best)
        return extent(largest_component(mask, grid).unflatten(1, grid), side, wider)

    return draw


def window(share: float) -> Callable[..., Tensor]:
    """The box of `share` of the sides with the highest mean score."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        size = round(share * grid[0])
        means = F.avg_pool2d(scores.unflatten(1, grid)[:, None], size, stride=1)
        best = means.flatten(1).argmax(dim=1)
        row, col = best // means.shape[-1], best % means.shape[-1]
        lines = torch.stack((col, row, col + size, row + size), dim=1)
        return lines * side // grid[0]

    return draw


def spread(deviations: float, sharp: float = 1.5) -> Callable[..., Tensor]:
    """As far around the weighted middle as the scores spread, weights by the softmax of standardised scores."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        w = (sharp * standard(scores)).softmax(dim=1)
        n = torch.arange(scores.shape[1])
        ends = []
        for lines, count in ((n % grid[1], grid[1]), (n // grid[1], grid[0])):
            place = (lines + 0.5) / count
            middle = (w * place).sum(dim=1)
            half = deviations * (w * (place - middle[:, None]).square()).sum(dim=1).sqrt()
            half = half.clamp(min=0.1)
            ends.append((((middle - half).clamp(min=0) * side).floor(), ((middle + half).clamp(max=1) * side).ceil()))
        (left, right), (up, down) = ends
        return torch.stack((left, up, right, down), dim=1).long()

    return draw


def square(shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same box, its shorter side as long as the longer one, moved inside the image."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        b = shape(scores, grid, side)
        length = (b[:, 2:] - b[:, :2]).amax(dim=1, keepdim=True)
        start = ((b[:, :2] + b[:, 2:] - length) // 2).clamp(min=0)
        start = torch.minimum(start, side - length)
        return torch.cat((start, start + length), dim=1)

    return draw


def at_random(shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        b = shape(scores, grid, side)
        return place_boxes(b, (side, side), torch.rand(len(b), 2, generator=torch.Generator().manual_seed(0)).double())

    return draw


def in_the_middle(shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        b = shape(scores, grid, side)
        return place_boxes(b, (side, side), torch.full((len(b), 2), 0.5, dtype=torch.double))

    return draw


def middle(share: float) -> Callable[..., Tensor]:
    """The box of `share` of the sides in the middle."""

    def draw(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
        low = round((1 - share) / 2 * side)
        return torch.tensor([low, low, side - low, side - low]).expand(len(scores), 4)

    return draw


SHAPES: dict[str, Callable[..., Tensor]] = {
    "published": top(8, published=True),
    "top8": top(8),
    **{f"top{p}": top(p / 100) for p in (10, 15, 20, 25, 30)},
    **{f"group{p}": top(p / 100, True) for p in (10, 15, 20, 25, 30)},
    **{f"group{p}+1": top(p / 100, True, 1) for p in (10, 15, 20, 25, 30)},
    **{f"group{p}+2": top(p / 100, True, 2) for p in (10, 15)},
    "otsu": otsu(),
    "otsu+1": otsu(1),
    **{f"window{p}": window(p / 100) for p in (50, 60, 67, 75)},
    **{f"spread{d}": spread(d / 100) for d in (125, 150, 175, 200)},
    **{f"spread{d}s2": spread(d / 100, 2.0) for d in (150, 175, 200)},
    **{f"middle{p}": middle(p / 100) for p in (50, 60, 70, 80)},
}
SHAPES |= {
    f"square-{name}": square(SHAPES[name])
    for name in ("group15", "group20", "group10+1", "group20+1", "otsu+1", "spread150")
}
SHAPES |= {
    f"random-{name}": at_random(SHAPES[name]) for name in ("top8", "group10+1", "group15", "group20+1", "spread150")
}
SHAPES |= {
    f"centre-{name}": in_the_middle(SHAPES[name]) for name in ("top8", "group10+1", "group15", "group20+1", "spread150")
}


# --- the frozen network ---------------------------------------------------------------------------------------------------


def network(name: str, weights: str, size: int) -> Backbone:
    backbone = build_backbone(name, size).eval()
    backbone.net.load_state_dict(checkpoint_filter_fn(load_file(weights), backbone.net))
    return backbone


def pixels(paths: list[Path], side: int, kept: Path) -> Tensor:
    """The images squeezed to `side` (bicubic), uint8 (B, 3, side, side)."""
    if not kept.exists():
        images = [read_image(p, lambda image: squeezed(image, side)) for p in paths]
        save_file({"images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()}, kept)
    return load_file(kept)["images"]


def squeezed(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def first_pass(net: Backbone, images: Tensor, kept: Path, batch: int) -> Seen:
    if not kept.exists():
        parts: dict[str, list[Tensor]] = {"cls": [], "patches": [], "rows": [], "middle": []}
        for chunk in images.split(batch):
            x = normalised(chunk)
            with torch.autocast("cpu", torch.bfloat16):
                f = net(x, attention="maps")
                (middle,) = net.net.forward_intermediates(x, indices=[8], output_fmt="NLC", intermediates_only=True)
            parts["cls"].append(f.cls.float())
            parts["patches"].append(f.patches.to(torch.bfloat16))
            parts["rows"].append(torch.stack([a[:, :, 0, net.skip :].float().mean(dim=1) for a in f.attention_maps], 1))
            parts["middle"].append(middle.to(torch.bfloat16))
        save_file({k: torch.cat(v) for k, v in parts.items()}, kept)
    d = load_file(kept)
    side = int(d["patches"].shape[1] ** 0.5)
    return Seen(d["cls"], d["patches"].float(), d["rows"], d["middle"].float(), (side, side))


@torch.inference_mode()
def tokens(net: Backbone, images: Tensor, boxes: Tensor, size: int, batch: int) -> Tensor:
    """Class tokens (B, D) of the crops `boxes` (B, 4) of `images`, at `size`."""
    out = []
    for chunk, box in zip(images.split(batch), boxes.split(batch), strict=True):
        crops = crop_and_resize(normalised(chunk), box, (size, size))
        with torch.autocast("cpu", torch.bfloat16):
            out.append(net.class_token(crops).float())
    return torch.cat(out)


# --- the classifier ---------------------------------------------------------------------------------------------------------


def answers(train: Tensor, labels: Tensor, test: Tensor, l2: float) -> Tensor:
    """Predicted classes of `test` (M, D) by logistic regression on `train` (n, D)."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    x, y = (train - mean) / std, (test - mean) / std
    w = torch.zeros(x.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w[:-1] + w[-1], labels) + l2 * w[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (y @ w[:-1] + w[-1]).argmax(dim=1)


def folds(labels: Tensor, count: int) -> Tensor:
    """The fold of each image: the images of a class are dealt out in turn, in an order drawn once."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fold = torch.empty_like(labels)
    for c in labels.unique():
        mine = order[labels[order] == c]
        fold[mine] = torch.arange(len(mine)) % count
    return fold


def cross_validated(x: Tensor, labels: Tensor, count: int, l2: float) -> Tensor:
    fold, out = folds(labels, count), torch.empty_like(labels)
    for k in range(count):
        out[fold == k] = answers(x[fold != k], labels[fold != k], x[fold == k], l2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--out", type=Path, default=Path("probe"))
    parser.add_argument("--size", type=int, default=168)
    parser.add_argument("--first", type=int, help="of the first pass; default: --size")
    parser.add_argument("--detail", type=float, default=2)
    parser.add_argument("--rules", nargs="*", default=[])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--l2", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--larger", type=int, nargs="*", default=[], help="image alone at these sizes too")
    parser.add_argument("--test", action="store_true")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    first = a.first or a.size
    big = int(a.size * a.detail)

    splits = read_data(a.data)
    train, test = splits["train"], splits["test"]
    paths = [*train.paths, *test.paths]
    labels, n = torch.tensor([*train.labels, *test.labels]), len(train.paths)
    net = network(a.backbone, a.weights, a.size)
    images = {s: pixels(paths, s, a.out / f"pixels_{s}.safetensors") for s in {first, a.size, big, *a.larger}}
    seen = first_pass(net, images[first], a.out / f"first_{first}.safetensors", a.batch)
    table = a.data / "boxes.csv"
    known = None
    if table.exists():
        with table.open() as file:
            rows = {r["path"]: [int(r[k]) for k in ("left", "top", "right", "bottom")] for r in csv.DictReader(file)}
        shares = []
        for p in paths:
            with Image.open(p) as im:
                w, h = im.size
            left, up, right, down = rows[p.relative_to(a.data.resolve() if p.is_absolute() else a.data).as_posix()]
            shares.append([left / w, up / h, right / w, down / h])
        known = torch.tensor(shares)

    def kept_tokens(name: str, boxes: Tensor, source: Tensor) -> Tensor:
        kept = a.out / f"crop_{first}_{a.size}_{name.replace('/', '__')}.safetensors"
        if not kept.exists():
            save_file({"tokens": tokens(net, source, boxes, a.size, a.batch), "boxes": boxes.contiguous()}, kept)
        return load_file(kept)["tokens"]

    def measured(x: Tensor) -> Tensor:
        if a.test:
            return answers(x[:n], labels[:n], x[n:], a.l2) == labels[n:]
        return cross_validated(x[:n], labels[:n], a.folds, a.l2) == labels[:n]

    report = a.out / ("test.json" if a.test else "cv.json")
    results: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    alone = measured(seen.cls)

    def note(name: str, both: Tensor, only: Tensor | None, boxes: Tensor | None, side: int = 1) -> None:
        b, c = int((both & ~alone).sum()), int((alone & ~both).sum())
        row: dict[str, Any] = {"image_and_crop": round(100 * both.float().mean().item(), 1), "won": b, "lost": c}
        row["p"] = round(mcnemar(b, c), 4)
        if only is not None:
            row["crop_alone"] = round(100 * only.float().mean().item(), 1)
        if boxes is not None:
            share = boxes.float() / side
            area = (share[:, 2] - share[:, 0]) * (share[:, 3] - share[:, 1])
            row["area"] = round(area.mean().item(), 3)
            if known is not None:
                inner = (torch.minimum(share[:, 2:], known[:, 2:]) - torch.maximum(share[:, :2], known[:, :2])).clamp(
                    min=0
                )
                both_area = inner[:, 0] * inner[:, 1]
                true = (known[:, 2] - known[:, 0]) * (known[:, 3] - known[:, 1])
                row["iou"] = round((both_area / (area + true - both_area)).mean().item(), 3)
                row["covered"] = round((both_area / true).mean().item(), 3)
        results[name] = row
        write_json(report, results)
        print(f"{name:40}", json.dumps(row), flush=True)

    note("none", alone, None, None)
    for size in a.larger:
        kept = a.out / f"large_{size}.safetensors"
        if not kept.exists():
            whole = torch.tensor([0, 0, size, size]).expand(len(paths), 4)
            save_file({"tokens": tokens(net, images[size], whole, size, a.batch)}, kept)
        large = load_file(kept)["tokens"]
        note(f"image at {size}", measured(large), None, None)
    every = ["annotated", "annotated+10", *(f"{s}/{b}" for s in SCORES for b in SHAPES)]
    wanted = [r for pattern in a.rules for r in [*every, *(f"{r}/detail" for r in every)] if fnmatch(r, pattern)]
    for rule in dict.fromkeys(wanted):
        start = time.monotonic()
        detail = rule.endswith("/detail")
        side = big if detail else first
        name = rule.removesuffix("/detail")
        if name.startswith("annotated"):
            wider = 0.05 if name.endswith("+10") else 0.0
            grown = known + torch.tensor([-wider, -wider, wider, wider])
            boxes = (grown.clamp(0, 1) * side).round().long()
        else:
            score, shape = name.split("/")
            boxes = SHAPES[shape](SCORES[score](seen), seen.grid, side)
        crops = kept_tokens(rule, boxes, images[side])
        note(rule, measured(torch.cat((seen.cls, crops), dim=1)), measured(crops), boxes, side)
        results[rule]["seconds"] = round(time.monotonic() - start, 1)


if __name__ == "__main__":
    main()
