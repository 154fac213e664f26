"""Attention logits made visible, and attention between two images: context managers that always undo.

Every block of a timm transformer calls `F.scaled_dot_product_attention`; `replaced_attention` answers that call with
another function. So no network is forked, whatever its family, and the fused kernels are back when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


class _Replaced(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._call(*args, **(kwargs or {}))

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
    ) -> Tensor:
        return self.attend(q, k, v, attn_mask, dropout_p)


@contextmanager
def replaced_attention(net: nn.Module, attend: Attend) -> Iterator[None]:
    """Inside, every attention of `net` is `attend(q, k, v, mask, dropout)`, q, k and v (B, h, n, d).

    The switches of `net` that are turned are put back afterwards, also after an exception.
    """
    # Only the fused path calls the function that is replaced; and a block that gradient checkpointing computes once
    # more in the backward pass would no longer find the replacement.
    turned = {"fused_attn": True, "grad_checkpointing": False}
    switches: list[Any] = [(m, k, getattr(m, k)) for m in net.modules() for k in turned if hasattr(m, k)]
    for module, name, _ in switches:
        setattr(module, name, turned[name])
    try:
        with _Replaced(attend):
            yield
    finally:
        for module, name, before in switches:
            setattr(module, name, before)


@contextmanager
def explicit_attention(net: nn.Module, maps: bool = False) -> Iterator[list[Tensor]]:
    """Collect the attention logits (B, h, n, n) of every block of `net` that runs inside, first block first.

    With `maps` what the softmax makes of them instead, which the backward pass keeps anyway. The outputs stay timm's
    own: the same attention, computed in three steps.
    """
    collected: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:  # BEiT's relative position bias; the other families pass none
            logits = logits + mask
        weights = logits.softmax(dim=-1)
        collected.append(weights if maps else logits)
        return F.dropout(weights, dropout) @ v

    with replaced_attention(net, attend):
        yield collected


@contextmanager
def paired_attention(net: nn.Module) -> Iterator[None]:
    """Inside, every image of a batch also attends to the tokens of the one before it (DCAL, arXiv 2205.02151, eq. 6).

    Queries stay an image's own; keys and values are its own and its partner's, one softmax over both.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        k, v = (torch.cat((x, x.roll(1, dims=0)), dim=2) for x in (k, v))
        mask = None if mask is None else torch.cat((mask, mask), dim=-1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    with replaced_attention(net, attend):
        yield
