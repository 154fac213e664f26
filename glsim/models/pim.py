"""PIM (Chou, Lin and Kao: A Novel Plug-in Module for Fine-Grained Visual Classification, arXiv 2202.03822)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.heads import zero_linear
from glsim.models.published import File, Published
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
    pyramid_sizes,
    rank,
    take,
    views,
)
from glsim.types import ConfigError, Output, choose

TITLE = "PIM"
NEEDS = ("scales",)
EMBEDDINGS = ("fused",)
PER_JOINT = 32  # chosen places


class PIM(Model):
    """Every place of four maps is classified; those of which the classifiers are surest are combined by a graph."""

    def __init__(
        self,
        backbone: Backbone,
        width: int,
        num_classes: int,
        counts: list[int],
        weights: tuple[float, ...],
        answer: Callable[[list[Tensor], Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.backbone, self.counts, self.weights, self.answer = backbone, counts, weights, answer
        shapes, grids = backbone.scale_shapes(), backbone.scale_grids()
        self.fpn = Pyramid(shapes, grids, width, learned=backbone.of_tokens)
        self.classify = nn.ModuleList(PlaceClassifier(width, num_classes) for _ in shapes)
        self.combiner = Combiner(width, sum(counts), max(1, sum(counts) // PER_JOINT))
        self.dropout, self.head = nn.Dropout(0.1), zero_linear(width, num_classes)

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        scales = self.backbone.scales(images)
        maps = self.fpn([scale.tokens for scale in scales])  # of each map B S f
        logits = [classify(x) for classify, x in zip(self.classify, maps, strict=True)]  # B S C
        scores = [x.float().softmax(dim=-1).amax(dim=-1) for x in logits]  # B S
        ranks = [rank(s) for s in scores]
        vector = self.combiner(torch.cat(take(maps, ranks, self.counts), dim=1))  # B f
        combined, whole = self.head(self.dropout(vector)), [x.mean(dim=1) for x in logits]
        losses: dict[str, Any] = {}
        if self.training:
            of_maps, of_selected, of_dropped, of_combined = self.weights
            losses["cross_entropy"] = [(of_maps, x) for x in whole] + [(of_combined, combined)]
            if of_selected:
                losses["cross_entropy"] += [(of_selected, views([x])) for x in take(logits, ranks, self.counts)]
            losses["background"] = [(of_dropped, x) for x in leave(logits, ranks, self.counts)]
        selection = as_selection(scales, scores, ranks[-1][:, : self.counts[-1]], self.backbone, images)
        return Output(self.answer(whole, combined), selection, aux=losses, embeddings={"fused": vector})


def combined_alone(whole: list[Tensor], combined: Tensor) -> Tensor:
    """Logits of the combiner (B, C)."""
    return combined


def mean_of_all(whole: list[Tensor], combined: Tensor) -> Tensor:
    """Logarithm of the mean probability by the mean logits of each map and by the combiner (B, C)."""
    return torch.stack([x.softmax(dim=-1) for x in (*whole, combined)]).mean(dim=0).log()


ANSWERS: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {"combined": combined_alone, "mean": mean_of_all}


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    width: int = 512,
    selects: Any = 32,
    loss_weights: Any = (0.5, 0.0, 5.0, 1.0),
    answer: str = "combined",
) -> PIM:
    """PIM (arXiv 2202.03822) on `encoder`.

    Args:
        encoder: a network with several maps: stages, or the last four blocks of a ViT.
        num_classes: C.
        width: f of the pyramid (the authors: 1536 for Swin-L, else 512).
        selects: places kept of each map, a list (the authors: 2048, 512, 128, 32 for Swin-L), or one number for all,
            half of a map at most.
        loss_weights: of the losses of mean logits, selected places, dropped places and combiner.
        answer: a name of `ANSWERS`: "combined", or "mean" of the probabilities of all maps and the combiner.

    Raises:
        ConfigError: for an encoder without several maps, or numbers that do not fit.
    """
    if width < 1:
        raise ConfigError(f"width={width}: 1 or more is needed")
    encoder.leave_end_frozen()
    counts = count_places(selects, encoder.scale_shapes())
    weights = check_weights(loss_weights, "mean logits, selected places, dropped places, combiner")
    return PIM(encoder, width, num_classes, counts, weights, choose(answer, ANSWERS, "answer"))


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell of network and pyramid."""
    return pyramid_sizes(file, "fpn")


PUBLISHED = Published(
    "PIM",
    (
        *numbered(r"fpn\.Proj_layer", "fpn.project"),
        *numbered(r"fpn\.Up_layer", "fpn.resample", -2),
        *numbered("fpn_classifier_layer", "classify"),
        *COMBINER,
    ),
    published_sizes,
    ASKS,
    IGNORED,
    MADE,
)
