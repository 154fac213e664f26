"""Floor 1: what training minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glsim.types import Output


def objective(output: Output, labels: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Cross-entropy of the logits (B, C) against `labels` (B,), with label smoothing (arXiv 1512.00567): a scalar."""
    return F.cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
