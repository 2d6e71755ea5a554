"""Context parallelism: every rank of `cp` has a part of each sequence.

Everything in a Llama works on single positions except attention, so only attention changes: the module inside every
block that mixes positions is exchanged for one that fetches what it needs from the other ranks.

    allgather    fetch all keys and values, keep own queries; least latency, memory for one layer's keys and values
    ring         keys and values travel around the ranks, results are merged by their log-sum-exp; least memory
    all_to_all   exchange sequence for heads, so each rank attends over whole sequences with some heads

Which positions a rank has: with the head-tail balance, the sequence is cut into 2*cp chunks, of which rank r has r and
2*cp-1-r, so that a causal mask costs every rank the same. Without it, rank r has the r-th of cp parts.

PyTorch's own `context_parallel` has no CPU path, so it cannot be held against one process on any machine; this is
the same code on CPU and CUDA. Weights are shared out over dp_shard x cp, so the gradients' sum over cp rides on FSDP's.

Source:
    Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2 (all-gather and head-tail); Ring Attention,
    https://arxiv.org/abs/2310.01889; DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509.

Shape letters: B batch, S sequence, H query heads, K kv heads, E head size, C chunk.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from titan.config.schema import ContextMethod
from titan.models.attention import CausalAttention, Visible, attend
from titan.models.decoder import Decoder
from titan.parallel.collectives import all_gather, gather


def positions_of_rank(seq_len: int, ranks: int, rank: int, head_tail: bool) -> Tensor:
    """Return which positions of a sequence a rank has, ascending. Shape: (seq_len / ranks,), int64."""
    chunks = torch.arange(seq_len).chunk(2 * ranks if head_tail else ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank])) if head_tail else chunks[rank]


def apply_context_parallel(model: Decoder, group: dist.ProcessGroup, method: ContextMethod, head_tail: bool) -> None:
    """Exchange the attention of every block, in place, and tell the model which positions it has."""
    inner = {
        ContextMethod.allgather: AllGatherAttention,
        ContextMethod.ring: RingAttention,
        ContextMethod.all_to_all: AllToAllAttention,
    }[method]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is CausalAttention:
                setattr(module, name, inner(group, head_tail))
    model.positions = positions_of_rank(model.seq_len, group.size(), group.rank(), head_tail)


@functools.lru_cache(maxsize=8)  # one for all blocks
def _order(seq_len: int, ranks: int, head_tail: bool, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the positions in the order in which the ranks hold them, and the inverse of that order."""
    held = torch.cat([positions_of_rank(seq_len, ranks, rank, head_tail) for rank in range(ranks)])
    return held.to(device), held.argsort().to(device)


class _ContextAttention(CausalAttention):
    def __init__(self, group: dist.ProcessGroup, head_tail: bool) -> None:
        super().__init__()
        self.group, self.head_tail = group, head_tail
        self.held = self.inverse = torch.empty(0, dtype=torch.int64)

    def init_buffers(self, seq_len: int, device: torch.device | str) -> None:
        """Put the order of the positions where it is used, once: a copy in a step would have the host wait for it."""
        self.held, self.inverse = _order(seq_len, self.group.size(), self.head_tail, device)

    def order(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the positions in the order in which the ranks hold them, and the inverse of that order.

        Args:
            length: Of the whole sequence; the model's own, or that of a text to be continued.
        """
        if length == len(self.held):
            return self.held, self.inverse
        return _order(length, self.group.size(), self.head_tail, self.held.device)

    def visible(self, starts: Tensor, positions: Tensor) -> Visible:
        """Return which keys of the whole sequence this rank's queries see. Shape: (B, S/cp) -> for S/cp and S."""
        return self.mask(starts, positions, self.group.size() * starts.shape[1])


class AllGatherAttention(_ContextAttention):
    """Fetch all keys and values; attend with this rank's queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend. Shape: q (B, H, S/cp, E); k, v (B, K, S/cp, E) -> (B, H, S/cp, E)."""
        ranks, rank, length = self.group.size(), self.group.rank(), q.shape[2]
        _, inverse = self.order(ranks * length)
        k, v = (gather(x, 2, self.group).index_select(2, inverse) for x in (k, v))
        if visible is not None:
            return attend(q, k, v, visible, self.kernel)
        if not self.head_tail:
            end = (rank + 1) * length
            return attend(q, k[:, :, :end], v[:, :, :end], None, self.kernel)
        head, tail = q.chunk(2, dim=2)
        chunk = length // 2
        ends = ((rank + 1) * chunk, (2 * ranks - rank) * chunk)
        parts = [
            attend(part, k[:, :, :end], v[:, :, :end], None, self.kernel)
            for part, end in zip((head, tail), ends, strict=True)
        ]
        return torch.cat(parts, dim=2)


class AllToAllAttention(_ContextAttention):
    """Exchange sequence for heads, attend over whole sequences, and exchange back."""

    def visible(self, starts: Tensor, positions: Tensor) -> Visible:
        """Return which keys every query of the sequence sees. Shape: (B, S/cp) -> for S and S."""
        _, inverse = self.order(self.group.size() * starts.shape[1])
        whole = all_gather(starts, 1, self.group).index_select(1, inverse)
        return self.mask(whole, torch.arange(whole.shape[1], device=whole.device), whole.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend. Shape: q (B, H, S/cp, E); k, v (B, K, S/cp, E) -> (B, H, S/cp, E). H and K are multiples of cp."""
        held, inverse = self.order(self.group.size() * q.shape[2])
        q, k, v = (_exchange(x, 1, 2, self.group).index_select(2, inverse) for x in (q, k, v))
        return _exchange(attend(q, k, v, visible, self.kernel).index_select(2, held), 2, 1, self.group)


def _exchange(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    return cast(Tensor, _Exchange.apply(x, cut, join, group))


def _all_to_all(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim=cut)).contiguous()
    got = funcol.wait_tensor(funcol.all_to_all_single(parts, None, None, group))
    return torch.cat(got.unbind(0), dim=join)


class _Exchange(torch.autograd.Function):
    """Cut along one dim, send each rank its piece, and join what comes along another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        return _all_to_all(x, cut, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad, ctx.join, ctx.cut, ctx.group), None, None, None


class RingAttention(_ContextAttention):
    """Let keys and values travel around the ranks, one hop at a time, and merge the results."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend. Shape: q (B, H, S/cp, E); k, v (B, K, S/cp, E) -> (B, H, S/cp, E)."""
        assert not isinstance(visible, BlockMask), "the ring takes a mask apart by ranks"
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            # The kernels that give the log-sum-exp take equal heads; autograd sums the copies' gradients.
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        held, _ = self.order(self.group.size() * q.shape[2])
        return cast(Tensor, _Ring.apply(q, k, v, visible, held, self.group, self.head_tail))


def _pairs(source: int, rank: int, head_tail: bool) -> tuple[slice, slice, bool] | None:
    """Return which queries see which keys of another rank, and whether causally; None where none do."""
    everything = slice(None)
    if source == rank:  # positions ascend within a rank, so its own block is causal whatever its chunks
        return everything, everything, True
    if not head_tail:
        return (everything, everything, False) if source < rank else None
    # chunk `source` lies before both of ours, chunk 2*cp-1-source after both; or both lie before our tail only
    return (everything, slice(0, 2), False) if source < rank else (slice(1, 2), everything, False)


def _part(x: Tensor, halves: slice) -> Tensor:
    """Return a whole tensor, its first half or its second half along the sequence."""
    half = x.shape[2] // 2
    if halves == slice(None):
        return x
    return x[:, :, :half] if halves == slice(0, 2) else x[:, :, half:]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        held: Tensor,
        group: dist.ProcessGroup,
        head_tail: bool,
    ) -> Tensor:
        ranks, rank = group.size(), group.rank()
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        travelling = torch.stack((k, v))
        for hop in range(ranks):
            source = (rank - hop) % ranks
            pair = _pairs(source, rank, head_tail)
            arriving = _start_hop(travelling, group) if hop + 1 < ranks else None
            if pair is not None:
                queries, keys, causal = pair
                part, part_lse = _attend_with_lse(
                    _part(q, queries),
                    _part(travelling[0], keys),
                    _part(travelling[1], keys),
                    causal,
                    _bias(visible, held.chunk(ranks)[source], queries, keys, q.dtype),
                )
                _merge(_part(out, queries), _part(lse, queries), part, part_lse)
            if arriving is not None:
                travelling = _finish_hop(arriving)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse, visible, held)
        ctx.group, ctx.head_tail = group, head_tail
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, visible, held = ctx.saved_tensors
        ranks, rank = ctx.group.size(), ctx.group.rank()
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        travelling = torch.stack((k, v))
        # The gradients of a block travel with it and are home again after as many hops as there are ranks.
        gradients = torch.zeros((2, *k.shape), dtype=torch.float32, device=q.device)
        for hop in range(ranks):
            source = (rank - hop) % ranks
            pair = _pairs(source, rank, ctx.head_tail)
            if pair is not None:
                queries, keys, causal = pair
                parts = _attend_backward(
                    _part(grad, queries),
                    _part(q, queries),
                    _part(travelling[0], keys),
                    _part(travelling[1], keys),
                    _part(out, queries),
                    _part(lse, queries),
                    causal,
                    _bias(visible, held.chunk(ranks)[source], queries, keys, q.dtype),
                )
                _part(grad_q, queries).add_(parts[0])
                _part(gradients[0], keys).add_(parts[1])
                _part(gradients[1], keys).add_(parts[2])
            travelling = _finish_hop(_start_hop(travelling, ctx.group)) if hop + 1 < ranks else travelling
            gradients = _finish_hop(_start_hop(gradients, ctx.group))
        grad_k, grad_v = gradients.to(k.dtype).unbind(0)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


def _bias(visible: Tensor | None, positions: Tensor, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores of some of this rank's queries and some of another rank's keys.

    Shape:
        visible: (B, 1, S/cp, S) or None. positions: (S/cp,), of the other's keys. Returns (B, 1, Q, C), 0 or -inf, or
        None.
    """
    if visible is None:
        return None
    seen = _part(_part(visible, queries).transpose(2, 3)[:, :, positions], keys).transpose(2, 3)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _start_hop(x: Tensor, group: dist.ProcessGroup) -> tuple[list[dist.Work], Tensor, Tensor]:
    ranks, rank = group.size(), group.rank()
    x = x.contiguous()
    received = torch.empty_like(x)
    after = dist.get_global_rank(group, (rank + 1) % ranks)
    before = dist.get_global_rank(group, (rank - 1) % ranks)
    operations = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, received, before, group)]
    return dist.batch_isend_irecv(operations), received, x


def _finish_hop(hop: tuple[list[dist.Work], Tensor, Tensor]) -> Tensor:
    works, received, _ = hop
    for work in works:
        work.wait()
    return received


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add the attention over more keys to that over others, in place. Shape: (B, H, S, E) and (B, H, S)."""
    total = torch.logaddexp(lse, part_lse)
    # -inf - -inf where a query has seen nothing yet: no share for either
    mine, theirs = ((x - total).exp().nan_to_num(0.0).unsqueeze(-1) for x in (lse, part_lse))
    out.mul_(mine).add_(part * theirs)
    lse.copy_(total)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention over one block of keys, and the log-sum-exp of its scores: -inf where a query sees none."""
    if q.device.type == "cpu":
        causal = causal and bias is None
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
        if bias is not None:
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)  # the kernel says 0
        return out, lse
    if is_in_full(q.dtype, bias is not None):
        return _attend_in_full(q, k, v, causal, bias)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return out, lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients through one block, given the output and log-sum-exp over *all* blocks."""
    if q.device.type == "cpu":
        causal = causal and bias is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias
        )
    if is_in_full(q.dtype, bias is not None):
        return _backward_in_full(grad, q, k, v, out, lse, causal, bias)
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, empty, empty
    )
    return grads[0], grads[1], grads[2]


def is_in_full(dtype: torch.dtype, has_documents: bool) -> bool:
    """Return whether the ring has to compute all scores on CUDA, where the flash kernel takes no mask and 16 bits."""
    return has_documents or dtype is torch.float32


def _attend_in_full(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, bias)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0) @ v.float(), lse


def _backward_in_full(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    shares = (_scores(q, k, causal, bias) - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    grad_shares = grad @ v.float().transpose(-1, -2) - (grad * out.float()).sum(-1, keepdim=True)
    grad_scores = shares * grad_shares * q.shape[-1] ** -0.5
    return grad_scores @ k.float(), grad_scores.transpose(-1, -2) @ q.float(), shares.transpose(-1, -2) @ grad


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:  # causal too
        return scores + bias
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf) if causal else scores
