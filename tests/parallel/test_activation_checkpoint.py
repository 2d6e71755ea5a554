"""What selective recomputing keeps, by the operators that a device runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titan.models.linear import linear
from titan.parallel.activation_checkpoint import is_kept


class Seen(TorchDispatchMode):
    """Takes down every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_second_product_is_kept(dtype: torch.dtype) -> None:
    """Of the linear layers that a block has, whichever operator they are on this machine; and nothing else of them."""
    x, weight = torch.ones(2, 3, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype, requires_grad=True)
    with Seen() as seen:
        for _ in range(4):
            x = linear(x, weight)
    counts: dict[str, int] = {}
    assert [is_kept(operator, counts, "forward") for operator in seen.operators].count(True) == 2
    assert counts == {"forward": 4}
