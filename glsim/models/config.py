"""What a model is made from, and what its bundle says of it: the content of `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL_KEYS = ("method", "backbone", "num_classes", "image_size", "backbone_args", "options")


@dataclass(frozen=True)
class ModelConfig:
    """Plain values, as JSON has them. The first six make the model; a bundle adds the others, where it knows them.

    `glsim.checkpoints.config` holds a stranger's values to what each may be.
    """

    method: str
    backbone: str  # timm's name
    num_classes: int
    image_size: list[int]  # height, width
    backbone_args: dict[str, Any]  # for timm
    options: dict[str, Any]  # of the method and of its encoder, all of them
    format: int | None = None  # of the bundle
    label_names: list[str] | None = None  # in the order of the logits
    class_names: dict[str, dict[str, str]] = field(default_factory=dict)  # that people use, by label
    preprocessing: dict[str, Any] | None = None  # of `glsim.data.transforms:Preprocessing`
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)  # the preprocessing, as timm tells it
    licence: dict[str, str] = field(default_factory=dict)  # of the data, the backbone and the model
    data: dict[str, Any] = field(default_factory=dict)  # source, counts, split_hash and how splits were drawn
    training: dict[str, Any] = field(default_factory=dict)  # start, epochs, optimizer, lr, batch_size, seed
    calibration: dict[str, Any] = field(default_factory=dict)  # temperature, threshold and what they were fitted on
    extra: dict[str, Any] = field(default_factory=dict)  # keys that glsim writes or keeps, and never reads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `as_dict`; keys without a field of their own become `extra`."""
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in values.items() if key in names}
        return cls(**known, extra={key: value for key, value in values.items() if key not in names})

    def as_dict(self) -> dict[str, Any]:
        """The content of `config.json`, without what is not known."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        always = (*MODEL_KEYS, "label_names")
        return {key: value for key, value in own.items() if key in always or value not in (None, {})} | self.extra
