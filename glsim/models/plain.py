"""The plain backbone with a linear head: what every method has to beat."""

from __future__ import annotations

from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.heads import zero_linear
from glsim.types import Output

EMBEDDINGS = ("global",)


class Plain(Model):
    """One pass, the head reads the class token (the pooled vector where there is none)."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        cls = self.features(images).cls
        return Output(self.head(cls), embeddings={"global": cls})


def build(encoder: Backbone, num_classes: int) -> Plain:
    """Any timm network and a linear layer that starts at zero."""
    return Plain(encoder, zero_linear(encoder.dim, num_classes))
