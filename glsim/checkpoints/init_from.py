"""Weights from elsewhere as the start of a model: bundles, and files of any convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glsim import models
from glsim.checkpoints.bundle import FILES, check_inside, read_bundle_weights
from glsim.checkpoints.conventions import NET, Weights, read_weights, recognise, sources_of
from glsim.checkpoints.fit import Fit, fit, plain
from glsim.checkpoints.hub import fetch
from glsim.checkpoints.sizes import fitting_names, sizes_of
from glsim.files import expand
from glsim.models.base import Model
from glsim.types import ConfigError


@dataclass(frozen=True)
class Start:
    """What a model started from, and what became of every tensor."""

    source: str  # the file's or the bundle's name
    convention: str  # of its names
    used: dict[str, str]  # name in the file -> in the model
    ignored: dict[str, str]  # name in the file -> why
    missing: list[str]  # of the backbone: they stay as they were
    new: list[str]  # parts of the method that the file does not hold: they stay as they were
    resampled: dict[str, str]  # of the backbone: from which shape to which

    def __str__(self) -> str:
        """For people, on one line."""
        told = [f"{len(self.used)} tensors used, {len(self.ignored)} ignored"]
        why = sorted(set(self.ignored.values()))
        told[0] += f" ({', '.join(why)})" if why else ""
        told += [f"{name} resampled from {sizes}" for name, sizes in self.resampled.items() if "pos" in name][:1]
        told.append(f"new: {', '.join(sorted({name.split('.')[0] for name in self.new})) or 'nothing'}")
        return f"{self.source} ({self.convention}): {'; '.join(told)}"


def create_model(
    method: str,
    backbone: str | None = None,
    num_classes: int = 1000,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    backbone_args: dict[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
    **options: Any,
) -> Model:
    """Build a model as `glsim.models:create_model` does, which tells of the other arguments; `weights` to start from.

    Args:
        method: a name of `METHODS`.
        backbone: a timm name; None: the method's own default.
        num_classes: logits of the model.
        image_size: pixels, one side or (height, width); None: the size timm lists for the weights.
        pretrained: start from timm's weights; not read where `weights` are given.
        backbone_args: handed to timm.
        weights: a file of any convention, or a bundle: see `init_from`. The model does not remember it.
        options: those of the method and of every encoder.

    Raises:
        ConfigError: for what does not fit, weights too.
        DataError: for weights that cannot be read.
    """
    pretrained = pretrained and weights is None
    model = models.create_model(method, backbone, num_classes, image_size, pretrained, backbone_args, **options)
    if weights is not None:
        init_from(model, weights)
    return model


def init_from(model: Model, source: str | Path) -> Start:
    """Give a model the weights of a file or of another model; nothing is changed where they do not fit.

    Args:
        model: changed in place; positions are resampled to its grid.
        source: a bundle folder, `hf-hub:owner/name`, `local-dir:path`, or a file of weights of timm, their publishers
            or Hugging Face's transformers (`docs/weights.md` lists them). Of a bundle or a checkpoint of a method, the
            parts of the method are taken too where name and shape agree.

    Returns:
        What became of every tensor.

    Raises:
        ConfigError: for weights of another backbone, with the sizes they seem to have and timm's names for them.
        DataError: for a file that cannot be read.
    """
    weights = open_weights(source)
    taken, found = fit(weights, model.backbone.net)
    if not found.fits:
        raise ConfigError(refusal(weights, found, model.config.backbone))
    own = model.state_dict()
    parts = {k: v for k, v in weights.parts.items() if k in own and own[k].shape == v.shape}
    taken = {NET + name: tensor for name, tensor in taken.items()} | {k: plain(v) for k, v in parts.items()}
    missing = [NET + name for name in found.missing]
    new = sorted(own.keys() - taken.keys() - set(missing))
    model.load_state_dict(taken, strict=False)
    model.initialised([*missing, *new])
    new = [name for name in new if name in model.state_dict()]  # a method may do without one of them now
    used = {key: NET + name for key, name in found.used.items()}
    used |= {key: name for name, part in parts.items() for key in sources_of(part)}
    return Start(
        source=Path(source).name,
        convention=weights.convention.name,
        used=used,
        ignored={key: why for key, why in found.ignored.items() if key not in used},
        missing=missing,
        new=new,
        resampled={NET + name: sizes for name, sizes in found.resampled.items()},
    )


def open_weights(source: str | Path) -> Weights:
    """The weights of a file or of a bundle; see `init_from`."""
    if str(source).startswith("hf-hub:"):
        path = fetch(str(source).removeprefix("hf-hub:"), FILES)
    else:
        path = Path(expand(str(source)).removeprefix("local-dir:"))
    if path.suffix == ".onnx":
        raise ConfigError(f"{source} is an exported graph: it only answers; name the bundle it was exported from")
    if path.is_dir():
        check_inside(path)
        return recognise(read_bundle_weights(path), [], path)
    return read_weights(path)


def refusal(weights: Weights, found: Fit, backbone: str) -> str:
    """Why a file does not fit, the sizes it seems to have, and which of timm's networks would take it."""
    names = fitting_names(weights)
    fitting = f"timm's networks that take it: {', '.join(names)}" if names else "no network of timm is known to take it"
    return (
        f"{weights.path} does not fit {backbone!r}: {'; '.join(found.unfit)}. It seems to be "
        f"{weights.convention.name}: {sizes_of(weights)}; {fitting}"
    )
