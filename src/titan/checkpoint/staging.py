"""Copies of a state in the CPU's memory, so that training can go on while they are written.

A copy may be made in the background too, for weights and optimizer states stand still from one update to the next:
what must wait for it is the update, not forward and backward. On a GPU the copies go to pinned memory on a stream of
their own, and the update waits on the GPU; on a CPU a thread makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Copies:
    """Memory for copies of one state.

    Args:
        is_kept: Keep the memory for the next time, pinned where there is a GPU; else it is taken anew and given back.
    """

    def __init__(self, is_kept: bool) -> None:
        self.is_kept = is_kept
        self._kept: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._wait: Callable[[], None] = lambda: None

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy now; returns this rank's parts by name."""
        copies = self._memory(state)
        for name, tensor in state.items():
            copies[name].copy_(local(tensor))
        return copies

    def start(self, state: Mapping[str, Tensor], executor: Executor) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy.

        Returns:
            A function that waits for the copies, for another thread to call.
        """
        if not any(tensor.is_cuda for tensor in map(local, state.values())):
            future: Future[dict[str, Tensor]] = executor.submit(self.copy, state)
            self._wait = lambda: void(future)
            return future.result
        copies = self._memory(state)
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in state.items():
                copies[name].copy_(local(tensor), non_blocking=True)
        done = self._stream.record_event()
        self._wait = lambda: torch.cuda.current_stream().wait_event(done)

        def finished() -> dict[str, Tensor]:
            done.synchronize()
            return copies

        return finished

    def wait(self) -> None:
        """Return when what was copied may change; to be called before every update."""
        wait, self._wait = self._wait, lambda: None
        wait()

    def _memory(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        memory = {}
        for name, tensor in state.items():
            mine, kept = local(tensor), self._kept.get(name)
            if kept is not None and kept.shape == mine.shape and kept.dtype == mine.dtype:
                memory[name] = kept
            else:
                pin = self.is_kept and torch.cuda.is_available()
                memory[name] = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=pin)
        if self.is_kept:
            self._kept = memory
        return memory


def void(future: Future[dict[str, Tensor]]) -> None:
    """Wait; whoever reads the copies sees an error of theirs."""
    future.exception()
