"""Memory that a training step of a planned run needs, and what to change where there is less."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from glsim.config import Doctor, Train
from glsim.environment import pick_device
from glsim.models import create_model
from glsim.models.backbone import Model
from glsim.models.losses import objective
from glsim.training.train import make_optimizer

SLACK = 1.1  # memory for what a step holds beside what the estimate counts


def estimate_memory(s: Doctor, num_classes: int) -> dict[str, Any]:
    """Bytes that a training step of the planned run needs, the bytes free on its device, and what to change.

    Weights and optimiser state are counted; what the forward pass keeps for the backward pass is measured on the CPU
    with 2 and with 3 images, and goes up by the same amount with every further one. Raises ConfigError as `train` does.
    """
    device = pick_device(s.device)
    plan = Train(data=s.data, out=s.out, method=s.method, batch_size=s.batch_size, optimizer=s.optimizer)

    def build(image_size: Any) -> Model:
        args = s.backbone_args or None
        return create_model(s.method, s.backbone, num_classes, image_size, False, args, **s.options).train()

    model = build(s.image_size)
    optimizer = make_optimizer(plan, model)
    fixed, each = measure_activations(model, s.precision, backward=True)
    optimizer.step()
    weights = _bytes([*model.parameters(), *model.buffers()])
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    parts = {"weights": weights, "gradients": _bytes(trained), "optimizer": _bytes(state)}
    size, backbone = model.backbone.image_size, model.config["backbone"]
    parameters = sum(p.numel() for p in model.parameters())
    del model, optimizer, trained, state
    free = free_bytes(device)
    usable = free / SLACK - sum(parts.values()) - fixed  # what is left for activations of images
    largest = max(0, math.floor(usable / each))
    total = math.ceil(SLACK * (sum(parts.values()) + fixed + each * s.batch_size))
    advice = []
    if largest < s.batch_size:
        if largest:
            accumulate = math.ceil(s.batch_size / largest)
            batch = math.ceil(s.batch_size / accumulate)
            advice.append(f"--batch-size {batch} --accumulate {accumulate}: steps of the same size in smaller parts")
        if s.precision == "no":
            half_fixed, half = measure_activations(build(s.image_size), "bf16")
            need = math.ceil(SLACK * (sum(parts.values()) + half_fixed + half * s.batch_size))
            advice.append(f"--precision bf16: {as_gib(need)} instead of {as_gib(total)}")
        if usable > 0:
            # Activations go with the number of pixels; no measurement at the smaller size, which may not fit the model.
            height, width = (int(side * math.sqrt(usable / each / s.batch_size)) // 32 * 32 for side in size)
            if min(height, width) >= 32:
                advice.append(f"--image-size {height if height == width else f'[{height},{width}]'} or smaller")
        advice.append("a smaller --backbone, or a device with more memory")
    return {
        "method": s.method,
        "backbone": backbone,
        "image_size": list(size),
        "batch_size": s.batch_size,
        "precision": s.precision,
        "parameters": parameters,
        **parts,
        "activations": fixed + each * s.batch_size,
        "activations_per_image": each,
        "total": total,
        "device": str(device),
        "free": free,
        "fits": largest >= s.batch_size,
        "largest_batch_size": largest,
        "advice": advice,
    }


def measure_activations(model: Model, precision: str, backward: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: (whatever the batch, for each image).

    With `backward` the gradients are there afterwards.
    """
    two, three = saved_bytes(model, 2, precision), saved_bytes(model, 3, precision, backward)
    return max(0, 3 * two - 2 * three), three - two


def saved_bytes(model: Model, batch: int, precision: str, backward: bool = False) -> int:
    """Bytes of all tensors that autograd keeps for `batch` images, each storage once, the model's own left out."""
    kept = {t.untyped_storage().data_ptr(): 0 for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    images = torch.randn(batch, 3, *model.backbone.image_size)
    labels = torch.arange(batch) % model.config["num_classes"]
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
