"""Cross-entropy with one denominator: the number of valid tokens in the whole global batch.

Dividing each micro-batch by its own count and averaging would give a token in a sparse micro-batch more weight than
one in a full one, and the result would depend on how the batch was cut. So the sum is divided by one number for all
ranks and micro-batches, *before* the backward pass, and every reduction of gradients is a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan.data.batch import IGNORED_LABEL

LossSum = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, V) or this rank's words of them, and labels (N,), in; the sum of cross-entropies out."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of cross-entropies over the positions that count, in nats. Shape: (N, V), (N,) -> ()."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED_LABEL)


def loss_share(logits: Tensor, labels: Tensor, valid_tokens: Tensor, loss_sum: LossSum = cross_entropy_sum) -> Tensor:
    """Return these positions' share of the global batch's mean cross-entropy, in nats.

    Args:
        logits: Scores; the loss is computed in float32 whatever their dtype.
        labels: The tokens to predict; `IGNORED_LABEL` where a position does not count.
        valid_tokens: Positions that count in the whole global batch.
        loss_sum: What adds up; another one where the logits are cut by words.

    Shape:
        logits: (B, S, V). labels: (B, S). valid_tokens: (). Returns (), float32.
    """
    return loss_sum(logits.flatten(0, -2), labels.flatten()) / valid_tokens


def count_valid_tokens(labels: list[Tensor], group: dist.ProcessGroup, account: Sequence[int] = ()) -> Tensor:
    """Return how many positions count in the global batch, and behind it more sums over the ranks.

    Args:
        labels: Of this rank's micro-batches.
        group: The ranks that see other tokens.
        account: What else to add up, modulo 2^64, in the same exchange.

    Shape:
        (1 + len(account),) int64.
    """
    count = torch.stack([(part != IGNORED_LABEL).sum() for part in labels]).sum(0, keepdim=True)
    more = torch.tensor(account, dtype=torch.int64).to(count.device, non_blocking=True)
    counts = torch.cat((count, more))
    dist.all_reduce(counts, group=group)
    return counts
