"""RAMS-Trans (Hu et al.: Recurrent Attention Multi-scale Transformer for Fine-grained .., arXiv 2107.08192)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.boxes import crop_and_resize, select_component
from glsim.models.heads import zero_linear
from glsim.models.published import VIT_ASKS, VIT_AUTHORS, File, Published, vit_sizes
from glsim.models.scores import check_metric, needs_attention, score
from glsim.types import ConfigError, Output, Selection

TITLE = "RAMS-Trans"
NEEDS = ("class_token",)
CROPS = True
EMBEDDINGS = ("global", "crop", "fused")


class RAMS(Model):
    """Attention rolled out over all blocks marks a region, which is encoded again with a class token of its own."""

    top_o = None

    def __init__(self, backbone: Backbone, head: nn.Module, metric: str, threshold: float) -> None:
        super().__init__()
        self.backbone, self.head, self.metric, self.threshold = backbone, head, metric, threshold
        self.crop_token = nn.Parameter(backbone.net.cls_token.detach().clone())  # 1 1 D

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised.

        Trained by two cross-entropies; the answer is the mean of both passes' logits (the published code: the image's).
        """
        f = self.features(images, attention=needs_attention(self.metric))
        selection = self.select(score(self.metric, f), images)
        crops = crop_and_resize(images, selection.boxes)
        local = functional_call(self.backbone, {"net.cls_token": self.crop_token}, (crops,)).cls
        logits = self.head(torch.stack((f.cls, local)))  # 2 B C
        losses = {"cross_entropy": ((1.0, logits[0]), (1.0, logits[1]))} if self.training else {}
        vectors = {"global": f.cls, "crop": local, "fused": (f.cls + local) / 2}
        return Output(logits.mean(dim=0), selection, crops, losses, vectors)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """The largest connected region of what exceeds the mean of `scores` (B, g, N)."""
        return select_component(scores, self.threshold, self.backbone.grid_of(images), images.shape[-2:])

    def initialised(self, kept: list[str]) -> None:
        """Weights that know one class token only start the crop's from it."""
        if "crop_token" in kept:
            self.crop_token.data.copy_(self.backbone.net.cls_token)

    def no_weight_decay(self) -> set[str]:
        """The crop's class token too."""
        return super().no_weight_decay() | {"crop_token"}


class ReleasedRAMS(RAMS):
    """What the authors released: both class tokens in one sequence, the first answers alone, and is trained alone.

    The second one is the network's first register. The box begins a pixel before its first patch.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, metric: str, threshold: float) -> None:
        super().__init__(backbone, head, metric, threshold)
        del self.crop_token

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. What the second token says of the crop is in `embeddings` alone."""
        f = self.features(images, attention=needs_attention(self.metric))
        selection = self.select(score(self.metric, f), images)
        crops = crop_and_resize(images, selection.boxes)
        with torch.no_grad():  # no loss reads it
            local = self.backbone.layers(crops)[-1][:, 1]
        vectors = {"global": f.cls, "crop": local, "fused": f.cls}
        return Output(self.head(f.cls), selection, crops, embeddings=vectors)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """The region, its box one pixel wider at the left and at the top."""
        selection = super().select(scores, images)
        start = selection.boxes[:, :2].sub(1).clamp(min=0)
        return selection._replace(boxes=torch.cat((start, selection.boxes[:, 2:]), dim=1))

    def initialised(self, kept: list[str]) -> None:
        """The second token is the network's own."""

    def no_weight_decay(self) -> set[str]:
        """Those of the network."""
        return Model.no_weight_decay(self)


def build(
    encoder: Backbone, num_classes: int, *, metric: str = "rams", threshold: float = 1.2, released: bool = False
) -> RAMS:
    """RAMS-Trans (arXiv 2107.08192) on `encoder`.

    Args:
        encoder: a backbone with a class token.
        num_classes: C.
        metric: what scores the patches.
        threshold: patches above that times the mean score make the region (the paper: 1.2).
        released: compute what the authors' code does, which is not the paper's (`ReleasedRAMS`); needs a backbone with
            a register.

    Raises:
        ConfigError: for a metric that the encoder cannot serve, or a threshold below 1.
    """
    check_metric(metric, encoder.has_attention, encoder.depth)
    if threshold < 1:
        raise ConfigError(f"threshold={threshold}: at least 1, times the mean score")
    if released and encoder.skip < 2:
        raise ConfigError("released=True: a second class token is needed, --backbone-args.reg_tokens 1")
    return (ReleasedRAMS if released else RAMS)(encoder, zero_linear(encoder.dim, num_classes), metric, threshold)


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell: the released form, with two class tokens."""
    sizes = vit_sizes(file, prefix=2)
    return sizes | {"backbone_args": sizes["backbone_args"] | {"reg_tokens": 1}, "released": True}


PUBLISHED = Published(
    "RAMS-Trans",
    (
        (r"cls_token1$", "cls_token"),
        (r"cls_token2$", "reg_token"),
        (r"^transformer\.encoder\.part_norm", "norm"),
        (r"^part_head", "head"),
        *VIT_AUTHORS,
    ),
    published_sizes,
    VIT_ASKS,
)
