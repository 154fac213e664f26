"""HERBS (Chou, Kao and Lin: Fine-grained Visual Classification with High-temperature .., arXiv 2303.06442)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.heads import zero_linear
from glsim.models.published import Published
from glsim.models.pyramid import (
    ASKS,
    COMBINER,
    IGNORED,
    MADE,
    Combiner,
    PlaceClassifier,
    Pyramid,
    as_selection,
    check_weights,
    count_places,
    leave,
    numbered,
    of_class,
    pyramid_sizes,
    rank,
    take,
    views,
)
from glsim.types import ConfigError, Output

TITLE = "HERBS"
NEEDS = ("scales",)
EMBEDDINGS = ("fused",)
PER_JOINT = 64  # chosen places


class HERBS(Model):
    """Two pyramids over four maps: classifiers of the first learn from those of the second at a falling temperature;
    places of the second that speak for its class are combined by a graph, the others are taught to be background."""

    epoch = 0

    def __init__(
        self,
        backbone: Backbone,
        width: int,
        num_classes: int,
        counts: list[int],
        weights: tuple[float, ...],
        temperature: float,
        halve_every: int,
    ) -> None:
        super().__init__()
        self.backbone, self.counts, self.weights = backbone, counts, weights
        self.hottest, self.halve_every = temperature, halve_every
        shapes, grids = backbone.scale_shapes(), backbone.scale_grids()
        self.down = Pyramid(shapes, grids, width, always=True)
        self.up = Pyramid([(places, width) for places, _ in shapes], grids, width, always=True, upwards=True)
        self.classify_down, self.classify = (
            nn.ModuleList(PlaceClassifier(width, num_classes) for _ in shapes) for _ in range(2)
        )
        self.combiner = Combiner(width, sum(counts), max(1, sum(counts) // PER_JOINT))
        self.dropout, self.head = nn.Dropout(0.1), zero_linear(width, num_classes)

    def start_epoch(self, epoch: int) -> None:
        """Training has reached this epoch, from 0: the temperature follows."""
        self.epoch = epoch

    @property
    def temperature(self) -> float:
        """T of this epoch."""
        return self.hottest * 0.5 ** (self.epoch // self.halve_every)

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        scales = self.backbone.scales(images)
        first = self.down([scale.tokens for scale in scales])  # of each map B S f
        second = self.up(first)
        logits = [classify(x) for classify, x in zip(self.classify, second, strict=True)]  # B S C
        scores = [of_class(x) for x in logits]  # B S
        ranks = [rank(s) for s in scores]
        vector = self.combiner(torch.cat(take(second, ranks, self.counts), dim=1))  # B f
        answer = self.head(self.dropout(vector))
        losses: dict[str, Any] = {}
        if self.training:
            of_refinement, of_maps, of_selected, of_dropped, of_combined = self.weights
            losses["cross_entropy"] = [(of_maps, x.mean(dim=1)) for x in logits] + [(of_combined, answer)]
            if of_selected:
                losses["cross_entropy"] += [(of_selected, views([x])) for x in take(logits, ranks, self.counts)]
            losses["background"] = [(of_dropped, x) for x in leave(logits, ranks, self.counts)]
            earlier = [classify(x) for classify, x in zip(self.classify_down, first, strict=True)]
            pairs = zip(earlier, logits, strict=True)
            losses["refinement"] = [(of_refinement, self.temperature, x, y) for x, y in pairs]
        selection = as_selection(scales, scores, ranks[-1][:, : self.counts[-1]], self.backbone, images)
        return Output(answer, selection, aux=losses, embeddings={"fused": vector})


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    width: int = 512,
    selects: Any = 32,
    loss_weights: Any = (1.375, 0.3, 0.0, 5.0, 1.0),
    temperature: float = 64.0,
    halve_every: int = 10,
) -> HERBS:
    """HERBS (arXiv 2303.06442) on `encoder`.

    Args:
        encoder: a network with several maps: stages, or the last four blocks of a ViT.
        num_classes: C.
        width: f of the pyramids (the authors: 1536 for Swin-L).
        selects: places kept of each map, a list (the authors: 256, 128, 64, 32 for Swin-L), or one number for all,
            half of a map at most.
        loss_weights: of refinement, and of mean logits, selected places, dropped places and combiner.
        temperature: of the refinement, at first.
        halve_every: epochs after which it is half of that, again and again.

    Raises:
        ConfigError: for an encoder without several maps, or numbers that do not fit.
    """
    if width < 1 or temperature <= 0 or halve_every < 1:
        raise ConfigError(f"width={width}, temperature={temperature}, halve_every={halve_every}: above 0 is needed")
    encoder.leave_end_frozen()
    counts = count_places(selects, encoder.scale_shapes())
    weights = check_weights(loss_weights, "refinement, mean logits, selected places, dropped places, combiner")
    return HERBS(encoder, width, num_classes, counts, weights, temperature, halve_every)


PUBLISHED = Published(
    "HERBS",
    (
        *numbered(r"fpn_(down|up)\.Proj_layer", r"\1.project"),
        *numbered(r"fpn_down\.Up_layer", "down.resample", -2),
        *numbered(r"fpn_up\.Down_layer", "up.resample"),
        *numbered("fpn_classifier_down_layer", "classify_down"),
        *numbered("fpn_classifier_up_layer", "classify"),
        *COMBINER,
    ),
    partial(pyramid_sizes, fpn="down"),
    ASKS | {"temperature": "of the refinement, at the first epoch"},
    IGNORED,
    MADE,
)
