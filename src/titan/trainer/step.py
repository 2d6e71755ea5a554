"""One optimizer step: forward and backward of all micro-batches, clip, guard, move the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from titan.data.loader import Batch
from titan.errors import NonFiniteError
from titan.optim.clip import clip_gradients, global_grad_norm
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


def build_forward_backward(model: nn.Module) -> ForwardBackward:
    """Return the seam for a model that runs whole: one micro-batch after the other."""

    def run(batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=valid_tokens.device)
        for index, batch in enumerate(batches):
            if isinstance(model, FSDPModule):
                # Gradients travel once a step, after the last micro-batch.
                model.set_requires_gradient_sync(index == len(batches) - 1)
            loss = model(batch.tokens, batch.starts, batch.labels) / valid_tokens
            loss.backward()
            total += loss.detach()
        return total

    return run


def build_evaluate(model: nn.Module) -> Evaluate:
    """Return the seam without a backward pass, for a model that runs whole."""

    @torch.no_grad()
    def run(batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for batch in batches:
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
    after_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Do one step on this rank's micro-batches.

    Args:
        batches: This rank's micro-batches.
        forward_backward: Runs them.
        parameters: This rank's.
        optimizer: Over the same parameters.
        max_grad_norm: See `clip_gradients`.
        loss_group: The ranks that see other tokens.
        stage_group: The ranks that have other stages of the model, if there are any.
        copies: Those of the parameters whose original is on another stage: they count once in the norm.
        spike_grad_norm: A norm above this is as bad as one that is not finite; None knows no limit.
        before_update: Called before any weight or optimizer state changes.
        account: Integers of this rank to add up over the ranks that see other tokens.
        after_update: Called once the weights have moved.

    Raises:
        NonFiniteError: If the loss or the gradient norm is not finite, or the norm above its limit, before any weight
            has moved; on every rank, if on one of them.
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
    values = torch.stack((loss, norm.to(loss.dtype), is_bad)).double()
    # all in one fetch, for each waits for the device
    fetched = torch.cat((values.view(torch.int64), counts)).cpu()
    loss_value, norm_value, is_bad_anywhere = fetched[:3].view(torch.float64).tolist()
    valid_tokens, *sums = fetched[3:].tolist()
    result = StepResult(loss_value, norm_value, valid_tokens, tuple(sums))
    if is_bad_anywhere:
        wrong = describe_spike(result, spike_grad_norm)
        raise NonFiniteError(f"{wrong}; no weight was moved", result.loss, result.grad_norm)
    clip_gradients(parameters, norm, max_grad_norm)
    before_update()
    optimizer.step()
    after_update()
    return result


def describe_spike(result: StepResult, spike_grad_norm: float | None) -> str:
    """Say what is wrong with a step's loss or gradient norm, as this rank sees it."""
    for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
        if not abs(value) < float("inf"):
            return f"the {name} is {value}"
    if spike_grad_norm is not None and result.grad_norm > spike_grad_norm:
        return f"the gradient norm is {result.grad_norm:.4g}, above {spike_grad_norm:g}"
    here = f"here they are {result.loss:.4g} and {result.grad_norm:.4g}"
    return f"the loss or the gradient norm of another rank is no number, or too large ({here})"
