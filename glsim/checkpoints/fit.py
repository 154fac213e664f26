"""Weights of a file in a network: which tensors are used, ignored and missing, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glsim.checkpoints.config import some
from glsim.checkpoints.conventions import FLAX, UNKNOWN, Weights, find_prefixes, sources_of, why_ignored
from glsim.models import filter_weights

# What a file need not hold: torch did not always count batches, and no other library does.
MAY_LACK = re.compile(r"num_batches_tracked$")
RESAMPLED = re.compile(r"pos_embed$|patch_embed\.proj\.weight$|relative_position_bias_table$")
# Of a network that has none of these, they would be lost without a word.
TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre")


@dataclass(frozen=True)
class Fit:
    """What becomes of every tensor of a file in a network."""

    used: dict[str, str]  # name in the file -> in the network
    ignored: dict[str, str]  # name in the file -> why
    missing: list[str]  # of the network, found nowhere: they stay as they were
    resampled: dict[str, str]  # of the network: from which shape to which
    unfit: list[str]  # why the file is none for this network; empty where it fits

    @property
    def fits(self) -> bool:
        """Whether the network can start from the file."""
        return not self.unfit


@torch.no_grad()
def fit(weights: Weights, net: nn.Module) -> tuple[dict[str, Tensor], Fit]:
    """The tensors of a file as `net`, a network of timm, names and shapes them, and what became of each.

    Positions, and kernels of other patches, are resampled by timm's filter for the family. Nothing is changed in `net`,
    which may be on the meta device.
    """
    own = net.state_dict()
    named, ignored = dict(weights.named), dict(weights.ignored)
    if weights.convention is UNKNOWN:
        named = _without_prefix(named, next(iter(own)), ignored)
    _drop_silent_biases(named, own, ignored)
    _spread_positions(named, own)
    try:
        made = filtered(named, net, weights.convention.table is FLAX)
    except Exception:  # timm's filters look up what another network has not
        return {}, Fit({}, ignored, sorted(own), {}, [f"its tensors are not those of {type(net).__name__}"])
    _name_final_norm(made, own)
    taken: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    resampled: dict[str, str] = {}
    odd: dict[str, str] = {}
    foreign: dict[str, str] = {}
    for name, tensor in made.items():
        sources = sorted(sources_of(tensor))
        if name not in own:
            foreign |= dict.fromkeys(sources, name)
        elif tensor.shape != own[name].shape:
            odd[name] = f"{name} is {list(tensor.shape)}, {list(own[name].shape)} is needed"
            ignored |= dict.fromkeys(sources, "of another shape")
        elif tensor.is_floating_point() != own[name].is_floating_point():
            odd[name] = f"{name} is of {str(tensor.dtype).removeprefix('torch.')}"
            ignored |= dict.fromkeys(sources, "of another type")
        else:
            taken[name] = plain(tensor)
            used |= {source: ", ".join(filter(None, [used.get(source), name])) for source in sources}
            before = weights.stored[sources[0]].shape if len(sources) == 1 else tensor.shape
            if RESAMPLED.search(name) and _other_grid(before, tensor.shape, getattr(net, "num_prefix_tokens", 0)):
                resampled[name] = f"{list(before)} to {list(tensor.shape)}"
    roots = {name.split(".")[0] for name in own} | set(TOKENS)
    lost = []
    ignored |= {key: "another part of a method" for tensor in weights.parts.values() for key in sources_of(tensor)}
    for key in sorted(weights.stored.keys() - used.keys() - ignored.keys()):
        name = foreign.get(key, key)
        why = why_ignored(name) or why_ignored(key)
        if why is None and name.split(".")[0] in roots and not name.startswith(("norm.", "fc_norm.")):
            lost.append(name)
        ignored[key] = why or ("final norm of the other pooling" if "norm." in name else "not part of this network")
    missing = sorted(own.keys() - taken.keys())
    lacking = [name for name in missing if name not in odd and not MAY_LACK.search(name)]
    unfit = [
        said + some(names, between, most=3)
        for said, names, between in (
            ("", odd.values(), "; "),
            ("it holds nothing for ", lacking, ", "),
            ("the network has no ", lost, ", "),
        )
        if names
    ]
    return taken, Fit(dict(sorted(used.items())), dict(sorted(ignored.items())), missing, resampled, unfit)


def plain(tensor: Tensor) -> Tensor:
    """A tensor that no longer knows where it came from."""
    return tensor.as_subclass(Tensor)


def filtered(named: Mapping[str, Tensor], net: nn.Module, bilinear: bool = False) -> dict[str, Tensor]:
    """What timm's filter makes of tensors for `net`; `bilinear`: resampled as the ViT authors do it."""
    if not isinstance(net, VisionTransformer):
        return filter_weights(named, net)
    how: dict[str, Any] = {"interpolation": "bilinear", "antialias": False} if bilinear else {}
    return filter_weights(named, net, adapt_layer_scale=True, **how)  # scaled layers as DeiT III names them


def _without_prefix(named: dict[str, Tensor], first: str, ignored: dict[str, str]) -> dict[str, Tensor]:
    """Names behind what stands before that of the network's first tensor."""
    prefix = min(find_prefixes(named, first), key=len, default="")
    for name in [name for name in named if not name.startswith(prefix)]:
        ignored[name] = why_ignored(name) or f"stands beside {prefix!r}"
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


def _drop_silent_biases(named: dict[str, Tensor], own: Mapping[str, Tensor], ignored: dict[str, str]) -> None:
    """Leave out biases of queries, keys and values that are zero, where the network has none: DINOv3's."""
    for name in [name for name in named if re.search(r"attn\.(?:qkv\.|[qkv]_)bias$", name)]:
        block = name[: name.index("attn.")]
        has = name in own or f"{block}attn.q_bias" in own or f"{block}attn.q_proj.bias" in own
        if not has and not bool(named[name].any()):
            ignored |= dict.fromkeys(sources_of(named.pop(name)), "zero, and the network has no such bias")


def _spread_positions(named: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Give every block the relative positions that all of them share while BEiT is pre-trained."""
    shared, each = "rel_pos_bias.relative_position_bias_table", r"blocks\.\d+\.attn\.relative_position_bias_table"
    if shared in named and shared not in own and any(re.fullmatch(each, name) for name in own):
        table = named.pop(shared)
        named |= {name: table for name in own if re.fullmatch(each, name)}


def _other_grid(before: torch.Size, after: torch.Size, prefix: int) -> bool:
    """Whether shapes differ by more than what stands for the tokens before the first patch."""
    if len(before) == 4:
        return before[-2:] != after[-2:]
    return abs(before[-2:].numel() - after[-2:].numel()) > prefix * after[-1]


def _name_final_norm(made: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Give the final norm the name it has in the network: timm's is `fc_norm` where patches are pooled before it."""
    for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
        for kind in ("weight", "bias"):
            there, here = f"{old}.{kind}", f"{new}.{kind}"
            if here in own and here not in made and there in made and there not in own:
                made[here] = made.pop(there)
