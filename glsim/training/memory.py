"""Estimate of the memory that a training step of a planned run needs, and what to change where there is less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from glsim.environment import pick_device
from glsim.models import create_model
from glsim.models.base import Model
from glsim.models.losses import objective
from glsim.settings import Size
from glsim.training.adapt import adapt
from glsim.training.components import make_optimizer
from glsim.training.config import Train

SLACK = 1.1  # memory for what a step holds beside what the estimate counts


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training step of a planned run needs, the bytes free on its device, and what to change."""

    method: str
    backbone: str
    image_size: list[int]  # height, width
    batch_size: int
    precision: str
    parameters: int  # numbers, not bytes
    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the whole batch
    activations_per_image: int
    total: int  # with `SLACK`
    device: str
    free: int
    fits: bool
    largest_batch_size: int
    advice: list[str]  # options that make it fit, where it does not


def estimate_memory(
    num_classes: int,
    *,
    method: str = "glsim",
    backbone: str | None = None,
    image_size: Size = None,
    options: Mapping[str, Any] | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    optimizer: str = "sgd",
    precision: str = "no",
    freeze: int | str = "none",
    device: str | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a training step.

    Weights and optimiser state are counted; what the forward pass keeps for the backward pass is measured on the CPU
    with 2 and with 3 images, and goes up by the same amount with every further one.

    Args:
        num_classes: of the data.
        method, backbone, image_size, options, backbone_args: of the run, as in `glsim.training.config:Train`.
        batch_size, optimizer, precision, freeze: likewise.
        device: on which it is to run; None: the best there is.

    Raises:
        ConfigError: as `glsim.training.train:train` does.
    """
    place = pick_device(device)
    plan = Train(data="-", out="-", method=method, batch_size=batch_size, optimizer=optimizer)

    def build(precision: str) -> Model:
        args = dict(backbone_args or {}) or None
        model = create_model(method, backbone, num_classes, image_size, False, args, **options or {})
        adapt(model, freeze=freeze, precision=precision, device=place)
        return model.train()

    model = build(precision)
    state = make_optimizer(plan, model)
    fixed, each = measure_activations(model, precision, backward=True)
    state.step()
    weights = _bytes([*model.parameters(), *model.buffers()])
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    kept = _bytes(v for values in state.state.values() for v in values.values() if isinstance(v, torch.Tensor))
    size, name = model.config.image_size, model.config.backbone
    parameters = sum(p.numel() for p in model.parameters())
    del model, state
    always = weights + gradients + kept
    free = free_bytes(place)
    usable = free / SLACK - always - fixed  # what is left for activations of images
    largest = max(0, math.floor(usable / each))
    total = math.ceil(SLACK * (always + fixed + each * batch_size))
    advice = []
    if largest < batch_size:
        if largest:
            accumulate = math.ceil(batch_size / largest)
            batch = math.ceil(batch_size / accumulate)
            advice.append(f"--batch-size {batch} --accumulate {accumulate}: steps of the same size in smaller parts")
        if precision == "no":
            half_fixed, half = measure_activations(build("bf16"), "bf16")
            need = math.ceil(SLACK * (always + half_fixed + half * batch_size))
            advice.append(f"--precision bf16: {as_gib(need)} instead of {as_gib(total)}")
        if usable > 0:
            # Activations go with the number of pixels; no measurement at the smaller size, which may not fit the model.
            height, width = (int(side * math.sqrt(usable / each / batch_size)) // 32 * 32 for side in size)
            if min(height, width) >= 32:
                advice.append(f"--image-size {height if height == width else f'[{height},{width}]'} or smaller")
        advice.append("a smaller --backbone, or a device with more memory")
    return MemoryEstimate(
        method=method,
        backbone=name,
        image_size=list(size),
        batch_size=batch_size,
        precision=precision,
        parameters=parameters,
        weights=weights,
        gradients=gradients,
        optimizer=kept,
        activations=fixed + each * batch_size,
        activations_per_image=each,
        total=total,
        device=str(place),
        free=free,
        fits=largest >= batch_size,
        largest_batch_size=largest,
        advice=advice,
    )


def measure_activations(model: Model, precision: str, backward: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass.

    Args:
        model: on the CPU.
        precision: as of a recipe.
        backward: run the backward pass too, so that the gradients are there afterwards.

    Returns:
        Whatever the batch, and for each image.
    """
    two, three = saved_bytes(model, 2, precision), saved_bytes(model, 3, precision, backward)
    return max(0, 3 * two - 2 * three), three - two


def saved_bytes(model: Model, batch: int, precision: str, backward: bool = False) -> int:
    """Bytes of all tensors that autograd keeps, each storage once, the model's own left out.

    Args:
        model: on the CPU.
        batch: images.
        precision: as of a recipe.
        backward: run the backward pass too.
    """
    kept = {t.untyped_storage().data_ptr(): 0 for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    images = torch.randn(batch, 3, *model.config.image_size)
    labels = torch.arange(batch) % model.config.num_classes
    # fp16 and bf16 have the same size, and every CPU computes in bf16.
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision != "no")
    with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(model(images), labels)
    if backward:
        loss.backward()
    return sum(kept.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`; of the machine where the device has none of its own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def as_gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.{2 if count < 10 * 2**30 else 0}f} GiB"
