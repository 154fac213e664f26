"""Types that every other file shares, and the legend of shapes. Nothing here imports torch when it runs.

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

from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


LONGEST, MOST = 2000, 50  # characters of a message or of a line of its details, and lines of details


class GlsimError(Exception):
    """Something a person can put right. The command line prints it without a traceback and exits with `exit_code`.

    `details` are lines shown below the message: what there is one of each, a file or a key. Both are bounded, for what
    is told may come from a file: of a longer message the middle is left out, of more lines the last.
    """

    exit_code = 1

    def __init__(self, *said: Any, details: Iterable[object] = ()) -> None:
        super().__init__(*(bounded(part) if isinstance(part, str) else part for part in said))
        lines = [bounded(str(line)) for line in details]
        left = len(lines) - MOST
        self.details = tuple(lines if left <= 0 else [*lines[:MOST], f".. and {left:,} more"])

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.details])


class ConfigError(GlsimError, ValueError):
    """A wrong option, name or combination of both."""

    exit_code = 2


class DataError(GlsimError, ValueError):
    """Missing, damaged or contradictory data."""

    exit_code = 3


class DataWarning(UserWarning):
    """What a person should know of their data, though the work goes on: on the command line a note, and in its JSON."""


def optional(beside: str | None = None) -> Any:
    """A field of a result that is None where it does not apply, and then is left out of its JSON document.

    A field whose None says something is left out where the field named `beside` is None.
    """
    return field(default=None, metadata={"optional": beside or True})


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


def bounded(text: str, length: int = LONGEST) -> str:
    """A text of at most `length` characters and a remark: of a longer one the middle is left out, and counted."""
    if len(text) <= length + 60:  # with the remark, which is not counted as something to leave out again
        return text
    head, tail = length * 3 // 4, length // 4
    return f"{text[:head]} .. ({len(text) - head - tail:,} characters left out) .. {text[-tail:]}"


def choose(name: Any, choices: Any, what: str) -> Any:
    """Return `choices[name]`, or raise a ConfigError that lists what there is."""
    if name not in choices:
        raise ConfigError(f"unknown {what} {name!r}; choose from: {', '.join(str(c) for c in sorted(choices))}")
    return choices[name]
