"""Official checkpoints (`.pth`) of published methods as models of this package."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glsim.checkpoints.config import TooLarge, check_config, no_larger_than, some
from glsim.checkpoints.tensors import check_tensors, read_pickle
from glsim.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from glsim.files import one_line
from glsim.models import create_model, resample_positions, spell_out
from glsim.models.base import Model
from glsim.models.patch_embed import to_pair
from glsim.types import ConfigError, DataError, GlsimError, choose


class Conversion(NamedTuple):
    """What became of the keys of an official checkpoint."""

    used: dict[str, str]  # published key -> ours
    ignored: dict[str, str]  # published key -> why
    missing: list[str]  # ours, found nowhere


# Published argument -> the only value this package computes the same way. A file with another is refused, not guessed.
GLSIM_FIXED = {
    "dynamic_anchor": True,
    "anchor_random": False,
    "anchor_conv_stem": False,
    "anchor_resize_size": False,
    "select_top_k": False,
    "aggregator": True,
    "aggregator_norm": True,
    "aggregator_type": "transformer",
    "inference_crops": True,
    "encoder_norm": True,
    "pos_embedding_type": "learned",
    "hidden_act": "gelu",
    "head_norm": False,
    "head_act": False,
    "classifier_aux": None,
    "adapter": None,
    "deit_recipe": False,
}
MOST_BLOCKS = 1000
GLSIM_BLOCK = {"proj": "attn.proj", "norm1": "norm1", "norm2": "norm2", "pwff.fc1": "mlp.fc1", "pwff.fc2": "mlp.fc2"}


def convert_official(path: str | Path, method: str = "glsim", **overrides: Any) -> Model:
    """Read a publisher's checkpoint; the model's `conversion` tells what became of its keys.

    Args:
        path: the `.pth`.
        method: of which it is: glsim, transfg or ffvt.
        overrides: options in place of those that shapes and saved arguments tell.

    Raises:
        DataError: for a file that is damaged, holds anything but tensors and arguments, lacks weights, or was trained
            with an option unknown here.
    """
    path = Path(path)
    file = read_pickle(path)
    if not isinstance(file, dict) or not isinstance(file.get("model"), dict):
        raise DataError(f'{path} is no official checkpoint: it has no "model" with weights')
    published = {k.removeprefix("model."): v for k, v in check_tensors(file["model"], path).items()}
    arguments = vars(file["config"]) if isinstance(file.get("config"), argparse.Namespace) else {}
    read, asked = choose(method, OFFICIAL, "published method"), bool(overrides)
    try:
        with no_larger_than(published.values()):
            model, used, ignored = read(path, published, arguments, overrides)
        preprocessing = _published_preprocessing(arguments, model, path).as_dict()
        model.config = replace(model.config, preprocessing=preprocessing)
        check_config(model.config.as_dict(), path)
    except TooLarge as error:
        raise DataError(
            f"{path} was refused: its keys and arguments name a far larger model than its weights"
        ) from error
    except Exception as error:  # of shapes and arguments of any kind
        if isinstance(error, DataError) or (asked and isinstance(error, GlsimError)):
            raise
        raise DataError(f"{path} is damaged: no model can be built from it: {one_line(error)}") from error
    weights = {ours: weight for ours, (_, weight) in used.items()}
    own = model.state_dict()
    missing = sorted(set(own) - set(weights))
    wrong = [k for k in weights if k in own and own[k].shape != weights[k].shape]
    names = {source: ours for ours, (sources, _) in used.items() for source in sources}
    left = {k: ignored.get(k, "not part of this model") for k in published if k not in names}
    if missing or wrong:
        raise DataError(
            f"{path} does not hold this model; missing: {some(missing) or 'none'}; "
            f"of another shape: {some(wrong) or 'none'}; ignored: {some(left) or 'none'}; {len(names)} used"
        )
    model.load_state_dict(weights)
    model.conversion = Conversion(names, left, missing)
    return model.eval()


def _read_glsim(path: Path, published: dict[str, Tensor], args: dict[str, Any], overrides: dict[str, Any]) -> tuple:
    """GLSim from a checkpoint of its authors: the model, ours -> (published keys, weight), and why keys are left."""
    for name, value in GLSIM_FIXED.items():
        if args.get(name, value) != value:
            raise DataError(f"{path} was trained with {name}={args[name]!r}, which has no equal here (only {value!r})")
    try:
        size = args["image_size"]
        options = {
            "box": "exclusive",
            "top_o": args["dynamic_top"],
            "metric": f"gls_{args['sim_metric']}",
            "classifier": args["classifier"],
            "norm_eps": args["layer_norm_eps"],
        }
        dim, _, *patch = published["patch_embedding.weight"].shape
        backbone_args = {
            "embed_dim": dim,
            "depth": _count(published, "encoder.blocks."),
            "num_heads": args["num_attention_heads"],
            "mlp_ratio": published["encoder.blocks.0.pwff.fc1.weight"].shape[0] / dim,
            "patch_size": patch[0],
        }
        options["aggregator_depth"] = _count(published, "aggregator.blocks.")
        head = "head" if options["classifier"] == "cls" else "head_reducer.0"
        num_classes = published[f"{head}.weight"].shape[0]
    except KeyError as error:
        raise DataError(f"{path} is no GLSim checkpoint: {error} is missing") from error
    model = create_model(
        "glsim",
        "vit_base_patch16_224",
        num_classes,
        **({"image_size": size, "backbone_args": backbone_args} | options | spell_out("glsim", overrides)),
    )
    used: dict[str, tuple[list[str], Tensor]] = {}

    def take(ours: str, *keys: str, join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]) -> None:
        if all(k in published for k in keys):
            used[ours] = (list(keys), join([published[k] for k in keys]))

    net = "backbone.net."
    take(net + "cls_token", "class_token")
    take(net + "pos_embed", "positional_embedding.pos_embedding")
    for kind in ("weight", "bias"):
        take(f"{net}patch_embed.proj.{kind}", f"patch_embedding.{kind}")
        take(f"{net}norm.{kind}", f"encoder_norm.{kind}")
        take(f"aggregator.norm.{kind}", f"aggregator_norm.{kind}")
        take(f"head.linear.{kind}", f"{head}.{kind}")
        for theirs, ours, depth in (
            ("encoder.blocks", net + "blocks", backbone_args["depth"]),
            ("aggregator.blocks", "aggregator.blocks", options["aggregator_depth"]),
        ):
            for i in range(depth):
                qkv = [f"{theirs}.{i}.attn.proj_{x}.{kind}" for x in "qkv"]
                take(f"{ours}.{i}.attn.qkv.{kind}", *qkv, join=torch.cat)
                for a, b in GLSIM_BLOCK.items():
                    take(f"{ours}.{i}.{b}.{kind}", f"{theirs}.{i}.{a}.{kind}")
    if "image_size" in overrides:
        flat = resample_positions({k: w for k, (_, w) in used.items()}, model.backbone.net)
        used = {k: (used[k][0], flat[k]) for k in used}
    ignored = {"anchor_class_token": "created by the authors' code and never used"}
    if head != "head":
        ignored |= {f"head.{kind}": f"classifier={options['classifier']} reads {head}" for kind in ("weight", "bias")}
    return model, used, ignored


# Blocks of TransFG and FFVT: theirs -> timm's; query, key and value become one.
VIT_BLOCK = {
    "attention_norm": "norm1",
    "attn.out": "attn.proj",
    "ffn_norm": "norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}


def _read_transfg(path: Path, published: dict[str, Tensor], args: dict[str, Any], overrides: dict[str, Any]) -> tuple:
    """TransFG from a checkpoint of its authors; see `_read_vit`."""
    # `stride` given with the call, or the paper's 12 pixels; as a share it fits any patch
    return _read_vit(path, published, overrides, "transfg", "part_layer", "part_norm", "part_head", {"stride": 0.75})


def _read_ffvt(path: Path, published: dict[str, Tensor], args: dict[str, Any], overrides: dict[str, Any]) -> tuple:
    """FFVT from a checkpoint of its authors; see `_read_vit`."""
    return _read_vit(path, published, overrides, "ffvt", "ff_last_layer", "ff_encoder_norm", "head", {"top_k": 12})


def _read_vit(
    path: Path,
    published: dict[str, Tensor],
    overrides: dict[str, Any],
    method: str,
    last: str,
    norm: str,
    head: str,
    options: dict[str, Any],
) -> tuple:
    """A checkpoint that says nothing of itself: widths come from the shapes, the rest from `overrides` or ViT-B/16.

    `overrides`: `num_heads` (default: one for every 64 of the width), `image_size` (default: the square that the
    positions were made for), `patch_size` (has to be the stored one), and options of the method. Another `image_size`
    than the stored one resamples the positions.
    """
    overrides = dict(overrides)
    embeddings, layers = "transformer.embeddings.", "transformer.encoder."
    try:
        positions = published[embeddings + "position_embeddings"].shape[1] - 1
        dim, _, patch, _ = published[embeddings + "patch_embeddings.weight"].shape
        mlp_ratio = published[f"{layers}{last}.ffn.fc1.weight"].shape[0] / dim
        num_classes = published[f"{head}.weight"].shape[0]
    except KeyError as error:
        raise DataError(f"{path} is no {method} checkpoint: {error} is missing") from error
    depth = _count(published, layers + "layer.") + 1
    heads = overrides.pop("num_heads", max(1, dim // 64))
    if type(heads) is not int or heads < 1 or dim % heads:
        raise ConfigError(f"num_heads={heads}: the width of {path} is {dim}, which that does not divide")
    if overrides.pop("patch_size", patch) != patch:
        raise ConfigError(f"patch_size: {path} was made for patches of {patch} pixels")
    options = options | {"norm_eps": 1e-6} | overrides
    stride = options.get("stride") or patch
    stride = stride if isinstance(stride, int) else int(stride * patch)
    side = math.isqrt(positions)
    least = (side - 1) * stride + patch
    whole = -(-least // patch) * patch  # of the sizes with that many places the one that is a multiple of the patch
    stored = whole if whole < least + stride else least
    size = options.pop("image_size", stored)
    backbone_args = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "patch_size": patch,
    }
    model = create_model(method, "vit_base_patch16_224", num_classes, size, backbone_args=backbone_args, **options)
    used: dict[str, tuple[list[str], Tensor]] = {}

    def take(ours: str, *keys: str) -> None:
        if all(k in published for k in keys):
            used[ours] = (list(keys), torch.cat([published[k] for k in keys]))

    net = "backbone.net."
    take(net + "cls_token", embeddings + "cls_token")
    take(net + "pos_embed", embeddings + "position_embeddings")
    for kind in ("weight", "bias"):
        take(f"{net}patch_embed.proj.{kind}", f"{embeddings}patch_embeddings.{kind}")
        take(f"{net}norm.{kind}", f"{layers}{norm}.{kind}")
        take(f"head.{kind}", f"{head}.{kind}")
        for i in range(depth):
            theirs = f"{layers}layer.{i}" if i < depth - 1 else layers + last
            qkv = [f"{theirs}.attn.{x}.{kind}" for x in ("query", "key", "value")]
            take(f"{net}blocks.{i}.attn.qkv.{kind}", *qkv)
            for a, b in VIT_BLOCK.items():
                take(f"{net}blocks.{i}.{b}.{kind}", f"{theirs}.{a}.{kind}")
    if model.backbone.grid[0] * model.backbone.grid[1] != positions:
        flat = resample_positions({k: w for k, (_, w) in used.items()}, model.backbone.net)
        used = {k: (used[k][0], flat[k]) for k in used}
    return model, used, {}


OFFICIAL = {"glsim": _read_glsim, "transfg": _read_transfg, "ffvt": _read_ffvt}


def _count(published: dict[str, Tensor], prefix: str) -> int:
    """The blocks that keys name under `prefix`; TooLarge where no model has so many."""
    count = len({k[len(prefix) :].split(".")[0] for k in published if k.startswith(prefix)})
    if count > MOST_BLOCKS:
        raise TooLarge
    return count


def _published_preprocessing(args: Mapping[str, Any], model: Model, path: Path) -> Preprocessing:
    """The authors' evaluation pipeline: square resize to 1.34 S (Cars: S / 0.875), ImageNet or 0.5 statistics."""
    size = to_pair(model.config.image_size)
    resize = args.get("test_resize_size") or args.get("resize_size")
    if args.get("test_resize_directly"):
        resize = args["image_size"]
    ratio = resize / args["image_size"] if resize else 1 / 0.875 if args.get("dataset_name") == "cars" else 1.34
    half = args.get("custom_mean_std")
    mean, std = ((0.5,) * 3, (0.5,) * 3) if half else (IMAGENET_MEAN, IMAGENET_STD)
    try:
        return Preprocessing(size, ratio, mean, std)
    except ConfigError as error:
        raise DataError(f"{path} is damaged: {error}") from error
