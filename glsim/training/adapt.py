"""Adaptations of a model for training: frozen parts, low-rank adapters, gradient checkpoints, loss terms."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glsim.models.base import Model, TokenModel, layers_of
from glsim.types import ConfigError, Features, Output

SETTINGS = ("freeze", "lora", "supcon", "grad_checkpointing", "compile", "precision")  # of a run, that `adapt` takes


def adapt(
    model: Model,
    *,
    freeze: int | str = "none",
    lora: int = 0,
    supcon: float = 0.0,
    grad_checkpointing: bool = False,
    compile: bool = False,  # noqa: A002
    precision: str = "no",
    device: torch.device | None = None,
) -> None:
    """Make a model train as the settings of these names ask.

    Args:
        model: changed in place.
        freeze: "none", "backbone", whose weights then stay, or how many of its first blocks do.
        lora: rank of the adapters of an otherwise frozen backbone; 0: none.
        supcon: weight of the supervised-contrastive term; 0: none.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: by torch.compile.
        precision: of the arithmetic.
        device: where the model is trained; None: not told.

    Raises:
        ConfigError: where the model cannot.
    """
    if isinstance(freeze, int):
        freeze_blocks(model, freeze)
    if lora:
        add_low_rank(model, lora)
    if freeze == "backbone":
        if not lora:
            model.backbone.requires_grad_(False)
        model.backbone.frozen = [model.backbone.net]
    if supcon:
        add_contrast(model, supcon)
    if grad_checkpointing:
        if isinstance(model, TokenModel):
            method = model.config.method
            raise ConfigError(f"grad_checkpointing: {method!r} needs the attention maps of its pass, and keeps all")
        try:
            model.backbone.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ConfigError(f"grad_checkpointing: timm has none for {model.config.backbone!r}") from error
    if device is not None and device.type == "cpu" and precision == "bf16":
        unfuse_attention(model)
    if compile:
        model.compile()  # in place: the names of the weights stay


def freeze_blocks(model: Model, count: int) -> None:
    """Leave the first `count` blocks of the backbone, and what lies before them, as they are: ConfigError if it cannot.

    Nothing below them asks for a gradient, so torch keeps nothing of their pass and never goes back through them.
    """
    net, layer = model.backbone.net, layers_of(model.backbone.net)
    if layer is None:
        raise ConfigError(f"freeze: timm does not say which blocks {model.config.backbone!r} has; use none or backbone")
    blocks = int(layer("")) - 1  # the stem is layer 0, all above the blocks the last one
    if count > blocks:
        raise ConfigError(f"freeze={count}: {model.config.backbone!r} has {blocks} blocks")
    for name, parameter in net.named_parameters():
        if layer(name) <= count:
            parameter.requires_grad = False
    frozen: list[nn.Module] = []
    for module in net.modules():  # in the order in which they were made, which is that of the computation
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            break
        if not any(parameter.requires_grad for parameter in module.parameters()):
            frozen.append(module)
    model.backbone.frozen = frozen


def unfuse_attention(model: Model) -> None:
    """Compute attention in three steps: on CPUs the backward pass of torch's fused bf16 kernel takes most of a step.

    For training; in answers little or nothing changes (benchmarks/cpu_attention.py).
    """
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]  # timm's switch
    for block in blocks:
        block.fused_attn = False


class LowRank(nn.Module):
    """What LoRA (arXiv 2106.09685) adds to a weight matrix: up (out, rank) @ down (rank, in), zero at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) with the addition."""
        return weight + self.up @ self.down


def add_low_rank(model: Model, rank: int) -> None:
    """Freeze the backbone; in every block that was not frozen before, the matrix of queries, keys and values gets an
    addition of low rank.

    As a parametrization of the weight it is seen wherever timm reads that weight: EVA and BEiT do not call the layer,
    so that adapters which replace the layer (peft's) would be passed over in silence.

    Raises ConfigError for a backbone without such matrices.
    """
    found = [m.qkv for m in model.backbone.net.modules() if isinstance(getattr(m, "qkv", None), nn.Linear)]
    layers = [layer for layer in found if layer.weight.requires_grad]
    if not layers:
        where = " above the frozen ones" if found else ""
        raise ConfigError(f"lora: {model.config.backbone!r} has no attention with one matrix for q, k and v{where}")
    model.backbone.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def merged(model: Model) -> Model:
    """`model` as it is measured and saved: with low-rank additions, a copy in which they are part of the weights."""
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    model = deepcopy(model)
    for name, layer in list(model.named_modules()):
        if parametrize.is_parametrized(layer):  # to remove it instead would undo the original's too: they share a class
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.load_state_dict({"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})})
            model.set_submodule(name, plain.to(layer.weight.device))
    return model


def add_contrast(model: Model, weight: float) -> None:
    """In training `model` also names the supervised-contrastive term, on the class tokens (B, D) of its first pass."""
    if isinstance(model, TokenModel):
        raise ConfigError(f"supcon: {model.config.method!r} has no class token before its parts are chosen")
    passes: list[Tensor] = []

    def note(_: Any, __: Any, features: Features) -> None:
        passes.append(features.cls)

    def add(model: Any, _: Any, output: Output) -> Output:
        first = passes[0]
        passes.clear()
        if not model.training:
            return output
        terms = output.aux or {"cross_entropy": ((1.0, output.logits),)}
        return output._replace(aux={**terms, "supervised_contrastive": (weight, first)})

    model.backbone.register_forward_hook(note)
    model.register_forward_hook(add)
