"""Heads: aggregators of tokens, classifiers, and the lead of the best class."""

from __future__ import annotations

from collections.abc import Callable, Collection

from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glsim.types import ConfigError, choose

STARTS = ("published", "identity")  # of an aggregator
NO_ANSWER = "the model's answer is no number: its weights or its arithmetic overflow"


class Aggregator(nn.Module):
    """Transformer blocks and a LayerNorm over the class tokens of image and crop (arXiv 2407.12891): (B, 2, D) -> same.

    Pre-norm, D/64 heads, MLP ratio 4, no position embedding: the two tokens are told apart by what they hold. Without
    any block, a control, both tokens become their mean.

    `start` "published" is that. "identity" hands the tokens on as they come, exactly, until it is trained: the residual
    branches end at zero, and no norm follows, for the tokens have been through the backbone's own. (A fresh LayerNorm
    brings them to unit scale, a third of DINOv2's; with the backbone's weight and bias it would apply those twice.)
    None: "published", until the model hears of weights that know no aggregator.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        start: str | None = "published",
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(dim, count_heads(dim), qkv_bias=True, proj_drop=dropout, drop_path=drop_path) for _ in range(depth))
        )
        self.norm: nn.Module = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
        if start is not None and start not in STARTS:
            raise ConfigError(f"aggregator_start={start!r}: {' or '.join(STARTS)} is needed, or null")
        self.start = start
        if start == "identity":
            self.become_identity({name for name, _ in self.named_parameters()})

    def become_identity(self, fresh: Collection[str]) -> None:
        """Start as the identity, but for blocks that have learnt something; `fresh` names the weights that have not."""
        for name, weight in self.named_parameters():
            if name in fresh and name.split(".")[2:-1] in (["attn", "proj"], ["mlp", "fc2"]):
                nn.init.zeros_(weight)
        self.norm, self.start = nn.Identity(), "identity"

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 2, D) -> (B, 2, D)."""
        mixed = self.blocks(tokens) if self.blocks else tokens.mean(dim=1, keepdim=True).expand_as(tokens)
        return self.norm(mixed)


def read_first(tokens: Tensor, head: nn.Module) -> Tensor:
    """Logits (B, C) of the image's token, which has seen the crop's in the aggregator."""
    return head(tokens[:, 0])


def read_mean(tokens: Tensor, head: nn.Module) -> Tensor:
    """Mean of both tokens' logits (B, C)."""
    return head(tokens).mean(dim=1)


def read_max(tokens: Tensor, head: nn.Module) -> Tensor:
    """Largest of both tokens' logits (B, C), class by class."""
    return head(tokens).amax(dim=1)


# How the head reads the aggregated tokens (B, 2, D); the published names.
CLASSIFIERS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "cls": read_first,
    "avg_cls": read_mean,
    "max_cls": read_max,
}


class Classifier(nn.Module):
    """A linear layer that starts at zero, and one of the three published ways to read the tokens with it."""

    def __init__(self, dim: int, num_classes: int, kind: str = "cls") -> None:
        super().__init__()
        self.read = choose(kind, CLASSIFIERS, "classifier")
        self.linear = zero_linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 2, D) -> logits (B, C)."""
        return self.read(tokens, self.linear)


def zero_linear(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer initialised to zero, so that training starts from even odds."""
    linear = nn.Linear(dim, num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def top2_margin(logits: Tensor) -> Tensor:
    """How far the best class is ahead of the second one in probability (B,), of logits (B, C); 1 for a single class."""
    best = logits.float().softmax(dim=1).topk(min(2, logits.shape[1])).values
    return best[:, 0] - best[:, 1:].sum(dim=1)


def are_answers(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of which images the logits (images, C) are numbers that a softmax can take: bool (images,)."""
    return (logits.float() / temperature).isfinite().all(dim=1)


class LayerWeights(nn.Module):
    """Squeeze and excitation over blocks (AF-Trans, arXiv 2110.01240): which block's attention counts how much.

    Squeeze: the share of its attention that the class token gives to patches, block by block; excitation: two linear
    layers with GELU between (the usual ReLU dies where shares hardly differ) and a sigmoid after.
    """

    def __init__(self, depth: int, reduction: int = 2) -> None:
        super().__init__()
        hidden = max(1, depth // reduction)
        self.excite = nn.Sequential(nn.Linear(depth, hidden), nn.GELU(), nn.Linear(hidden, depth), nn.Sigmoid())

    def forward(self, rows: Tensor) -> Tensor:
        """Class-token attention of all blocks (B, L, N) -> weights in (0, 1) (B, L)."""
        return self.excite(rows.sum(dim=-1))


class CrossBlock(nn.Module):
    """A pre-norm transformer block whose queries are a few of the tokens, and a LayerNorm (DCAL, eq. 3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, count_heads(dim), batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, K, D) ask tokens (B, n, D): (B, K, D)."""
        given = self.norm1(tokens)
        x = queries + self.attn(self.norm1(queries), given, given, need_weights=False)[0]
        return self.norm(x + self.mlp(self.norm2(x)))


def count_heads(dim: int) -> int:
    """One attention head for every 64 of `dim`, or the next fewer that divide it."""
    return next(h for h in range(max(1, dim // 64), 0, -1) if dim % h == 0)
