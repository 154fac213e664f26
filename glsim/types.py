"""Floor 0: the names every other file shares. Nothing here imports torch when it runs: the command line stays quick.

Shape legend, used in every docstring:

| letter     | meaning                                                                       |
|------------|-------------------------------------------------------------------------------|
| B          | images in the batch                                                           |
| H, W       | image height and width in pixels (crops: height and width)                    |
| rows, cols | the patch grid; patch i stands in row i // cols, column i % cols              |
| N          | patches, rows * cols                                                          |
| n          | tokens, N + prefix (class token, distillation token, registers: 0, 1, 2, 5..) |
| D          | width of a token                                                              |
| L          | transformer blocks                                                            |
| h          | attention heads (in `attention_logits` and `attention_maps`)                  |
| g          | groups of scores a metric returns (1, one per head, or one per block)         |
| K          | selected patches, `top_o` for GLSim                                           |
| C          | classes                                                                       |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class GlsimError(Exception):
    """Something a person can put right. The command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(GlsimError, ValueError):
    """A wrong option, name or combination of both."""

    exit_code = 2


class DataError(GlsimError, ValueError):
    """Missing, damaged or contradictory data."""

    exit_code = 3


class DataWarning(UserWarning):
    """What a reader of data left out or put together, in one sentence. The command line shows it as one line."""


EMBEDDINGS = {
    "global": "class token of the first pass (pooled vector where there is none)",
    "crop": "the same of the crop",
    "fused": "what the head reads where that is more than one of them",
}


class Features(NamedTuple):
    """What a backbone says of a batch of images, after its final normalisation."""

    cls: Tensor  # (B, D) class token, or the pooled vector where the backbone has none
    patches: Tensor  # (B, N, D) row by row
    grid: tuple[int, int]  # (rows, cols)
    num_prefix: int  # tokens before the first patch in `attention_logits`, the first a class token; 0 without one
    attention_logits: tuple[Tensor, ...] | None = None  # L tensors (B, h, n, n), before the softmax; rows are queries
    layer_weights: Tensor | None = None  # (B, L) how much each block's attention counts, where a model learns that
    attention_maps: tuple[Tensor, ...] | None = None  # after the softmax: in place of the logits, where asked for


class Selection(NamedTuple):
    """Which patches were chosen, and the box around them."""

    scores: Tensor  # (B, N), higher is more discriminative
    indices: Tensor  # (B, K), best first; -1 where a rule that chooses freely many took fewer than K
    boxes: Tensor  # (B, 4) int64 pixels: left, top, right, bottom; right and bottom are exclusive
    grid: tuple[int, int]  # (rows, cols)


class Output(NamedTuple):
    """What every model returns, whatever its method."""

    logits: Tensor  # (B, C)
    selection: Selection | None = None
    crops: Tensor | None = None  # (B, 3, height, width), what the second pass saw
    aux: dict[
        str, Any
    ] = {}  # training: inputs of the method's own losses; else `embeddings` (EMBEDDINGS), `unsure` (B,)


def choose(name: Any, choices: Any, what: str) -> Any:
    """Return `choices[name]`, or raise a ConfigError that lists what there is."""
    if name not in choices:
        raise ConfigError(f"unknown {what} {name!r}; choose from: {', '.join(str(c) for c in sorted(choices))}")
    return choices[name]
