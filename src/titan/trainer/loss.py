"""Cross-entropy with one denominator: the number of valid tokens in the whole global batch.

Dividing each micro-batch by its own count and averaging would give a token in a sparse micro-batch more weight than
one in a full one, and the result would depend on how the batch was cut. So the sum is divided by one number for all
ranks and micro-batches, *before* the backward pass, and every reduction of gradients is a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan.data.batch import IGNORED_LABEL


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
    # pinned: the driver may wait for the device before it copies from any other memory
    more = torch.tensor(account, dtype=torch.int64, pin_memory=count.is_cuda).to(count.device, non_blocking=True)
    counts = torch.cat((count, more))
    dist.all_reduce(counts, group=group)
    return counts
