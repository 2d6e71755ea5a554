"""Tensor parallelism: every matrix of a block is cut over the ranks of `tp`.

    attention     wq wk wv by rows (a rank has some heads), wo by columns
    feed-forward  w1 w3 by rows, w2 by columns
    embedding     by words;  output  by words

Between a matrix cut by rows and one cut by columns nothing has to travel, so a block costs two exchanges forward
and two backward. With sequence parallelism what lies between the blocks (norms, residuals) is cut along the
sequence: the sums become reduce-scatters, the copies all-gathers, at the same volume and with less memory.

The weights become DTensors on the mesh, which FSDP and checkpoints understand; the computation sees plain local
tensors, so that it keeps its fast kernels and pays for no dispatch. A module that was cut is of a subclass of its own
class that computes with the local part, as FSDP2 does for whole modules.

Source:
    Megatron-LM, https://arxiv.org/abs/1909.08053; sequence parallelism, https://arxiv.org/abs/2205.05198.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from titan.errors import TitanError
from titan.models.decoder import Decoder
from titan.models.family import Cut
from titan.models.linear import Linear, linear
from titan.parallel.collectives import (
    copy_to_ranks,
    gather,
    gather_same_use,
    scatter_sum,
    sum_over_ranks,
)

_SEQUENCE = 1  # of (B, S, D)


def apply_tensor_parallel(
    model: Decoder, cut_of: Callable[[str], Cut | None], mesh: DeviceMesh, sequence_parallel: bool, loss_parallel: bool
) -> None:
    """Cut the weights over the ranks and put the exchanges between them, in place.

    Args:
        model: On meta, its blocks not yet wrapped.
        cut_of: What to do with a module, by its name.
        mesh: One dim.
        sequence_parallel: Whether what lies between the blocks is cut along the sequence.
        loss_parallel: Whether the logits stay cut by words; `titan.parallel.loss` then takes the ranks' group.

    Raises:
        TitanError: If the plan forgets a module, or a module has a parameter that cannot be cut.
    """
    group = mesh.get_group()
    enter, leave = _enter(group, sequence_parallel), _leave(group, sequence_parallel)
    between: Placement = Partial() if sequence_parallel else Replicate()
    for name, module in model.named_modules():
        cut = cut_of(name)
        if cut is None:
            if module._parameters:
                raise TitanError(f"the model family's tensor_plan says nothing of {name}, which has parameters")
        elif cut in (Cut.whole, Cut.shared):
            _cut(name, module, mesh, Replicate(), between if cut is Cut.whole else Partial())
        elif cut is not Cut.enter:
            _cut(name, module, mesh, Shard(1 if cut is Cut.columns else 0))
        if cut in (Cut.enter, Cut.output):
            module.register_forward_pre_hook(enter)
        if cut in (Cut.words, Cut.columns):
            module.register_forward_hook(leave)
        if cut is Cut.output and not loss_parallel:
            module.register_forward_hook(_gather_words(group))
    model.tie_weights()


def unwrap_weights_before(block: nn.Module) -> None:
    """Before each forward of a block, take the local parts out of its DTensors, outside of what is compiled.

    torch.compile can trace a DTensor, but not save what belongs to one for a backward pass that recomputes (2.13).
    """
    cut = [module for module in block.modules() if isinstance(module, _LocalModule)]

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for each in cut:
            each.locals = {key: each.unwrap(key) for key, value in each._parameters.items() if value is not None}

    if cut:
        block.register_forward_pre_hook(hook)


def _enter(group: dist.ProcessGroup, sequence_parallel: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        x = gather(x, _SEQUENCE, group) if sequence_parallel else copy_to_ranks(x, group)
        return (x, *others)

    return hook


def _leave(group: dist.ProcessGroup, sequence_parallel: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        return scatter_sum(out, _SEQUENCE, group) if sequence_parallel else sum_over_ranks(out, group)

    return hook


def _gather_words(group: dist.ProcessGroup) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        return gather_same_use(logits, logits.ndim - 1, group)

    return hook


def _cut(
    name: str, module: nn.Module, mesh: DeviceMesh, placement: Placement, gradient: Placement | None = None
) -> None:
    """Make the parameters DTensors and let the module compute with its local parts.

    Args:
        name: The module's.
        module: On meta.
        mesh: One dim.
        placement: Of the parameters.
        gradient: Of the local part's gradient, where that is not the parameter's own.
    """
    for key, whole in module._parameters.items():
        if whole is None:
            continue
        local = whole.detach()
        if isinstance(placement, Shard):
            if placement.dim >= whole.ndim or whole.shape[placement.dim] % mesh.size():
                raise TitanError(
                    f"{name}.{key} of shape {tuple(whole.shape)} cannot be cut along dim {placement.dim} "
                    f"for parallelism.tp = {mesh.size()}"
                )
            local = local.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
        distributed = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        module._parameters[key] = nn.Parameter(distributed)
    module.__class__ = _local_class(type(module))
    cut = cast(_LocalModule, module)
    cut.group, cut.gradient, cut.locals = mesh.get_group(), gradient if gradient is not None else placement, {}


class _LocalModule(nn.Module):
    """A module that computes with the local parts of its parameters, whatever its own forward does with them."""

    group: dist.ProcessGroup
    gradient: Placement
    locals: dict[str, Tensor]

    def local(self, key: str = "weight") -> Tensor:
        """Return the local part of a parameter; inside a block, as `unwrap_weights` has left it."""
        found = self.locals.get(key)
        return found if found is not None else self.unwrap(key)

    def unwrap(self, key: str) -> Tensor:
        parameter = self._parameters[key]
        assert isinstance(parameter, DTensor), "cut over the ranks"
        return parameter.to_local(grad_placements=[self.gradient])

    def forward(self, *inputs: Tensor) -> Tensor:
        distributed = dict(self._parameters)
        for key in [key for key, parameter in distributed.items() if parameter is not None]:
            self._parameters[key] = cast(nn.Parameter, self.local(key))
        try:
            return super().forward(*inputs)
        finally:
            self._parameters.update(distributed)


class _LocalLinear(_LocalModule):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear(x, self.local())


class _LocalNorm(_LocalModule):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        norm = cast(nn.RMSNorm, self)
        return F.rms_norm(x, norm.normalized_shape, self.local(), norm.eps)


class _LocalEmbedding(_LocalModule):
    """Looks up the words that this rank has and gives zeros for the others, to be summed over ranks."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        weight = self.local()
        local = tokens - self.group.rank() * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        return F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0)


_LOCAL: dict[type, type[_LocalModule]] = {
    Linear: _LocalLinear,
    nn.RMSNorm: _LocalNorm,
    nn.Embedding: _LocalEmbedding,
}


@functools.cache  # one class for all blocks, or each would be compiled anew
def _local_class(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"TensorParallel{own.__name__}", (_LOCAL.get(own, _LocalModule), own), {})
