"""What is a crop worth? Rules of selection screened on a frozen network: linear classifiers on image and crop tokens.

    python benchmarks/probe.py --data cub20 --weights dinov2_small.safetensors --out probe          # choose, on train
    python benchmarks/probe.py --data cub20 --weights dinov2_small.safetensors --out probe --test   # measure, once

The network stays as it is, so a rule costs one more pass over the images, about a minute, instead of a fine-tuning.
Images are squeezed to `--first` pixels for the first pass (default: `--size`), crops are `--size` pixels; a rule that
ends in `/detail` cuts them out of the images at `--detail` pixels, any other one out of what the first pass saw.
Features are the class token of the image and, behind it, of the crop; the classifier is multinomial logistic
regression (L-BFGS on standardised features, weight decay `--l2`).

Without `--test` accuracy is that of 5 stratified folds of train, each answered by a classifier of the others: rules are
chosen by it. With `--test` a classifier of all of train answers test. `won` and `lost` are the images that image and
crop answer right and the image alone does not, and the reverse; `p` is McNemar's exact test of them. `--boxes` (CSV,
`path,left,top,right,bottom`, paths relative to the data) adds how a rule's boxes lie, and the rule `annotated`, which
crops those boxes: the upper bound. `image at N` is the image alone at N pixels: 238 cost as much as two passes at 168.

A rule is `SCORES/SHAPE[/detail]`, a control `random-SHAPE` or `centre-SHAPE`; `--rules` takes patterns (`gls/*`,
`border/moments*/detail`). Tokens stay in OUT, a file a rule, so that nothing is encoded twice; OUT/cv.json and
OUT/test.json are written after every rule.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import glsim
from glsim.data.annotations import fit, read_annotations
from glsim.data.images import read_image
from glsim.data.readers import read_data
from glsim.evaluation.statistics import mcnemar
from glsim.files import read_json, write_json
from glsim.models import boxes as rules
from glsim.models.backbone import Backbone
from glsim.models.boxes import boxes_from_mask, crop_and_resize, place_boxes
from glsim.models.scores import METRICS, largest_component
from glsim.types import Features

FOLDS = 5
BLOCK = -2  # of whose attention maps `attention` is: the last one's are worse (../docs/results/selection.md)
Grid = tuple[int, int]
Shape = Callable[[Tensor, Grid, int], Tensor]  # scores (B, N), grid, side of the image -> boxes (B, 4)

# --- scores: features of the first pass -> (B, N), higher is better ---------------------------------------------------


def standard(scores: Tensor) -> Tensor:
    """Scores (B, N) with mean 0 and deviation 1."""
    return (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)


def centred(f: Features) -> Tensor:
    """Cosine of what class token and patches have beyond the mean patch."""
    mean = f.patches.mean(dim=1)
    return METRICS["gls_cos"](f._replace(cls=f.cls - mean, patches=f.patches - mean[:, None]))[:, 0]


def unlike_border(f: Features) -> Tensor:
    """How little a patch resembles the border; the class token is not read."""
    return METRICS["gls_border"](f)[:, 0] - METRICS["gls_cos"](f)[:, 0]


def component(f: Features) -> Tensor:
    """First principal component of the patches, its sign such that the border is low."""
    apart = f.patches - f.patches.mean(dim=1, keepdim=True)
    first = torch.linalg.svd(apart, full_matrices=False)[2][:, 0]
    scores = torch.einsum("bnd,bd->bn", apart, first)
    inner = scores.unflatten(1, f.grid)[:, 1:-1, 1:-1].mean(dim=(1, 2))
    return scores * (inner - scores.mean(dim=1)).sign()[:, None]


SCORES: dict[str, Callable[[Features], Tensor]] = {
    "gls": lambda f: METRICS["gls_cos"](f)[:, 0],
    "border": lambda f: METRICS["gls_border"](f)[:, 0],
    "unlike": unlike_border,
    "centred": centred,
    "object": lambda f: standard(centred(f)) + standard(unlike_border(f)),
    "component": component,
    "attention": lambda f: METRICS["attention"](f, block=BLOCK)[:, 0],
    "last": lambda f: METRICS["attention"](f)[:, 0],
    "both": lambda f: standard(centred(f)) + standard(METRICS["attention"](f, block=BLOCK)[:, 0].log()),
}

# --- shapes -----------------------------------------------------------------------------------------------------------


def best(count: float, rule: str) -> Shape:
    """The package's box around the best `count` patches, a share of the grid below 1."""
    return lambda scores, grid, side: rules.select(scores[:, None], count, grid, (side, side), rule).boxes


def group(share: float, wider: int = 0) -> Shape:
    """The box around the largest connected group among the best `share` of the patches, `wider` patches wider."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        count = round(share * scores.shape[1])
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count, dim=1).indices, True)
        return boxes_from_mask(largest_component(mask, grid).unflatten(1, grid), (side, side), wider / grid[0])

    return draw


def otsu(scores: Tensor, grid: Grid, side: int) -> Tensor:
    """The box around the largest group above the threshold that parts scores best in two (Otsu 1979)."""
    ordered, n = scores.sort(dim=1).values, scores.shape[1]
    below, total = torch.arange(1, n), ordered.cumsum(dim=1)
    low, high = total[:, :-1] / below, (total[:, -1:] - total[:, :-1]) / (n - below)
    threshold = ordered.gather(1, (below * (n - below) * (high - low).square()).argmax(dim=1, keepdim=True))
    return boxes_from_mask(largest_component(scores > threshold, grid).unflatten(1, grid), (side, side))


def window(share: float) -> Shape:
    """The box of `share` of the sides with the highest mean score."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        size = round(share * grid[0])
        means = F.avg_pool2d(scores.unflatten(1, grid)[:, None], size, stride=1)
        first = means.flatten(1).argmax(dim=1)
        row, col = first // means.shape[-1], first % means.shape[-1]
        return torch.stack((col, row, col + size, row + size), dim=1) * side // grid[0]

    return draw


def moments(deviations: float, sharpness: float = rules.SHARPNESS) -> Shape:
    """The package's box by moments, with other constants."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        return rules.boxes_from_moments(scores, grid, (side, side), deviations, sharpness)

    return draw


def middle(share: float) -> Shape:
    """The box of `share` of the sides in the middle."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        low = round((1 - share) / 2 * side)
        return torch.tensor([low, low, side - low, side - low]).expand(len(scores), 4)

    return draw


def square(shape: Shape) -> Shape:
    """The same box, its shorter side as long as the longer one, moved inside the image."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        boxes = shape(scores, grid, side)
        length = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
        start = torch.minimum(((boxes[:, :2] + boxes[:, 2:] - length) // 2).clamp(min=0), side - length)
        return torch.cat((start, start + length), dim=1)

    return draw


def elsewhere(shape: Shape, at_random: bool) -> Shape:
    """A control: a box of the same size, at a random place or in the middle."""

    def draw(scores: Tensor, grid: Grid, side: int) -> Tensor:
        boxes = shape(scores, grid, side)
        share = torch.rand(len(boxes), 2, generator=torch.Generator().manual_seed(0)).double()
        return place_boxes(boxes, (side, side), share if at_random else torch.full_like(share, 0.5))

    return draw


SHAPES: dict[str, Shape] = {
    "published": best(8, "exclusive"),
    "inclusive": best(8, "inclusive"),
    **{f"group{p}": group(p / 100) for p in (10, 15, 20)},
    **{f"group{p}+1": group(p / 100, 1) for p in (10, 15, 20)},
    "otsu": otsu,
    **{f"window{p}": window(p / 100) for p in (60, 67)},
    **{f"moments{p}": moments(p / 100) for p in (125, 150, 175, 200)},
    **{f"sharper{p}": moments(p / 100, 2.0) for p in (150, 175)},
    **{f"middle{p}": middle(p / 100) for p in (60, 70, 80)},
}
SHAPES |= {f"square-{name}": square(SHAPES[name]) for name in ("group15", "moments150")}
for _name in ("inclusive", "group10+1", "moments150", "moments175"):
    SHAPES |= {f"random-{_name}": elsewhere(SHAPES[_name], True), f"centre-{_name}": elsewhere(SHAPES[_name], False)}

# --- the frozen network -----------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """All images of train and, from `count` on, of test."""

    paths: list[Path]
    labels: Tensor
    count: int
    known: Tensor | None  # annotators' boxes (B, 4) in shares of the sides


def read_images(data: Path, boxes: Path | None) -> Images:
    """Paths, labels and, where there are any, boxes."""
    splits = read_data(data)
    paths = [*splits["train"].paths, *splits["test"].paths]
    labels = torch.tensor([*splits["train"].labels, *splits["test"].labels])
    known = None
    if boxes is not None:
        found = read_annotations(boxes)
        shares = []
        for path in paths:
            size = read_image(path, lambda image: image.size)
            told = found[path.resolve().relative_to(data.resolve()).as_posix()]
            assert not isinstance(told, Path)
            shares.append(torch.tensor(fit(told, size).boxes[0].sides) / torch.tensor([*size, *size]))
        known = torch.stack(shares)
    return Images(paths, labels, len(splits["train"].paths), known)


def pixels(paths: list[Path], side: int, kept: Path) -> Tensor:
    """The images squeezed to `side` (bicubic), uint8 (B, 3, side, side)."""

    def squeezed(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    if not kept.exists():
        stacked = np.stack([read_image(path, squeezed) for path in paths])
        save_file({"images": torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()}, kept)
    return load_file(kept)["images"]


@torch.inference_mode()
def first_pass(net: Backbone, images: Tensor, kept: Path, batch: int) -> Features:
    """What the first pass over all images says, attention of the class token alone, mean over heads."""
    if not kept.exists():
        parts: list[tuple[Tensor, ...]] = []
        for chunk in images.split(batch):
            with torch.autocast("cpu", torch.bfloat16):
                f = net(normalised(net, chunk), attention="maps")
            rows = [a[:, :, :1].float().mean(dim=1, keepdim=True) for a in f.attention_maps or ()]
            parts.append((f.cls.float(), f.patches.to(torch.bfloat16), torch.stack(rows, dim=1)))
        save_file(dict(zip(("cls", "patches", "rows"), map(torch.cat, zip(*parts, strict=True)), strict=True)), kept)
    d = load_file(kept)
    side = round(d["patches"].shape[1] ** 0.5)
    return Features(
        d["cls"], d["patches"].float(), (side, side), net.num_prefix, attention_maps=d["rows"].unbind(dim=1)
    )


def normalised(net: Backbone, images: Tensor) -> Tensor:
    """Images as the network expects them, of uint8."""
    mean, std = (torch.tensor(net.net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def encode(net: Backbone, images: Tensor, boxes: Tensor, size: int, batch: int) -> Tensor:
    """Class tokens (B, D) of the crops `boxes` (B, 4) of `images`, at `size` pixels."""
    tokens = []
    for chunk, box in zip(images.split(batch), boxes.split(batch), strict=True):
        crops = crop_and_resize(normalised(net, chunk), box, (size, size))
        with torch.autocast("cpu", torch.bfloat16):
            tokens.append(net.class_token(crops).float())
    return torch.cat(tokens)


# --- the classifier ---------------------------------------------------------------------------------------------------


def answer(train: Tensor, labels: Tensor, asked: Tensor, l2: float) -> Tensor:
    """Classes that logistic regression on `train` (n, D) gives to `asked` (m, D)."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    x, y = (train - mean) / std, (asked - mean) / std
    w = torch.zeros(x.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w[:-1] + w[-1], labels) + l2 * w[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return (y @ w[:-1] + w[-1]).argmax(dim=1)


def right(x: Tensor, images: Images, test: bool, l2: float) -> Tensor:
    """Which images of test, or of train by cross-validation, features `x` (B, D) answer right."""
    n, labels = images.count, images.labels
    if test:
        return answer(x[:n], labels[:n], x[n:], l2) == labels[n:]
    order, fold = torch.randperm(n, generator=torch.Generator().manual_seed(0)), torch.empty(n, dtype=torch.long)
    for label in labels[:n].unique():  # the images of a class are dealt out in turn
        own = order[labels[order] == label]
        fold[own] = torch.arange(len(own)) % FOLDS
    told = torch.empty(n, dtype=torch.long)
    for k in range(FOLDS):
        told[fold == k] = answer(x[:n][fold != k], labels[:n][fold != k], x[:n][fold == k], l2)
    return told == labels[:n]


def about_boxes(shares: Tensor, known: Tensor | None) -> dict[str, float]:
    """Area of boxes (B, 4) in shares of the sides; and IoU with annotators' boxes, and how much of them they cover."""
    area = (shares[:, 2:] - shares[:, :2]).prod(dim=1)
    told = {"area": area.mean().item()}
    if known is not None:
        true = (known[:, 2:] - known[:, :2]).prod(dim=1)
        ends, starts = torch.minimum(shares[:, 2:], known[:, 2:]), torch.maximum(shares[:, :2], known[:, :2])
        common = (ends - starts).clamp(min=0).prod(dim=1)
        told |= {"iou": (common / (area + true - common)).mean().item(), "covered": (common / true).mean().item()}
    return {name: round(value, 3) for name, value in told.items()}


def main() -> None:
    """Measure the rules that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--boxes", type=Path, help="CSV of annotators' boxes")
    parser.add_argument("--weights", required=True, help="any file that --init-from takes")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--out", type=Path, default=Path("probe"))
    parser.add_argument("--size", type=int, default=168, help="pixels of a crop")
    parser.add_argument("--first", type=int, help="pixels of the first pass")
    parser.add_argument("--detail", type=int, default=336, help="pixels that crops in detail are cut out of")
    parser.add_argument(
        "--larger", type=int, nargs="*", default=[238], help="pixels of the image alone, for comparison"
    )
    parser.add_argument("--rules", nargs="*", default=["annotated*", "*/published", "border/*moments175/detail"])
    parser.add_argument("--l2", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--test", action="store_true", help="measure on test instead of by cross-validation on train")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    first = a.first or a.size
    images = read_images(a.data, a.boxes)
    net = glsim.create_model("plain", a.backbone, 1, a.size, weights=a.weights).eval().backbone

    def seen_at(side: int) -> Tensor:
        return pixels(images.paths, side, a.out / f"pixels_{side}.safetensors")

    f = first_pass(net, seen_at(first), a.out / f"first_{first}.safetensors", a.batch)
    report = a.out / ("test.json" if a.test else "cv.json")
    results: dict[str, Any] = read_json(report) if report.exists() else {}
    alone = right(f.cls, images, a.test, a.l2)

    def note(name: str, answers: Tensor, more: dict[str, float]) -> None:
        won, lost = int((answers & ~alone).sum()), int((alone & ~answers).sum())
        told = {"top1": round(100 * answers.float().mean().item(), 1), "won": won, "lost": lost}
        results[name] = told | {"p": round(mcnemar(won, lost), 4)} | more
        write_json(report, results)
        print(f"{name:36}", json.dumps(results[name]), flush=True)

    def tokens(name: str, side: int, boxes: Tensor, size: int) -> Tensor:
        kept = a.out / f"tokens_{first}_{size}_{name.replace('/', '__')}.safetensors"
        if not kept.exists():
            save_file({"tokens": encode(net, seen_at(side), boxes, size, a.batch)}, kept)
        return load_file(kept)["tokens"]

    note("image alone", alone, {})
    for side in a.larger:
        whole = torch.tensor([0, 0, side, side]).expand(len(images.paths), 4)
        note(f"image at {side}", right(tokens("whole", side, whole, side), images, a.test, a.l2), {})
    every = [f"{scores}/{shape}" for scores in SCORES for shape in SHAPES]
    every += ["annotated", "annotated+5"] if images.known is not None else []
    every += [f"{rule}/detail" for rule in every]
    for rule in [rule for rule in every if any(fnmatch(rule, pattern) for pattern in a.rules)]:
        side = a.detail if rule.endswith("/detail") else first
        if rule.startswith("annotated"):
            assert images.known is not None
            wider = 0.05 if "+5" in rule else 0.0
            grown = (images.known + torch.tensor([-wider, -wider, wider, wider])).clamp(0, 1)
            boxes = (grown * side).round().long()
        else:
            scores, shape = rule.split("/")[:2]
            boxes = SHAPES[shape](SCORES[scores](f), f.grid, side)
        crops = tokens(rule, side, boxes, a.size)
        crop_alone = {"crop_alone": round(100 * right(crops, images, a.test, a.l2).float().mean().item(), 1)}
        both = right(torch.cat((f.cls, crops), dim=1), images, a.test, a.l2)
        note(rule, both, crop_alone | about_boxes(boxes / side, images.known))


if __name__ == "__main__":
    main()
