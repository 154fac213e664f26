"""Sizes of the network that a file of weights is for, and timm's names of networks that would take it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, list_pretrained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glsim.checkpoints.conventions import Weights, sources_of, why_ignored
from glsim.checkpoints.fit import fit
from glsim.types import optional

MOST_NAMES = 5  # of timm's networks that are told
# The same tensor under the names of timm, CLIP, ConvNeXt and ResNet.
PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "stem.0.weight", "downsample_layers.0.0.weight")
POSITIONS = ("pos_embed", "visual.positional_embedding")
BLOCK = re.compile(r"^(?:visual\.transformer\.)?(?:res)?blocks\.(\d{1,5})\.")
STAGE = re.compile(r"^(?:stages|layers)\.(\d{1,5})\.(?:blocks\.)?(\d{1,5})\.")


@dataclass(frozen=True)
class Sizes:
    """What the shapes in a file tell of its network; None where they tell nothing."""

    width: int | list[int] | None  # of a token; of each stage where there are several
    depth: int | list[int] | None  # blocks; of each stage
    patch: int | None  # pixels
    positions: int | None  # places that were learned: rows * cols; None where they are computed, or relative
    grid: list[int] | None = optional()  # of the positions, where they fill a square
    registers: int = 0
    distilled: bool = False  # a distillation token
    heads: int | list[int] | None = optional()
    hidden: int | None = optional()  # of the MLP
    swiglu: bool = False
    layer_scale: bool = False

    def __str__(self) -> str:
        """For people, on one line."""
        told = [
            f"width {_listed(self.width)}" if self.width else "",
            f"depth {_listed(self.depth)}" if self.depth else "",
            f"patch {self.patch}" if self.patch else "",
            f"{_listed(self.heads)} heads" if self.heads else "",
            f"MLP {self.hidden}" if self.hidden else "",
            "SwiGLU" if self.swiglu else "",
            "layer scale" if self.layer_scale else "",
            f"{self.registers} registers" if self.registers else "",
            "distillation token" if self.distilled else "",
            f"{self.positions} positions" if self.positions else "",
            f"({self.grid[0]}x{self.grid[1]})" if self.grid else "",
        ]
        return ", ".join(filter(None, told)).replace(", (", " (") or "sizes unknown"


def _listed(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def sizes_of(weights: Weights) -> Sizes:
    """What the shapes of a file tell of its network."""
    named = weights.named
    patch = next((named[name].shape for name in PATCHES if name in named), None)
    blocks = {int(m[1]) for name in named if (m := BLOCK.match(name))}
    stages: dict[int, set[int]] = {}
    for name in named:
        if m := STAGE.match(name):
            stages.setdefault(int(m[1]), set()).add(int(m[2]))
    depth = len(blocks) or [len(stages[i]) for i in sorted(stages)] or None
    tokens = next((named[name].shape[-2] for name in POSITIONS if name in named and named[name].ndim > 1), None)
    registers = max(
        (
            named[k].shape[-2]
            for k in ("reg_token", "register_tokens", "storage_tokens")
            if k in named and named[k].ndim > 1
        ),
        default=0,
    )
    distilled = "dist_token" in named
    prefix = ("cls_token" in named or "visual.class_embedding" in named) + distilled
    positions = (
        None
        if tokens is None
        else next(
            (n for n in (tokens - prefix, tokens - prefix - registers, tokens) if n >= 0 and math.isqrt(n) ** 2 == n),
            max(tokens - prefix, 0),
        )
    )
    side = math.isqrt(positions or 0)
    first = [name for name in named if "blocks.0." in name]
    gated = any(re.search(r"mlp\.(?:w1|w12|fc1_g)\.", name) for name in first)
    hidden = next((named[n].shape[0] for n in first if re.search(r"mlp\.(?:fc1|w1|w12|fc1_g|c_fc)\.weight$", n)), None)
    hidden = hidden // 2 if hidden and any("mlp.w12" in name for name in first) else hidden
    return Sizes(
        width=_widths(named, sorted(stages)) if stages else patch[0] if patch else None,
        depth=depth,
        patch=patch[-1] if patch and len(patch) == 4 else None,
        positions=positions,
        grid=[side, side] if positions and side**2 == positions else None,
        registers=registers,
        distilled=distilled,
        heads=_heads(weights, patch[0] if patch else 0),
        hidden=hidden if blocks else None,
        swiglu=gated,
        layer_scale=any(re.search(r"(?:ls1\.|ls_1\.|\.)gamma", name) for name in named),
    )


def _widths(named: dict[str, Tensor], stages: list[int]) -> list[int] | None:
    """The width of each stage: that of its first norm."""
    norm = r"(?:stages|layers)\.{}\.(?:blocks\.)?\d+\.norm1?\.weight"
    found = [next((t.shape[0] for n, t in named.items() if re.fullmatch(norm.format(i), n)), 0) for i in stages]
    return found if all(found) else None


def _heads(weights: Weights, width: int) -> int | list[int] | None:
    """Attention heads, where a tensor has one row or column for each."""
    named, stored = weights.named, weights.stored
    tables = {k: t.shape[-1] for k, t in named.items() if k.endswith("relative_position_bias_table") and t.ndim}
    stages = [tables[k] for k in sorted(tables) if re.fullmatch(r"layers\.\d+\.blocks\.0\..*", k)]
    if tables:
        return stages or next(iter(tables.values()))
    kernel = next((t for k, t in stored.items() if k.endswith("query/kernel") and t.ndim == 3), None)
    if kernel is not None:
        return kernel.shape[1]
    periods = next((t for k, t in stored.items() if k.endswith("rope_embed.periods")), None)
    if periods is not None:
        return width // (4 * max(periods.numel(), 1)) or None
    if weights.convention.name == "CLIP":
        return width // 64 or None  # as its authors build it
    return None


def heads_of(weights: Weights) -> dict[str, list[int]]:
    """Classifiers and projections in a file: name -> shape."""
    known = (
        {key: why_ignored(key) for key in weights.stored}
        | {key: why_ignored(name) for name, t in weights.named.items() for key in sources_of(t)}
        | weights.ignored
    )
    return {k: list(t.shape) for k, t in weights.stored.items() if t.ndim == 2 and known[k] == "head"}


FILLERS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class _NoInit(TorchFunctionMode):
    """Inside, tensors are made and left as they are: for networks of which only the shapes are read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or (
            getattr(func, "__name__", "")
            in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
        ):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def hollow(name: str, **args: Any) -> nn.Module | None:
    """A network of timm whose tensors have shapes and no numbers; None where it takes no such arguments."""
    try:
        with torch.device("meta"), _NoInit():
            return timm.create_model(name, num_classes=0, **args)
    except Exception:  # of odd arguments and of networks that compute while they are made
        return None


def fitting_names(weights: Weights, most: int = MOST_NAMES) -> list[str]:
    """timm's networks that take a file, those that are named like its convention and made for its grid first.

    With the tag of the weights where timm has the same, so that their preprocessing is used too.
    """
    sizes, found = sizes_of(weights), []
    for name in _candidates(weights, sizes):
        net = hollow(name)
        if net is not None and fit(weights, net)[1].fits:
            found.append(with_tag(name, weights.convention.words))
            if len(found) == most:
                break
    return found


def _candidates(weights: Weights, sizes: Sizes) -> Iterator[str]:
    """Names of the convention's families, the likeliest first, that agree in patch and, seen by one block, in width."""
    convention = weights.convention
    names = [name for module in convention.modules for name in timm.list_models(module=module)]
    if sizes.patch and isinstance(sizes.depth, int):
        names = [n for n in names if re.search(rf"patch{sizes.patch}(?:_|$)", n) or "patch" not in n]
    quick = "context_length" in weights.stored or "input_resolution" in weights.stored  # OpenAI's own files
    side = sizes.grid[0] * sizes.patch if sizes.grid and sizes.patch else None

    def order(name: str) -> tuple[Any, ...]:
        cfg = get_pretrained_cfg(name, allow_unregistered=True)
        size = cfg.input_size[-1] if cfg is not None else None
        named = any(word in name or with_tag(name, (word,)) != name for word in convention.words)
        return not named, quick and "quickgelu" not in name, size != side, len(name), name

    one_block = {k: t for k, t in weights.named.items() if not (m := BLOCK.match(k)) or int(m[1]) == 0}
    one = weights._replace(
        named=one_block,
        stored={k: weights.stored[k] for t in one_block.values() for k in sources_of(t) if k in weights.stored},
    )
    for name in sorted(names, key=order):
        if isinstance(sizes.depth, int) and sizes.depth > 1:
            net = hollow(name, depth=1)
            if net is not None and not fit(one, net)[1].fits:
                continue
        yield name


def with_tag(name: str, words: tuple[str, ...]) -> str:
    """The name with the first tag of its weights in timm that begins with one of the words; without where none does."""
    tagged = [full for full in list_pretrained(f"{name}.*") if full.partition(".")[2].split("_")[0] in words]
    return tagged[0] if tagged else name
