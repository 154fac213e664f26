"""CAL (Rao et al.: Counterfactual Attention Learning for Fine-Grained Visual Categorization .., arXiv 2108.08728)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.models.boxes import ENDS, boxes_from_mask, crop_and_resize
from glsim.models.published import RESNET_SEQUENCE, File, Published, resnet_sizes
from glsim.types import ConfigError, Features, Output, Selection, choose

TITLE = "CAL"
NEEDS = ("map", "places")
CROPS = True
EMBEDDINGS = ("global", "crop", "fused")
BACKBONE = "resnet101"
VIEWS: dict[int, tuple[tuple[float, float], ...]] = {  # passes at test time -> (threshold, padding) of the crops
    1: (),
    2: ((0.1, 0.05),),  # what the authors validate with
    8: ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05)),  # image and three crops, and again mirrored
}


class CAL(Model):
    """Attention maps pool the features; what they gain over random maps is trained too, so that they must matter."""

    def __init__(self, backbone: Backbone, num_classes: int, maps: int, views: int, box: str) -> None:
        super().__init__()
        self.backbone, self.views, self.box = backbone, views, box
        self.attend = nn.Linear(backbone.dim, maps, bias=False)  # over places: a 1x1 convolution
        self.norm = nn.BatchNorm1d(maps, eps=1e-3)
        self.head = nn.Linear(maps * backbone.dim, num_classes, bias=False)
        self.register_buffer("centres", torch.zeros(num_classes, maps * backbone.dim))
        self.centres: Tensor

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. Training encodes them, a crop and a masked copy; testing `views` views."""
        if not self.training:
            return self.test(images)
        vector, logits, effect, maps, grid = self.look_and_compare(images)
        with torch.no_grad():  # two maps an image, strong ones more often: one to crop to, one to hide
            strength = maps.mean(dim=1).add(1e-6).sqrt()  # B M
            race = strength / torch.empty_like(strength).exponential_()  # by weight, no waiting
            index = race.topk(2, dim=1).indices[:, None].expand(-1, maps.shape[1], -1)
            to_crop, to_hide = maps.gather(2, index).unbind(dim=2)  # B N
            theta = torch.rand(2, images.shape[0], 1, 1, device=images.device)
            size = images.shape[-2:]
            boxes = boxes_from_mask(over(to_crop, grid, size, 0.4 + 0.2 * theta[0]), size, 0.1, self.box)
            hidden = images.masked_fill(over(to_hide, grid, size, 0.2 + 0.3 * theta[1])[:, None], 0.0)
        crops = crop_and_resize(images, boxes)
        _, more, more_effect, *_ = self.look_and_compare(torch.cat((crops, hidden)))
        losses = {
            "cross_entropy": ((1 / 3, logits), (1.0, torch.cat((effect, more_effect))), (2 / 3, more)),
            "centre": (vector, self.centres),
        }
        return Output(logits, as_selection(maps, grid, boxes), crops, losses)

    def look(self, images: Tensor) -> tuple[Features, Tensor, Tensor, Tensor]:
        """Features, attention maps (B, N, M), the vector they pool (B, F) and its logits (B, C)."""
        f = self.features(images)
        maps = F.relu(self.norm(self.attend(f.patches).transpose(1, 2))).transpose(1, 2)
        vector = pool(f.patches, maps)
        return f, maps, vector, self.head(100 * vector)

    def look_and_compare(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """Vector, logits, what they gain over counterfactual maps drawn from U(0, 2) (testing: of ones), maps, grid."""
        f, maps, vector, logits = self.look(images)
        fake = 2 * torch.rand_like(maps) if self.training else torch.ones_like(maps)
        return vector, logits, logits - self.head(100 * pool(f.patches, fake)), maps, f.grid

    def test(self, images: Tensor) -> Output:
        """The mean of the logits of the image, of crops at falling thresholds, and (8 views) of their mirror images."""
        size = images.shape[-2:]
        logits: list[Tensor] = []
        vectors: list[Tensor] = []
        selection, crops = None, None
        embeddings: dict[str, Tensor] = {}
        for view in (images, images.flip(-1)) if self.views == 8 else (images,):
            f, maps, vector, whole = self.look(view)
            embeddings.setdefault("global", f.cls)
            logits.append(whole)
            vectors.append(vector)
            mean, grid = maps.mean(dim=-1), f.grid
            for threshold, padding in VIEWS[self.views]:
                boxes = boxes_from_mask(over(mean, grid, size, threshold), size, padding, self.box)
                crop = crop_and_resize(view, boxes)
                f_crop, _, vector, local = self.look(crop)
                embeddings.setdefault("crop", f_crop.cls)
                logits.append(local)
                vectors.append(vector)
                if selection is None:
                    selection, crops = as_selection(maps, grid, boxes), crop
        if selection is None:
            selection = as_selection(maps, grid, boxes_from_mask(over(mean, grid, size, 0.3), size, 0.1, self.box))
        embeddings["fused"] = torch.stack(vectors).mean(dim=0)
        return Output(torch.stack(logits).mean(dim=0), selection, crops, embeddings=embeddings)


def pool(patches: Tensor, maps: Tensor) -> Tensor:
    """Bilinear attention pooling: features (B, N, D) under each map (B, N, M), root-scaled, unit length: (B, M D)."""
    x = (maps.transpose(1, 2) @ patches / maps.shape[1]).flatten(1)
    return F.normalize(x.sign() * (x.abs() + 1e-6).sqrt(), dim=-1)


def over(scores: Tensor, grid: tuple[int, int], size: Sequence[int], threshold: float | Tensor) -> Tensor:
    """Which pixels belong to the object.

    Args:
        scores: (B, N).
        grid: rows and columns of the N patches.
        size: (H, W) in pixels.
        threshold: share of an image's largest score that a pixel has to reach.

    Returns:
        bool (B, H, W).
    """
    maps = F.interpolate(scores.unflatten(1, grid)[:, None], list(size), mode="bilinear", align_corners=True)[:, 0]
    return maps >= threshold * scores.amax(dim=1)[:, None, None]


def as_selection(maps: Tensor, grid: tuple[int, int], boxes: Tensor) -> Selection:
    """The mean of the attention maps (B, N, M) as scores; the patch where each map is strongest, and the box."""
    return Selection(maps.mean(dim=-1), maps.argmax(dim=1), boxes, grid)


def build(encoder: Backbone, num_classes: int, *, maps: int = 32, views: int = 8, box: str = "inclusive") -> CAL:
    """CAL (arXiv 2108.08728) on `encoder`.

    Args:
        encoder: a backbone whose map has several places.
        num_classes: C.
        maps: attention maps (the paper: 32).
        views: at test time: 1 (image), 2 (and a crop) or 8 (the paper's).
        box: whether it holds the last row and column of what a map marks; the authors' code leaves them out
            ("exclusive").

    Raises:
        ConfigError: for fewer than two maps, or another number of views.
    """
    choose(views, VIEWS, "number of views")
    choose(box, ENDS, "box rule")
    if maps < 2:
        raise ConfigError(f"maps={maps}: two or more are needed, one to crop to and one to hide")
    return CAL(encoder, num_classes, maps, views, box)


def published_sizes(file: File) -> dict[str, Any]:
    """A ResNet whose last stage keeps the places of the one before it, and boxes as the authors' code draws them."""
    own = {"maps": file.shape("attend.weight")[0], "box": "exclusive", "last_stride": 1}
    return resnet_sizes(file) | own


PUBLISHED = Published(
    "CAL",
    (
        (r"^features\.", ""),
        *RESNET_SEQUENCE,
        (r"^attentions\.conv", "attend"),
        (r"^attentions\.bn", "norm"),
        (r"^fc\.", "head."),
        (r"^feature_center$", "centres"),
    ),
    published_sizes,
    {"image_size": "pixels (by default 448)", "views": "passes at test time: 1, 2 or 8 (by default 8)"},
)
