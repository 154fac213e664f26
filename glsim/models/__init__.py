"""Methods: METHODS by name, what each declares, and `create_model`.

A new method is a file here with a `build` function, and its name in `METHODS`. `build(encoder, num_classes, *, ..)`
returns the model; its keyword-only parameters are the method's options. What else the file declares: `Method`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from operator import gt
from typing import TYPE_CHECKING, Any, NamedTuple

from glsim.models.config import ModelConfig
from glsim.types import ConfigError, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from glsim.models.base import Model
    from glsim.models.published import Published

BACKBONE = "vit_base_patch16_224"
METHODS = {  # name -> module; imported when asked for, so that the names cost nothing
    "plain": "glsim.models.plain",
    "glsim": "glsim.models.glsim",
    "transfg": "glsim.models.transfg",
    "ffvt": "glsim.models.ffvt",
    "rams": "glsim.models.rams",
    "aftrans": "glsim.models.aftrans",
    "dcal": "glsim.models.dcal",
    "ielt": "glsim.models.ielt",
    "cal": "glsim.models.cal",
    "pim": "glsim.models.pim",
    "herbs": "glsim.models.herbs",
    "r2trans": "glsim.models.r2trans",
    "ifa": "glsim.models.ifa",
    "apinet": "glsim.models.apinet",
}


class Method(NamedTuple):
    """What the file of a method declares, by constants of these names in capitals; beside them what holds without."""

    build: Callable[..., Model]
    title: str | None = None  # in pictures; None: its name
    needs: tuple[str, ...] = ()  # of the backbone, names of `glsim.models.backbone:NEEDS`
    crops: bool = False  # whether it encodes a crop of the image too
    embeddings: tuple[str, ...] = ()  # which vectors of `glsim.types:EMBEDDINGS` it hands out
    backbone: str = BACKBONE  # its default
    encoder: dict[str, Any] = {}  # its defaults for options of the encoder
    words: dict[str, dict[str, dict[str, Any]]] = {}  # option -> value -> the options that it stands for
    published: Published | None = None  # how its authors store it, where checkpoints of theirs can be read


def find_method(name: str) -> Method:
    """What the method `name` declares; ConfigError for an unknown one."""
    module = import_module(choose(name, METHODS, "method"))
    declared = {field: field.upper() for field in Method._fields[1:]}
    return Method(module.build, **{k: vars(module)[v] for k, v in declared.items() if v in vars(module)})


def spell_out(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method with each word that stands for several spelt out; what is given beside it wins.

    Raises ConfigError for a word that the method does not know.
    """
    spelt = dict(options)
    for word, meanings in find_method(method).words.items():
        if word in spelt:
            spelt = choose(spelt.pop(word), meanings, word) | spelt
    return spelt


def create_model(
    method: str,
    backbone: str | None = None,
    num_classes: int = 1000,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    backbone_args: dict[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Build a model: `model(images (B, 3, H, W))` returns an `Output` whatever the method.

    Args:
        method: a name of `METHODS`.
        backbone: a timm name; None: the method's own default (ViT-B/16, for cal ResNet-101).
        num_classes: logits of the model.
        image_size: pixels, one side or (height, width); None: the size timm lists for the weights.
        pretrained: start from timm's weights.
        backbone_args: handed to timm (`{"depth": 2, "embed_dim": 64}`).
        options: those of the method (keyword-only parameters of its `build`: `top_o`, `metric`, ..), words that stand
            for several of them (`rule`), and those every encoder has (`dropout`, `drop_path`, `norm_eps`, `stride`).

    Returns:
        The model; its `config` holds all of this, as plain values, for `glsim.save`.

    Raises:
        ConfigError: for any name, option or size that does not fit, listing what would, and for a backbone without
            what the method needs.
    """
    from glsim.models.backbone import build_backbone  # here, so that the names above cost nothing
    from glsim.models.patch_embed import to_pair

    made = find_method(method)
    own, encoder = _parameters(made.build), _parameters(build_backbone)
    defaults = {name: p.default for name, p in (encoder | own).items()} | made.encoder
    if unknown := sorted(set(options) - set(defaults) - set(made.words)):
        known = ", ".join(sorted({*defaults, *made.words}))
        raise ConfigError(f"{method!r} has no option {', '.join(unknown)}; its options: {known}")
    options = spell_out(method, options)
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes}; at least one class is needed")
    for name, value in options.items():
        _check_kind(name, value, (own | encoder)[name].annotation)
    options = {**defaults, **options}
    backbone = backbone or made.backbone
    first_size = options.get("first_size")  # what the encoder sees, where the model shrinks what it is given
    size = image_size if first_size is None else first_size
    if first_size is not None and image_size is None:
        raise ConfigError(f"first_size={first_size}: image_size is needed too, the pixels that crops are cut out of")
    if first_size is not None and image_size is not None and any(map(gt, to_pair(first_size), to_pair(image_size))):
        raise ConfigError(f"first_size={first_size}: more than image_size={image_size}, which crops are cut out of")
    net = build_backbone(backbone, size, pretrained, backbone_args, **{k: options[k] for k in encoder})
    net.check_needs(method, made.needs)
    model = made.build(net, num_classes, **{k: options[k] for k in own})
    model.config = ModelConfig(
        method=method,
        backbone=backbone,
        num_classes=num_classes,
        image_size=list(net.image_size if first_size is None or image_size is None else to_pair(image_size)),
        backbone_args=dict(backbone_args or {}),
        options=options,
    )
    if pretrained:
        model.initialised([name for name in model.state_dict() if not name.startswith("backbone.")])
    return model


def _check_kind(name: str, value: Any, annotation: Any) -> None:
    """ConfigError unless `value` is of the kind that the builder declares; one that may be None has its own check."""
    annotation = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    number = (int | float, "a number")
    kinds = {"int": (int, "a whole number"), "float": number, "int | float": number, "str": (str, "a name")}
    if annotation in kinds:
        kind, words = kinds[annotation]
        finite = not isinstance(value, int | float) or abs(value) < math.inf
        if not isinstance(value, kind) or isinstance(value, bool) or not finite:
            raise ConfigError(f"{name}={value!r}: {words} is needed")


def _parameters(build: Any) -> dict[str, inspect.Parameter]:
    """The options of a builder: its keyword-only parameters."""
    return {p.name: p for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY}


def resample_positions(weights: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Position embeddings for another image size, by timm's own filter for the family of `net`."""
    prefix = "backbone.net."
    inner = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    beside = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    return beside | {prefix + k: v for k, v in filter_weights(inner, net).items()}


def filter_weights(weights: Mapping[str, Tensor], net: nn.Module, **how: Any) -> dict[str, Tensor]:
    """Tensors named and resampled for `net` by timm's own filter of its family, which takes `how`; raises whatever that
    raises. A convolutional network may have none, and no positions."""
    clean = getattr(import_module(type(net).__module__), "checkpoint_filter_fn", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of old and slow calls where timm resamples relative positions
        return clean(dict(weights), net, **how) if clean else dict(weights)
