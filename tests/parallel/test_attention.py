"""Which kernel computes attention: what is chosen, that it is taken wherever it should be, and what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from titan.config.schema import ActivationCheckpointMode, Attention, CompileConfig, ContextMethod, ModelConfig
from titan.errors import ConfigError
from titan.models.attention import CausalAttention, attend, visible_keys, visible_tiles
from titan.models.llama import Llama
from titan.parallel.activation_checkpoint import apply_activation_checkpoint, is_kept
from titan.parallel.attention import AttentionShape, apply_attention, choose_kernel
from titan.parallel.compile import apply_compile
from titan.parallel.context import _attend_in_full, _backward_in_full
from titan.trainer.record import Record, compare_records

from .flex import record_flex
from .matrix import mesh, options
from .pool import RankPool

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 16, torch.float32, has_documents=False, method=None)


@pytest.fixture
def model() -> Llama:
    """Two blocks on the CPU."""
    shape = ModelConfig("small", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=32, max_seq_len=16)
    model = Llama(shape, 16)
    model.init_buffers(CPU)
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has compiled nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("attention", "changes", "says"),
    [
        (Attention.default, {}, "flash"),
        (Attention.flash, {}, "flash"),
        (Attention.math, {}, "math"),
        (Attention.default, {"has_documents": True}, "flash, with a mask of all queries and keys for the documents"),
        (Attention.default, {"method": ContextMethod.allgather}, "flash, with a mask of all queries and keys"),
        (Attention.math, {"method": ContextMethod.all_to_all}, "math"),
        (Attention.cpu, {"has_documents": True}, "cpu, titan's own"),
        (Attention.default, {"method": ContextMethod.ring, "has_documents": True}, "flash, from rank to rank"),
    ],
)
def test_what_is_chosen_is_what_runs_and_is_said(attention: Attention, changes: dict[str, Any], says: str) -> None:
    """The name in the log is that of the kernel that PyTorch took in the trial."""
    assert choose_kernel(attention, replace(SHAPE, **changes), CPU)[1] == says


@pytest.mark.parametrize("attention", [Attention.cudnn, Attention.efficient])
def test_a_kernel_that_the_device_lacks_is_told_before_the_first_step(attention: Attention) -> None:
    """With PyTorch's reason and what to type instead; a config may come from where no rule could know the device."""
    with pytest.raises(ConfigError) as error:
        choose_kernel(attention, SHAPE, CPU)
    assert f"training.attention = {attention.name} cannot do this on cpu" in str(error.value)
    assert "No viable backend" in str(error.value)
    assert "training.attention=default" in str(error.value)


def test_flash_attention_3_without_its_package_is_told() -> None:
    """PyTorch knows the name, but the kernels come from elsewhere."""
    with pytest.raises(ConfigError) as error:
        choose_kernel(Attention.flash3, SHAPE, CPU)
    assert "cannot activate FlashAttention 3" in str(error.value)
    assert "flash_attn" in str(error.value)


def test_a_compiler_that_fails_is_told() -> None:
    """With its own words, and a kernel that needs none, before the first step."""
    import torch._inductor.config

    without = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with without, pytest.raises(ConfigError, match="/no/such/compiler") as error:
        choose_kernel(Attention.cpu, replace(SHAPE, head_size=20), CPU)  # which nothing else has compiled
    assert error.value.problems[0].suggestion == "training.attention=flash"


class _Kernels(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        """Return how many had that in their name."""
        return sum(part in name for name in self.names)


def run(model: Llama) -> _Kernels:
    """Return what ran in a forward and a backward pass."""
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    with _Kernels() as kernels:
        model(tokens).sin().sum().backward()
    return kernels


@pytest.mark.parametrize("mode", [ActivationCheckpointMode.none, ActivationCheckpointMode.full])
@pytest.mark.parametrize(
    ("attention", "softmax", "flash", "own"),
    [(Attention.math, 1, 0, 0), (Attention.flash, 0, 1, 0), (Attention.cpu, 0, 0, 1)],
)
def test_the_chosen_kernel_runs_again_where_a_block_is_recomputed(
    model: Llama, mode: ActivationCheckpointMode, attention: Attention, softmax: int, flash: int, own: int
) -> None:
    """The recomputation, which comes from inside the backward pass, takes the kernel of the forward pass."""
    assert apply_attention(model, attention, SHAPE, CPU).startswith(f"attention: {attention.name}")
    apply_activation_checkpoint(model, mode, 1)
    kernels, times = run(model), 2 * (2 if mode is ActivationCheckpointMode.full else 1)
    assert kernels.count("_safe_softmax.default") == softmax * times
    assert kernels.count("_scaled_dot_product_flash_attention_for_cpu.") == flash * times
    assert kernels.count("titan.attention.") == own * times


@pytest.mark.parametrize("mode", [ActivationCheckpointMode.none, ActivationCheckpointMode.full])
@pytest.mark.parametrize(
    ("attention", "softmax", "flash", "own"),
    [(Attention.math, 1, 0, 0), (Attention.flash, 0, 1, 0), (Attention.cpu, 0, 0, 1)],
)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_chosen_kernel_is_the_one_compiled(
    model: Llama, mode: ActivationCheckpointMode, attention: Attention, softmax: int, flash: int, own: int
) -> None:
    """A whole block is compiled without a break, and its graphs, forward and backward, have the kernel chosen.

    The last norm has graphs of its own, between the two.
    """
    apply_attention(model, attention, SHAPE, CPU)
    apply_activation_checkpoint(model, mode, 1)
    backend: Any = AotEagerAndRecordGraphs()
    apply_compile(model, CompileConfig(enable=True, backend=backend))
    model(torch.zeros(2, 16, dtype=torch.int64)).sum().backward()
    is_flash = re.compile("_scaled_dot_product_flash_attention_for_cpu(?!_backward)").search
    found = []
    assert len(backend.fw_graphs) == len(backend.bw_graphs) == 2
    for graph in (backend.fw_graphs[0], backend.bw_graphs[1]):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        # what the compiler wraps, because it runs it twice, is an argument of the wrapper
        names = [str(call.args[:2] if "rng_state" in str(call.target) else call.target) for call in calls]
        found.append(
            (
                sum("_safe_softmax" in name for name in names),
                sum(map(bool, map(is_flash, names))),
                sum("titan.attention." in name for name in names),
            )
        )
    assert found[0] == (softmax, flash, own)
    if mode is ActivationCheckpointMode.full:
        assert found[1] == (softmax, flash, own)
    assert all(again <= once for again, once in zip(found[1], (softmax, flash, own), strict=True))


def test_selective_checkpointing_keeps_every_kind_of_attention() -> None:
    """SDPA's kernels, FlexAttention, by itself or inside a graph, and the kernels for rows of unequal length."""
    import torch.nn.attention.varlen
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch._higher_order_ops.wrap import inductor_compiled_code

    operators = [
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.titan.attention.default,
        flex_attention,
        inductor_compiled_code,
    ]
    assert [is_kept(operator, {}, "forward") for operator in operators] == [True] * len(operators)
    assert not is_kept(torch.ops.aten.silu.default, {}, "forward")


FLEX = {
    "kept by operator": (1, (*mesh(), "activation_checkpoint=selective")),
    "compiled": (1, (*mesh(), "compile=inductor", "compile.backend=aot_eager", "activation_checkpoint=selective")),
    "fsdp, compiled": (2, (*mesh(dp_shard=2), "compile=inductor", "compile.backend=aot_eager")),
    "all keys gathered": (2, mesh(cp=2)),
    "all keys gathered, in order": (2, (*mesh(cp=2), *options("cp_head_tail=false"))),
    "heads exchanged": (2, (*mesh(cp=2), *options("cp_method=all_to_all"))),
    "pipeline": (2, mesh(pp=2)),
}


SLOW = ("fsdp, compiled", "all keys gathered, in order", "pipeline")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FLEX])
def test_flex_attention_trains_as_the_mask_does(
    pools: Callable[[int], RankPool], packed_file: Path, record: Callable[..., Record], layout: str
) -> None:
    """Losses, gradients and weights are those of one process with the mask, to rounding: the same code as on CUDA."""
    world_size, overrides = FLEX[layout]
    documents = "data.mask_documents=true"
    found = pools(world_size).run(record_flex, world_size, (*overrides, documents), packed_file)[0]
    difference = compare_records(found, record(1, *mesh(), documents))
    assert difference.loss < 1e-5
    assert max(difference.grad_norm, difference.gradient, difference.weight) < 1e-4


@pytest.mark.parametrize("kind", ["causal", "all", "documents"])
def test_the_ring_without_a_fused_kernel_is_the_one_with_it(kind: str) -> None:
    """What the ring computes in full on CUDA, for documents and in float32, equals PyTorch's kernel for CPUs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 12, 8, generator=generator) for _ in range(4))
    bias, causal = None, kind == "causal"
    if kind == "documents":
        starts, positions = torch.tensor([[0] * 5 + [5] * 7, [0] * 12]), torch.arange(12)
        bias = torch.zeros(2, 1, 12, 12).masked_fill_(~visible_keys(starts, positions, positions), -torch.inf)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = fused(q, k, v, 0.0, causal, attn_mask=bias)
    found = _attend_in_full(q, k, v, causal, bias)
    torch.testing.assert_close(found, tuple(expected))
    wanted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, *expected, 0.0, causal, attn_mask=bias
    )
    torch.testing.assert_close(_backward_in_full(grad, q, k, v, *expected, causal, bias), tuple(wanted))


def on_cuda(attention: Attention, shape: AttentionShape) -> tuple[torch.device, CausalAttention]:
    """Return a GPU and attention on it; skips where the GPU, or a package, is not there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device, module = torch.device("cuda", 0), CausalAttention()
    try:
        apply_attention(module, attention, shape, device)
    except ConfigError as error:
        pytest.skip(str(error))
    return device, module


def make_inputs(device: torch.device, queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of eight heads, keys and values of two, as a block makes them."""
    generator = torch.Generator(device).manual_seed(queries)
    q, k, v = (
        torch.randn(2, length, heads, 64, generator=generator, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for length, heads in ((queries, 8), (keys, 2), (keys, 2))
    )
    return q, k, v


def assert_is_attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
    """Hold an output and its gradients against the formula in float32, to what 16 bits can hold."""
    inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
    full, key, value = inputs[0], *(x.repeat_interleave(4, 1) for x in inputs[1:])
    scores = (full @ key.transpose(-1, -2) / 8).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.linspace(-1, 1, expected.numel(), device=out.device).view_as(expected)
    found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        assert F.cosine_similarity(mine.float().flatten(), theirs.flatten(), 0) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (256, 512), (192, 512)])
@pytest.mark.parametrize("attention", [a for a in Attention if a not in (Attention.flex, Attention.cpu)])
@pytest.mark.usefixtures("fresh_compiler")
def test_every_kernel_is_causal_on_a_gpu(attention: Attention, queries: int, keys: int, is_compiled: bool) -> None:
    """In bfloat16 with fewer kv heads, for whole rows and for queries at the end of the keys, eager and compiled."""
    device, module = on_cuda(attention, AttentionShape(8, 2, 64, torch.bfloat16, False, ContextMethod.allgather))
    q, k, v = make_inputs(device, queries, keys, torch.bfloat16)
    function = torch.compile(attend, fullgraph=True) if is_compiled else attend
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    assert_is_attention(function(q, k, v, None, module.kernel), q, k, v, visible)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("attention", [Attention.default, Attention.flex, Attention.efficient, Attention.math])
@pytest.mark.usefixtures("fresh_compiler")
def test_documents_are_kept_apart_on_a_gpu(attention: Attention, is_compiled: bool) -> None:
    """The right attention inside documents, and not one bit of another's output changes with a document's keys."""
    device, module = on_cuda(attention, AttentionShape(8, 2, 64, torch.bfloat16, True, None))
    q, k, v = make_inputs(device, 600, 600, torch.bfloat16)
    starts = torch.tensor([0] * 150 + [150] * 250 + [400] * 200, device=device).expand(2, -1)
    positions = torch.arange(600, device=device)
    function = torch.compile(attend, fullgraph=True) if is_compiled else attend
    visible = module.visible(starts, positions)
    if attention in (Attention.default, Attention.flex):
        assert isinstance(visible, type(visible_tiles(starts, positions, 600)))
    out = function(q, k, v, visible, module.kernel)
    assert_is_attention(out, q, k, v, visible_keys(starts, positions, positions))
    with torch.no_grad():
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, 150:400] += 1
        other = function(*changed, visible, module.kernel)
    assert other[:, :, :150].equal(out[:, :, :150])
    assert other[:, :, 400:].equal(out[:, :, 400:])
    assert not other[:, :, 150:400].equal(out[:, :, 150:400])
