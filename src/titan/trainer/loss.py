"""Cross-entropy with one denominator: the number of valid tokens in the whole global batch.

Dividing each micro-batch by its own count and averaging would give a token in a sparse micro-batch more weight than
one in a full one, and the result would depend on how the batch was cut. So the sum is divided by one number for all
ranks and micro-batches, *before* the backward pass, and every reduction of gradients is a sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan.data.batch import IGNORED_LABEL


def cross_entropy_share(logits: Tensor, labels: Tensor, valid_tokens: Tensor) -> Tensor:
    """Return these positions' share of the global batch's mean cross-entropy, in nats.

    Args:
        logits: Scores; the loss is computed in float32 whatever their dtype.
        labels: The tokens to predict; `IGNORED_LABEL` where a position does not count.
        valid_tokens: Positions that count in the whole global batch.

    Shape:
        logits: (B, S, V). labels: (B, S). valid_tokens: (). Returns (), float32.
    """
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
    )
    return total / valid_tokens


def count_valid_tokens(labels: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Return how many positions count in the global batch; at least 1. Shape: (), float32."""
    count = torch.stack([(part != IGNORED_LABEL).sum() for part in labels]).sum().float()
    dist.all_reduce(count, group=group)
    return count.clamp(min=1)
