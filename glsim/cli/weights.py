"""`glsim weights`: what a file of weights is, and which backbones can start from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import MISSING, Settings, Size, dataclass, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.checkpoints.examine import WeightsReport

PURPOSE = "Start"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Say what a file of weights is: whose names it has, sizes, heads, and the backbones that can start from it."""

    source: str = positional(
        MISSING, "file of weights (.safetensors .pth .pt .bin .ckpt .npz), bundle or hf-hub:owner/name", path="reads"
    )
    backbone: str | None = setting(None, "timm model name: check whether it fits")
    image_size: Size = setting(None, "of that backbone, pixels, one side or [height,width]; default: its own")

    def check(self) -> None:
        """A size is that of a backbone."""
        if self.image_size is not None and self.backbone is None:
            raise ConfigError(f"image_size={self.image_size}: name the --backbone that it is for")


def run(options: Options, progress: bool) -> WeightsReport:
    """Look at it."""
    from glsim.checkpoints.examine import examine_weights

    return examine_weights(**vars(options))


def show(r: WeightsReport, options: Options) -> str:
    """What it is, line by line; with a backbone, what becomes of every tensor."""
    heads = ", ".join(f"{name} {shape}" for name, shape in r.heads.items())
    lines = [
        f"{r.source}: {r.convention}" + (f", wrapped in {r.wrapped}" if r.wrapped else ""),
        f"  network     {r.sizes}",
        f"  parameters  {r.parameters:,} in {r.tensors} tensors ({', '.join(r.dtypes)})",
        f"  heads       {heads or 'none'}",
        f"  backbones   {', '.join(r.backbones) or 'none of timm that is known to take it'}",
        f"  train       {r.command}",
    ]
    if r.checked is not None:
        found = r.checked.fit
        lines.append(f"{r.checked.backbone}: " + ("fits" if r.checked.fits else "does not fit"))
        lines += [f"  why         {why}" for why in found.unfit]
        lines += [f"  used        {key} -> {name}" for key, name in found.used.items()]
        lines += [f"  resampled   {name}: {sizes}" for name, sizes in found.resampled.items()]
        lines += [f"  ignored     {key}: {why}" for key, why in found.ignored.items()]
        lines += [f"  missing     {name}" for name in found.missing]
    return "\n".join(lines)
