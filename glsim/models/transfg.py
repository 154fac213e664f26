"""TransFG (He et al.: TransFG: A Transformer Architecture for Fine-grained Recognition, arXiv 2103.07976)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import TokenModel
from glsim.models.boxes import select_these
from glsim.models.heads import zero_linear
from glsim.models.published import VIT_ASKS, VIT_AUTHORS, File, Published, vit_sizes
from glsim.models.scores import check_metric, gather_tokens, needs_attention, score
from glsim.types import Output

TITLE = "TransFG"
NEEDS = ("class_token", "last_block")
EMBEDDINGS = ("fused",)
ENCODER = {"stride": 0.75}  # patches overlap: 12 pixels of 16


class TransFG(TokenModel):
    """Overlapping patches; for every head the patch that attention leads to; only those go through the last block."""

    def __init__(self, backbone: Backbone, head: nn.Module, metric: str) -> None:
        super().__init__()
        self.backbone, self.head, self.metric = backbone, head, metric

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        tokens, f = self.backbone.stages(images, needs_attention(self.metric))[-1]
        scores = score(self.metric, f)  # B h N
        parts = scores.argmax(dim=-1)  # B h
        index = parts + self.backbone.skip
        cls = self.backbone.last_block(tokens, gather_tokens(tokens, index), index, f.grid)[:, 0]
        logits = self.head(cls)
        selection = select_these(scores.sum(dim=1), parts, f.grid, images.shape[-2:])
        losses = {"cross_entropy": ((1.0, logits),), "contrastive": cls} if self.training else {}
        return Output(logits, selection, aux=losses, embeddings={"fused": cls})


def build(encoder: Backbone, num_classes: int, *, metric: str = "psm") -> TransFG:
    """TransFG (arXiv 2103.07976) on `encoder`.

    Args:
        encoder: a backbone with a class token and a last block that takes some of the tokens.
        num_classes: C.
        metric: what scores the patches; one with a map for each head chooses as many parts (the paper: psm).

    Raises:
        ConfigError: for a metric that the encoder cannot serve.
    """
    check_metric(metric, encoder.has_attention, encoder.depth - 1)
    return TransFG(encoder, zero_linear(encoder.dim, num_classes), metric)


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell; patches overlap as in the paper, as a share that fits any patch."""
    stride = file.given.pop("stride", 0.75)
    return vit_sizes(file, stride) | {"stride": stride}


PUBLISHED = Published(
    "transfg",
    (
        (r"^transformer\.encoder\.part_layer", "blocks.last"),
        (r"^transformer\.encoder\.part_norm", "norm"),
        (r"^part_head", "head"),
        *VIT_AUTHORS,
    ),
    published_sizes,
    VIT_ASKS | {"stride": "pixels from patch to patch (by default 0.75 of the patch)"},
)
