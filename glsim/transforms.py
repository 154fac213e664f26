"""Floor 1: named image pipelines, and the numbers a trained model needs to repeat its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from glsim.types import ConfigError, choose

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network; stored in every bundle.

    The image is squeezed to `resize_ratio` times `image_size` (height, width) without keeping its aspect (the paper's
    rule: nothing is lost at the long side), then the centre `image_size` is cut out and normalised.
    """

    image_size: tuple[int, int]
    resize_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `as_dict`; raises ConfigError when a number is missing or malformed."""
        try:
            return cls(
                (int(values["image_size"][0]), int(values["image_size"][1])),
                float(values["resize_ratio"]),
                tuple(float(v) for v in values["mean"]),
                tuple(float(v) for v in values["std"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"preprocessing {values!r} lacks a proper {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def resize(self) -> tuple[int, int]:
        """Height and width the whole image is squeezed to, in pixels."""
        return int(self.image_size[0] * self.resize_ratio), int(self.image_size[1] * self.resize_ratio)


def _nothing() -> list[v2.Transform]:
    return []


def _weak() -> list[v2.Transform]:
    return [v2.RandomHorizontalFlip()]


def _medium() -> list[v2.Transform]:
    return [v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]


AUGMENTATIONS = {"none": _nothing, "weak": _weak, "medium": _medium}  # the paper's names
ERASING = {"none": 0.0, "weak": 0.0, "medium": 0.3}  # probabilities; up to 0.4 of the area, as published


def train_transform(
    p: Preprocessing, augment: str = "medium", crop: str = "random", crop_scale: float = 0.5
) -> Callable[[Image.Image], Tensor]:
    """RGB image -> normalised (3, H, W).

    `crop="random"` is the paper's: squeeze to `p.resize`, cut `p.image_size` anywhere. `crop="resized"` cuts between
    `crop_scale` and all of the area at aspect 3/4 to 4/3, which suits training from scratch.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    crops = {
        "random": lambda: [v2.Resize(p.resize, bicubic), v2.RandomCrop(p.image_size)],
        "resized": lambda: [v2.RandomResizedCrop(p.image_size, scale=(crop_scale, 1.0), interpolation=bicubic)],
    }
    steps = choose(crop, crops, "crop policy")() + choose(augment, AUGMENTATIONS, "augmentation")()
    return v2.Compose([*steps, *_to_tensor(p), v2.RandomErasing(ERASING[augment], scale=(0.02, 0.4))])


def eval_transform(p: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """RGB image -> normalised (3, H, W), always the same."""
    steps = [v2.Resize(p.resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(p.image_size)]
    return v2.Compose([*steps, *_to_tensor(p)])


def mask_transform(p: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """A mask the way `eval_transform` sees its image: mode "L" -> bool (H, W), True where the mask is not zero."""
    steps = [v2.Resize(p.resize, v2.InterpolationMode.NEAREST), v2.CenterCrop(p.image_size)]
    return v2.Compose([*steps, v2.PILToTensor(), v2.Lambda(lambda mask: mask[0] > 0)])


def to_picture(images: Tensor, p: Preprocessing) -> np.ndarray:
    """Undo the normalisation: (..., 3, H, W) -> uint8 (..., H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (p.mean, p.std))
    pixels = (images.detach().float().cpu() * std + mean).clamp(0, 1)
    return (pixels.movedim(-3, -1) * 255).round().to(torch.uint8).numpy()


def _to_tensor(p: Preprocessing) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]
