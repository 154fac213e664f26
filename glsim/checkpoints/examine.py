"""What a file of weights is: convention, sizes, heads, and which of timm's networks can start from it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glsim.checkpoints.conventions import why_ignored
from glsim.checkpoints.fit import Fit, fit
from glsim.checkpoints.init_from import open_weights
from glsim.checkpoints.sizes import Sizes, fitting_names, heads_of, sizes_of
from glsim.models.backbone import build_backbone
from glsim.types import optional


@dataclass(frozen=True)
class FittedBackbone:
    """Whether a file fits one network of timm, and what would become of every tensor."""

    backbone: str
    fits: bool
    fit: Fit


@dataclass(frozen=True)
class WeightsReport:
    """What `examine_weights` returns."""

    source: str
    convention: str  # of the names
    wrapped: str  # what stands around the network's names, from outside in; "" for nothing
    sizes: Sizes
    tensors: int  # of the network
    parameters: int  # numbers in them
    dtypes: list[str]  # of all tensors
    heads: dict[str, list[int]]  # classifiers and projections, which are left out -> shape
    backbones: list[str]  # timm's names of networks that take it; at most five
    command: str  # that trains from it
    checked: FittedBackbone | None = optional()  # with `backbone`
    exit_code: int = 0  # 4 where `backbone` does not fit


def examine_weights(
    source: str | Path, backbone: str | None = None, image_size: int | Sequence[int] | None = None
) -> WeightsReport:
    """Tell what a file of weights, or a bundle, is. Nothing is downloaded, but for a source `hf-hub:..`.

    Args:
        source: what `init_from` takes.
        backbone: a timm name: check whether it can start from the file.
        image_size: of that backbone, pixels; None: its own.

    Raises:
        ConfigError: for a backbone that timm has not.
        DataError: for a file that cannot be read.
    """
    weights = open_weights(source)
    names = fitting_names(weights)
    checked = None
    if backbone is not None:
        found = fit(weights, build_backbone(backbone, image_size).net)[1]
        checked = FittedBackbone(backbone, found.fits, found)
    network = [
        tensor for name, tensor in weights.named.items() if not why_ignored(name) or name.startswith("head.norm.")
    ]
    chosen = backbone if checked is not None and checked.fits else names[0] if names else "NAME"
    return WeightsReport(
        source=str(source),
        convention=weights.convention.name,
        wrapped=weights.wrapped,
        sizes=sizes_of(weights),
        tensors=len(network),
        parameters=sum(tensor.numel() for tensor in network),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in weights.stored.values()}),
        heads=heads_of(weights),
        backbones=names,
        command=f"glsim train --data DATA --out RUN --backbone {chosen} --init-from {shlex.quote(str(source))}",
        checked=checked,
        exit_code=0 if checked is None or checked.fits else 4,
    )
