"""AF-Trans-style (Zhang et al.: A Free Lunch from ViT, arXiv 2110.01240).

Adaptive Attention Multi-scale Fusion Transformer. There is no public code: this follows the text, and says where not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glsim.models.backbone import Attention, Backbone
from glsim.models.base import Model
from glsim.models.boxes import crop_and_resize, select_component
from glsim.models.heads import LayerWeights, zero_linear
from glsim.models.scores import check_metric, class_rows, needs_attention, sacm, score
from glsim.types import ConfigError, Features, Output, Selection

TITLE = "AF-Trans"
NEEDS = ("class_token",)
CROPS = True
EMBEDDINGS = ("global", "crop", "fused")


class AFTrans(Model):
    """Attention of all blocks, each weighted by how much it says, marks a region; the region is encoded again."""

    top_o = None

    def __init__(self, backbone: Backbone, excite: nn.Module, head: nn.Module, metric: str, threshold: float) -> None:
        super().__init__()
        self.backbone, self.excite, self.head = backbone, excite, head
        self.metric, self.threshold = metric, threshold

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The answer is the mean of both passes' logits."""
        f = self.features(images, attention=needs_attention(self.metric) or (self.training and "maps"))
        selection = self.select(score(self.metric, f), images)
        crops = crop_and_resize(images, selection.boxes)
        local = self.backbone.class_token(crops)
        logits = self.head(torch.stack((f.cls, local)))  # 2 B C
        losses: dict[str, Any] = {}
        if self.training:
            # No gradient flows through a box. The paper leaves open what teaches the weights of the blocks: here it is
            # a third cross-entropy, on the patches averaged by the weighted attention.
            weights = sacm(f)
            pooled = (weights / weights.sum(dim=-1, keepdim=True)) @ f.patches  # B 1 D
            losses = {"cross_entropy": ((1.0, logits[0]), (1.0, logits[1]), (1.0, self.head(pooled[:, 0])))}
        vectors = {"global": f.cls, "crop": local, "fused": (f.cls + local) / 2}
        return Output(logits.mean(dim=0), selection, crops, losses, vectors)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """The largest connected region of what exceeds the mean of `scores` (B, g, N)."""
        return select_component(scores, self.threshold, self.backbone.grid_of(images), images.shape[-2:])

    def features(self, images: Tensor, attention: Attention = False) -> Features:
        """Tokens of the first pass; with `attention`, the learned weight of every block too."""
        f = self.backbone(images, attention=attention)
        return f._replace(layer_weights=self.excite(class_rows(f))) if attention else f


def build(encoder: Backbone, num_classes: int, *, metric: str = "sacm", threshold: float = 1.2) -> AFTrans:
    """AF-Trans (arXiv 2110.01240) on `encoder`.

    Args:
        encoder: a backbone with a class token.
        num_classes: C.
        metric: what scores the patches; by default attention under learned weights of the blocks.
        threshold: patches above that times the mean score make the region (ours; the paper's value is not known).

    Raises:
        ConfigError: for a metric that the encoder cannot serve, or a threshold below 1.
    """
    check_metric(metric, encoder.has_attention, encoder.depth)
    if threshold < 1:
        raise ConfigError(f"threshold={threshold}: at least 1, times the mean score")
    excite = LayerWeights(encoder.depth)
    return AFTrans(encoder, excite, zero_linear(encoder.dim, num_classes), metric, threshold)
