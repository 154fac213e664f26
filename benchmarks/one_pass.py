"""The method `tokens`: GLSim whose aggregator sees the chosen patches' own tokens instead of a crop. One pass.

An experiment beside the package (docs/results/below_two_passes.md): `cost_accuracy.py` makes its name known. Recipes:
`benchmarks/*_tokens.yaml`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.boxes import select
from glsim.models.heads import Aggregator, Classifier
from glsim.models.scores import check_metric, check_top, gather_tokens, needs_attention, score
from glsim.types import Output


class Tokens(Model):
    """Encode, choose patches as GLSim does, refine the image's token together with theirs, classify."""

    def __init__(self, backbone: Backbone, aggregator: nn.Module, head: nn.Module, metric: str, top_o: int) -> None:
        super().__init__()
        self.backbone, self.aggregator, self.head, self.metric, self.top_o = backbone, aggregator, head, metric, top_o

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        f = self.features(images, attention=needs_attention(self.metric))
        selection = select(score(self.metric, f), self.top_o, f.grid, images.shape[-2:])
        tokens = torch.cat((f.cls[:, None], gather_tokens(f.patches, selection.indices)), dim=1)  # B 1+K D
        return Output(self.head(self.aggregator(tokens)), selection)


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    top_o: int = 8,
    metric: str = "gls_cos",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> Tokens:
    """As for `glsim`, without its crop."""
    check_metric(metric, encoder.has_attention, encoder.depth)
    check_top(top_o, encoder.grid, "top_o")
    aggregator = Aggregator(encoder.dim, 1, dropout, drop_path, norm_eps or 1e-6)
    return Tokens(encoder, aggregator, Classifier(encoder.dim, num_classes), metric, top_o)
