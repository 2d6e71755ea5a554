"""titan's own attention for CPUs, held against the formula in double precision and against PyTorch's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan.models.attention import CausalAttention, Kernel, Visible, visible_keys
from titan.models.cpu_attention import Span, attend_on_cpu
from titan.models.rope import apply_rope

from .test_attention import random_starts, reference

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT32: 2e-6, BFLOAT16: 1e-2}
FORMATS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(
    queries: int, keys: int, head_size: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = FLOAT32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return two rows of queries, keys and values as a block makes them: the heads of a position beside each other."""
    generator = torch.Generator().manual_seed(queries + head_size)
    q, k, v = (
        torch.randn(2, length, count, head_size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for length, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    return q, k, v


def causal(queries: int, keys: int) -> Tensor:
    """Return what queries at the end of the keys see. Shape: (queries, keys), bool."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Return an output and the gradients of a nonlinear function of it."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out.sin() * weight).sum(), inputs)]


def assert_is_formula(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, factor: float = 1.0, rope: Tensor | None = None
) -> None:
    """Compare output and gradients with the formula's, each within a share of its largest number, or of 1."""
    a, b = (q, k) if rope is None else (rotated(q, rope[..., -q.shape[2] :, :, :]), rotated(k, rope))
    expected = with_gradients(reference(a, b, v, visible), q, k, v)
    for found, wanted in zip(with_gradients(out, q, k, v), expected, strict=True):
        assert found.shape == wanted.shape
        error = (found.double() - wanted).abs().max()
        assert error <= factor * TOLERANCE[q.dtype] * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("head_size", [4, 8, 12, 16, 24, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 100), (24, 24), (8, 300), (97, 97), (193, 193)])
def test_it_is_the_formula(head_size: int, queries: int, keys: int) -> None:
    """For heads that fill no vector, whole or several ones; for queries and keys that fill no block and no chunk."""
    q, k, v = inputs(queries, keys, head_size)
    assert_is_formula(attend_on_cpu(q, k, v), q, k, v, causal(queries, keys))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@FORMATS
def test_a_group_of_heads_shares_its_keys(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """And their gradients are summed over the group."""
    q, k, v = inputs(70, 70, 16, heads, kv_heads, dtype)
    assert_is_formula(attend_on_cpu(q, k, v), q, k, v, causal(70, 70))


@pytest.mark.parametrize("head_size", [8, 16, 24, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("length", [1, 15, 33, 100, 193])
def test_in_bfloat16_it_is_at_least_as_exact_as_pytorch(head_size: int, length: int) -> None:
    """So no farther from the formula than PyTorch's kernel is, in tiles, where a CPU has them, and without."""
    q, k, v = inputs(length, length, head_size, 4, 4, BFLOAT16)
    exact = with_gradients(reference(q, k, v, causal(length, length)), q, k, v)
    own = with_gradients(attend_on_cpu(q, k, v), q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torchs = with_gradients(F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    for mine, theirs, wanted in zip(own, torchs, exact, strict=True):
        assert mine.dtype is BFLOAT16
        error, bound = ((x.double() - wanted.double()).norm() for x in (mine, theirs))
        assert error <= 1.05 * bound + 1e-6
        assert error <= 0.01 * wanted.double().norm() + 1e-6


def angles(length: int, head_size: int, rows: int = 0) -> Tensor:
    """Return cosines and sines of any angles, of positions, or of those of each row. Shape: (rows, length, E/2, 2)."""
    generator = torch.Generator().manual_seed(length)
    shape = (rows, length, head_size // 2) if rows else (length, head_size // 2)
    angle = 6 * torch.rand(shape, dtype=torch.float64, generator=generator)
    return torch.stack((angle.cos(), angle.sin()), -1).float()


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Return what is to be attended with, by complex numbers in double precision. Shape: (B, H, S, E)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turns = torch.view_as_complex(rope.double())
    turns = turns.unsqueeze(1) if turns.ndim == 3 else turns
    return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize("rows", [0, 2], ids=["one for all rows", "each row its own"])
@pytest.mark.parametrize("head_size", [4, 8, 12, 16, 24, 64, 128])
@pytest.mark.parametrize(("queries", "keys", "heads", "kv_heads"), [(97, 97, 4, 4), (40, 70, 4, 2)])
@FORMATS
def test_it_rotates_queries_and_keys(
    head_size: int, queries: int, keys: int, heads: int, kv_heads: int, rows: int, dtype: torch.dtype
) -> None:
    """By the angles of their positions, the queries' being the last ones, and their gradients back."""
    q, k, v = inputs(queries, keys, head_size, heads, kv_heads, dtype)
    rope = angles(keys, head_size, rows)
    assert_is_formula(attend_on_cpu(q, k, v, None, rope), q, k, v, causal(queries, keys), rope=rope)


def test_rotating_as_it_reads_is_no_less_exact_than_before_it_is_called() -> None:
    """In bfloat16: what is rotated before has been rounded by then."""
    q, k, v = inputs(193, 193, 16, 4, 4, BFLOAT16)
    rope = angles(193, 16)
    exact = with_gradients(reference(rotated(q, rope), rotated(k, rope), v, causal(193, 193)), q, k, v)
    before = [apply_rope(x.transpose(1, 2), rope).transpose(1, 2) for x in (q, k)]
    two_passes = with_gradients(attend_on_cpu(*before, v), q, k, v)
    one_pass = with_gradients(attend_on_cpu(q, k, v, None, rope), q, k, v)
    for mine, theirs, wanted in zip(one_pass, two_passes, exact, strict=True):
        error, bound = ((x.double() - wanted.double()).norm() for x in (mine, theirs))
        assert error <= bound
        assert error <= 0.01 * wanted.double().norm()


@pytest.mark.parametrize("has_documents", [False, True])
def test_a_module_gives_the_same_with_either_kernel(has_documents: bool) -> None:
    """Rotated as it is read, or before PyTorch's kernel is called."""
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs(60, 60, 16))
    starts, positions = random_starts(2, 60, 3, 0), torch.arange(60)
    rope = angles(60, 16)[positions - starts] if has_documents else angles(60, 16)
    own, torchs = CausalAttention(), CausalAttention()
    own.kernel = Kernel(is_own=True)
    found, wanted = (
        with_gradients(each.rotary(q, k, v, rope, each.visible(starts, positions) if has_documents else None), q, k, v)
        for each in (own, torchs)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        *(
            torch.ones(shape)
            for shape in ((40, 4, 2), (39, 8, 2), (1, 8, 2), (1, 40, 8, 2), (3, 40, 8, 2), (2, 1, 40, 8, 2))
        ),
        torch.ones(40, 8, 2, dtype=torch.bfloat16),
        torch.ones(40, 8, 2, dtype=torch.float64),
    ],
    ids=lambda rope: f"{rope.dtype} {tuple(rope.shape)}",
)
def test_angles_of_another_shape_or_format_are_refused(rope: Tensor) -> None:
    """For it would read behind them, or something else."""
    q, k, v = inputs(40, 40, 16)
    with pytest.raises(ValueError, match=r"the angles are .*, and not float32, \(40, 8, 2\)"):
        attend_on_cpu(q, k, v, None, rope)


def test_queries_without_angles_are_refused() -> None:
    """More of them than there are keys, whose positions the angles are of."""
    q, k, v = inputs(41, 40, 16)
    with pytest.raises(ValueError, match="41 queries and angles for 40 positions"):
        attend_on_cpu(q, k, v, None, torch.ones(40, 8, 2))


def test_a_module_that_has_its_own_way_is_asked() -> None:
    """A kind of attention that does something with keys before, as context parallelism does, gets them rotated."""

    class Halved(CausalAttention):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
            return super().forward(q, k / 2, v, visible)

    q, k, v = (x.transpose(1, 2).detach() for x in inputs(60, 60, 16))
    own = Halved()
    own.kernel = Kernel(is_own=True)
    torch.testing.assert_close(own.rotary(q, k, v, angles(60, 16)), Halved().rotary(q, k, v, angles(60, 16)))


LAYOUTS = {
    "position by position": lambda x: x.contiguous(),
    "numbers of a head apart": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a part of something larger": lambda x: torch.stack((x, x, x), 3)[:, :, :, 1],
    "one row for all": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_memory_is_read(layout: str) -> None:
    """The inputs', and that of the gradient, which comes in whichever form autograd has it."""
    q, k, v = (LAYOUTS[layout](x.detach()).requires_grad_() for x in inputs(40, 40, 8))
    assert_is_formula(attend_on_cpu(q, k, v), q, k, v, causal(40, 40))
    out = attend_on_cpu(q, k, v)
    found = torch.autograd.grad(out.sum(), (q, k, v))  # an expanded gradient
    wanted = torch.autograd.grad(reference(q, k, v, causal(40, 40)).sum(), (q, k, v))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [1, 5, 60])
@pytest.mark.parametrize(("ranks", "head_tail"), [(1, True), (2, True), (3, True), (2, False)])
@FORMATS
def test_spans_are_the_mask(documents: int, ranks: int, head_tail: bool, dtype: torch.dtype) -> None:
    """Of documents in a row, and of the queries of one context-parallel rank and all keys."""
    from titan.parallel.context import positions_of_rank

    length = 300
    starts = random_starts(2, length, documents, documents)
    for rank in range(ranks):
        held = positions_of_rank(length, ranks, rank, head_tail)
        q, k, v = inputs(len(held), length, 16, dtype=dtype)
        span = Span(starts[:, held].int(), held.expand(2, -1).int())
        visible = visible_keys(starts[:, held], held, torch.arange(length))
        assert_is_formula(attend_on_cpu(q, k, v, span), q, k, v, visible)


@pytest.mark.parametrize(("rows", "queries", "keys"), [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
@FORMATS
def test_nothing_gives_nothing(rows: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    """No rows, no queries, or no keys, of which a query sees nothing."""
    q, k, v = (x.detach()[:rows].requires_grad_() for x in inputs(queries, keys, 16, dtype=dtype))
    out = attend_on_cpu(q, k, v)
    assert out.shape == q.shape
    assert not any(x.any() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@FORMATS
def test_a_query_that_sees_nothing_gives_zeros(dtype: torch.dtype) -> None:
    """Forward and backward, though it shares a block with others."""
    q, k, v = inputs(40, 40, 16, dtype=dtype)
    first, last = torch.zeros(2, 40, dtype=torch.int32), torch.arange(40, dtype=torch.int32).repeat(2, 1)
    last[0, 7] = last[1, 39] = -1
    first[1, 20] = 21
    out, *gradients = with_gradients(attend_on_cpu(q, k, v, Span(first, last)), q, k, v)
    blind = torch.zeros(2, 40, dtype=torch.bool)
    blind[0, 7] = blind[1, 39] = blind[1, 20] = True
    for x in (out, gradients[0]):
        assert not x.transpose(1, 2)[blind].any()
    visible = causal(40, 40) | blind[:, None, :, None]  # all of it, for there the formula divides by 0
    expected = reference(q, k, v, visible).masked_fill(blind[:, None, :, None], 0)
    for found, wanted in zip((out, *gradients), with_gradients(expected, q, k, v), strict=True):
        assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


def test_large_and_small_scores_are_those_of_the_formula() -> None:
    """No exponential overflows, and one that is too small to count is 0 and not slow."""
    q, k, v = (x.detach() for x in inputs(130, 130, 16))
    for factor in (1e-4, 30.0, 1e4):
        a, b, c = ((x * (factor if i == 0 else 1)).requires_grad_() for i, x in enumerate((q, k, v)))
        assert_is_formula(attend_on_cpu(a, b, c), a, b, c, causal(130, 130), max(1, factor))


@FORMATS
def test_what_is_no_number_is_not_lost(dtype: torch.dtype) -> None:
    """A query or key that is none shows where it is seen alone; a value at least there, for 0 * nan is nan."""
    q, k, v = (x.detach() for x in inputs(100, 100, 16, dtype=dtype))
    q[1, :, 50, 3] = k[1, :, 70, 3] = torch.nan
    seen = attend_on_cpu(q, k, v).isnan().flatten(3).any(3).any(1)
    assert seen[1].nonzero().flatten().tolist() == [50, *range(70, 100)]
    assert not seen[0].any()
    v[0, :, 90, 3] = torch.nan
    assert attend_on_cpu(q, k, v)[0, :, 90:, 3].isnan().all()


def test_products_behind_it_are_those_before_it() -> None:
    """PyTorch takes a thread's tiles for other shapes, where a CPU has them."""
    q, k, v = inputs(100, 100, 16, dtype=BFLOAT16)
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, size, size, generator=generator).bfloat16() for size in (5, 48, 100, 256)]
    before = [a @ b for a, b in pairs]
    for (a, b), wanted in zip(pairs, before, strict=True):
        attend_on_cpu(q, k, v).sum().backward()
        assert (a @ b).equal(wanted)


@pytest.fixture
def threads() -> Iterator[None]:
    """As many threads as before, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@FORMATS
def test_its_bits_depend_on_no_other_row_head_or_thread(dtype: torch.dtype) -> None:
    """So a layout that cuts rows or heads, or a machine with more cores, changes nothing."""
    q, k, v = inputs(97, 97, 16, dtype=dtype)
    rope = angles(97, 16)
    torch.set_num_threads(1)
    whole = with_gradients(attend_on_cpu(q, k, v, None, rope), q, k, v)
    torch.set_num_threads(3)
    again = with_gradients(attend_on_cpu(q, k, v, None, rope), q, k, v)
    assert all(a.equal(b) for a, b in zip(again, whole, strict=True))
    out = attend_on_cpu(q[1:, 2:], k[1:, 1:], v[1:, 1:], None, rope)
    assert out.equal(whole[0][1:, 2:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = torch.autograd.grad(out, (q, k, v), grad)
    padded = torch.cat((torch.zeros_like(grad), grad), 1).repeat(2, 1, 1, 1)
    wanted = torch.autograd.grad(attend_on_cpu(q, k, v, None, rope), (q, k, v), padded)
    assert all(a[1].equal(b[1]) for a, b in zip(found, wanted, strict=True))


def test_it_is_an_operator_as_pytorch_wants_them() -> None:
    """Schema, shapes and layouts without data, autograd and the compiler's tracing, as PyTorch itself checks them."""
    q, k, v = inputs(20, 30, 8)
    span = torch.zeros(2, 20, dtype=torch.int32), torch.full((2, 20), 25, dtype=torch.int32)
    for visible in ((None, None, None), (*span, None), (None, None, angles(30, 8)), (*span, angles(30, 8, 2))):
        torch.library.opcheck(torch.ops.titan.attention.default, (q, k, v, *visible))


@FORMATS
def test_compiled_it_is_the_same(dtype: torch.dtype) -> None:
    """Inside of a function that Inductor compiles, with what comes before and behind it."""
    rope = angles(48, 16)

    def function(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
        return attend_on_cpu(q * 2, k, v.relu(), Span(first, last), rope).transpose(1, 2).flatten(2)

    q, k, v = inputs(48, 48, 16, dtype=dtype)
    span = torch.zeros(2, 48, dtype=torch.int32), torch.arange(48, dtype=torch.int32).repeat(2, 1)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    found = with_gradients(compiled(q, k, v, *span), q, k, v)
    for mine, wanted in zip(found, with_gradients(function(q, k, v, *span), q, k, v), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_its_operations_are_counted_as_pytorch_counts_its_own() -> None:
    """Forward and backward, so that the compiler knows what it costs to compute it again."""

    def count(kernel) -> int:
        q, k, v = inputs(64, 64, 16, 4, 4)
        with FlopCounterMode(display=False) as counter:
            kernel(q, k, v).sum().backward()
        return counter.get_total_flops()

    # the CPU's own kernel is not counted by PyTorch; the formula for CUDA's flash attention is
    assert count(attend_on_cpu) == 2 * 2 * 4 * 64 * 64 * 16 * (2 + 5)


@pytest.mark.parametrize(
    "dtypes", [(FLOAT32, FLOAT32, BFLOAT16), (torch.float64,) * 3, (torch.float16,) * 3], ids=["mixed", "64", "16"]
)
def test_formats_that_it_does_not_read_are_refused(dtypes: tuple[torch.dtype, ...]) -> None:
    """For it would read them as something else."""
    q, k, v = (x.detach().to(dtype) for x, dtype in zip(inputs(4, 4, 8), dtypes, strict=True))
    with pytest.raises(TypeError, match="all float32 or all bfloat16"):
        attend_on_cpu(q, k, v)
