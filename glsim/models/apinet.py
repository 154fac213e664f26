"""API-Net (Zhuang, Wang and Qiao: Learning Attentive Pairwise Interaction for .., AAAI 2020, arXiv 2002.10191)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.heads import zero_linear
from glsim.models.published import RESNET_SEQUENCE, Published, resnet_sizes
from glsim.types import ConfigError, Output

TITLE = "API-Net"
EMBEDDINGS = ("global",)


class APINet(Model):
    """In training every image is compared with two others of the batch: which channels tell them apart is learned.

    Which images make a pair follows from their labels, so the loss term chooses them and calls `compare`. A test image
    is classified alone.
    """

    def __init__(self, backbone: Backbone, num_classes: int, hidden: int, margin: float, ranking: float) -> None:
        super().__init__()
        self.backbone, self.margin, self.ranking = backbone, margin, ranking
        self.mutual = nn.Sequential(
            nn.Linear(2 * backbone.dim, hidden), nn.Dropout(0.5), nn.Linear(hidden, backbone.dim)
        )
        self.dropout, self.head = nn.Dropout(0.5), zero_linear(backbone.dim, num_classes)

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        x = self.features(images).cls
        losses: dict[str, Any] = {"pairs": (self.ranking, self.margin, x, self.compare)} if self.training else {}
        return Output(self.head(x), aux=losses, embeddings={"global": x})

    def compare(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of vectors (P, D) and their partners the logits (P, C): each by its own gate, and each by its partner's."""
        mutual = self.mutual(torch.cat((one, other), dim=1))
        gate, partners = (mutual * one).sigmoid(), (mutual * other).sigmoid()
        gated = one + gate * one, one + partners * one, other + partners * other, other + gate * other
        own, by_other, others_own, by_own = (self.head(self.dropout(x)) for x in gated)
        return own, others_own, by_other, by_own


def build(
    encoder: Backbone, num_classes: int, *, hidden: int = 512, margin: float = 0.05, ranking: float = 1.0
) -> APINet:
    """API-Net (arXiv 2002.10191) on `encoder`.

    Args:
        encoder: any backbone.
        num_classes: C.
        hidden: width between the two layers of the mutual vector (the paper: 512).
        margin: by which a vector's own gate has to do better than its partner's.
        ranking: weight of that.

    Raises:
        ConfigError: for numbers that do not fit.
    """
    if hidden < 1 or margin < 0 or ranking < 0:
        raise ConfigError(f"hidden={hidden}, margin={margin}, ranking={ranking}: 1 or more, and from 0 on, is needed")
    return APINet(encoder, num_classes, hidden, margin, ranking)


PUBLISHED = Published(
    "API-Net",
    (
        (r"^conv\.(?:module\.)?", ""),
        *RESNET_SEQUENCE,
        (r"^map1", "mutual.0"),
        (r"^map2", "mutual.2"),
        (r"^fc\.", "head."),
    ),
    lambda file: resnet_sizes(file) | {"hidden": file.shape("mutual.0.weight")[0]},
    {"image_size": "pixels (by default 448)", "margin": "of the ranking (by default 0.05)"},
)
