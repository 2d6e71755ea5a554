"""Copies of a state: what was copied is what was there, however soon it changes after."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from titan.checkpoint.staging import Copies


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("is_kept", [False, True])
def test_what_changes_after_the_wait_is_not_copied(device: str, is_kept: bool) -> None:
    """Copies started in the background hold the state of the moment, though the update comes right after the wait."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    copies = Copies(is_kept)
    state = {"a": torch.zeros(1 << 22, device=device), "b": torch.zeros(3, dtype=torch.int64, device=device)}
    with ThreadPoolExecutor(1) as executor:
        for turn in range(1, 6):
            for tensor in state.values():
                tensor.fill_(turn)
            finished = copies.start(state, executor)
            copies.wait()
            for tensor in state.values():
                tensor.fill_(-1)
            found = finished()
            for name, tensor in found.items():
                assert not tensor.is_cuda
                assert torch.equal(tensor, torch.full_like(tensor, turn)), name
                assert tensor.dtype == state[name].dtype


def test_memory_is_kept_only_where_that_is_meant() -> None:
    """async_pinned copies into the same memory each time, unless a shape has changed; async into new."""
    state = {"a": torch.ones(8)}
    kept, fresh = Copies(is_kept=True), Copies(is_kept=False)
    first = kept.copy(state)["a"]
    assert kept.copy(state)["a"].data_ptr() == first.data_ptr()
    assert kept.copy({"a": torch.ones(9)})["a"].shape == (9,)
    one = fresh.copy(state)["a"]
    assert fresh.copy(state)["a"].data_ptr() != one.data_ptr()


def test_an_error_while_copying_is_whose_reads_the_copies() -> None:
    """It fails the save, and not the step that waits for it."""
    copies = Copies(is_kept=True)
    with ThreadPoolExecutor(1) as executor:
        finished = copies.start({"a": torch.empty(2, device="meta")}, executor)
        copies.wait()
        with pytest.raises(NotImplementedError):
            finished()
