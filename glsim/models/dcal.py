"""DCAL (Zhu et al.: Dual Cross-Attention Learning for Fine-Grained Visual Categorization .., arXiv 2205.02151)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.attention import paired_attention
from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.boxes import select
from glsim.models.heads import CrossBlock, zero_linear
from glsim.models.scores import check_metric, gather_tokens, needs_attention, score
from glsim.types import ConfigError, Output, Selection

TITLE = "DCAL"
NEEDS = ("class_token",)
EMBEDDINGS = ("global", "fused")


class DCAL(Model):
    """The best patches ask all tokens once more; in training every image is distracted by another one."""

    top_o = None

    def __init__(self, backbone: Backbone, cross: nn.Module, heads: nn.ModuleList, metric: str, share: float) -> None:
        super().__init__()
        self.backbone, self.cross, self.heads, self.metric, self.share = backbone, cross, heads, metric, share
        self.uncertainty = nn.Parameter(torch.zeros(3))  # of the three losses

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The answer adds the probabilities of both parts.

        The local part reads the mean of the queries' answers: in a single cross-attention block the class token's own
        does not depend on which patches ask beside it, and the paper does not say what is read.
        """
        f = self.features(images, attention=needs_attention(self.metric))
        selection = self.select(score(self.metric, f), images)
        queries = torch.cat((f.cls[:, None], gather_tokens(f.patches, selection.indices)), dim=1)  # B 1+R D
        tokens = torch.cat((f.cls[:, None], f.patches), dim=1)
        parts = self.cross(queries, tokens).mean(dim=1)
        whole, local = self.heads[0](f.cls), self.heads[1](parts)
        losses = {}
        if self.training:
            with paired_attention(self.backbone.net):
                pair = self.heads[0](self.backbone(images).cls)
            losses = {"uncertainty": (torch.stack((whole, local, pair)), self.uncertainty)}
        logits = torch.logaddexp(F.log_softmax(whole, dim=-1), F.log_softmax(local, dim=-1))
        vectors = {"global": f.cls, "fused": torch.cat((f.cls, parts), dim=1)}
        return Output(logits, selection, aux=losses, embeddings=vectors)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """The best patches by `scores` (B, g, N), a share of all; their box is for pictures."""
        top = max(1, round(self.share * scores.shape[-1]))
        return select(scores, top, self.backbone.grid_of(images), images.shape[-2:], "inclusive")


def build(encoder: Backbone, num_classes: int, *, metric: str = "rollout", share: float = 0.1) -> DCAL:
    """DCAL (arXiv 2205.02151) on `encoder`.

    Args:
        encoder: a backbone with a class token.
        num_classes: C.
        metric: what scores the patches (the paper: rollout).
        share: of the patches, which ask (the paper: 10 %).

    Raises:
        ConfigError: for a metric that the encoder cannot serve, or a share outside (0, 1].
    """
    check_metric(metric, encoder.has_attention, encoder.depth)
    if not 0 < share <= 1:
        raise ConfigError(f"share={share}: above 0, at most 1")
    heads = nn.ModuleList(zero_linear(encoder.dim, num_classes) for _ in range(2))
    return DCAL(encoder, CrossBlock(encoder.dim), heads, metric, share)
