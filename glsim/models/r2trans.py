"""R2-Trans (Wang, Yu and You: R2-Trans: Fine-Grained Visual Categorization with .., arXiv 2204.10095)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.attention import replaced_attention
from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.boxes import select_these
from glsim.models.heads import zero_linear
from glsim.models.published import VIT_ASKS, VIT_AUTHORS, File, Published, vit_sizes
from glsim.types import ConfigError, Features, Output

TITLE = "R2-Trans"
NEEDS = ("class_token",)
EMBEDDINGS = ("global",)
WEIGHTS = (4.0, 4.0, 2.0)  # of the three answers where they are added up


class R2Trans(Model):
    """Patches that receive little attention are removed, and the image is encoded once more without them.

    Training classifies both class tokens and the two side by side. The map that removes patches goes through a norm
    over places, which nothing trains: the authors' code cuts it off from every loss, and so does this one.
    """

    def __init__(self, backbone: Backbone, num_classes: int, threshold: float, batch_share: bool, answer: str) -> None:
        super().__init__()
        self.backbone, self.threshold, self.batch_share, self.answer = backbone, threshold, batch_share, answer
        self.norm = nn.LayerNorm(backbone.grid[0] * backbone.grid[1]).requires_grad_(False)
        self.head, self.both = zero_linear(backbone.dim, num_classes), zero_linear(2 * backbone.dim, num_classes)

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The answer is that of the first pass, as the authors report it."""
        f = self.features(images, attention="maps")
        scores, keep = self.judge(f)  # B N
        order = scores.argsort(dim=1, descending=True, stable=True)
        indices = torch.where(keep.gather(1, order), order, -1)
        selection = select_these(scores, indices, f.grid, images.shape[-2:])
        logits, losses = self.head(f.cls), {}
        if self.training or self.answer == "sum":
            second = self.encode_kept(images, keep)
            three = (logits, self.head(second), self.both(torch.cat((f.cls, second), dim=1)))
            losses = {"cross_entropy": tuple((1.0, x) for x in three)} if self.training else {}
            if self.answer == "sum":
                logits = torch.stack([w * x for w, x in zip(WEIGHTS, three, strict=True)]).sum(dim=0)
        return Output(logits, selection, aux=losses, embeddings={"global": f.cls})

    @torch.no_grad()
    def judge(self, f: Features) -> tuple[Tensor, Tensor]:
        """The map (B, N), and which patches stay: as many of the lowest go as lie below `threshold` times the mean."""
        attention = torch.stack(f.attention_maps).mean(dim=(0, 2))  # type: ignore[arg-type]  # B n n
        received = attention[:, f.num_prefix :, f.num_prefix :].sum(dim=1)  # of a patch from all patches, B N
        scores = self.norm(received).sigmoid()
        below = (scores < self.threshold * scores.mean(dim=1, keepdim=True)).sum(dim=1, keepdim=True)  # B 1
        if self.batch_share:
            below = below.float().mean(dim=0, keepdim=True).long().expand_as(below)
        rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
        return scores, rank >= below

    def encode_kept(self, images: Tensor, keep: Tensor) -> Tensor:
        """The class token (B, D) of the patches that stay (B, N): no query sees the others, as if they were removed."""
        seen = F.pad(keep, (self.backbone.skip, 0), value=True)[:, None, None]  # B 1 1 n

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
            return F.scaled_dot_product_attention(q, k, v, bias if mask is None else bias + mask, dropout)

        with replaced_attention(self.backbone.net, attend):
            return self.backbone(images).cls


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    threshold: float = 1.0,
    batch_share: bool = False,
    answer: str = "first",
) -> R2Trans:
    """R2-Trans (arXiv 2204.10095) on `encoder`.

    Args:
        encoder: a backbone with a class token.
        num_classes: C.
        threshold: lambda, times the mean of the map.
        batch_share: remove as many patches of every image as lie below on average in the batch, as the authors' code
            does: the second and third answer of an image then depend on the others.
        answer: "first", or "sum" of the three, weighted 4, 4, 2, which takes both passes.

    Raises:
        ConfigError: for an encoder without attention or a class token, or an unknown answer.
    """
    if answer not in ("first", "sum") or threshold <= 0:
        raise ConfigError(f"answer={answer!r}, threshold={threshold}: first or sum is needed, and a number above 0")
    return R2Trans(encoder, num_classes, threshold, batch_share, answer)


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell, with the rule of the authors' code."""
    return vit_sizes(file) | {"batch_share": True}


PUBLISHED = Published(
    "R2-Trans",
    (
        (r"^base_model_one\.", ""),
        (r"^transformer\.encoder\.encoder_norm", "backbone.net.norm"),
        (r"^classifier", "both"),
        *VIT_AUTHORS,
    ),
    published_sizes,
    VIT_ASKS | {"threshold": "lambda, times the mean of the map (by default 1)"},
)
