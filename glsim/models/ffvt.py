"""FFVT (Wang, Yu and Gao: Feature Fusion Vision Transformer for Fine-Grained .., arXiv 2107.02341)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import TokenModel
from glsim.models.boxes import select_these
from glsim.models.heads import zero_linear
from glsim.models.published import VIT_ASKS, VIT_AUTHORS, Published, vit_sizes
from glsim.models.scores import check_metric, check_top, gather_tokens, mutual_attention, needs_attention, score
from glsim.types import Features, Output

TITLE = "FFVT"
NEEDS = ("class_token", "last_block")
EMBEDDINGS = ("fused",)


class FFVT(TokenModel):
    """The best tokens of every block go, with the class token, through the last one."""

    def __init__(self, backbone: Backbone, head: nn.Module, metric: str, top_k: int) -> None:
        super().__init__()
        self.backbone, self.head, self.metric, self.top_k = backbone, head, metric, top_k

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        stages = self.backbone.stages(images, needs_attention(self.metric))
        skip, grid = self.backbone.skip, stages[0].features.grid
        weights = [self.weigh(stage.features) for stage in stages]  # L - 1 of (B, n)
        indices = [w.topk(self.top_k, dim=-1).indices for w in weights]
        chosen = [gather_tokens(stage.tokens, index) for stage, index in zip(stages, indices, strict=True)]
        index = torch.cat(indices, dim=1)  # B (L-1)K
        tokens = self.backbone.last_block(stages[-1].tokens, torch.cat(chosen, dim=1), index, grid)
        scores = torch.stack(weights).mean(dim=0)[:, skip:]
        selection = select_these(scores, (index - skip).clamp(min=-1), grid, images.shape[-2:])
        return Output(self.head(tokens[:, 0]), selection, embeddings={"fused": tokens[:, 0]})

    @torch.no_grad()
    def weigh(self, f: Features) -> Tensor:
        """Scores of all n tokens after a block (B, n). The paper's own rank the class token too, others patches."""
        if self.metric == "maws":
            return mutual_attention(f, f.attention_logits[-1])  # type: ignore[index]
        return F.pad(score(self.metric, f).mean(dim=1), (f.num_prefix, 0), value=-torch.inf)


def build(encoder: Backbone, num_classes: int, *, metric: str = "maws", top_k: int = 12) -> FFVT:
    """FFVT (arXiv 2107.02341) on `encoder`.

    Args:
        encoder: a backbone with a class token and a last block that takes some of the tokens.
        num_classes: C.
        metric: what scores the tokens, read off every block in turn (the paper: maws).
        top_k: tokens of each block (the paper: 12, Stanford Dogs 24).

    Raises:
        ConfigError: for a metric that the encoder cannot serve, or more tokens than patches.
    """
    check_metric(metric, encoder.has_attention, 1)
    check_top(top_k, encoder.grid, "top_k")
    return FFVT(encoder, zero_linear(encoder.dim, num_classes), metric, top_k)


PUBLISHED = Published(
    "ffvt",
    (
        (r"^transformer\.encoder\.ff_last_layer", "blocks.last"),
        (r"^transformer\.encoder\.ff_encoder_norm", "norm"),
        *VIT_AUTHORS,
    ),
    vit_sizes,
    VIT_ASKS | {"top_k": "tokens taken of each block (by default 12)"},
)
