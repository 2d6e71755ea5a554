"""One optimizer step: forward and backward of all micro-batches, guard, clip and move the weights.

The host only hands out work. Whether a step is bad is found out on the device, which then leaves its update out by
itself, and what the step gave travels to the host on its own: a `PendingResult`, which may be read when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from titan.data.loader import Batch
from titan.errors import NonFiniteError
from titan.optim.clip import clip_divisor, global_grad_norm
from titan.optim.guard import step_unless
from titan.trainer.breakdown import OPTIMIZER
from titan.trainer.loss import count_valid_tokens

ForwardBackward = Callable[[Sequence[Batch], Tensor], Tensor]
"""Micro-batches and the count of valid tokens in; gradients accumulated, this rank's share of the loss out.

The one seam between a model that runs whole and one that runs as a pipeline: chosen once, when the trainer is built.
"""

Evaluate = Callable[[Sequence[Batch]], Tensor]
"""Micro-batches in, the sum of their losses on this rank out (a pipeline's rank without the last stage has none).

The same seam without a backward pass.
"""


@dataclass(frozen=True)
class StepResult:
    """What a step gave, the same on every rank."""

    loss: float
    """Mean cross-entropy of the global batch in nats a token, before the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    valid_tokens: int = 0
    """Positions of the global batch that count in the loss."""
    account: tuple[int, ...] = ()
    """What else was added up over the ranks, modulo 2^64."""


class PendingResult:
    """What a step gave, on its way from the device.

    Args:
        values: Loss, norm and whether the step is bad, as the bits of float64; then the sums over the ranks.
        spike_grad_norm: See `train_step`.

    Shape:
        values: (4 + N,) int64.
    """

    def __init__(self, values: Tensor, spike_grad_norm: float | None) -> None:
        self._values, self._spike_grad_norm = values, spike_grad_norm
        self._is_copied: torch.cuda.Event | None = None
        if values.is_cuda:
            # all in one copy, to pinned memory: from any other the device could not be left alone with it
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._is_copied = torch.cuda.Event()
            self._is_copied.record()

    def is_here(self) -> bool:
        """Return whether it can be read without waiting for the device; on this rank."""
        return self._is_copied is None or self._is_copied.query()

    def read(self) -> StepResult:
        """Return what the step gave; waits for it.

        Raises:
            NonFiniteError: If the loss or the gradient norm is not finite, or the norm above its limit; on every rank,
                if on one of them.
        """
        if self._is_copied is not None:
            self._is_copied.synchronize()
        loss, norm, is_bad = self._values[:3].view(torch.float64).tolist()
        valid_tokens, *sums = self._values[3:].tolist()
        result = StepResult(loss, norm, valid_tokens, tuple(sums))
        if is_bad:
            wrong = describe_spike(result, self._spike_grad_norm)
            raise NonFiniteError(f"{wrong}; no weight was moved", result.loss, result.grad_norm)
        return result


def build_forward_backward(model: nn.Module, begin: Callable[[bool], None]) -> ForwardBackward:
    """Return the seam for a model that runs whole: one micro-batch after the other.

    Args:
        model: Tokens, starts and labels in, the sum of the losses out.
        begin: Is told before every micro-batch whether it is the last.
    """

    def run(batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=valid_tokens.device)
        for index, batch in enumerate(batches):
            begin(index == len(batches) - 1)
            loss = model(batch.tokens, batch.starts, batch.labels) / valid_tokens
            loss.backward()
            total += loss.detach()
            del loss  # or what it has of this graph would stay through the next one's forward pass
        return total

    return run


def build_evaluate(model: nn.Module, begin: Callable[[], None] = lambda: None) -> Evaluate:
    """Return the seam without a backward pass, for a model that runs whole; see `build_forward_backward`."""

    @torch.no_grad()
    def run(batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for batch in batches:
            begin()
            total += model(batch.tokens, batch.starts, batch.labels)
        return total

    return run


def train_step(
    batches: Sequence[Batch],
    forward_backward: ForwardBackward,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    loss_group: dist.ProcessGroup,
    stage_group: dist.ProcessGroup | None,
    copies: Sequence[nn.Parameter] = (),
    spike_grad_norm: float | None = None,
    before_update: Callable[[], None] = lambda: None,
    account: Sequence[int] = (),
    spikes_left: Tensor | None = None,
    after_update: Callable[[], None] = lambda: None,
) -> PendingResult:
    """Do one step on this rank's micro-batches, without waiting for the device.

    A step whose loss or gradient norm is not finite, or whose norm is above its limit, is bad, on every rank if on one
    of them: no weight and no state of the optimizer changes.

    Args:
        batches: This rank's micro-batches.
        forward_backward: Runs them.
        parameters: This rank's.
        optimizer: Over the same parameters.
        max_grad_norm: See `clip_divisor`.
        loss_group: The ranks that see other tokens.
        stage_group: The ranks that have other stages of the model, if there are any.
        copies: Those of the parameters whose original is on another stage: they count once in the norm.
        spike_grad_norm: A norm above this is as bad as one that is not finite; None knows no limit.
        before_update: Called before any weight or optimizer state changes.
        account: Integers of this rank to add up over the ranks that see other tokens.
        spikes_left: How many bad steps there may be; a bad step takes one away. Below zero no step changes anything any
            more, for the host, which will know later, is going to take them all back. None knows no end.
        after_update: Called once the weights have moved.

    Shape:
        spikes_left: ().
    """
    optimizer.zero_grad()
    counts = count_valid_tokens([batch.labels for batch in batches], loss_group, account)
    loss = forward_backward(batches, counts[0].float().clamp(min=1))
    dist.all_reduce(loss, group=loss_group)
    if stage_group is not None:  # only the last stage knows it
        dist.all_reduce(loss, group=stage_group)
    norm = global_grad_norm(parameters, loss.device, stage_group, copies)
    limit = float("inf") if spike_grad_norm is None else spike_grad_norm
    is_bad = ~loss.isfinite() | ~norm.isfinite() | (norm > limit)
    # Both are global, but each tensor-parallel rank and each replica has computed them by itself.
    is_bad = is_bad.to(loss.dtype)
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    is_left_out = is_bad
    if spikes_left is not None:
        spikes_left.sub_(is_bad)
        is_left_out = is_bad.maximum((spikes_left < 0).to(is_bad.dtype))
    before_update()
    with record_function(OPTIMIZER):
        step_unless(optimizer, is_left_out, clip_divisor(norm, max_grad_norm))
        after_update()
    values = torch.stack((loss, norm.to(loss.dtype), is_bad)).double()
    return PendingResult(torch.cat((values.view(torch.int64), counts)), spike_grad_norm)


def describe_spike(result: StepResult, spike_grad_norm: float | None) -> str:
    """Say what is wrong with a step's loss or gradient norm, as this rank sees it."""
    for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
        if not abs(value) < float("inf"):
            return f"the {name} is {value}"
    if spike_grad_norm is not None and result.grad_norm > spike_grad_norm:
        return f"the gradient norm is {result.grad_norm:.4g}, above {spike_grad_norm:g}"
    here = f"here they are {result.loss:.4g} and {result.grad_norm:.4g}"
    return f"the loss or the gradient norm of another rank is no number, or too large ({here})"
