"""The method `annotated`: GLSim that crops the annotators' box in place of its own, the upper bound of any rule.

An experiment beside the package: `study.py` makes its name known, and hands each image's box to the network as a fourth
channel, 1 inside the box and 0 outside, which goes through the same augmentation as the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.tv_tensors import BoundingBoxes

from glsim.data.annotations import read_annotations
from glsim.data.images import read_image
from glsim.data.loaders import ImageDataset
from glsim.data.readers import ImageList
from glsim.data.transforms import Preprocessing, train_steps
from glsim.models.backbone import Backbone
from glsim.models.boxes import boxes_from_mask, crop_and_resize
from glsim.models.glsim import RULES, GLSim
from glsim.models.glsim import build as build_glsim
from glsim.models.scores import score
from glsim.types import Output


class Annotated(GLSim):
    """Encode the image, crop the box that is given, encode the crop, refine both, classify."""

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 4, H, W), the last channel the box; without it (B, 3, H, W) the crop is the image."""
        pixels, inside = images[:, :3], images[:, 3:].amax(dim=1) if images.shape[1] > 3 else images[:, 0] > -torch.inf
        f = self.features(pixels)
        selection = self.select(score(self.metric, f), pixels)
        boxes = boxes_from_mask(inside > 0, pixels.shape[-2:])
        crops = crop_and_resize(pixels, boxes, self.crop_size)
        tokens = torch.stack((f.cls, self.backbone.class_token(crops)), dim=1)
        return self.refine(tokens, selection._replace(boxes=boxes), crops)


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    first_size: int | None = None,
    crop_size: int | None = None,
    classifier: str = "cls",
    aggregator_start: str | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
) -> Annotated:
    """GLSim of these options; its box is given."""
    options: dict[str, Any] = {
        "classifier": classifier,
        "aggregator_start": aggregator_start,
        "first_size": first_size,
        "crop_size": crop_size,
        "norm_eps": norm_eps,
        **RULES["object"],
    }
    made = build_glsim(encoder, num_classes, dropout=dropout, drop_path=drop_path, **options)
    assert isinstance(made, GLSim)
    made.__class__ = Annotated
    return made  # type: ignore[return-value]


class Boxed(ImageDataset):
    """Images read once, with their boxes: item i is ((4, H, W), label), augmented together."""

    def __init__(self, images: ImageList, always: Any, chance: Any, boxes: dict[str, tuple[float, ...]]) -> None:
        super().__init__(images, chance)
        self.read = [self._open(path, always, boxes) for path in images.paths]

    def _open(self, path: Path, always: Any, boxes: dict[str, tuple[float, ...]]) -> tuple[np.ndarray, Tensor]:
        box = boxes["/".join(path.parts[-3:])]  # train/CLASS/FILE
        whole, pixels = read_image(path, lambda image: (image.size, np.asarray(always(image))))
        scale = torch.tensor([pixels.shape[1] / whole[0], pixels.shape[0] / whole[1]] * 2)
        return pixels, torch.tensor(box) * scale

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels, box = self.read[index]
        marked = BoundingBoxes(box[None], format="XYXY", canvas_size=pixels.shape[:2])  # type: ignore[call-arg, call-overload]
        image, moved = self.transform(Image.fromarray(pixels), marked)
        left, top, right, bottom = moved[0].round().long().tolist()
        inside = torch.zeros(1, *image.shape[1:])
        inside[:, top : max(bottom, top + 1), left : max(right, left + 1)] = 1
        return torch.cat((image, inside)), self.labels[index]


@contextmanager
def given_boxes(file: Path) -> Iterator[None]:
    """Inside, training and its measuring hand the boxes of `file` on with the images."""
    boxes = {key: found.boxes[0].sides for key, found in read_annotations(file).items() if not isinstance(found, Path)}

    def train_images(s: Any, images: ImageList, p: Preprocessing, copies: int = 1) -> Boxed:
        return Boxed(images, *train_steps(p, s.augment, s.crop, s.crop_scale), boxes)

    def make_loader(images: ImageList, transform: Any, batch_size: int, workers: int) -> DataLoader:
        resize, *rest = transform.transforms
        together = type(transform)(rest)
        return DataLoader(Boxed(images, resize, together, boxes), batch_size=batch_size)  # type: ignore[arg-type]

    with (
        patch("glsim.training.train.train_images", train_images),
        patch("glsim.training.train.make_loader", make_loader),
    ):
        yield
