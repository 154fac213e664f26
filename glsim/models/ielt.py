"""IELT (Xu et al.: Fine-Grained Visual Classification via Internal Ensemble Learning Transformer, IEEE TMM 2023)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glsim.models.attention import explicit_attention
from glsim.models.backbone import Backbone
from glsim.models.base import TokenModel
from glsim.models.boxes import select_these
from glsim.models.heads import count_heads, zero_linear
from glsim.models.published import VIT_ASKS, VIT_AUTHORS, File, Published, vit_sizes
from glsim.models.scores import check_metric, gather_tokens, needs_attention, score
from glsim.types import ConfigError, Output

TITLE = "IELT"
NEEDS = ("class_token", "last_block")
EMBEDDINGS = ("fused",)
DRIFT = 0.001  # how fast a block's share of the tokens follows what the refinement keeps


class IELT(TokenModel):
    """Heads vote for patches in every block; the winners are refined together, vote again, and meet the last block.

    Blocks whose tokens survive the second vote are given more of them (dynamic selection). The published code also adds
    a little of the assisting answer to the main one (`assisted`); by default it only trains.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Linear, metric: str, shares: Tensor, votes: int, ballot: int, assisted: bool
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.metric, self.votes = backbone, head, metric, votes
        self.tokens, self.ballot, self.assisted = int(shares.sum().round()), ballot, assisted
        self.refine, self.norm = another_block(backbone), nn.LayerNorm(backbone.dim, eps=1e-6)
        self.register_buffer("shares", shares / shares.sum())
        self.shares: Tensor

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        stages = self.backbone.stages(images, needs_attention(self.metric))
        f = [stage.features for stage in stages]
        skip, grid = self.backbone.skip, f[0].grid
        scores = torch.stack([score(self.metric, x).mean(dim=1) for x in f], dim=1)  # B L-1 N

        block, rank = self.allot()  # T each
        rank = rank % scores.shape[-1]  # of a block that may give more than it has, the best ones again
        patches = scores.argsort(dim=-1, descending=True, stable=True)[:, block, rank]  # B T
        batch = torch.arange(images.shape[0], device=images.device)[:, None]
        chosen = torch.stack([x.patches for x in f], dim=1)[batch, block, patches]  # B T D

        with explicit_attention(self.refine) as logits:
            refined = self.norm(self.refine(torch.cat((stages[-1].tokens[:, :skip], chosen), dim=1)))
        kept = self.vote(logits[0][:, :, 0, skip:])  # B K
        places = patches.gather(1, kept)
        parts = gather_tokens(refined[:, skip:], kept)
        cls = self.backbone.last_block(stages[-1].tokens, parts, places + skip, grid)[:, 0]

        answer, assist = self.head(cls), self.head(refined[:, 0])
        if self.assisted:
            answer = answer + assist.softmax(dim=-1) * self.head.weight.sum(dim=-1)
        losses: dict[str, Any] = {}
        if self.training:
            losses = {"cross_entropy": ((0.6, answer), (0.4, assist))}
            self.shares.lerp_(F.one_hot(block[kept], len(f)).float().mean(dim=(0, 1)), DRIFT)
        selection = select_these(scores.mean(dim=1), places, grid, images.shape[-2:])
        return Output(answer, selection, aux=losses, embeddings={"fused": cls})

    def allot(self) -> tuple[Tensor, Tensor]:
        """For each of the T tokens the block it comes from, and its rank there: (T,), (T,)."""
        ends = (self.shares.cumsum(0) / self.shares.sum() * self.tokens).round()
        slots = torch.arange(self.tokens, device=ends.device)
        block = (ends <= slots[:, None]).sum(dim=1).clamp(max=len(ends) - 1)
        return block, slots - F.pad(ends, (1, 0))[block].long()

    def vote(self, rows: Tensor) -> Tensor:
        """Every head votes for its best of T tokens (B, h, T); the indices (B, K) with most votes.

        Equal counts are decided by the mean attention, which is less than a vote.
        """
        rows = rows.float()  # counts and attention together need more than half precision
        best = rows.topk(self.ballot, dim=-1).indices
        counts = torch.zeros_like(rows).scatter(-1, best, 1.0).sum(dim=1)
        return (counts + rows.softmax(dim=-1).mean(dim=1)).topk(self.votes, dim=-1).indices


def another_block(backbone: Backbone) -> Block:
    """A transformer block as wide as those of `backbone`, with their heads and MLP where they are ViT's own."""
    last: Any = backbone.net.blocks[-1]
    heads, ratio = count_heads(backbone.dim), 4.0
    if type(last) is Block:
        own: Any = last.get_submodule("attn"), last.get_submodule("mlp.fc1")
        heads, ratio = own[0].num_heads, own[1].out_features / backbone.dim
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return Block(backbone.dim, heads, ratio, qkv_bias=True, norm_layer=norm)


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    metric: str = "mhv:block=-1",
    tokens: Any = 126,
    votes: int = 24,
    ballot: int | None = None,
    assisted: bool = False,
) -> IELT:
    """IELT (IEEE TMM 2023) on `encoder`.

    Args:
        encoder: a backbone with a class token and a last block that takes some of the tokens.
        num_classes: C.
        metric: what scores the patches, read off every block in turn (the paper: votes of the heads).
        tokens: of all blocks, which are refined (the paper: 126 at 448 pixels); or of each block but the last, a list.
        votes: of these, which are kept (24).
        ballot: of these, for which a head votes in the refinement; None: as many as are kept.
        assisted: add the assisting answer, a probability of each class times the sum of the head's weights for it, as
            the authors' code does.

    Raises:
        ConfigError: for a metric that the encoder cannot serve, or more tokens than patches.
    """
    check_metric(metric, encoder.has_attention, 1)
    blocks, patches = encoder.depth - 1, encoder.grid[0] * encoder.grid[1]
    each = tokens if isinstance(tokens, list | tuple) else None
    total = tokens if each is None else sum(each) if all(type(count) is int and count >= 0 for count in each) else 0
    if type(total) is not int or (each is not None and len(each) != blocks):
        raise ConfigError(f"tokens={tokens!r}: a whole number is needed, or a list of {blocks}, one for each block")
    ballot = votes if ballot is None else ballot
    if not (1 <= votes <= total <= blocks * patches and 1 <= ballot <= total):
        raise ConfigError(
            f"tokens={total}, votes={votes}: 1 <= votes <= tokens <= {blocks * patches} patches is needed, "
            f"and a ballot ({ballot}) of 1 to {total}"
        )
    if each is None:
        start = 6 + 10 * torch.linspace(-1, 1, blocks).abs()  # 16 14 12 10 8 6 8 .. 16 for ViT-B: 126 in all
        shares = start / start.sum() * total
    else:
        shares = torch.tensor(each, dtype=torch.float)
    return IELT(encoder, zero_linear(encoder.dim, num_classes), metric, shares, votes, ballot, assisted)


def published_sizes(file: File) -> dict[str, Any]:
    """What shapes tell, with the assisting answer; a head's ballot is the same in all blocks, 24 as published."""
    ballot = file.given.pop("ballot", 24)
    sizes = {"metric": f"mhv:block=-1,votes={ballot}", "ballot": ballot, "assisted": True}
    return vit_sizes(file) | sizes


PUBLISHED = Published(
    "IELT",
    (
        (r"^encoder\.(?:clr_encoder\.)?clr_layer\.", "refine."),
        (r"^encoder\.clr_encoder\.clr_norm\.", "norm."),
        (r"^encoder\.key_layer\.", "blocks.last."),
        (r"^encoder\.key_norm\.", "backbone.net.norm."),
        *VIT_AUTHORS,
    ),
    published_sizes,
    VIT_ASKS
    | {
        "tokens": "patches taken of each block, a list, which training moves (by default 126 as at the start)",
        "votes": "patches that are kept of them (by default 24)",
        "ballot": "patches that each head votes for (by default 24)",
    },
    made=("shares",),
)
