"""The plain backbone with a linear head: what every method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from glsim.backbone import Backbone, Model, build_backbone
from glsim.heads import zero_linear
from glsim.types import Output


class Plain(Model):
    """One pass, the head reads the class token (the pooled vector where there is none)."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        return Output(self.head(self.features(images).cls))


def build(
    backbone: str,
    num_classes: int,
    image_size: int | Sequence[int] | None,
    pretrained: bool,
    backbone_args: dict[str, Any] | None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> Plain:
    """A timm transformer and a linear layer that starts at zero."""
    encoder = build_backbone(
        backbone, image_size, pretrained, backbone_args, dropout=dropout, drop_path=drop_path, norm_eps=norm_eps
    )
    return Plain(encoder, zero_linear(encoder.dim, num_classes))
