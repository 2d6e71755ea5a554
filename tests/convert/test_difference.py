"""How far two tensors are apart, in all that floating point can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titan.convert.difference import distance

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.5], (0.5, 0.5 / 4.5, 1)),
        ([0.0, -0.0], [-0.0, 0.0], None),
        ([NAN, 2.0], [NAN, 2.0], None),
        ([NAN, 2.0], [NAN, 3.0], (1.0, 1 / 3, 1)),
        ([NAN, 2.0], [1.0, 2.0], (INF, INF, 1)),
        ([INF, 2.0], [INF, 1.0], (1.0, 0.5, 1)),
        ([INF, 2.0], [-INF, 2.0], (INF, INF, 1)),
        ([INF, 2.0], [1.0, 2.0], (INF, INF, 1)),
        ([0.0], [1e-300], (1e-300, 1.0, 1)),
        ([], [], None),
    ],
)
def test_the_distance(a: list[float], b: list[float], expected: tuple[float, float, int] | None) -> None:
    """The largest difference, its share of the largest finite number, and how many numbers differ."""
    found = distance("x", torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert (None if found is None else (found.absolute, found.relative, found.numbers)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_formats_are_compared_as_numbers(dtype: torch.dtype) -> None:
    """The same numbers in another format are not apart."""
    numbers = torch.arange(-100, 100)
    assert distance("x", numbers.to(dtype), numbers.float()) is None
    assert distance("x", numbers.to(dtype), numbers.to(dtype)) is None


def test_all_of_a_large_tensor_is_looked_at() -> None:
    """In pieces, also its last number, in any shape."""

    def planted(value: float) -> Tensor:
        numbers = torch.ones(321, 1001)
        numbers[-1, -1] = value
        return numbers

    assert distance("x", planted(1.0), planted(1.0)) is None
    found = distance("x", planted(1.0), planted(3.0).T.contiguous().T)
    assert found is not None
    assert (found.absolute, found.relative, found.numbers, found.of) == (2.0, 2 / 3, 1, 321 * 1001)
