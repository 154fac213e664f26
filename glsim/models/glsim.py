"""GLSim (Rios, Hu and Lai: Global-Local Similarity for Efficient Fine-Grained Image Recognition, arXiv 2407.12891)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glsim.backbone import Backbone, Model, to_pair
from glsim.crop import BOX_RULES, crop_and_resize, select
from glsim.heads import Aggregator, Classifier
from glsim.selection import check_metric, check_top, needs_attention, score
from glsim.types import Output, choose


class GLSim(Model):
    """Encode the image, crop where class token and patches agree most, encode the crop, refine both, classify."""

    def __init__(
        self,
        backbone: Backbone,
        aggregator: nn.Module,
        head: nn.Module,
        metric: str = "gls_cos",
        top_o: int = 8,
        box: str = "exclusive",
        crop_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.aggregator, self.head = backbone, aggregator, head
        self.metric, self.top_o, self.box, self.crop_size = metric, top_o, box, crop_size

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The crop is taken from these very pixels, augmentation included."""
        f = self.features(images, attention=needs_attention(self.metric))
        selection = select(score(self.metric, f), self.top_o, f.grid, images.shape[-2:], self.box)
        crops = crop_and_resize(images, selection.boxes, self.crop_size)
        fused, vectors = self.fuse(f.cls, self.backbone(crops).cls)
        return Output(self.head(fused), selection, crops, embeddings=vectors)

    def fuse(self, image: Tensor, crop: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both class tokens (B, D) refined together, (B, 2, D); and the embeddings (B, D) by name."""
        fused = self.aggregator(torch.stack((image, crop), dim=1))
        return fused, {"global": image, "crop": crop, "fused": fused[:, 0]}


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    top_o: int = 8,
    metric: str = "gls_cos",
    box: str = "exclusive",
    crop_size: int | Sequence[int] | None = None,
    classifier: str = "cls",
    aggregator_depth: int = 1,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> GLSim:
    """`top_o` patches span the crop (the paper: 8, Stanford Dogs 16, at every image size); `crop_size` in pixels."""
    check_metric(metric, encoder.has_attention, encoder.depth)
    choose(box, BOX_RULES, "box rule")
    check_top(top_o, encoder.grid, "top_o")
    if crop_size is not None:
        crop_size = to_pair(crop_size)
        encoder.check_size(crop_size)
    aggregator = Aggregator(encoder.dim, aggregator_depth, dropout, drop_path, norm_eps or 1e-6)
    return GLSim(encoder, aggregator, Classifier(encoder.dim, num_classes, classifier), metric, top_o, box, crop_size)
