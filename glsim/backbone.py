"""Floor 1: one face for every timm vision transformer with a single token grid.

timm does the work; this adapter gives the tokens names (`Features`) and, on request, the attention logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glsim.types import ConfigError, Features

FAMILIES = (
    "ViT and DeiT (vit_base_patch16_224, deit_small_patch16_224), DINOv2 (vit_small_patch14_reg4_dinov2), "
    "DINOv3 (vit_small_patch16_dinov3), SigLIP (vit_base_patch16_siglip_224), "
    "EVA-02 (eva02_base_patch14_224), BEiT (beit_base_patch16_224)"
)


class Backbone(nn.Module):
    """Adapter over a timm `VisionTransformer`, `Eva` or `Beit` built with `num_classes=0`.

    `image_size` (H, W) is the size it was built for; `patch_size` the pixels from one patch to the next.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net
        # timm moves the final norm behind the pooling in some families: patches and class token need it all the same.
        self.late_norm = isinstance(net.norm, nn.Identity)
        self.pooled = net.cls_token is None or getattr(net, "attn_pool", None) is not None
        self.dim: int = net.embed_dim
        self.skip: int = net.num_prefix_tokens  # tokens before the first patch
        self.num_prefix = self.skip if net.cls_token is not None else 0  # the same, where the first is a class token
        self.image_size: tuple[int, int] = to_pair(net.patch_embed.img_size)
        self.grid: tuple[int, int] = to_pair(net.patch_embed.grid_size)
        self.patch_size = to_pair(net.patch_embed.feat_ratio(as_scalar=False))
        self.any_size: bool = getattr(net, "dynamic_img_size", False)

    def forward(self, images: Tensor, attention: bool = False) -> Features:
        """Encode `images` (B, 3, H, W), normalised as the backbone expects.

        With `attention` the blocks spell their attention out and `attention_logits` holds one (B, h, n, n) tensor a
        block; without it they stay on the fused kernels.
        """
        if attention:
            with explicit_attention(self.net) as logits:
                raw = self.net.forward_features(images)
        else:
            logits, raw = None, self.net.forward_features(images)
        tokens = self.net.fc_norm(raw) if self.late_norm else raw
        cls = self.net.forward_head(raw, pre_logits=True) if self.pooled else tokens[:, 0]
        rows, cols = self.net.patch_embed.dynamic_feat_size(images.shape[-2:])
        if logits is not None and not self.num_prefix:  # registers alone: their rows and columns say nothing of places
            logits = [a[..., self.skip :, self.skip :] for a in logits]
        maps = None if logits is None else tuple(logits)
        return Features(cls, tokens[:, self.skip :], (rows, cols), self.num_prefix, maps)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ConfigError unless images of `size` (H, W) can be encoded."""
        if any(side < patch or side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ConfigError(f"image size {_by(size)} is no multiple of the patch, {_by(self.patch_size)} pixels")
        if size != self.image_size and not self.any_size:
            raise ConfigError(
                f"{type(self.net).__name__} keeps relative positions for {_by(self.image_size)} pixels only; "
                f"crops of {_by(size)} need a ViT, DINO, SigLIP or EVA backbone"
            )


class Model(nn.Module):
    """What every method has: a backbone, and in `config` the plain values that `create_model` made it from."""

    backbone: Backbone
    config: dict[str, Any]
    conversion: Any = None  # of an official checkpoint: what became of its keys

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers leave undecayed beside biases and norms: tokens and positions."""
        return {f"backbone.net.{name}" for name in self.backbone.net.no_weight_decay()}

    def features(self, images: Tensor, attention: bool = False) -> Features:
        """Tokens of the first pass over `images` (B, 3, H, W), for any metric and picture."""
        return self.backbone(images, attention=attention)


class _SpelledOut(TorchFunctionMode):
    """While active, scaled dot-product attention is computed in three steps and its logits are kept."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
    ) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if attn_mask is not None:  # BEiT's relative position bias; the other families pass none
            logits = logits + attn_mask
        self.logits.append(logits)
        return F.dropout(logits.softmax(dim=-1), dropout_p) @ v


@contextmanager
def explicit_attention(net: Any) -> Iterator[list[Tensor]]:
    """Collect the attention logits (B, h, n, n) of every block of `net` that runs inside, first block first.

    The outputs stay timm's own. The fused-attention switches are put back afterwards, also after an exception.
    """
    logits: list[Tensor] = []
    switches: list[Any] = [(m, m.fused_attn) for m in net.modules() if hasattr(m, "fused_attn")]
    for module, _ in switches:  # only the fused path calls the function that `_SpelledOut` replaces
        module.fused_attn = True
    try:
        with _SpelledOut(logits):
            yield logits
    finally:
        for module, fused in switches:
            module.fused_attn = fused


def build_backbone(
    name: str,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    backbone_args: dict[str, Any] | None = None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> Backbone:
    """Build the timm model `name` and wrap it.

    `image_size` in pixels (one side, or height and width; None: the size timm lists for the weights).
    `backbone_args` goes to timm untouched (`depth=2`, `embed_dim=64`, ..). `dropout` acts after the attention
    projection and in the MLP, `drop_path` is the same in every block (timm's own rises with depth; the paper's does
    not), `norm_eps` replaces the epsilon of every LayerNorm.

    Raises ConfigError for an unknown name, a family without one token grid, a size the backbone cannot take, an
    argument timm does not know, and for pre-trained weights that cannot be had.
    """
    args = dict(backbone_args or {})
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name.partition(".")[0], timm.list_models(), n=5))
        raise ConfigError(f"timm has no model {name!r}" + (f"; close to it: {close}" if close else f"; try {FAMILIES}"))
    if image_size is not None:
        args["img_size"] = to_pair(image_size)
    entry = timm.model_entrypoint(name)
    if entry.__module__.rpartition(".")[2] in ("vision_transformer", "vision_transformer_hybrid", "deit", "eva"):
        args.setdefault("dynamic_img_size", True)
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, proj_drop_rate=dropout, **args)
    except (TypeError, AssertionError, ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, TypeError) and pretrained and _is_download_error(error):
            raise ConfigError(
                f"no pre-trained weights for {name!r}: {_first_line(error)}. Connect to the network once (they are "
                "kept in the cache), hand timm a local file with backbone_args={'pretrained_cfg_overlay': "
                "{'file': 'weights.safetensors'}}, or start from nothing: pretrained=False (--no-pretrained)"
            ) from error
        if "proj_drop_rate" in str(error):
            raise _no_grid(name) from error
        raise ConfigError(f"timm cannot build {name!r} with {args}: {_first_line(error)}") from error
    if not isinstance(net, VisionTransformer | Eva | Beit):
        raise _no_grid(name)
    for module in net.modules():
        if drop_path and hasattr(module, "drop_path1"):
            module.drop_path1, module.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        elif drop_path and hasattr(module, "drop_path"):
            module.drop_path = DropPath(drop_path)
        if norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = norm_eps
    backbone = Backbone(net)
    backbone.check_size(backbone.image_size)
    return backbone


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`224` or `(192, 256)` as (height, width); ConfigError for anything else."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ConfigError(f"size {list(size)}: give one side or [height, width], in whole pixels")
    return size[0], size[1]


def _no_grid(name: str) -> ConfigError:
    return ConfigError(f"{name!r} has no single grid of patch tokens to compare; families that work: {FAMILIES}")


def _is_download_error(error: Exception) -> bool:
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return isinstance(error, OSError) or any(w in text for w in ("huggingface", "connect", "pretrained", "http"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
