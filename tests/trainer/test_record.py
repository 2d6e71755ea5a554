"""How far apart two records are: a number that is none is never hidden behind one that is."""

from __future__ import annotations

import math

import pytest
import torch

from titan.trainer.record import Record, apart, compare_records, tensors_apart


def record(**changed: object) -> Record:
    """Return a record of two steps and two parameters."""
    weights = {"a": torch.ones(3), "b": torch.ones(3)}
    given = {"losses": [2.0, 1.0], "grad_norms": [1.0, 1.0], "gradients": weights, "weights": weights} | changed
    return Record(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_what_is_no_number_is_infinitely_far(bad: float, at: int) -> None:
    """Wherever it stands, in losses, norms, gradients or weights, and on either side."""
    numbers = [1.0, 1.0]
    numbers[at] = bad
    assert compare_records(record(losses=numbers), record()).loss == math.inf
    assert compare_records(record(), record(grad_norms=numbers)).grad_norm == math.inf
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    tensors["ab"[at]][1] = bad
    found = compare_records(record(gradients=tensors, weights=tensors), record())
    assert (found.gradient, found.gradient_of, found.weight, found.weight_of) == (math.inf, "ab"[at]) * 2


def test_distances() -> None:
    """Relative to the reference; 0 for what is equal, and for nothing else."""
    assert apart(1.1, 1.0) == pytest.approx(0.1)
    assert tensors_apart(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) == pytest.approx(0.02, rel=1e-5)
    assert tensors_apart(torch.zeros(2), torch.zeros(2)) == 0.0
    assert tensors_apart(torch.tensor([1e-30]), torch.tensor([0.0])) > 0.0
    assert compare_records(record(), record()).weight == 0.0


def test_records_of_other_lengths_are_refused() -> None:
    """Fewer steps are no agreement."""
    with pytest.raises(ValueError, match="1 losses beside 2"):
        compare_records(record(losses=[2.0]), record())
