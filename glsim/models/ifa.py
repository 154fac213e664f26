"""IFA (Rios, Hu and Lai: Anime Character Recognition using Intermediate Features Aggregation, ISCAS 2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.heads import zero_linear
from glsim.models.published import GLSIM_AUTHORS, VIT_ASKS, File, Published, vit_sizes
from glsim.types import ConfigError, Output

TITLE = "IFA"
NEEDS = ("class_token",)
EMBEDDINGS = ("fused",)


class IFA(Model):
    """The class tokens after all blocks, mixed channel by channel, are what is classified."""

    def __init__(
        self, backbone: Backbone, num_classes: int, exclusion: float, distance: int, temperature: float
    ) -> None:
        super().__init__()
        self.backbone, self.exclusion, self.distance, self.temperature = backbone, exclusion, distance, temperature
        self.mix = nn.Linear(backbone.depth, 1)
        nn.init.zeros_(
            self.mix.bias
        )  # torch's own may lie below all of an untrained network's class token: no gradient
        self.norm = nn.LayerNorm(backbone.dim, eps=1e-12)
        self.head = zero_linear(backbone.dim, num_classes)

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        tokens = torch.stack([x[:, 0] for x in self.backbone.layers(images)[:-1]], dim=2)  # B D L, before any norm
        vector = self.norm(F.relu(self.mix(tokens)[..., 0]))
        logits = self.head(vector)
        losses: dict[str, Any] = {}
        if self.training and self.exclusion:
            losses["cross_entropy"] = ((1.0, logits),)
            losses["exclusion"] = (self.exclusion, self.temperature, self.distance, tokens)
        return Output(logits, aux=losses, embeddings={"fused": vector})


def build(
    encoder: Backbone, num_classes: int, *, exclusion: float = 0.0, distance: int = 2, temperature: float = 1.0
) -> IFA:
    """IFA (ISCAS 2022) on `encoder`.

    Args:
        encoder: a backbone with a class token.
        num_classes: C.
        exclusion: weight of the term that pushes class tokens of different blocks apart (the authors: 0 or 0.01).
        distance: blocks between the two.
        temperature: of their softmax over channels.

    Raises:
        ConfigError: for numbers that do not fit.
    """
    if exclusion < 0 or temperature <= 0 or distance < 1 or (exclusion and distance >= encoder.depth):
        told = f"exclusion={exclusion}, distance={distance}, temperature={temperature}"
        raise ConfigError(f"{told}: from 0, 1 to {encoder.depth - 1}, above 0")
    encoder.leave_end_frozen()
    return IFA(encoder, num_classes, exclusion, distance, temperature)


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell, with the epsilon of the authors' ViTs."""
    file.given.setdefault("norm_eps", 1e-12)
    return vit_sizes(file)


PUBLISHED = Published(
    "IFA",
    (
        (r"^model\.", ""),
        (r"^transformer\.", "encoder."),
        (r"^inter_class_head\.0", "mix"),
        (r"^inter_class_head\.3", "norm"),
        (r"^inter_class_head\.4", "head"),
        *GLSIM_AUTHORS,
    ),
    published_sizes,
    VIT_ASKS | {"distance": "blocks between tokens that are pushed apart", "temperature": "of their softmax"},
    made=("backbone.net.norm.weight", "backbone.net.norm.bias"),
)
