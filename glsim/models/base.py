"""Base classes of the methods: any model, models that may answer early, models whose last block sees chosen tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from glsim.models.backbone import Attention, Backbone
from glsim.models.boxes import select
from glsim.models.config import ModelConfig
from glsim.types import ConfigError, Features, Output, Selection


class Model(nn.Module):
    """What every method has: a backbone, and in `config` the plain values that `create_model` made it from."""

    backbone: Backbone
    config: ModelConfig
    metric: Any = None  # name of the metric whose scores choose patches; None: nothing does, or scores of its own
    top_o: Any = 8  # how many best patches `select` draws a box around; None: its rule takes no number
    box = "exclusive"  # rule by which `select` draws a box
    conversion: Any = None  # of an official checkpoint: what became of its keys

    def features(self, images: Tensor, attention: Attention = False) -> Features:
        """Tokens of the first pass over `images` (B, 3, H, W), for any metric and picture."""
        return self.backbone(images, attention=attention)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """What the method chooses of `images` (B, 3, H, W) by a metric's `scores` (B, g, N): its own rule.

        Pictures, localisation and the server draw all scores by it. Here, for methods that draw no single box by
        scores: the box around the `top_o` best patches. A rule that takes no such number declares `top_o = None`.
        """
        best = min(self.top_o, scores.shape[-1])
        return select(scores, best, self.backbone.grid_of(images), images.shape[-2:], self.box)

    def start_epoch(self, epoch: int) -> None:
        """Called when training reaches an epoch, from 0: for methods whose losses change with it."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers leave undecayed beside biases and norms: tokens and positions."""
        inner: set[str] = getattr(self.backbone.net, "no_weight_decay", set)()
        return {f"backbone.net.{name}" for name in inner}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter by its name, for timm's layer-wise learning rates; heads lie above the backbone.

        Raises ConfigError where timm does not say which layers a network has.
        """
        net = self.backbone.net
        layer = layers_of(net)
        if layer is None:
            raise ConfigError(f"layer_decay: timm does not say which layers {type(net).__name__} has; leave it at 1")
        return lambda name: layer(name.removeprefix("backbone.net.") if name.startswith("backbone.net.") else "")

    def initialised(self, kept: list[str]) -> None:
        """Called when weights from elsewhere are in, with the names of those that were not found there."""


def layers_of(net: Any) -> Callable[[str], int] | None:
    """The layer of a parameter of timm's network by its name: stem 0, blocks from 1, any other name above them.

    None where timm does not tell.
    """
    if not hasattr(net, "group_matcher"):
        return None
    names = iter([*net.named_parameters(), ("", None)])  # "": what no rule knows is the top, pooling and its norm too
    layers: dict[str, int] = group_with_matcher(names, net.group_matcher(coarse=False), reverse=True)
    return lambda name: layers.get(name, layers[""])


class EarlyExitModel(Model):
    """A model that may answer after its first pass: who has many images can make the second one in full batches.

    `margin`: where the two best classes are so far apart in probability, the first answer stands; None: nowhere.
    """

    margin: float | None = None

    def first_pass(self, images: Tensor) -> tuple[Tensor, Tensor, Selection]:
        """Of `images` (B, 3, H, W): what `second_pass` is given (B, D), the first logits (B, C), what to crop."""
        raise NotImplementedError

    def second_pass(self, images: Tensor, given: Tensor, boxes: Tensor) -> Output:
        """The refined answer.

        Args:
            images: (B, 3, H, W).
            given: (B, D), what the first pass gave for them.
            boxes: (B, 4), what to crop, int pixels.

        Returns:
            An output without a selection.
        """
        raise NotImplementedError


class TokenModel(Model):
    """A method whose last block sees chosen tokens only: what they are chosen from ends one block earlier."""

    box = "inclusive"

    def features(self, images: Tensor, attention: Attention = False) -> Features:
        """Tokens and attention before the last block, not normalised, for any metric and picture."""
        return self.backbone.stages(images, attention)[-1].features
