"""The method `ruled`: GLSim with one thing changed, named by the option `rule`. Two passes of the same size.

An experiment beside the package (docs/localize.md): `paired.py` makes its name known, trains and compares. A rule says
how patches are scored and what is cut out; `published` is GLSim itself. Two losses are options, for any rule:
`early_loss` and `crop_loss` add the cross-entropy of what the image's token, or the crop's, says alone.

Two rules cost more than the published one: `evidence` sends every patch's token alone through aggregator and head,
`two_boxes` rounds the sides of its two crops to whole patches (112 pixels: 80 and 80; 96 by patches of 12: 72 and 72).
`paired.py` counts what each costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glsim.models.backbone import Backbone
from glsim.models.boxes import crop_and_resize, exclusive, grid_line, select, select_component
from glsim.models.glsim import GLSim
from glsim.models.heads import Aggregator, Classifier
from glsim.models.scores import check_top, find_metric, pick, score
from glsim.types import ConfigError, Features, Output, Selection, choose

SHARP = 1.5  # of the softmax over standardised scores: about a tenth of the patches carries the weight
DEVIATIONS = 1.2  # from the middle to the side of a box by spread: about the area of the published box
WINDOW, EYE = 2 / 3, 1 / 2  # sides of one box of fixed size, and of each of two, as shares of the grid's
QUANTILES = (0.1, 0.9)


class Ruled(GLSim):
    """Encode, score the patches and crop as the rule says, encode the crop, refine all tokens, classify."""

    def __init__(self, *parts: Any, rule: str, early_loss: float, crop_loss: float) -> None:
        super().__init__(*parts)
        self.rule, self.early_loss, self.crop_loss = choose(rule, RULES, "rule"), early_loss, crop_loss

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. Of several crops of an image, `Output` holds the first."""
        f, scores = self.rule.score(self, images)
        selection, crops = self.rule.cut(self, images, f.grid, scores)
        views = self.backbone.class_token(crops).unflatten(0, (-1, len(images)))  # k B D
        output = self.refine(torch.stack((f.cls, *views), dim=1), selection, crops[: len(images)])
        alone = ((self.early_loss, f.cls), (self.crop_loss, views[0]))
        more = [(weight, self.says(token)) for weight, token in alone if weight and self.training]
        return output._replace(aux={"cross_entropy": ((1.0, output.logits), *more)}) if more else output

    def says(self, tokens: Tensor) -> Tensor:
        """What aggregator and head make of each of `tokens` (B, D) alone: logits (B, C)."""
        return self.head(self.aggregator(tokens[:, None]))


# --- scores: (model, images (B, 3, H, W)) -> what the first pass saw, and (B, 1, N) -----------------------------------


def similar(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """Cosine with the global token: the published one."""
    f = model.features(images)
    return f, score(model.metric, f)


def similar_with_gradient(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """The same, and what is cut out by it may teach it."""
    f = model.features(images)
    return f, find_metric(model.metric)(f)


def dissimilar(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """The same, reversed."""
    f, scores = similar(model, images)
    return f, -scores


def centred(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """Cosine of what class token and patches have beyond the image's mean patch."""
    f = model.features(images)
    mean = f.patches.mean(dim=1)
    return f, score(model.metric, f._replace(cls=f.cls - mean, patches=f.patches - mean[:, None]))


def early(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """Cosine with the class token (else the mean patch) after half of the blocks."""
    f, raw = in_layers(model.backbone, images)
    tokens = raw[model.backbone.depth // 2 - 1].detach()
    patches = tokens[:, model.backbone.skip :]
    cls = tokens[:, 0] if model.backbone.num_prefix else patches.mean(dim=1)
    return f, score(model.metric, f._replace(cls=cls, patches=patches))


def similar_from_afar(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """The published score of the image at half of its pixels."""
    f = model.features(F.interpolate(images, smaller(model.backbone), mode="bilinear", antialias=True))
    return f, score(model.metric, f)


def length(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """How long a patch's token is before the final norm."""
    f, raw = in_layers(model.backbone, images)
    return f, raw[-1].detach()[:, model.backbone.skip :].norm(dim=-1)[:, None]


@torch.no_grad()
def evidence_of(model: Ruled, f: Features) -> Tensor:
    """The logit that each patch's token alone gives to the class that the global token alone predicts: (B, 1, N)."""
    best = model.says(f.cls).argmax(dim=1)
    logits = model.says(f.patches.flatten(0, 1)).unflatten(0, f.patches.shape[:2])  # B N C
    return logits.gather(2, best[:, None, None].expand(-1, logits.shape[1], 1)).transpose(1, 2)


def evidence(model: Ruled, images: Tensor) -> tuple[Features, Tensor]:
    """As a class activation map: what a patch says for the predicted class."""
    f = model.features(images)
    return f, evidence_of(model, f)


def in_layers(backbone: Backbone, images: Tensor) -> tuple[Features, list[Tensor]]:
    """What `backbone` says, and all tokens (B, n, D) after every block, from one pass."""
    *raw, last = backbone.layers(images)
    net = backbone.net
    cls = net.forward_head(net.norm(raw[-1]), pre_logits=True) if backbone.pooled else last[:, 0]
    return Features(cls, last[:, backbone.skip :], backbone.grid_of(images), backbone.num_prefix), raw


# --- cuts: (model, images, grid, scores (B, 1, N)) -> selection, and k crops of each image (kB, 3, h, w) --------------

Grid = tuple[int, int]


def around_best(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The published box around the O best patches."""
    return cropped(images, select(scores, model.top_o, grid, images.shape[-2:]))


def around_best_in_detail(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The published box, cut out of all pixels, at the size that the first pass saw."""
    selection = select(scores, model.top_o, grid, images.shape[-2:])
    return selection, crop_and_resize(images, selection.boxes, smaller(model.backbone))


def mirrored(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The published box, its crop mirrored: the two passes see left and right exchanged."""
    selection, crops = around_best(model, images, grid, scores)
    return selection, crops.flip(-1)


def around_best_whole(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The inclusive box around the O best patches."""
    return cropped(images, select(scores, model.top_o, grid, images.shape[-2:], "inclusive"))


def around_group(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The inclusive box around the largest connected group among the 2 O best patches."""
    best = twice(model, scores)
    chosen = torch.zeros_like(scores[:, 0]).scatter(1, best, 1.0)
    found = select_component(chosen[:, None], 1.0, grid, images.shape[-2:])
    return cropped(images, found._replace(scores=scores[:, 0]))


def around_quantiles(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The published box around the 10 % and the 90 % quantile of the rows and columns of the 2 O best patches."""
    best = twice(model, scores)
    ends = []
    for lines, count, side in zip((best // grid[1], best % grid[1]), grid, images.shape[-2:], strict=True):
        low, high = lines.float().quantile(torch.tensor(QUANTILES, device=lines.device), dim=1)
        ends.append(exclusive(low.round().long(), high.round().long(), count, side))
    (top, bottom), (left, right) = ends
    return cropped(images, Selection(scores[:, 0], best, torch.stack((left, top, right, bottom), dim=1), grid))


def around_middle(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """As far around the weighted middle of all patches as they spread."""
    return cropped(images, by_spread(model, images, grid, scores)[0])


def sampled(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The same box in fractions of pixels, cut out so that the gradient reaches the scores."""
    selection, (left, top, right, bottom) = by_spread(model, images, grid, scores)
    height, width = images.shape[-2:]
    zero = torch.zeros_like(left)
    theta = torch.stack(  # pixel p of W lies at 2 p / (W - 1) - 1; the last one of a box is right - 1
        (
            torch.stack(((right - 1 - left) / (width - 1), zero, (right - 1 + left) / (width - 1) - 1), dim=1),
            torch.stack((zero, (bottom - 1 - top) / (height - 1), (bottom - 1 + top) / (height - 1) - 1), dim=1),
        ),
        dim=1,
    )
    places = F.affine_grid(theta, list(images.shape), align_corners=True)
    return selection, F.grid_sample(images, places.to(images.dtype), padding_mode="border", align_corners=True)


def best_window(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The box of two thirds of the sides with the highest mean score."""
    return cropped(images, by_window(model, images, grid, scores, WINDOW)[0])


def two_windows(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, Tensor]:
    """The box of half of the sides with the highest mean score, and the next one half a box or more away."""
    both = by_window(model, images, grid, scores, EYE)
    size = smaller(model.backbone)
    return both[0], torch.cat([crop_and_resize(images, box.boxes, size) for box in both])


def cropped(images: Tensor, selection: Selection) -> tuple[Selection, Tensor]:
    """The crop of a selection's box, as large as the image."""
    return selection, crop_and_resize(images, selection.boxes)


def twice(model: Ruled, scores: Tensor) -> Tensor:
    """The 2 O best patches (B, K)."""
    return pick(scores, min(2 * model.top_o, scores.shape[-1]))[1]


def smaller(backbone: Backbone) -> tuple[int, int]:
    """Height and width of half of the image's pixels, in whole patches."""
    rows, cols = (
        max(1, round(side / math.sqrt(2) / patch)) * patch
        for side, patch in zip(backbone.image_size, backbone.patch_size, strict=True)
    )
    return rows, cols


def by_spread(model: Ruled, images: Tensor, grid: Grid, scores: Tensor) -> tuple[Selection, tuple[Tensor, ...]]:
    """Weighted mean +- `DEVIATIONS` deviations of the patches' places; and left, top, right, bottom as floats (B,)."""
    values, indices = pick(scores.float(), model.top_o)
    apart = values - values.mean(dim=1, keepdim=True)
    weights = (SHARP * apart / (apart.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()).softmax(dim=1)
    number = torch.arange(grid[0] * grid[1], device=values.device)
    ends = []
    for lines, count, side in zip((number // grid[1], number % grid[1]), grid, images.shape[-2:], strict=True):
        place = (lines + 0.5) / count
        middle = (weights * place).sum(dim=1)
        spread = ((weights * (place - middle[:, None]).square()).sum(dim=1) + 1e-6).sqrt()
        half = (DEVIATIONS * spread).clamp(min=0.5 / count)
        ends.append(((middle - half).clamp(min=0) * side, (middle + half).clamp(max=1) * side))
    (top, bottom), (left, right) = ends
    with torch.no_grad():
        boxes = torch.stack((left.floor(), top.floor(), right.ceil(), bottom.ceil()), dim=1).long()
    return Selection(values.detach(), indices, boxes, grid), (left, top, right, bottom)


def by_window(model: Ruled, images: Tensor, grid: Grid, scores: Tensor, share: float) -> list[Selection]:
    """The best box of `share` of the grid's sides, and the best of those half a box or more away from it."""
    values, indices = pick(scores.float(), model.top_o)
    sides = (max(1, round(share * grid[0])), max(1, round(share * grid[1])))
    means = F.avg_pool2d(values.unflatten(1, grid)[:, None], sides, stride=1)  # B 1 rows cols, of places for the box
    cols = means.shape[-1]
    number = torch.arange(means[0].numel(), device=means.device)
    found = []
    for _ in range(2):
        best = means.flatten(1).argmax(dim=1)
        row, col = best // cols, best % cols
        top, bottom = (grid_line(line, grid[0], images.shape[-2]) for line in (row, row + sides[0]))
        left, right = (grid_line(line, grid[1], images.shape[-1]) for line in (col, col + sides[1]))
        found.append(Selection(values, indices, torch.stack((left, top, right, bottom), dim=1), grid))
        close = (2 * (number // cols - row[:, None]).abs() < sides[0]) & (
            2 * (number % cols - col[:, None]).abs() < sides[1]
        )
        means = means.flatten(1).masked_fill(close, -torch.inf).view_as(means)
    return found


class Rule(NamedTuple):
    """How to score patches, and what to cut out."""

    score: Callable[[Ruled, Tensor], tuple[Features, Tensor]] = similar
    cut: Callable[[Ruled, Tensor, Grid, Tensor], tuple[Selection, Tensor]] = around_best


RULES = {
    "published": Rule(),
    "mirrored": Rule(cut=mirrored),
    "detail": Rule(similar_from_afar, around_best_in_detail),
    "inclusive": Rule(cut=around_best_whole),
    "component": Rule(cut=around_group),
    "spread": Rule(cut=around_middle),
    "quantile": Rule(cut=around_quantiles),
    "window": Rule(cut=best_window),
    "two_boxes": Rule(cut=two_windows),
    "soft": Rule(similar_with_gradient, sampled),
    "far": Rule(dissimilar),
    "far_window": Rule(dissimilar, best_window),
    "centred": Rule(centred),
    "early": Rule(early),
    "evidence": Rule(evidence),
    "evidence_window": Rule(evidence, best_window),
    "norm": Rule(length),
}


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    rule: str = "published",
    top_o: int = 8,
    early_loss: float = 0.0,
    crop_loss: float = 0.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> Ruled:
    """As for `glsim` by cosine; `rule` names one of `RULES`.

    `centred` needs a class token: a pooled one is the mean patch, and nothing of it would be left. `early` and `norm`
    need a transformer over one grid.
    """
    check_top(top_o, encoder.grid, "top_o")
    if rule == "centred" and (encoder.pooled or not encoder.num_prefix):
        raise ConfigError(
            f"rule={rule} subtracts the mean patch, which is all that the global token of {type(encoder.net).__name__} "
            "without a class token holds; try a backbone with one (class_token: true, global_pool: token)"
        )
    if rule in ("early", "norm") and encoder.depth < 2:
        raise ConfigError(f"rule={rule} looks into a transformer of two blocks or more; try ViT, DeiT, DINO or EVA")
    if rule in ("two_boxes", "detail"):
        encoder.check_size(smaller(encoder))
    aggregator = Aggregator(encoder.dim, 1, dropout, drop_path, norm_eps or 1e-6)
    parts = (encoder, aggregator, Classifier(encoder.dim, num_classes), "gls_cos", top_o)
    return Ruled(*parts, rule=rule, early_loss=early_loss, crop_loss=crop_loss)
