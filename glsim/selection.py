"""Floor 1: which patches matter. A metric scores every patch; `pick` takes the best.

A metric is a function from `Features` to scores (B, g, N), higher is more discriminative; g is 1, or one score map per
head or block. Adding one to `METRICS` gives it to every model, picture and table. Those that read
`Features.attention_logits` also stand in `NEEDS_ATTENTION`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from glsim.types import ConfigError, Features


def gls_cos(f: Features) -> Tensor:
    """Global-local similarity: cosine of the class token with every patch token (arXiv 2407.12891). (B, 1, N)"""
    return F.cosine_similarity(f.cls[:, None], f.patches, dim=-1)[:, None]


def gls_l1(f: Features) -> Tensor:
    """Global-local similarity by mean absolute difference, negated so that near is high. (B, 1, N)"""
    return -(f.cls[:, None] - f.patches).abs().mean(dim=-1)[:, None]


def gls_l2(f: Features) -> Tensor:
    """Global-local similarity by mean squared difference, negated so that near is high. (B, 1, N)"""
    return -(f.cls[:, None] - f.patches).square().mean(dim=-1)[:, None]


def attention(f: Features) -> Tensor:
    """Attention of the class token to every patch in the last block, mean over heads. (B, 1, N)

    A backbone without a class token has no such row: there it is the mean over all query rows.
    """
    if f.attention_logits is None:
        raise ConfigError("the features hold no attention logits; encode with attention=True")
    probabilities = f.attention_logits[-1].softmax(dim=-1).mean(dim=1)  # B n n
    row = probabilities[:, 0] if f.num_prefix else probabilities.mean(dim=1)
    return row[:, None, f.num_prefix :]


METRICS: dict[str, Callable[[Features], Tensor]] = {
    "gls_cos": gls_cos,
    "gls_l1": gls_l1,
    "gls_l2": gls_l2,
    "attention": attention,
}
NEEDS_ATTENTION = {"attention"}


def pick(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Average the groups of `scores` (B, g, N): the mean (B, N), and the indices (B, k) of the k best, best first.

    Raises ConfigError when there are fewer than k patches.
    """
    scores = scores.mean(dim=1)
    if not 1 <= k <= scores.shape[-1]:
        raise ConfigError(f"cannot pick {k} patches of {scores.shape[-1]}; top_o must lie between 1 and that")
    return scores, scores.topk(k, dim=-1).indices
