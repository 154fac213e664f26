"""Official checkpoints (`.pth`) of published methods as models of this package, by what each method's file declares."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glsim.checkpoints.config import TooLarge, check_config, no_larger_than, some
from glsim.checkpoints.conventions import NET, join_qkv, number_last, sources_of, traced
from glsim.checkpoints.fit import MAY_LACK
from glsim.checkpoints.tensors import check_tensors, read_pickle
from glsim.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from glsim.files import one_line
from glsim.models import METHODS, create_model, filter_weights, find_method, spell_out
from glsim.models.base import Model
from glsim.models.patch_embed import to_pair
from glsim.models.published import File, Published
from glsim.types import ConfigError, DataError, GlsimError, choose

MOST_BLOCKS = 1000  # a number in a name: no model counts its blocks higher
STATE_DICTS = ("model", "state_dict", "net_state_dict")  # where authors keep their tensors; or they are the whole file
PREFIX = re.compile(r"^(?:module\.|model\.)+")  # before every name: of DataParallel, and of networks inside of a model


class Conversion(NamedTuple):
    """What became of the keys of an official checkpoint."""

    used: dict[str, str]  # published key -> ours
    ignored: dict[str, str]  # published key -> why
    missing: list[str]  # ours, found nowhere


def published_methods() -> dict[str, Published]:
    """What is declared of the methods whose authors' checkpoints can be read, by method."""
    return {name: found for name in METHODS if (found := find_method(name).published) is not None}


def convert_official(path: str | Path, method: str = "glsim", **overrides: Any) -> Model:
    """Read a publisher's checkpoint; the model's `conversion` tells what became of its keys.

    Args:
        path: the `.pth`.
        method: of which it is, a name of `published_methods`.
        overrides: what the file does not hold (`asks` of the method's declaration), and options in place of those that
            shapes and saved arguments tell.

    Raises:
        ConfigError: for a size that the file does not hold and the call does not give, or that does not fit.
        DataError: for a file that is damaged, holds anything but tensors and arguments, lacks weights, or was trained
            with an option unknown here.
    """
    path, asked = Path(path), bool(overrides)
    declared: Published = choose(method, published_methods(), "published method")
    stored, ignored, arguments = _open(path, declared)
    try:
        weights = _rename(stored, declared, path)
        file = File(str(path), method, weights, arguments, dict(overrides), declared.asks)
        try:
            sizes = declared.sizes(file)
            num_classes = sizes.pop("num_classes", None) or file.shape("head.weight")[0]
        except KeyError as error:
            raise DataError(f"{path} is no {declared.title} checkpoint: {error} is missing") from error
        except ConfigError as error:
            raise _Asked(*error.args) from error
        with no_larger_than(stored.values()):
            model = create_model(method, num_classes=num_classes, **(sizes | spell_out(method, file.given)))
        weights = _fit(weights, model)
        preprocessing = _published_preprocessing(arguments, model, path).as_dict()
        model.config = replace(model.config, preprocessing=preprocessing)
        check_config(model.config.as_dict(), path)
    except TooLarge as error:
        raise DataError(
            f"{path} was refused: its keys and arguments name a far larger model than its weights"
        ) from error
    except Exception as error:  # of shapes and arguments of any kind
        if isinstance(error, DataError | _Asked) or (asked and isinstance(error, GlsimError)):
            raise
        raise DataError(f"{path} is damaged: no model can be built from it: {one_line(error)}") from error
    own = model.state_dict()
    missing = sorted(k for k in own.keys() - weights.keys() if k not in declared.made and not MAY_LACK.search(k))
    wrong = [k for k in weights if k in own and own[k].shape != weights[k].shape]
    used = {source: ours for ours, w in weights.items() if ours in own for source in sources_of(w)}
    spare = {source: ours.removeprefix(NET) for ours, w in weights.items() for source in sources_of(w)}
    left = ignored | {k: _why(spare.get(k, k), declared) or "not part of this model" for k in stored if k not in used}
    if missing or wrong:
        raise DataError(
            f"{path} does not hold this model; missing: {some(missing) or 'none'}; "
            f"of another shape: {some(wrong) or 'none'}; ignored: {some(left) or 'none'}; {len(used)} used"
        )
    model.load_state_dict({k: w.as_subclass(Tensor) for k, w in weights.items() if k in own}, strict=False)
    model.conversion = Conversion(used, left, missing)
    return model.eval()


class _Asked(ConfigError):
    """A size that has to be given with the call."""


def _open(path: Path, declared: Published) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The tensors of a file by name, why others are left out, and the authors' arguments where they are saved."""
    held = read_pickle(path)
    inner = next((held[k] for k in STATE_DICTS if isinstance(held.get(k), dict)), None) if _is_dict(held) else None
    if inner is None and not (_is_dict(held) and held and all(isinstance(v, Tensor) for v in held.values())):
        raise DataError(f'{path} is no official checkpoint: it has no "model" or "state_dict" with weights')
    beside = {} if inner is None else {k: v for k, v in held.items() if isinstance(v, Tensor)}
    named = dict(held if inner is None else inner) | beside
    prefixes = {m[0] if isinstance(k, str) and (m := PREFIX.match(k)) else "" for k in named if k not in beside}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    short = {k: k.removeprefix(prefix) for k in named if isinstance(k, str)}
    left_out = {k: why for k, name in short.items() if (why := _why(name, declared))}
    read = check_tensors({k: v for k, v in named.items() if k not in left_out}, path)
    stored = {short[k]: v for k, v in read.items()}
    ignored = {short[k]: why for k, why in left_out.items()}
    if any(int(number[:9]) > MOST_BLOCKS for name in stored for number in re.findall(r"(?<=\.)\d+(?=\.)", name)):
        raise DataError(f"{path} was refused: its keys and arguments name a far larger model than its weights")
    config = held.get("config")
    return stored, ignored, vars(config) if isinstance(config, argparse.Namespace) else {}


def _why(name: str, declared: Published) -> str | None:
    return next((why for pattern, why in declared.ignored if re.search(pattern, name)), None)


def _is_dict(held: Any) -> bool:
    return isinstance(held, dict)


def _rename(stored: Mapping[str, Tensor], declared: Published, path: Path) -> dict[str, Tensor]:
    """The tensors under names of this package or of timm, each knowing its published ones."""
    named: dict[str, Any] = {}  # of Traced
    table = declared.names(stored.keys()) if callable(declared.names) else declared.names
    for name, tensor in stored.items():
        ours, made = name, traced(tensor, name)
        for pattern, new in table:
            ours = re.sub(pattern, new, ours)
        if ours in named:  # stored twice, as modules are that stand in two places
            if not torch.equal(named[ours], made):
                raise DataError(f"{path} is damaged: {name} is another tensor than {min(sources_of(named[ours]))}")
            named[ours].sources |= {name}
        else:
            named[ours] = made
    return number_last(join_qkv(named))


def _fit(weights: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Tensors by the names of the model: those of the network by timm's filter for its family, which resamples
    positions; 1x1 convolutions as the linear layers over places that they are."""
    own = model.state_dict()
    parts = {k: w for k, w in weights.items() if k in own and not k.startswith(NET)}
    inner = {k.removeprefix(NET): w for k, w in weights.items() if k not in parts}
    named = parts | {NET + k: w for k, w in filter_weights(inner, model.backbone.net).items()}
    for name, tensor in named.items():
        while name in own and tensor.ndim > own[name].ndim and tensor.shape[-1] == 1:
            tensor = named[name] = tensor.squeeze(-1)
    return named


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
