"""Overlapping patches (TransFG), and sizes as (height, width)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor

from glsim.types import ConfigError


class OverlappingPatches(PatchEmbed):
    """Patch embedding whose patches start every `stride` pixels (TransFG, arXiv 2103.07976, section 3.2).

    `stride` in pixels, or as a share of the patch (0.75: the paper's 12 of 16). What is left at the right and bottom
    edges, less than a stride, is not seen, as published.
    """

    def __init__(self, *args: Any, stride: int | float, patch_size: int | tuple[int, int] = 16, **kwargs: Any) -> None:
        pair = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        step = [stride if isinstance(stride, int) else max(1, int(side * stride)) for side in pair]
        if not all(1 <= s <= side for s, side in zip(step, pair, strict=True)):
            raise ValueError(f"stride={stride} and patches of {by(pair)} pixels; give 1 to {min(pair)}")
        self.stride: tuple[int, int] = (step[0], step[1])
        super().__init__(*args, patch_size=patch_size, **kwargs)  # type: ignore[arg-type, misc]
        self.proj.stride = self.stride

    def _init_img_size(self, img_size: Any) -> Any:
        size = to_pair(img_size)
        rows, cols = self.dynamic_feat_size(size)
        return size, (rows, cols), rows * cols

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        """Pixels from one patch to the next."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches that fit into an image (H, W)."""
        rows, cols = ((s - p) // t + 1 for s, p, t in zip(img_size, self.patch_size, self.stride, strict=True))
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, N, D), or (B, rows, cols, D) where timm asks for it."""
        x = self.proj(x).permute(0, 2, 3, 1)
        return self.norm(x.flatten(1, 2) if self.flatten else x)


def to_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`224` or `(192, 256)` as (height, width); ConfigError for anything else."""
    sides: Sequence[Any] = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side is not True and side > 0 for side in sides):
        raise ConfigError(f"size {size!r}: give one side or [height, width], in whole pixels")
    return sides[0], sides[1]


def by(size: tuple[int, int]) -> str:
    """A size for messages, height first: "192x256"."""
    return f"{size[0]}x{size[1]}"
