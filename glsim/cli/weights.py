"""`glsim weights`: what a file of weights is, and which backbones can start from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import Lines, Settings, Size, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.checkpoints.examine import WeightsReport

PURPOSE = "Start"
CALL = "glsim.checkpoints.examine:examine_weights"


class Options(Settings):
    """Say what a file of weights is: whose names it has, sizes, heads, and the backbones that can start from it."""

    source: str = positional(
        "file of weights (.safetensors .pth .pt .bin .ckpt .npz), bundle or hf-hub:owner/name", path="reads"
    )
    backbone: str | None = setting(None, "timm model name: check whether it fits")
    image_size: Size = setting(None, "of that backbone, pixels, one side or [height,width]; default: its own")

    def check(self) -> None:
        """A size is that of a backbone."""
        if self.image_size is not None and self.backbone is None:
            raise ConfigError(f"image_size={self.image_size}: name the --backbone that it is for")


def show(r: WeightsReport, options: Options) -> Lines:
    """What it is, line by line; with a backbone, what becomes of every tensor."""
    heads = ", ".join(f"{name} {shape}" for name, shape in r.heads.items())
    yield f"{r.source}: {r.convention}" + (f", wrapped in {r.wrapped}" if r.wrapped else "")
    yield f"  network     {r.sizes}"
    yield f"  parameters  {r.parameters:,} in {r.tensors} tensors ({', '.join(r.dtypes)})"
    yield f"  heads       {heads or 'none'}"
    yield f"  backbones   {', '.join(r.backbones) or 'none of timm that is known to take it'}"
    yield f"  train       {r.command}"
    if r.checked is not None:
        found = r.checked.fit
        yield f"{r.checked.backbone}: " + ("fits" if r.checked.fits else "does not fit")
        yield from (f"  why         {why}" for why in found.unfit)
        yield from (f"  used        {key} -> {name}" for key, name in found.used.items())
        yield from (f"  resampled   {name}: {sizes}" for name, sizes in found.resampled.items())
        yield from (f"  ignored     {key}: {why}" for key, why in found.ignored.items())
        yield from (f"  missing     {name}" for name in found.missing)
