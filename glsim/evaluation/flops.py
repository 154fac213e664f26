"""Floating point operations and parameters of a model, counted; nothing is timed.

Models are built on PyTorch's meta device, where tensors have shapes and no values: nothing is allocated or computed, so
ViT-B at 1024 pixels takes a second. The counter sees matrix products and convolutions, 2 operations per multiply-add,
with fused attention off (its kernels hide theirs from the counter on a CPU); elementwise work is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glsim.models import create_model
from glsim.models.base import Model


@dataclass(frozen=True)
class ModelFlops:
    """What the answer to one image takes."""

    method: str
    backbone: str
    image_size: list[int]  # height and width, pixels
    options: dict[str, Any]
    parameters: int
    gflops: float  # 10^9 operations
    ratio: float  # of the operations of plain


@dataclass(frozen=True)
class FlopsComparison:
    """What `compare_flops` returns: plain, and beside it the method."""

    rows: list[ModelFlops]


def compare_flops(
    method: str = "glsim",
    backbone: str | None = None,
    image_size: Any = None,
    num_classes: int = 200,
    options: Mapping[str, Any] | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> FlopsComparison:
    """Count parameters and operations of a method beside those of plain on the same backbone.

    Args:
        method: one of `glsim.METHODS`.
        backbone: timm model name; by default the method's own.
        image_size: side or (height, width), pixels; by default the backbone's own.
        num_classes: outputs of the last layer.
        options: options of the method.
        backbone_args: handed to timm.

    Raises:
        ConfigError: for a combination that cannot be built.
    """
    model = build(method, backbone, image_size, num_classes, backbone_args=backbone_args, **options or {})
    size, name = model.config.image_size, model.config.backbone  # of cal: its own
    plain = build("plain", name, size, num_classes, backbone_args=backbone_args)
    whole = count(plain)
    rows = []
    for each in [plain] if method == "plain" else [plain, model]:
        flops, kind, given = count(each), each.config.method, each.config.options
        rows.append(ModelFlops(kind, name, size, given, count_parameters(each), flops / 1e9, flops / whole))
    return FlopsComparison(rows)


def build(method: str, backbone: str | None, size: Any, num_classes: int = 200, **more: Any) -> Model:
    """A model without values, in eval mode: `create_model`, whose arguments these are, on the meta device."""
    with torch.device("meta"):
        return create_model(method, backbone, num_classes, size, **more).eval()


def count(model: Model) -> int:
    """Operations of the answer to one image, from a model that `build` made."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(1, 3, *model.config.image_size))
    return counter.get_total_flops()


def count_parameters(model: Model) -> int:
    """Numbers that training changes, or could."""
    return sum(p.numel() for p in model.parameters())
