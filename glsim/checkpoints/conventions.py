"""Conventions: by which names the tensors of a network stand in the files of its publishers, and in timm.

A convention is known by names of its own. What stands before them in every name (`module.`, `teacher.backbone.`,
`visual.`, ..) is its prefix. Its table turns names into those that timm's filter for the network takes, which is timm's
own or the authors' naming: where timm knows a convention, the table is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from glsim.checkpoints.tensors import read_tensors
from glsim.files import one_line
from glsim.models.published import GLSIM_AUTHORS, VIT_AUTHORS, Table
from glsim.types import DataError


class Convention(NamedTuple):
    """How a publisher names the tensors of a network."""

    name: str  # as the field knows it
    known_by: tuple[str, ...]  # names behind the prefix, all of them there; of `*NAME`, one anywhere that ends so
    modules: tuple[str, ...] = ()  # of timm, whose networks such files are for
    words: tuple[str, ...] = ()  # in timm's names of such networks, or first in its tags of such weights
    table: Table = ()
    prefix: str = ""  # that timm's filter expects in front
    parts: bool = False  # whether such files hold parts of a method of this package too


VIT = ("vision_transformer", "deit")
EVA = ("eva",)

# Hugging Face's names for ViT, DeiT, DINOv2, BEiT and Swin.
TRANSFORMERS: Table = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.(\w+_tokens?)", r"\1"),
    (r"^encoder\.layer\.(\d+)", r"blocks.\1"),
    (r"^encoder\.layers\.(\d+)", r"layers.\1"),
    (r"^encoder\.relative_position_bias", "rel_pos_bias"),
    (r"attention\.(?:attention|self)\.([qkv])(?:uery|ey|alue)\b", r"attn.\1"),
    (r"attention\.(?:attention|self)\.(?:relative_position_bias\.)?relative", "attn.relative"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\.output\.dense", ".mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"lambda_(\d)", r"gamma_\1"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
    (r"^pooler\.layernorm", "fc_norm"),
    (r"^layernorm", "norm"),
)
TRANSFORMERS_DINOV3: Table = (
    (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^embeddings\.(\w+_token)", r"\1"),
    (r"^(?:model\.)?layer\.(\d+)", r"blocks.\1"),
    (r"attention\.([qkv])_proj", r"attn.\1"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
)
TRANSFORMERS_CONVNEXT: Table = (
    (r"^embeddings\.patch_embeddings", "downsample_layers.0.0"),
    (r"^embeddings\.layernorm", "downsample_layers.0.1"),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer", r"downsample_layers.\1"),
    (r"^encoder\.stages\.(\d+)\.layers", r"stages.\1"),
    (r"layernorm", "norm"),
    (r"layer_scale_parameter", "gamma"),
    (r"grn\.weight", "grn.gamma"),
    (r"grn\.bias", "grn.beta"),
)
TRANSFORMERS_CLIP: Table = (
    (r"^embeddings\.class_embedding", "class_embedding"),
    (r"^embeddings\.patch_embedding", "conv1"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^pre_layrnorm", "ln_pre"),  # as it is spelled there
    (r"^post_layernorm", "ln_post"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.([qkv])_proj", r"attn.\1"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
)
# Google's ViTs, from Flax; kernels are turned by `_from_flax`.
FLAX: Table = (
    (r"^(?:opt/target/|params/)", ""),
    (r"^embedding/", "patch_embed.proj."),
    (r"^cls$", "cls_token"),
    (r"^Transformer/posembed_input/pos_embedding", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_[12]/", "norm2."),
    (r"MlpBlock_\d/Dense_0/", "mlp.fc1."),
    (r"MlpBlock_\d/Dense_1/", "mlp.fc2."),
    (r"MultiHeadDotProductAttention_\d/([qkv])(?:uery|ey|alue)/", r"attn.\1."),
    (r"MultiHeadDotProductAttention_\d/out/", "attn.proj."),
    (r"(?:kernel|scale)$", "weight"),
)
# TransFG and FFVT, whose last block and norm have names of their own.
TRANSFG_AUTHORS: Table = (
    (r"^transformer\.encoder\.(?:part_layer|ff_last_layer)", "blocks.last"),
    (r"^transformer\.encoder\.(?:part_norm|ff_encoder_norm|encoder_norm)", "norm"),
    (r"^part_head", "head"),
    *VIT_AUTHORS,
)
_MLP: Table = ((r"mlp\.up_proj", "mlp.fc1"), (r"mlp\.down_proj", "mlp.fc2"))
_GATED: Table = ((r"mlp\.gate_proj", "mlp.w1"), (r"mlp\.up_proj", "mlp.w2"), (r"mlp\.down_proj", "mlp.w3"))
_HEAD: Table = ((r"^head\.", "head.linear."),)
_REDUCER: Table = ((r"^head\.", "unread_head."), (r"^head_reducer\.0\.", "head.linear."))  # of both tokens
_PATCH, _HF = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
_HF_LAYER, _V3_LAYER = "encoder.layer.0.", ("embeddings.patch_embeddings.weight", "embeddings.register_tokens")

# The first that fits is taken: those that are known by more names come before their families.
CONVENTIONS = (
    Convention("MAE", (_PATCH, "decoder_embed.weight"), VIT, ("mae",)),
    Convention("DINOv3", (_PATCH, "storage_tokens"), EVA, ("dinov3",)),
    Convention("DINOv2 with registers", (_PATCH, "register_tokens"), VIT, ("reg4_dinov2",)),
    Convention("DINOv2", (_PATCH, "mask_token", "blocks.0.ls1.gamma"), VIT, ("dinov2",)),
    Convention("DINO", (_PATCH, "*head.last_layer.weight_v"), VIT, ("dino",)),
    Convention("EVA-02", (_PATCH, "blocks.0.mlp.w1.weight"), EVA, ("eva02",)),
    Convention("BEiT", (_PATCH, "blocks.0.gamma_1", "rel_pos_bias.relative_position_bias_table"), ("beit",), ("beit",)),
    Convention("BEiT", (_PATCH, "blocks.0.attn.relative_position_bias_table"), ("beit",), ("beit",)),
    Convention("timm DINOv3", (_PATCH, "reg_token", "blocks.0.gamma_1"), EVA, ("dinov3",)),
    Convention("EVA", (_PATCH, "blocks.0.attn.q_bias"), (*EVA, "beit"), ("eva",)),
    Convention("DeiT distilled", (_PATCH, "dist_token"), ("deit",), ("deit",)),
    Convention("Swin", (_PATCH, "layers.0.blocks.0.attn.qkv.weight"), ("swin_transformer",)),
    Convention("timm ViT", (_PATCH, "blocks.0.norm1.weight"), (*VIT, *EVA)),
    Convention("timm ConvNeXt", ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"), ("convnext",)),
    Convention("ConvNeXt", ("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"), ("convnext",)),
    Convention("ResNet", ("conv1.weight", "layer1.0.conv1.weight"), ("resnet",)),
    Convention(
        "CLIP",
        ("class_embedding", "conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"),
        (*VIT, *EVA),
        ("clip",),
        prefix="visual.",
    ),
    Convention(
        "Hugging Face CLIP",
        ("embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight"),
        VIT,
        ("clip",),
        TRANSFORMERS_CLIP,
        "visual.",
    ),
    Convention(
        "Hugging Face DINOv2 with registers",
        (_HF, "embeddings.register_tokens", _HF_LAYER + "layer_scale1.lambda1"),
        VIT,
        ("reg4_dinov2",),
        TRANSFORMERS,
    ),
    Convention("Hugging Face DINOv2", (_HF, _HF_LAYER + "layer_scale1.lambda1"), VIT, ("dinov2",), TRANSFORMERS),
    Convention("Hugging Face BEiT", (_HF, _HF_LAYER + "lambda_1"), ("beit",), ("beit",), TRANSFORMERS),
    Convention("Hugging Face DeiT", (_HF, "embeddings.distillation_token"), ("deit",), ("deit",), TRANSFORMERS),
    Convention("Hugging Face ViT", (_HF, _HF_LAYER + "layernorm_before.weight"), VIT, (), TRANSFORMERS),
    Convention(
        "Hugging Face Swin",
        (_HF, "encoder.layers.0.blocks.0.layernorm_before.weight"),
        ("swin_transformer",),
        (),
        TRANSFORMERS,
    ),
    *(
        Convention(
            "Hugging Face DINOv3",
            (*_V3_LAYER, f"{layer}.{mark}_proj.weight"),
            EVA,
            ("dinov3",),
            TRANSFORMERS_DINOV3 + table,
        )
        for layer in ("layer.0.mlp", "model.layer.0.mlp")
        for mark, table in (("gate", _GATED), ("up", _MLP))
    ),
    Convention(
        "Hugging Face ConvNeXt",
        ("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight"),
        ("convnext",),
        (),
        TRANSFORMERS_CONVNEXT,
    ),
    Convention("ViT authors (.npz)", ("embedding/kernel", "cls"), VIT, (), FLAX),
    *(
        Convention("GLSim authors", ("patch_embedding.weight", *mark), VIT, (), GLSIM_AUTHORS + table, parts=True)
        for mark, table in ((("head_reducer.0.weight",), _REDUCER), (("class_token",), _HEAD))
    ),
    Convention(
        "TransFG and FFVT authors",
        ("transformer.embeddings.patch_embeddings.weight",),
        VIT,
        (),
        TRANSFG_AUTHORS,
        parts=True,
    ),
)
UNKNOWN = Convention("timm", ())
NET = "backbone.net."  # where this package's models keep timm's network

# Of a name that the network has not: why that is as it should be.
WHY: Table = (
    (r"^(?:\w+_)?heads?(?:_\w+)?\.|^(?:fc|classifier|(?:cls|distillation|aux)_classifier|last_linear)\.", "head"),
    (r"^(?:lm_head|dino_head|ibot_head|dino_loss|ibot_patch_loss|visual\.proj|proj|visual_projection)\b", "head"),
    (r"^(?:pooler|pre_logits)\b", "pooler of the head"),
    (r"decoder|predictor|^projectors?\.", "decoder"),
    (r"mask_token|mask_embedding", "mask token"),
    (r"relative_position_index|attn_mask|position_ids|rope|periods$|bias_mask$|\.freqs", "computed anew"),
    (r"local_cls_norm|^norms\.", "norm that only pre-training reads"),
    (r"num_batches_tracked$", "counter"),
)


def why_ignored(name: str) -> str | None:
    """Why a tensor of this name is not wanted, in a word or two; None where that is not known."""
    return next((why for pattern, why in WHY if re.search(pattern, name)), None)


class Traced(Tensor):
    """A tensor that knows from which names of the file it was made, whatever is done with it."""

    sources: frozenset[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        given = [sources_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Traced)]
        for tensor in tree_leaves(made):
            if isinstance(tensor, Traced):
                tensor.sources = frozenset().union(*given)
        return made

    def plain(self) -> Tensor:
        """The tensor alone."""
        return self.as_subclass(Tensor)


def sources_of(tensor: Tensor) -> frozenset[str]:
    """The names of the file that a tensor was made from."""
    return getattr(tensor, "sources", frozenset())


def traced(tensor: Tensor, name: str) -> Tensor:
    """A tensor of the file, in 32 bits where it has a point."""
    made = (tensor.float() if tensor.is_floating_point() else tensor).as_subclass(Traced)
    made.sources = frozenset((name,))
    return made


class Weights(NamedTuple):
    """The tensors of a file, under names that timm's filter takes."""

    path: Path
    convention: Convention
    wrapped: str  # dictionaries and prefix that stood before the names; "" for none
    named: dict[str, Tensor]  # of the network
    parts: dict[str, Tensor]  # of a method of this package, beside the network
    ignored: dict[str, str]  # names of the file that belong to neither -> why
    stored: dict[str, Tensor]  # as they were read


def read_weights(path: str | Path) -> Weights:
    """The weights in a file of any convention; DataError for what is none, damaged, or holds more than tensors."""
    path = Path(path)
    return recognise(*read_tensors(path), path)


def recognise(stored: dict[str, Tensor], wrappers: list[str], path: Path) -> Weights:
    """The convention of tensors that were read from `path`, below `wrappers`, and their names in it."""
    ours = {k: v for k, v in stored.items() if k.startswith(NET)}
    convention, prefix = find_convention(ours or stored)
    if ours:
        convention, prefix = convention._replace(name=f"glsim bundle ({convention.name})", parts=True), NET
    inside = {key: traced(tensor, key) for key, tensor in stored.items() if key.startswith(prefix)}
    beside = {key: why_ignored(key) or f"stands beside {prefix!r}" for key in stored if key not in inside}
    try:
        named = rename({key.removeprefix(prefix): tensor for key, tensor in inside.items()}, convention)
    except (RuntimeError, IndexError) as error:
        raise DataError(f"{path} is damaged: its tensors do not go together: {one_line(error)}") from error
    if "register_tokens" in named:
        named.setdefault("mask_token", Traced(torch.zeros(())))  # by which timm's filter knows DINOv2
    if ours:  # what is beside the network, this package made
        parts, beside = {key: traced(stored[key], key) for key in beside}, {}
    else:
        parts = {k: v for k, v in named.items() if convention.parts and re.match(r"aggregator\.|head\.", k)}
        named = {k: v for k, v in named.items() if k not in parts}
    return Weights(path, convention, " > ".join([*wrappers, *filter(None, [prefix])]), named, parts, beside, stored)


def find_convention(stored: Mapping[str, Tensor]) -> tuple[Convention, str]:
    """The first convention whose names are there, and the prefix before them."""
    for convention in CONVENTIONS:
        first, *others = convention.known_by
        prefixes = [p for p in find_prefixes(stored, first) if all(_is_there(p, name, stored) for name in others)]
        if prefixes:
            return convention, min(prefixes, key=_rank)
    return UNKNOWN, ""


def find_prefixes(names: Iterable[str], end: str) -> list[str]:
    """What stands before `end` in the names that end so."""
    return [name[: -len(end)] for name in names if name == end or name.endswith((f".{end}", f"/{end}"))]


def _is_there(prefix: str, name: str, stored: Mapping[str, Tensor]) -> bool:
    return any(k.endswith(name[1:]) for k in stored) if name.startswith("*") else prefix + name in stored


def _rank(prefix: str) -> tuple[bool, int]:
    """Averaged weights first, then what is wrapped least."""
    return not re.search("teacher|ema|target|momentum", prefix), len(prefix)


def rename(stored: Mapping[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    """Tensors under the names that timm's filter takes, by the convention's table."""
    named = {}
    for name, tensor in stored.items():
        for pattern, new in convention.table:
            name = re.sub(pattern, new, name)
        named[convention.prefix + name] = _from_flax(name, tensor) if convention.table is FLAX else tensor
    return number_last(join_qkv(named)) if convention.table else named


def join_qkv(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one tensor; where a key has no bias, as timm's networks have them."""
    joined = {}
    for name, tensor in named.items():
        m = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if m is None:
            joined[name] = tensor
            continue
        three = [named[key] for x in "qkv" if (key := f"{m[1]}{x}.{m[3]}") in named]
        if len(three) == 3:
            if m[2] == "q":
                joined[f"{m[1]}qkv.{m[3]}"] = torch.cat(three)
        else:
            joined[f"{m[1]}{m[2]}_{m[3]}"] = tensor
    return joined


def number_last(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`blocks.last` as the block behind the numbered ones."""
    depth = len({name.split(".")[1] for name in named if re.match(r"blocks\.\d", name)})
    return {name.replace("blocks.last", f"blocks.{depth}"): tensor for name, tensor in named.items()}


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    """A kernel of Flax, inputs first, as one of PyTorch, outputs first; heads are laid side by side."""
    if re.search(r"attn\.[qkv]\.", name):
        tensor = tensor.flatten(-2)
    elif name.endswith("attn.proj.weight") and tensor.ndim == 3:
        tensor = tensor.flatten(0, 1)
    if name.endswith(".weight") and tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.T if name.endswith(".weight") and tensor.ndim == 2 else tensor
