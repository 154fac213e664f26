"""Floor 2: one file a paper. A new method is a file here with a `build` function, and its name in `METHODS`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from glsim.types import ConfigError, choose

if TYPE_CHECKING:
    from torch import Tensor, nn

    from glsim.backbone import Model

METHODS = {  # name -> module; imported when asked for, so that the names cost nothing
    "plain": "glsim.models.plain",
    "glsim": "glsim.models.glsim",
}


def create_model(
    method: str,
    backbone: str = "vit_base_patch16_224",
    num_classes: int = 1000,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    backbone_args: dict[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Build a model: `model(images (B, 3, H, W))` returns an `Output` whatever the method.

    `backbone` is a timm name, `backbone_args` goes to timm (`{"depth": 2, "embed_dim": 64}`), `options` to the method
    (`top_o`, `metric`, `box`, `crop_size`, `classifier`, `aggregator_depth`, `dropout`, `drop_path`, `norm_eps`).
    `model.config` holds all of it, as plain values, for `glsim.save`.

    Raises ConfigError for any name, option or size that does not fit, listing what would.
    """
    build = import_module(choose(method, METHODS, "method")).build
    parameters = inspect.signature(build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise ConfigError(f"{method!r} has no option {', '.join(unknown)}; its options: {', '.join(sorted(defaults))}")
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}; at least one class is needed")
    model = build(backbone, num_classes, image_size, pretrained, backbone_args, **options)
    model.config = {
        "method": method,
        "backbone": backbone,
        "num_classes": num_classes,
        "image_size": list(model.backbone.image_size),
        "backbone_args": dict(backbone_args or {}),
        "options": {**defaults, **options},
    }
    return model


def resample_positions(weights: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Position embeddings for another image size, by timm's own filter for the family of `net`."""
    prefix = "backbone.net."
    inner = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    inner = import_module(type(net).__module__).checkpoint_filter_fn(inner, net)
    return {k: v for k, v in weights.items() if not k.startswith(prefix)} | {prefix + k: v for k, v in inner.items()}
