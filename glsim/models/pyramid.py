"""Parts that methods on several maps of a network share: feature pyramid, place-wise classifiers, ranks, combiner.

A map is (B, S, d), S places: those of a stage, or all tokens after a block. f is the width of the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.backbone import Backbone, Scale
from glsim.models.boxes import select_these
from glsim.models.published import VIT_ASKS, File, Table, resnet_sizes, vit_sizes
from glsim.models.scores import gather_tokens
from glsim.types import ConfigError, Selection


class Pyramid(nn.Module):
    """Every map through two linear layers, then along the maps in the order given: each gets the one before it added.

    Between maps of other counts of places goes a learned matrix over places, or bilinear interpolation.

    Args:
        shapes: places and width of each map.
        grids: rows and columns of each.
        width: f.
        learned: whether a matrix over places goes between maps.
        always: also between maps of as many places.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        grids: Sequence[tuple[int, int]],
        width: int,
        learned: bool = True,
        always: bool = False,
        upwards: bool = False,
    ) -> None:
        super().__init__()
        self.grids, self.learned, self.upwards = list(grids), learned, upwards
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width)) for _, dim in shapes
        )
        pairs = [(a, b) if upwards else (b, a) for (a, _), (b, _) in pairwise(shapes)]
        self.resample = nn.ModuleList(
            nn.Conv1d(start, end, 1) if learned and (always or start != end) else nn.Identity() for start, end in pairs
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps, first to last (B, S, d) -> (B, S, f) each."""
        summed = [project(x) for project, x in zip(self.project, maps, strict=True)]
        last = len(summed) - 1
        for i in range(last) if self.upwards else range(last, 0, -1):
            there, step = (i + 1, i) if self.upwards else (i - 1, i - 1)
            moved = self.resample[step](summed[i]) if self.learned else self.stretch(summed[i], i, there)
            summed[there] = summed[there] + moved
        return summed

    def stretch(self, x: Tensor, here: int, there: int) -> Tensor:
        """Map `here` (B, S, f) on the grid of map `there`."""
        if self.grids[here] == self.grids[there]:
            return x
        x = x.transpose(1, 2).unflatten(2, self.grids[here])
        return F.interpolate(x, self.grids[there], mode="bilinear").flatten(2).transpose(1, 2)


class PlaceClassifier(nn.Sequential):
    """Two 1x1 convolutions with batch norm and ReLU between, at every place of a map."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(nn.Conv1d(width, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, f) -> logits (B, S, C)."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Combiner(nn.Module):
    """A graph convolution over joints that chosen places are pooled into (PIM, arXiv 2202.03822, section 3.3).

    Args:
        width: f.
        places: T, chosen of all maps.
        joints: J.
    """

    def __init__(self, width: int, places: int, joints: int) -> None:
        super().__init__()
        self.pool = nn.Linear(places, joints)
        self.adjacency = nn.Parameter(torch.full((joints, joints), 0.01) + 0.01 * torch.eye(joints))
        self.alpha = nn.Parameter(torch.zeros(1))
        self.query, self.key = (nn.Conv1d(width, max(1, width // 4), 1) for _ in range(2))
        self.mix, self.norm = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)
        self.read = nn.Linear(joints, 1)

    def forward(self, chosen: Tensor) -> Tensor:
        """Chosen places (B, T, f), in order -> (B, f)."""
        h = self.pool(chosen.transpose(1, 2))  # B f J
        q, k = self.query(h).mean(dim=1), self.key(h).mean(dim=1)  # B J
        graph = self.adjacency + self.alpha * (q[:, :, None] - k[:, None]).tanh()  # B J J
        return self.read(self.norm(self.mix(h) @ graph))[..., 0]


def rank(scores: Tensor) -> Tensor:
    """The places of a map by their scores (B, S), best first."""
    return scores.detach().argsort(dim=1, descending=True, stable=True)


def of_class(logits: Tensor) -> Tensor:
    """Of logits (B, S, C) the probability at every place of the class that their mean speaks for (B, S)."""
    best = logits.mean(dim=1).argmax(dim=-1)[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.float().softmax(dim=-1).gather(2, best)[..., 0]


def take(tensors: Sequence[Tensor], ranks: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Of tensors (B, S, ..) of each map those at its first places by rank."""
    return [gather_tokens(x, r[:, :k]) for x, r, k in zip(tensors, ranks, counts, strict=True)]


def leave(tensors: Sequence[Tensor], ranks: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """What `take` leaves, of maps of which anything is left."""
    left = [gather_tokens(x, r[:, k:]) for x, r, k in zip(tensors, ranks, counts, strict=True)]
    return [x for x in left if x.shape[1]]


def views(chosen: Sequence[Tensor]) -> Tensor:
    """Logits of chosen places (B, k, C) as views of their images, (T B, C): what a cross-entropy takes."""
    return torch.cat([x.transpose(0, 1).flatten(0, 1) for x in chosen])


def as_selection(
    scales: Sequence[Scale], scores: Sequence[Tensor], kept: Tensor, backbone: Backbone, images: Tensor
) -> Selection:
    """The mean score of all maps on the grid of the backbone, and the places that the last map keeps, with their box.

    Args:
        scales: the maps.
        scores: (B, S) of each.
        kept: (B, k) places of the last map.
        backbone: whose grid it is.
        images: (B, 3, H, W).
    """
    grid, prefix = scales[-1].grid, scales[-1].prefix
    on_grid = [
        F.adaptive_avg_pool2d(s[:, scale.prefix :].unflatten(1, scale.grid)[:, None], grid).flatten(1)
        for s, scale in zip(scores, scales, strict=True)
    ]
    mean = torch.stack(on_grid).mean(dim=0).detach()
    return select_these(mean, (kept - prefix).clamp(min=-1), grid, images.shape[-2:])


def count_places(selects: Any, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """How many places of each map are kept: a number for each, or one for all, of a map half of its places at most.

    Raises ConfigError for other numbers than 1 to S.
    """
    places = [count for count, _ in shapes]
    if type(selects) is int and selects > 0:
        return [max(1, min(selects, count // 2)) for count in places]
    fits = isinstance(selects, list | tuple) and len(selects) == len(places)
    if not fits or not all(type(k) is int and 1 <= k <= count for k, count in zip(selects, places, strict=True)):
        raise ConfigError(f"selects={selects!r}: one number above 0, or one for each map, at most {places}")
    return list(selects)


def check_weights(weights: Any, names: str) -> tuple[float, ...]:
    """The weights of loss terms; ConfigError unless there is a number from 0 on for each of `names`."""
    fits = isinstance(weights, list | tuple) and len(weights) == len(names.split(", "))
    if not fits or not all(type(w) in (int, float) and 0 <= w < math.inf for w in weights):
        raise ConfigError(f"loss_weights={weights!r}: numbers from 0 on are needed, of {names}")
    return tuple(weights)


COMBINER: Table = (
    (r"^combiner\.classifier", "head"),
    (r"^combiner\.param_pool0", "combiner.pool"),
    (r"^combiner\.adj1", "combiner.adjacency"),
    (r"^combiner\.conv1", "combiner.mix"),
    (r"^combiner\.batch_norm1", "combiner.norm"),
    (r"^combiner\.conv_q1", "combiner.query"),
    (r"^combiner\.conv_k1", "combiner.key"),
    (r"^combiner\.alpha1", "combiner.alpha"),
    (r"^combiner\.param_pool1", "combiner.read"),
    (r"^backbone\.", ""),
)
IGNORED: Table = (
    (r"relative_position_index$|attn_mask$", "computed anew"),
    (r"^backbone\.(?:head|fc)\.", "no output reads it"),
)
MADE = ("backbone.net.norm.weight", "backbone.net.norm.bias")  # which no output reads, and traced networks leave out
ASKS = VIT_ASKS | {
    "image_size": "pixels (by default those that its maps tell, of a ResNet 448)",
    "selects": "how many places are kept of each map, first to last, a list ([2048, 512, 128, 32] of PIM's Swin-L)",
    "loss_weights": "of the losses, as the method's option, by which the network was trained",
}


def numbered(published: str, ours: str, shift: int = -1) -> Table:
    """Names of the four maps that count from 1 there."""
    return tuple((rf"^{published}{i}\b", f"{ours}.{i + shift}") for i in range(1, 5))


def pyramid_sizes(file: File, fpn: str) -> dict[str, Any]:
    """The network (Swin, ViT or ResNet), width and places by the shapes; `selects` is asked for.

    Args:
        file: with the names of timm and of the parts above.
        fpn: name of the pyramid that reads the network's maps.
    """
    if "layers.0.blocks.0.norm1.weight" in file.weights:
        sizes = _swin_sizes(file, file.shape(f"{fpn}.resample.0.weight")[0])
    elif "pos_embed" in file.weights:
        sizes = vit_sizes(file)
        sizes["backbone_args"]["qkv_bias"] = "blocks.0.attn.qkv.bias" in file.weights
    else:
        sizes = resnet_sizes(file)
    places, selects = file.shape("combiner.pool.weight")[1], file.take("selects")
    if isinstance(selects, list | tuple) and all(type(k) is int for k in selects) and sum(selects) != places:
        raise ConfigError(f"selects={list(selects)}: {file.path} keeps {places} places in all")
    return sizes | {"width": file.shape(f"{fpn}.project.0.2.weight")[0], "selects": selects}


def _swin_sizes(file: File, places: int) -> dict[str, Any]:
    """Arguments for a Swin whose first merged map has so many places."""
    stages = range(file.count("layers."))
    tables = [file.shape(f"layers.{i}.blocks.0.attn.relative_position_bias_table") for i in stages]
    return {
        "backbone": "swin_large_patch4_window12_384",
        "image_size": file.take("image_size", 8 * math.isqrt(places)),
        "backbone_args": {
            "embed_dim": file.shape("patch_embed.proj.weight")[0],
            "depths": [file.count(f"layers.{i}.blocks.") for i in stages],
            "num_heads": list(file.take("num_heads", [heads for _, heads in tables])),
            "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        },
    }
