"""AdamW on this rank's shards, whose moments may be bfloat16, and whose update may be compiled.

The update of a number needs no other rank. PyTorch's own class hands whole DTensors to its kernel, and DTensor first
finds out how they are all sharded, in the first step of every rank: 1.7 s of processor time for 291 parameters, as 8B
has them (2.13, by hand). Here the same kernel gets what the rank has.

**Moments in bfloat16** halve the optimizer's memory. They are a format to keep numbers in, never one to compute in:
every step widens them to float32, takes the step of float32, and rounds once. PyTorch's fused kernel does that by
itself on CUDA (2.13); on a CPU, and on CUDA in 2.11, it refuses moments in another format than the parameters, and so
do the `foreach` and the plain path. There, each parameter's moments are widened, go through the same fused kernel, and
are rounded again, one parameter after the other, so that the float32 copies are those of one parameter at a time.

**A compiled update** is one graph for a parameter of any shape: each is handed over flat. What changes from step to
step, the learning rate first of all, is in a tensor, for a number would be a constant of the graph and compiled anew.

Source:
    AdamW, https://arxiv.org/abs/1711.05101; moments in bfloat16, DeepSeek-V3, https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.optim.adamw import adamw

from titan.optim.clip import local_part

_NUMBERS = 8
"""What an update needs beside its tensors."""


@dataclass(frozen=True)
class _Member:
    """What this rank has of a parameter and of what belongs to it."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    step: Tensor


@dataclass(frozen=True)
class _Told:
    """What a step is told by numbers on the device."""

    found_inf: Tensor | None = None
    """1 leaves it out."""
    grad_scale: Tensor | None = None
    """What gradients are divided by."""


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW on local parts, with moments in a format of their own and, if asked for, a compiled update.

    Args:
        groups: As PyTorch takes them.
        state_dtype: The moments' format; None is the parameters'.
        backend: What compiles the update; None does not.
        options: PyTorch's.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], state_dtype: torch.dtype | None, backend: str | None, **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self.state_dtype = state_dtype
        self._update: Callable[..., None] | None = None
        if backend is not None:
            self._update = torch.compile(update, backend=backend, fullgraph=True, dynamic=True)
        self._numbers: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, divided by `grad_scale`; none where `found_inf` is 1.

        Both are PyTorch's protocol, see `titan.optim.guard`.
        """
        told = _Told(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        assert closure is None, "the loss is computed before"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            members = [self._member(parameter) for parameter in parameters]
            if not members:
                continue
            if self._update is not None:
                self._step_compiled(group, parameters, members, told)
            elif self.state_dtype is None or takes_bfloat16_moments(members[0].parameter.device.type):
                _step_fused(group, members, told)
            else:
                for member in members:
                    first, second = member.first.float(), member.second.float()
                    widened = _Member(member.parameter, member.gradient, first, second, member.step)
                    _step_fused(group, [widened], told)
                    member.first.copy_(first)
                    member.second.copy_(second)

    def _member(self, parameter: nn.Parameter) -> _Member:
        state = self.state[parameter]
        if not state:  # the names and formats of PyTorch's, whose checkpoints these are too
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype, requires_grad=False)
        assert parameter.grad is not None, "others are left out"
        return _Member(
            local_part(parameter).detach(),
            local_part(parameter.grad).detach(),
            local_part(state["exp_avg"]).detach(),
            local_part(state["exp_avg_sq"]).detach(),
            state["step"],
        )

    def _step_compiled(
        self, group: dict[str, Any], parameters: list[nn.Parameter], members: list[_Member], told: _Told
    ) -> None:
        assert self._update is not None
        steps = [member.step for member in members]
        torch._foreach_add_(steps, 1)
        numbers = [self._numbers_of(parameter) for parameter in parameters]
        torch._foreach_copy_(numbers, list(_numbers(group, steps, told)))
        if told.found_inf is not None:
            torch._foreach_sub_(steps, [told.found_inf] * len(steps))
        for member, its in zip(members, numbers, strict=True):
            if member.parameter.numel():  # a rank may have nothing of a small parameter
                tensors = member.parameter, member.gradient, member.first, member.second
                self._update(*map(_flat, tensors), its)

    def _numbers_of(self, parameter: nn.Parameter) -> Tensor:
        """Return memory for a parameter's numbers, always the same: a view into others' would be compiled anew."""
        if parameter not in self._numbers:
            numbers = torch.empty(_NUMBERS, dtype=torch.float32, device=parameter.device)
            torch._dynamo.mark_static(numbers)  # or a parameter of as many numbers would be a case of its own
            self._numbers[parameter] = numbers
        return self._numbers[parameter]


def update(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Move one parameter and its moments, in place; computed in float32, rounded once.

    Shape:
        numbers: (8,), see `_numbers`; the others: (N,).
    """
    step_size, root, kept, gain, square_gain, eps, is_left_out, divisor = numbers.unbind()
    gradient = gradient / divisor
    mean = torch.lerp(first.float(), gradient, gain)
    square = torch.lerp(second.float(), gradient * gradient, square_gain)
    moved = parameter * kept - step_size * mean / (square.sqrt() / root + eps)
    # chosen, not multiplied by nought: what is left out need not be a number
    parameter.copy_(torch.where(is_left_out > 0, parameter, moved))
    first.copy_(torch.where(is_left_out > 0, first.float(), mean))
    second.copy_(torch.where(is_left_out > 0, second.float(), square))


@functools.cache
def takes_bfloat16_moments(device_type: str) -> bool:
    """Return whether PyTorch's fused kernel takes bfloat16 moments beside float32 parameters: tries it on one number.

    It does on CUDA in 2.13, and on no CPU (2.13).
    """
    with torch.device(device_type), torch.no_grad():
        one = _Member(
            torch.ones(1),
            torch.ones(1),
            torch.zeros(1, dtype=torch.bfloat16),
            torch.zeros(1, dtype=torch.bfloat16),
            torch.zeros(()),
        )
        options = {"lr": 0.5, "betas": (0.5, 0.5), "weight_decay": 0.0, "eps": 0.0}
        try:
            _step_fused(options, [one])
        except RuntimeError:
            return False
    return (one.parameter.item(), one.first.item(), one.second.item()) == (0.5, 0.5, 0.5)


def _step_fused(group: dict[str, Any], members: list[_Member], told: _Told = _Told()) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [member.parameter for member in members],
        [member.gradient for member in members],
        [member.first for member in members],
        [member.second for member in members],
        [],
        [member.step for member in members],
        fused=True,
        grad_scale=told.grad_scale,
        found_inf=told.found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _numbers(group: dict[str, Any], steps: list[Tensor], told: _Told) -> Tensor:
    """Return what `update` needs for each parameter: they may have taken different numbers of steps.

    Computed where the steps are, so that nobody waits for a GPU, and in float64: 1 - beta^step loses digits.

    Shape:
        (len(steps), 8) float32: step size, root of the second correction, share of the weight that decay leaves,
        1 - beta1, 1 - beta2, eps, whether the step is left out, what gradients are divided by.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    count = torch.stack(steps).double()
    constants = [1 - rate * group["weight_decay"], 1 - beta1, 1 - beta2, group["eps"]]
    columns = [rate / (1 - beta1**count), (1 - beta2**count).sqrt()]
    columns += [torch.full_like(count, constant) for constant in constants]
    for number, otherwise in ((told.found_inf, 0.0), (told.grad_scale, 1.0)):
        columns.append(torch.full_like(count, otherwise) if number is None else number.double().expand_as(count))
    return torch.stack(columns, dim=1).float()


def _flat(tensor: Tensor) -> Tensor:
    """Return the same numbers in one dim. Detached at last, for the graph would be another for a view's other base."""
    return tensor.view(-1).detach()
