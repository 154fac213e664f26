"""Published checkpoints: what the file of a method declares of those that its authors hand out (`PUBLISHED`).

A declaration says by which names tensors stand there, what of a model their shapes tell, and what a file does not hold
and has to be asked for. Names are turned into those of this package; timm's may be given without `backbone.net.`,
query, key and value apart, and the last block as `blocks.last`. `glsim.checkpoints.official` reads files by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from glsim.types import ConfigError, DataError

Table = tuple[tuple[str, str], ...]  # pattern -> replacement, of a part of the name; all of them, from the top


@dataclass
class File:
    """What is known of a checkpoint before its model is built; looking up a tensor it lacks raises KeyError."""

    path: str
    method: str
    weights: Mapping[str, Tensor]  # under names of this package, or of timm
    arguments: dict[str, Any]  # of the authors' program, where the file holds them
    given: dict[str, Any]  # with the call
    asks: dict[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        return list(self.weights[name].shape)

    def count(self, prefix: str) -> int:
        """How many numbers follow `prefix` in names: blocks of a network, or of a stage."""
        return len({name[len(prefix) :].split(".")[0] for name in self.weights if name.startswith(prefix)})

    def take(self, name: str, default: Any = None) -> Any:
        """What was given for `name`, else the default; ConfigError saying what is needed where there is neither."""
        value = self.given.pop(name, default)
        if value is None:
            raise ConfigError(
                f"{self.path} does not hold {name}, {self.asks[name]}: give it ({name}=.. in Python, --options.{name})"
            )
        return value


class Published(NamedTuple):
    """How the authors of a method store its network."""

    title: str  # of the method, for messages
    names: Table | Callable[[Collection[str]], Table]  # published name -> ours; the table may follow from the names
    sizes: Callable[[File], dict[str, Any]]  # arguments of `create_model`, but for those given with the call
    asks: dict[str, str] = {}  # what files do not hold and a call may give -> what it is
    ignored: Table = ()  # pattern of published names, or of ours -> why nothing reads them
    made: tuple[str, ...] = ()  # tensors of ours that follow from the options


# ViTs as TransFG's code, and all that is built on it, names them.
VIT_AUTHORS: Table = (
    (r"^(?:transformer\.)?embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"^(?:transformer\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"^(?:transformer\.)?embeddings\.", ""),
    (r"^(?:transformer\.)?encoder\.layer\.", "blocks."),
    (r"attn\.([qkv])(?:uery|ey|alue)\b", r"attn.\1"),
    (r"attn\.out", "attn.proj"),
    (r"attention_norm", "norm1"),
    (r"ffn_norm", "norm2"),
    (r"ffn\.", "mlp."),
)
# The same of GLSim's authors and of their other papers.
GLSIM_AUTHORS: Table = (
    (r"^class_token$", "cls_token"),
    (r"^positional_embedding\.pos_embedding$", "pos_embed"),
    (r"^patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.blocks", "blocks"),
    (r"^encoder_norm", "norm"),
    (r"^aggregator_norm", "aggregator.norm"),
    (r"(blocks\.\d+\.)proj\.", r"\1attn.proj."),
    (r"attn\.proj_([qkv])", r"attn.\1"),
    (r"pwff\.", "mlp."),
)
# torchvision's ResNet as a sequence: stem, batch norm, ReLU, pooling, four stages.
RESNET_SEQUENCE: Table = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    *((rf"^{i + 3}\.", f"layer{i}.") for i in range(1, 5)),
)
VIT_ASKS = {
    "num_heads": "how many attention heads a block has (by default one for every 64 of a width that 64 divides)",
    "image_size": "pixels (by default the square that its positions were made for; another one resamples them)",
    "patch_size": "pixels of a patch, which the file does hold and have to be these",
}


def vit_sizes(file: File, stride: int | float | None = None, prefix: int = 1) -> dict[str, Any]:
    """Arguments for a ViT: width, depth and patch by its shapes, `num_heads` and `image_size` as given or usual.

    Args:
        file: with timm's names.
        stride: from patch to patch, in pixels or as a share of the patch.
        prefix: tokens with a position before the first patch.
    """
    positions = file.shape("pos_embed")[1] - prefix
    dim, _, patch, _ = file.shape("patch_embed.proj.weight")
    heads = file.take("num_heads", None if dim % 64 else dim // 64)
    if type(heads) is not int or heads < 1 or dim % heads:
        raise ConfigError(f"num_heads={heads}: the width of {file.path} is {dim}, which that does not divide")
    if file.take("patch_size", patch) != patch:
        raise ConfigError(f"patch_size: {file.path} was made for patches of {patch} pixels")
    step = stride or patch
    step = step if isinstance(step, int) else int(step * patch)
    side = math.isqrt(positions)
    least = (side - 1) * step + patch
    whole = -(-least // patch) * patch  # of the sizes with that many places the one that is a multiple of the patch
    stored = whole if whole < least + step else least
    return {
        "backbone": "vit_base_patch16_224",
        "image_size": file.take("image_size", stored if side**2 == positions else None),
        "norm_eps": file.take("norm_eps", 1e-6),
        "backbone_args": {
            "embed_dim": dim,
            "depth": file.count("blocks."),
            "num_heads": heads,
            "mlp_ratio": file.shape("blocks.0.mlp.fc1.weight")[0] / dim,
            "patch_size": patch,
        },
    }


def resnet_sizes(file: File, prefix: str = "") -> dict[str, Any]:
    """Arguments for a ResNet of timm from the shapes of its stages; of `image_size`, which none tells, 448 is usual."""
    first = [f"{prefix}layer{i}.0." for i in range(1, 5)]
    deep = f"{first[0]}conv3.weight" in file.weights
    layers = [file.count(f"{prefix}layer{i}.") for i in range(1, 5)]
    names: dict[tuple[int, ...], str] = {
        (3, 4, 6, 3): "resnet50",
        (3, 4, 23, 3): "resnet101",
        (3, 8, 36, 3): "resnet152",
    }
    return {
        "backbone": names.get(tuple(layers), "resnet50") if deep else "resnet34",
        "image_size": file.take("image_size", 448),
        "backbone_args": {"layers": layers, "channels": [file.shape(f"{name}conv1.weight")[0] for name in first]},
    }


def refuse(file: File, arguments: Mapping[str, Any]) -> None:
    """DataError for a file trained with another value than the only one this package computes the same way."""
    for name, value in arguments.items():
        if file.arguments.get(name, value) != value:
            found = file.arguments[name]
            raise DataError(f"{file.path} was trained with {name}={found!r}, which has no equal here (only {value!r})")
