"""Patch scores: METRICS say how discriminative each patch is, a rule takes the best.

A metric is a function from `Features` to scores (B, g, N), higher is more discriminative; g is 1, or one score map per
head or block. `@metric(..)` puts it into `METRICS`, which gives it to every model, picture and table, and says what it
reads. Keyword parameters can be set where a metric is named: `attention:block=3`, `rollout:first=2,last=8`,
`random:seed=7`; blocks count from 0, or from -1 backwards.

Where there is no class token, its row and column of an attention matrix become the mean over all rows and columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glsim.types import ConfigError, Features, choose

EPS = 1e-8  # the shortest a token is taken to be
LARGEST_NUMBER = 2**31  # in a metric's name, so that `random` computes with its seed in 64 bits

Metric = Callable[..., Tensor]
Attention = Literal["attention_logits", "attention_maps"]  # fields of `Features`
METRICS: dict[str, Metric] = {}
TITLES: dict[str, str] = {}  # of metrics, in pictures
NEEDS_ATTENTION: set[str] = set()  # metrics that read the attention of the network
NEEDS_MAPS: set[str] = set()  # of these, those that find it in `Features.attention_maps`, after the softmax


def metric(title: str, reads: Attention | None = None) -> Callable[[Metric], Metric]:
    """Declare a function to be the metric of its name.

    Args:
        title: name in pictures.
        reads: the field of `Features` with the attention that it reads; None: tokens alone. Maps are what the
            network computes anyway, logits what it has before the softmax.
    """

    def declare(function: Metric) -> Metric:
        name = function.__name__
        METRICS[name], TITLES[name] = function, title
        if reads is not None:
            NEEDS_ATTENTION.add(name)
        if reads == "attention_maps":
            NEEDS_MAPS.add(name)
        return function

    return declare


@metric(title="GLS cos")
def gls_cos(f: Features) -> Tensor:
    """Global-local similarity: cosine of the class token with every patch token (arXiv 2407.12891). (B, 1, N)"""
    kind = f.cls.device.type
    mixed = kind != "meta"  # the counter's device, which has no autocast
    with torch.autocast(kind, enabled=False) if mixed else nullcontext():  # a product as exact as the tokens are
        lengths = torch.linalg.vector_norm(f.patches, dim=-1).clamp(min=EPS)
        one = F.normalize(f.cls.to(f.patches.dtype), dim=-1, eps=EPS)
        return one[:, None] @ f.patches.transpose(1, 2) / lengths[:, None]


@metric(title="GLS L1")
def gls_l1(f: Features) -> Tensor:
    """Global-local similarity by mean absolute difference, negated so that near is high. (B, 1, N)"""
    return -(f.cls[:, None] - f.patches).abs().mean(dim=-1)[:, None]


@metric(title="GLS L2")
def gls_l2(f: Features) -> Tensor:
    """Global-local similarity by mean squared difference, negated so that near is high. (B, 1, N)"""
    return -(f.cls[:, None] - f.patches).square().mean(dim=-1)[:, None]


@metric(title="GLS border")
def gls_border(f: Features) -> Tensor:
    """What the patch has more of the class token (cosine) than of the image's border: its mean patch. (B, 1, N)

    Photographs show their object inside and its surroundings at the border, with which the class token agrees too. A
    grid without an inside, below 3 patches a side, has the cosine alone.
    """
    if min(f.grid) < 3:
        return gls_cos(f)
    map_ = f.patches.unflatten(1, f.grid)
    border = torch.cat((map_[:, 0], map_[:, -1], map_[:, 1:-1, 0], map_[:, 1:-1, -1]), dim=1).mean(dim=1)
    return gls_cos(f) - gls_cos(f._replace(cls=border))


@metric(title="Attention", reads="attention_maps")
def attention(f: Features, block: int = -1) -> Tensor:
    """Attention of the class token to every patch in one block, mean over heads. (B, 1, N)"""
    (a,) = _blocks(f, block, block)
    return _class_row(f, a)[..., f.num_prefix :].mean(dim=1, keepdim=True)


@metric(title="Rollout", reads="attention_maps")
def rollout(f: Features, first: int = 0, last: int = -1) -> Tensor:
    """Attention rollout (arXiv 2005.00928): row 0 of A^last .. A^first, A = (mean over heads + I) / 2. (B, 1, N)

    Row form, v <- v A from the last block down: the same numbers as the matrix product at 1/n of its cost.

    Args:
        f: features with attention.
        first: block to begin with.
        last: block to end with, included.
    """
    if not f.num_prefix:
        return rams(f, first, last)
    *before, a = _blocks(f, first, last)
    row = _class_row(f, a)
    return _rollout(f, F.one_hot(row.new_zeros((), dtype=torch.long), row.shape[-1]), row, before)


@metric(title="PSM", reads="attention_maps")
def psm(f: Features, first: int = 0, last: int = -1) -> Tensor:
    """Part selection of TransFG (arXiv 2103.07976): row 0 of A^last .. A^first for each head, no identity. (B, h, N)

    All blocks of `f`; TransFG itself leaves the last one out and hands over features without it. Row form, as rollout,
    and arguments as there.
    """
    *before, a = _blocks(f, first, last)
    v = _class_row(f, a)[:, :, None]  # B h 1 n
    for a in reversed(before):
        v = v @ _softmax(f, a)
    return v[:, :, 0, f.num_prefix :]


@metric(title="MAWS", reads="attention_logits")
def maws(f: Features, block: int | None = None) -> Tensor:
    """Mutual attention (FFVT, arXiv 2107.02341): class token to patch times patch to class token. (B, L, N)

    One map a block, or that of `block` alone.
    """
    f = f._replace(attention_maps=None)
    chosen = _blocks(f, 0, -1) if block is None else _blocks(f, block, block)
    return torch.stack([mutual_attention(f, logits) for logits in chosen], dim=1)[..., f.num_prefix :]


def mutual_attention(f: Features, logits: Tensor) -> Tensor:
    """FFVT's weights of all n tokens in one block, from its `logits` (B, h, n, n): (B, n).

    Mean attention from the class token, times the mean softmax over queries of the logits towards it.
    """
    f = f._replace(attention_maps=None)
    taken = logits[..., 0].softmax(dim=-1) if f.num_prefix else logits.softmax(dim=-2).mean(dim=-1)
    return _class_row(f, logits).mean(dim=1) * taken.mean(dim=1)


@metric(title="SACM", reads="attention_maps")
def sacm(f: Features) -> Tensor:
    """Attention of the class token, mean over heads, blocks weighted (AF-Trans, arXiv 2110.01240). (B, 1, N)

    The weights are those that the model learned (`Features.layer_weights`); without any, blocks count alike.
    """
    rows = class_rows(f)  # B L N
    weights = rows.new_ones(rows.shape[:2]) if f.layer_weights is None else f.layer_weights
    return (weights[..., None] * rows).sum(dim=1, keepdim=True)


@metric(title="RAMS", reads="attention_maps")
def rams(f: Features, first: int = 0, last: int = -1) -> Tensor:
    """Rollout averaged over all query rows (RAMS-Trans, arXiv 2107.08192): mean attention to a patch. (B, 1, N)

    Arguments as of `rollout`.
    """
    *before, a = _blocks(f, first, last)
    return _rollout(f, 1 / a.shape[-1], _softmax(f, a).mean(dim=2), before)


def class_rows(f: Features) -> Tensor:
    """The class token's attention to every patch in every block, mean over heads. (B, L, N)"""
    return torch.stack([_class_row(f, a)[..., f.num_prefix :].mean(dim=1) for a in _blocks(f, 0, -1)], dim=1)


@metric(title="MHV", reads="attention_maps")
def mhv(f: Features, block: int | None = None, votes: int = 24) -> Tensor:
    """Multi-head voting (IELT): every head votes for its best patches, and votes are smoothed. (B, L, N)

    Smoothing adds the neighbours by [[1, 2, 1], [2, 4, 2], [1, 2, 1]], zero outside the grid.

    Args:
        f: features with attention.
        block: the one to take; None: one map a block.
        votes: patches that a head votes for.
    """
    chosen = _blocks(f, 0, -1) if block is None else _blocks(f, block, block)
    return torch.stack([_vote(_class_row(f, a)[..., f.num_prefix :], f.grid, votes) for a in chosen], dim=1)


def _vote(rows: Tensor, grid: tuple[int, int], votes: int) -> Tensor:
    """(B, h, N) -> (B, N)"""
    best = rows.topk(min(votes, rows.shape[-1]), dim=-1).indices
    counts = torch.zeros_like(rows).scatter(-1, best, 1.0).sum(dim=1)
    ramp = 2 - torch.arange(-1, 2, device=rows.device, dtype=rows.dtype).abs()
    kernel = torch.outer(ramp, ramp)[None, None]
    return F.conv2d(counts.unflatten(-1, grid)[:, None], kernel, padding=1).flatten(1)


@metric(title="Random")
def random(f: Features, seed: int = 0) -> Tensor:
    """Uniform in [0, 1) over the whole grid: the control that every mechanism has to beat. (B, 1, N)

    The draw follows from `seed` and the image (which channels of its mean patch exceed their average), so that an image
    gets the same one in any batch, up to rounding, and another image another one. No generator is touched.
    """
    patch_mean = f.patches.mean(dim=1)
    signs = (patch_mean > patch_mean.mean(dim=1, keepdim=True)).long()
    code = scramble(torch.arange(signs.shape[1], device=signs.device) + (seed + 1) * 1_000_003)
    key = scramble((signs * code).sum(dim=1, keepdim=True) & MASK)
    patch = torch.arange(f.patches.shape[1], device=signs.device)
    return (scramble(key + scramble(patch + 7_919 * (seed + 1)) & MASK).float() / 2**32).clamp(max=1 - 1e-7)[:, None]


MASK = 0xFFFFFFFF


def scramble(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit numbers held in int64 (the multiply-xorshift mixing of MurmurHash's finaliser)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x6C078965)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


def find_metric(spec: str) -> partial[Tensor]:
    """The metric that `spec` names, its parameters set: "psm", "attention:block=3", "rollout:first=2,last=8".

    Raises ConfigError for an unknown name or parameter, listing the choices.
    """
    name, _, given = spec.partition(":")
    function = choose(name, METRICS, "metric")
    if not given:  # at every forward: reading a signature takes longer than the score of a small image
        return partial(function)
    known = [p.name for p in list(inspect.signature(function).parameters.values())[1:]]
    values: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        try:
            values[key.strip()] = int(value)
        except ValueError:
            raise ConfigError(f"metric {spec!r}: write {name}:name=number, numbers whole") from None
    wrong = sorted(set(values) - set(known))
    if wrong:
        raise ConfigError(f"metric {name!r} has no {', '.join(wrong)}; it has: {', '.join(known) or 'no parameters'}")
    if max(map(abs, values.values()), default=0) >= LARGEST_NUMBER:
        raise ConfigError(f"metric {spec!r}: numbers below {LARGEST_NUMBER} are needed")
    return partial(function, **values)


@torch.no_grad()
def score(spec: str, f: Features) -> Tensor:
    """Scores (B, g, N) of the metric that `spec` names. They choose: no gradient, no attention maps kept for one."""
    return find_metric(spec)(f)


def needs_attention(spec: str) -> bool | Literal["maps"]:
    """What the metric reads of the attention, as `Backbone.forward` takes it: nothing, the logits (True), or maps."""
    name = spec.partition(":")[0]
    return "maps" if name in NEEDS_MAPS else name in NEEDS_ATTENTION


def check_metric(spec: str, has_attention: bool, depth: int | None = None) -> None:
    """Refuse a metric that a backbone cannot serve.

    Args:
        spec: its name, with parameters.
        has_attention: whether the backbone has attention that metrics can read.
        depth: blocks the metric will see, where a method shows it fewer than all.

    Raises:
        ConfigError: for an unknown metric, and one that reads attention or blocks that are not there.
    """
    given = find_metric(spec).keywords
    if needs_attention(spec) and not has_attention:
        rest = ", ".join(sorted(set(METRICS) - NEEDS_ATTENTION))
        raise ConfigError(f"metric {spec!r} reads attention maps, which this backbone has none of; choose from: {rest}")
    for key in ("block", "first", "last"):
        if depth is not None and given.get(key) is not None and not -depth <= given[key] < depth:
            raise ConfigError(f"metric {spec!r}: {key} must lie between {-depth} and {depth - 1} here")
    if given.get("votes", 1) < 1:
        raise ConfigError(f"metric {spec!r}: votes must be 1 or more")


def count_top(k: int | float, patches: int) -> int:
    """How many patches `k` means: so many, or, below 1, that share of all `patches`, one at least."""
    return max(1, round(k * patches)) if 0 < k < 1 else int(k)


def check_top(k: int | float, grid: tuple[int, int], what: str, shares: bool = False) -> None:
    """Refuse a number of patches that cannot be picked.

    Args:
        k: the number.
        grid: rows and columns of the backbone.
        what: the option's name, for the message.
        shares: a share of all patches, between 0 and 1, may be given too.

    Raises:
        ConfigError: unless 1 <= k <= N, whole, or such a share.
    """
    patches = grid[0] * grid[1]
    if shares and isinstance(k, float) and 0 < k < 1:
        return
    if not isinstance(k, int) or not 1 <= k <= patches:
        or_share = ", or a share of them below 1" if shares else ""
        raise ConfigError(
            f"{what}={k}, but the grid of the backbone has {patches} patches; choose 1 to {patches}{or_share}"
        )


def pick(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Average the groups of `scores` (B, g, N): the mean (B, N), and the indices (B, k) of the k best, best first.

    Raises ConfigError when there are fewer than k patches.
    """
    scores = scores.mean(dim=1)
    if not 1 <= k <= scores.shape[-1]:
        raise ConfigError(f"cannot pick {k} patches of {scores.shape[-1]}; top_o must lie between 1 and that")
    return scores, scores.topk(k, dim=-1).indices


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Take the tokens `index` (B, K) out of `tokens` (B, n, D): (B, K, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def above_mean(scores: Tensor, factor: float) -> Tensor:
    """Which of `scores` (B, N) exceed `factor` times their mean (RAMS-Trans, factor 1.2): bool (B, N).

    Written with the mean's magnitude, so that it means the same for scores below zero. Where none does, all are kept.
    """
    mean = scores.mean(dim=-1, keepdim=True)
    mask = scores > mean + (factor - 1) * mean.abs()
    return mask | ~mask.any(dim=-1, keepdim=True)


def largest_component(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The largest 8-connected group of patches in `mask` (B, N), bool; of two equal ones, the one further down.

    Every patch passes the largest number it has met to its neighbours, as often as the longest way through the grid
    has steps: no loop over the batch, no wait for the device.
    """
    rows, cols = grid
    number = torch.arange(1, rows * cols + 1, device=mask.device, dtype=torch.float32)
    inside = mask.float().view(-1, 1, rows, cols)
    label = number.view(1, 1, rows, cols) * inside
    for _ in range((rows * cols + rows + cols) // 2):
        label = F.max_pool2d(label, 3, stride=1, padding=1) * inside
    names = label.flatten(1).long()  # B N, 0 outside
    cells = rows * cols + 1
    sizes = torch.zeros(mask.shape[0], cells, dtype=torch.long, device=mask.device).scatter_add(1, names, mask.long())
    best = (sizes * cells + torch.arange(cells, device=mask.device) * (sizes > 0)).argmax(dim=1)
    return mask & (names == best[:, None])


def _blocks(f: Features, first: int, last: int) -> tuple[Tensor, ...]:
    """Maps (else logits) of blocks `first`..`last`, both included; negative numbers count from the end."""
    held = f.attention_maps if f.attention_maps is not None else f.attention_logits
    if held is None:
        raise ConfigError("the features hold no attention logits; encode with attention=True")
    depth = len(held)
    start, end = (b + depth if b < 0 else b for b in (first, last))
    if not 0 <= start <= end < depth:
        which = f"is no block {first}" if first == last else f"are no blocks {first} to {last}"
        raise ConfigError(f"there {which}: the features hold {depth}, 0 to {depth - 1}")
    return held[start : end + 1]


def _softmax(f: Features, a: Tensor) -> Tensor:
    """What `_blocks` gave, whole matrices or rows of them, after the softmax."""
    return a if f.attention_maps is not None else a.softmax(dim=-1)


def _class_row(f: Features, a: Tensor) -> Tensor:
    """What the class token gives to all tokens in a block's maps or logits `a` (B, h, n, n): (B, h, n)."""
    return _softmax(f, a[:, :, 0]) if f.num_prefix else _softmax(f, a).mean(dim=2)


def _rollout(f: Features, start: Tensor | float, row: Tensor, before: list[Tensor]) -> Tensor:
    """Rows of A sum to one, so normalising A + I by row is halving it.

    `row` (B, h, n) is what the last block makes of the row vector `start`; `before` holds the blocks before it.
    """
    v = (start + row.mean(dim=1))[:, None, None] / 2  # B 1 1 n
    for a in reversed(before):
        v = (v + (v @ _softmax(f, a)).mean(dim=1, keepdim=True)) / 2
    return v[:, :, 0, f.num_prefix :]
