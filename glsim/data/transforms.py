"""Image transforms by name, mixing in a batch (mixup, CutMix), and the preprocessing that a trained model stores."""

from __future__ import annotations

import math
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
LONGEST = 8  # times what is wanted of it: how long a side is resized as a whole
BICUBIC = v2.InterpolationMode.BICUBIC


def squeeze(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """An image of `size` (width, height) becomes `target` (height, width) itself."""
    return target


def fill(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest image of the aspect of `size` (width, height) that `target` fits into."""
    (width, height), (rows, cols) = size, target
    if rows * width >= cols * height:
        return rows, max(cols, int(rows * width / height))
    return max(rows, int(cols * height / width)), cols


RESIZE_RULES: dict[str, Callable[[tuple[int, int], tuple[int, int]], tuple[int, int]]] = {
    "square": squeeze,
    "short": fill,
}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network; stored in every bundle.

    The image is brought to `resize_ratio` times `image_size` (height, width), then the centre `image_size` is cut out
    and normalised. `resize_rule` "square" squeezes it to that very size without keeping its aspect (the paper's rule:
    nothing is lost at the long side); "short" keeps the aspect and lets the longer side stick out.
    """

    image_size: tuple[int, int]
    resize_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_rule: str = "square"

    def __post_init__(self) -> None:
        choose(self.resize_rule, RESIZE_RULES, "resize rule")
        if not (1 <= self.resize_ratio < math.inf and min(self.image_size) >= 1):
            raise ConfigError(f"image_size={self.image_size}, resize_ratio={self.resize_ratio}: at least 1 is needed")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not (len(self.mean) == len(self.std) == 3 and finite and min(self.std) > 0):
            raise ConfigError(f"mean={self.mean}, std={self.std}: three numbers each, std above 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `as_dict`; raises ConfigError when a number is missing or malformed."""
        try:
            return cls(
                (int(values["image_size"][0]), int(values["image_size"][1])),
                float(values["resize_ratio"]),
                tuple(float(v) for v in values["mean"]),
                tuple(float(v) for v in values["std"]),
                str(values.get("resize_rule", "square")),  # bundles of format 1 do not say
            )
        except ConfigError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"preprocessing {values!r} lacks a proper {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def resize(self) -> tuple[int, int]:
        """Height and width, in pixels, that images are squeezed to, or with the rule "short" at least fill."""
        return int(self.image_size[0] * self.resize_ratio), int(self.image_size[1] * self.resize_ratio)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a whole image of `size` (width, height) is brought to."""
        return RESIZE_RULES[self.resize_rule](size, self.resize)

    def middle(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the middle of an image of `size` (width, height) that is worth the resizing.

        All of it, unless a side would become more than 8 times what is wanted: a line of pixels would fill the memory.
        """
        sides = []
        for side, becomes, wanted in zip(size, reversed(self.resized(size)), reversed(self.resize), strict=True):
            part = math.ceil(side * LONGEST * wanted / becomes)
            sides.append(min(side, part + (side - part) % 2))  # as much is left away before it as behind
        return sides[0], sides[1]


# One step each, applied in the order they are named in. Strengths are those of timm and of the self-supervised field.
AUGMENTATIONS: dict[str, Callable[[], v2.Transform]] = {
    "flip": v2.RandomHorizontalFlip,
    "vflip": v2.RandomVerticalFlip,
    "autoaugment": v2.AutoAugment,
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
    "jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "blur": lambda: v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5),
    "grey": lambda: v2.RandomGrayscale(0.2),
    "solarise": lambda: v2.RandomSolarize(128, 0.2),
    "affine": lambda: v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.1)),
    "erase": lambda: v2.RandomErasing(0.3, scale=(0.02, 0.4)),  # as published: up to 0.4 of the area
}
LAST = {"erase"}  # acts on the normalised tensor: whatever its place, after all others
PRESETS = {"none": "", "weak": "flip", "medium": "flip,trivialaugment,erase"}  # the paper's names


def augmentations(names: str) -> list[str]:
    """The single steps that a comma list of steps and presets stands for, each once.

    Raises ConfigError for an unknown name.
    """
    given = [name.strip() for name in names.split(",")]
    known = {**{name: name for name in AUGMENTATIONS}, **PRESETS}
    parts = ",".join(choose(name, known, "augmentation") for name in given)
    return list(dict.fromkeys(name for name in parts.split(",") if name))


def train_transform(
    p: Preprocessing, augment: str = "medium", crop: str = "random", crop_scale: float = 0.5
) -> Callable[[Image.Image], Tensor]:
    """RGB image -> normalised (3, H, W): both parts of `train_steps`, one after the other."""
    return v2.Compose(train_steps(p, augment, crop, crop_scale))


def train_steps(
    p: Preprocessing, augment: str = "medium", crop: str = "random", crop_scale: float = 0.5
) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Image.Image], Tensor]]:
    """What is always done alike to an RGB image, and what chance has a part in: image -> image -> (3, H, W).

    `augment` names steps and presets. `crop="random"` is the paper's: resize by the rule of `p`, cut `p.image_size`
    anywhere; "centre" cuts the middle. `crop="resized"` cuts between `crop_scale` and all of the area out of the image
    as it is, at aspect 3/4 to 4/3, which suits training from scratch.

    Raises ConfigError for an unknown name.
    """
    crops: dict[str, Callable[[], tuple[Any, v2.Transform]]] = {
        "random": lambda: (Resize(p), v2.RandomCrop(p.image_size)),
        "centre": lambda: (Resize(p), v2.CenterCrop(p.image_size)),
        "resized": lambda: (
            v2.Identity(),
            v2.RandomResizedCrop(p.image_size, scale=(crop_scale, 1.0), interpolation=BICUBIC),
        ),
    }
    always, cut = choose(crop, crops, "crop policy")()
    names = augmentations(augment)
    early = [AUGMENTATIONS[name]() for name in names if name not in LAST]
    late = [AUGMENTATIONS[name]() for name in names if name in LAST]
    return always, v2.Compose([cut, *early, *_to_tensor(p), *late])


def eval_transform(p: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """RGB image -> normalised (3, H, W), always the same."""
    return v2.Compose([Resize(p), v2.CenterCrop(p.image_size), *_to_tensor(p)])


def mask_transform(p: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """A mask the way `eval_transform` sees its image: mode "L" -> bool (H, W), True where the mask is not zero."""
    steps = [Resize(p, v2.InterpolationMode.NEAREST), v2.CenterCrop(p.image_size)]
    return v2.Compose([*steps, v2.PILToTensor(), v2.Lambda(lambda mask: mask[0] > 0)])


def places_to_view(places: Tensor, size: tuple[int, int], p: Preprocessing) -> Tensor:
    """Places x, y (n, 2) in an image of `size` (width, height), in pixels of what `eval_transform` makes of it.

    What is cropped away lies below 0 or beyond `p.image_size`.
    """
    middle = p.middle(size)
    whole, kept, resized, view = map(torch.tensor, (size, middle, p.resized(middle)[::-1], p.image_size[::-1]))
    return (places - (whole - kept) / 2) * resized / kept - ((resized - view) / 2).round()


class Resize:
    """A whole image by the resize rule of `p`; of one that is far too long, the middle."""

    def __init__(self, p: Preprocessing, interpolation: v2.InterpolationMode = BICUBIC) -> None:
        self.p, self.interpolation = p, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image of any size -> one of `p.resized`, or the middle of that."""
        width, height = self.p.middle(image.size)
        if (width, height) != image.size:
            image = v2.functional.center_crop(image, [height, width])
        return v2.functional.resize(image, list(self.p.resized(image.size)), interpolation=self.interpolation)


def batch_mixing(mixup: float, cutmix: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (B, 3, H, W), labels (B,)) -> the same mixed in pairs, with the share (B, C) that each class has.

    `mixup` (arXiv 1710.09412) and `cutmix` (arXiv 1905.04899) are the parameters of the Beta distribution that shares
    are drawn from, 0 for neither; with both, chance picks one for each batch. Without any, nothing is changed.
    """
    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    mixings: list[Any] = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    if not mixings:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(mixings)


def to_picture(images: Tensor, p: Preprocessing) -> np.ndarray:
    """Undo the normalisation: (..., 3, H, W) -> uint8 (..., H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (p.mean, p.std))
    pixels = (images.detach().float().cpu() * std + mean).clamp(0, 1)
    return (pixels.movedim(-3, -1) * 255).round().to(torch.uint8).numpy()


def _to_tensor(p: Preprocessing) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]
