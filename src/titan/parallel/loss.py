"""Cross-entropy without the logits of all positions: projected, compared and differentiated a chunk at a time.

The logits are the largest tensor of a training step: 8,192 positions of 128,256 words are 4.2 GB in float32, and
their gradient as much again. Here a chunk of positions is projected, its loss is taken, and its gradients for the
hidden states and for the output's weights follow at once, so that only those are kept until the backward pass, which
scales them. No product is computed twice. An output in float8 takes part: its products and their derivatives are
asked of it, chunk by chunk (`Project`).

With tensor parallelism every rank has some of the words (`parallelism.loss_parallel`), and the ranks exchange three
numbers a position.

Source:
    The idea of differentiating in the forward pass: Liger Kernel, https://arxiv.org/abs/2410.10989; loss parallelism:
    Megatron-LM, https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titan.config.degrees import choose_loss_chunk
from titan.data.batch import IGNORED_LABEL
from titan.models.decoder import Decoder
from titan.models.linear import Linear, add_product, product
from titan.parallel.collectives import all_reduce

Project = Callable[[Tensor, Tensor], Tensor]
"""From hidden states and the output's weights to logits, with a derivative: (N, D), (V, D) -> (N, V)."""


def apply_loss(
    model: Decoder,
    chunk_size: int,
    device_type: str,
    group: dist.ProcessGroup | None = None,
    project: Project | None = None,
    is_compiled: bool = False,
) -> int:
    """Let the model's output compute the loss by itself, chunk by chunk, in place. Before FSDP.

    Args:
        model: With its output, tensor parallelism applied.
        chunk_size: Positions of a chunk at most; -1 chooses by the number of words and the device, 0 takes all
            positions together, as `cross_entropy_sum` of the logits does.
        device_type: What will compute.
        group: The ranks that have the other words; None for all words here.
        project: How the output multiplies, where it is no plain `Linear`.
        is_compiled: Whether `compile_loss` follows, which a chunk costs less memory with.

    Returns:
        Positions of a chunk; 0 for all together.
    """
    assert model.output is not None, "the stage that has the output"
    if chunk_size == 0 or not (project or isinstance(model.output, Linear)):
        model.loss = _LossOfLogits(group)
        return 0
    model.output.__class__ = _with_loss(type(model.output))  # type: ignore[reportAttributeAccessIssue]
    output = cast(_LossOutput, model.output)
    size = chunk_size if chunk_size > 0 else choose_loss_chunk(model.config.vocab_size, device_type, is_compiled)
    output.chunk_size, output.group, output.project = size, group, project
    model.loss = _call_output
    return size


def compile_loss(model: Decoder, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Compile what is done with a chunk's logits, in place; a loss of all logits at once stays as it is."""
    if isinstance(model.output, _LossOutput):
        model.output.differentiate = compiled(_differentiate)
        if model.output.project is not None:
            model.output.project = compiled(model.output.project)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of cross-entropies over the positions that count, in nats. Shape: (N, V), (N,) -> ()."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED_LABEL)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of cross-entropies of logits that are cut by words, the same on every rank.

    Small reductions forward, none backward; no rank ever sees all words.

    Shape:
        logits: (N, V/tp), any float dtype; computed in float32. labels: (N,). Returns ().
    """
    return cast(Tensor, _VocabParallelCrossEntropy.apply(logits.float(), labels, group))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    differentiate: Callable[..., tuple[Tensor, Tensor]] | None = None,
    project: Project | None = None,
) -> Tensor:
    """Return the sum of cross-entropies of `hidden` projected to words, over the positions that count, in nats.

    Args:
        hidden: What is projected.
        weight: One row a word; with `group`, of this rank's words.
        labels: The words to predict; `IGNORED_LABEL` where a position does not count.
        chunk_size: Positions that are projected together at most; the chunks are as even as can be, so that what is
            compiled is compiled for one size.
        group: The ranks that have the other words. The result is theirs all; the gradient of `hidden` is this rank's
            part, to be added up.
        differentiate: From a chunk's logits, labels and the group to the loss and its gradient; None for the plain way.
        project: Another product than the exact one.

    Shape:
        hidden: (N, D), any float dtype; the loss is computed in float32. weight: (V, D), or (V/tp, D). labels: (N,).
        Returns (), float32.
    """
    how = differentiate if differentiate is not None else _differentiate
    needs = torch.is_grad_enabled()  # which is off inside of a function of autograd's
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_size, group, how, needs, project))


class _LossOutput(nn.Module):
    """An output that, given labels, returns the sum of the losses instead of logits."""

    weight: Tensor
    chunk_size: int
    group: dist.ProcessGroup | None
    differentiate: Callable[..., tuple[Tensor, Tensor]] | None = None
    project: Project | None = None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)
        local = getattr(self, "local", None)  # cut by tensor parallelism
        weight = local() if local is not None else self.weight
        settings = self.chunk_size, self.group, self.differentiate, self.project
        return chunked_cross_entropy(x.flatten(0, -2), weight, labels.flatten(), *settings)


@functools.cache
def _with_loss(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Loss{own.__name__}", (_LossOutput, own), {})


def _call_output(output: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return output(hidden, labels)


class _LossOfLogits:
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, output: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        logits, labels = output(hidden).flatten(0, -2), labels.flatten()
        if self.group is None:
            return cross_entropy_sum(logits, labels)
        return vocab_parallel_cross_entropy(logits, labels, self.group)


def _differentiate(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropies and its gradient.

    What is compiled reads the logits and writes the gradient over them, in their own format, and has nothing of their
    size in between.

    Shape:
        logits: (N, V), any float dtype; computed in float32. labels: (N,). Returns (), float32, and (N, V) as `logits`.
    """
    given, logits = logits, logits.float()
    counts = labels != IGNORED_LABEL
    if group is None:
        local = labels.masked_fill(~counts, 0).unsqueeze(-1)
        scores = F.log_softmax(logits, -1)
        loss = -(scores.gather(-1, local).squeeze(-1) * counts).sum()
        gradient = scores.exp_()
        elsewhere = None
    else:
        highest = all_reduce(logits.max(-1).values, group, "max")
        shifted = logits - highest.unsqueeze(-1)
        local = labels - group.rank() * logits.shape[-1]
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        target = shifted.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0)
        gradient = shifted.exp_()
        # both sums in one exchange
        sums, target = all_reduce(torch.stack((gradient.sum(-1), target)), group).unbind(0)
        loss = ((sums.log() - target) * counts).sum()
        gradient /= sums.unsqueeze(-1)
    if (
        torch.compiler.is_compiling()
    ):  # which makes one pass of a comparison and what is around it, but not of a scatter
        words = torch.arange(gradient.shape[-1], device=gradient.device)
        is_label = words == local if elsewhere is None else (words == local) & ~elsewhere.unsqueeze(-1)
        return loss, given.copy_((gradient - is_label.float()) * counts.unsqueeze(-1))
    minus_one = torch.full_like(local, -1, dtype=gradient.dtype)
    if elsewhere is not None:
        minus_one.masked_fill_(elsewhere.unsqueeze(-1), 0)
    gradient.scatter_add_(-1, local, minus_one)
    return loss, gradient.mul_(counts.unsqueeze(-1)).to(given.dtype)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        loss, gradient = _differentiate(logits, labels, group)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        group: dist.ProcessGroup | None,
        differentiate: Callable[..., tuple[Tensor, Tensor]],
        needs_gradients: bool,
        project: Project | None,
    ) -> Tensor:
        needs_hidden, needs_weight = needs = [needs_gradients and each for each in ctx.needs_input_grad[:2]]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = -(-len(hidden) // chunk_size)
        size = -(-len(hidden) // max(chunks, 1))
        for first in range(0, len(hidden), size or 1):
            chunk, its = hidden[first : first + size], labels[first : first + size]
            if project is not None:
                how = functools.partial(differentiate, labels=its, group=group)
                loss, its_hidden, its_weight = _differentiate_through(project, chunk, weight, needs, how)
                if its_weight is not None:  # added up in float32, for every chunk rounds
                    grad_weight = its_weight if grad_weight is None else grad_weight.float().add_(its_weight)
            else:
                loss, gradient = differentiate(product(chunk, weight), labels=its, group=group)
                its_hidden = product(gradient, weight.t()) if needs_hidden else None
                if needs_weight and chunks == 1:
                    grad_weight = product(gradient.t(), chunk.t())
                elif needs_weight:
                    grad_weight = add_product(grad_weight, gradient.t(), chunk.t())
            total += loss
            if grad_hidden is not None and its_hidden is not None:
                grad_hidden[first : first + size] = its_hidden
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.gradients, ctx.is_scaled = (grad_hidden, grad_weight), False
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place, for they are as large as the weights. A pipeline that splits its backward pass comes here twice,
        # with the same `grad`.
        gradients = ctx.gradients
        assert gradients is not None, "a second backward pass needs retain_graph=True in the first"
        if not ctx.is_scaled:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad)
            ctx.is_scaled = True
        # Nobody else lets go of them: a pipeline's schedule keeps the losses of all microbatches to its end.
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[reportAttributeAccessIssue]
            ctx.gradients = None
        return *gradients, None, None, None, None, None, None


def _differentiate_through(
    project: Project,
    hidden: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    differentiate: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss of a chunk and the gradients of its hidden states and of the weights, those that are needed."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(its) for x, its in zip((hidden, weight), needs, strict=True)]
        logits = project(*leaves)
    loss, gradient = differentiate(logits.detach())
    found = iter(torch.autograd.grad(logits, [x for x in leaves if x.requires_grad], gradient) if any(needs) else ())
    grad_hidden, grad_weight = (next(found) if its else None for its in needs)
    return loss, grad_hidden, grad_weight
