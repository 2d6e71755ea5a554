"""The memory of a plan, against the rank that titan builds and the activations that it keeps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.parallel.layouts import SMALL
from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine, world_size
from titan.config.schema import ActivationCheckpointMode, Dtype, Float8Recipe, ReshardAfterForward, TitanConfig
from titan.models.llama import Llama
from titan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan.parallel.precision import apply_mixed_precision
from titan.plan.assumptions import Assumptions
from titan.plan.memory import block_bytes, is_checkpointed, loss_bytes, rank_memory
from titan.plan.rank import Shapes, stages_of
from titan.simulate import simulate

LAYOUTS = [
    ("cluster.devices_per_node=4",),
    ("cluster.devices_per_node=6", "training.global_batch_size=12"),
    ("cluster.devices_per_node=8", "parallelism.tp=2", "parallelism.cp=2"),
    ("cluster.devices_per_node=8", "parallelism.dp_replicate=2", "parallelism.tp=4"),
    ("cluster.devices_per_node=4", "parallelism.pp=2", "training.local_batch_size=4", "model.tie_embeddings=true"),
    ("cluster.devices_per_node=8", "parallelism.pp=2", "parallelism.pp_schedule=Interleaved1F1B", "parallelism.tp=2",
     "training.local_batch_size=4", "parallelism.pp_less_first=0", "parallelism.pp_less_last=0"),
    ("cluster.devices_per_node=3", "optimizer.state_dtype=bfloat16", "training.global_batch_size=6"),
]  # fmt: skip


def resolved(*overrides: str) -> TitanConfig:
    """Return a checked config of a simulated cluster."""
    return check_config(compose(["cluster=simulated", *overrides]), Machine())


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_states_are_those_of_the_rank_that_titan_builds(layout: tuple[str, ...]) -> None:
    """Along every pipeline rank the largest shards, moments and gradients equal the plan's, to the byte."""
    config = resolved(*SMALL, *layout)
    built: dict[int, list[tuple[int, int, int]]] = {}
    for rank in range(world_size(config.cluster)):
        found = simulate(replace(config, cluster=replace(config.cluster, simulated_rank=rank)))
        sizes = (found.weights_bytes, found.optimizer_bytes, found.gradients_bytes)
        built.setdefault(found.coordinates["pp"], []).append(sizes)
    rotary = config.training.seq_len * (config.model.dim // config.model.n_heads) * 4
    for rank, sizes in built.items():
        memory = rank_memory(config, rank, Assumptions())
        assert (memory.parameters - rotary, memory.optimizer, memory.gradients) == max(sizes)


@pytest.mark.parametrize("recipe", ["llama3_8b_8gpu", pytest.param("llama3_405b_512gpu", marks=pytest.mark.slow)])
def test_the_recipes_states_and_gathered_weights(recipe: str) -> None:
    """At full scale too; and the largest group of weights that is gathered has the numbers that the plan counts."""
    config = resolved(f"experiment={recipe}")
    found = simulate(config)
    shapes = Shapes(config)
    assert found.parameters == shapes.shard_numbers(stages_of(config)[0])
    ends = [shapes.words * config.model.dim * stage.has_embedding for stage in stages_of(config)[0]]
    heads = [(shapes.words + 1) * config.model.dim * stage.has_output for stage in stages_of(config)[0]]
    assert found.largest_gathered_bytes == 2 * max(shapes.block_numbers, *ends, *heads)


@functools.cache
def small_config() -> TitanConfig:
    """Return a model of two blocks in bfloat16, with heads of 64 numbers."""
    overrides = ("model.dim=256", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4", "model.vocab_size=512",
                 "training.seq_len=64", "training.local_batch_size=2", "training.param_dtype=bfloat16",
                 "cluster.devices_per_node=1")  # fmt: skip
    return check_config(compose(overrides), Machine())


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as PyTorch's kernel on CUDA keeps it: input and root, and nothing between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, root)
        return (x * root).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        _, weight, _ = ctx.saved_tensors
        return grad, torch.zeros_like(weight), None


class _Alive(TorchDispatchMode):
    """Adds up the memory of what operations have made and is still there."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out


@pytest.fixture
def fused_norm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The norm of a GPU, on a CPU."""
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight, self.eps))
    return


@pytest.mark.parametrize("mode", ["none", "selective", "every_nth", "full"])
@pytest.mark.usefixtures("fused_norm")
def test_activations_are_those_that_the_model_keeps(mode: str) -> None:
    """After a forward pass of the model as much memory is alive as the plan says, within 1 %.

    In bfloat16 with heads of 64 numbers and as many kv heads, where a CPU's kernels keep what a GPU's keep.
    """
    config = small_config()
    recompute = replace(config.activation_checkpoint, mode=ActivationCheckpointMode[mode])
    config = replace(config, activation_checkpoint=recompute)
    model = Llama(config.model, config.training.seq_len)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.to(torch.bfloat16).init_buffers("cpu")
    model.leaves_output = True
    apply_activation_checkpoint(model, recompute.mode, recompute.every)
    tokens = torch.randint(512, (2, 64))
    alive = _Alive([*model.parameters(), *model.buffers(), tokens])
    with alive:
        out = model(tokens)
    shapes = Shapes(config)
    blocks = sum(block_bytes(shapes, is_checkpointed(config, block)).saved for block in range(2))
    ends = 2 * out.nbytes  # what goes into the last norm and what comes out
    assert blocks + ends == pytest.approx(sum(alive.sizes.values()), rel=0.01)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.usefixtures("fused_norm")
def test_a_single_rank_keeps_what_its_weights_were_cast_to(mode: str) -> None:
    """Of blocks that are not computed again, until the backward pass: as many bytes alive as planned, within 1 %."""
    config = small_config()
    recompute = replace(config.activation_checkpoint, mode=ActivationCheckpointMode[mode])
    in_several = replace(config.training, global_batch_size=8)
    config = replace(config, activation_checkpoint=recompute, training=in_several)
    alive = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = Llama(config.model, config.training.seq_len)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        model.to(dtype).init_buffers("cpu")
        model.leaves_output = True
        apply_activation_checkpoint(model, recompute.mode, recompute.every)
        apply_mixed_precision(model, torch.bfloat16)
        tokens = torch.randint(512, (2, 64))
        sizes = _Alive([*model.parameters(), *model.buffers(), tokens])
        with sizes:
            out = model(tokens)
        alive[dtype] = sum(sizes.sizes.values())
        del out
    shapes, memory = Shapes(config), rank_memory(config, 0, Assumptions())
    cast = alive[torch.float32] - alive[torch.bfloat16]
    again = shapes.block_numbers * shapes.bytes if mode == "full" else 0  # one block, which is cast later
    matrix = max(rows * columns for rows, columns in shapes.matrices.values()) * shapes.bytes
    assert memory.gathered - matrix - again == pytest.approx(cast, rel=0.01, abs=2 * config.model.dim)
    assert memory.whole_gradients == 0  # micro-batches are added up in the gradients themselves


def test_what_each_option_saves() -> None:
    """Options that are there to save memory save the item that they are about, and by how much they should."""
    base = resolved("cluster.devices_per_node=8", "model=llama3_8b", "training.seq_len=8192",
                    "training.local_batch_size=2")  # fmt: skip

    def memory(**more: Any) -> Any:
        config = base
        for name, value in more.items():
            group, key = name.split("__")
            config = replace(config, **{group: replace(getattr(config, group), **{key: value})})
        settings = replace(config.parallelism, dp_shard=8 // config.parallelism.tp)
        return rank_memory(replace(config, parallelism=settings), 0, Assumptions())

    plain, modes = memory(), ActivationCheckpointMode
    assert memory(optimizer__state_dtype=Dtype.bfloat16).optimizer == plain.optimizer / 2
    full, half, some = (
        memory(activation_checkpoint__mode=mode).activations for mode in (modes.full, modes.every_nth, modes.selective)
    )
    assert full < some < plain.activations
    assert half == pytest.approx((plain.activations + full) / 2)
    budget = memory(
        compile__enable=True, activation_checkpoint__mode=modes.memory_budget, activation_checkpoint__memory_budget=0.0
    )
    assert budget.activations == full
    assert memory(parallelism__reshard_after_forward=ReshardAfterForward.never).gathered > 5 * plain.gathered
    offloaded = memory(parallelism__cpu_offload=True)
    assert offloaded.optimizer == 0
    assert offloaded.host == pytest.approx(16 * 8_030_261_248 / 8, rel=1e-3)
    float8 = {"float8__recipe": Float8Recipe.tensorwise}
    assert memory(**float8, float8__fsdp_all_gather=True).gathered < memory(**float8).gathered
    uncut = memory(parallelism__tp=2, parallelism__sequence_parallel=False)
    assert memory(parallelism__tp=2).activations < uncut.activations
    assert memory(parallelism__tp=2).logits < memory(parallelism__tp=2, parallelism__loss_parallel=False).logits
    waiting = memory(training__global_batch_size=32)
    assert waiting.whole_gradients == pytest.approx(4 * 8_030_261_248, rel=1e-3)
    assert plain.whole_gradients == 0


def test_the_loss_takes_what_it_makes() -> None:
    """All logits at once: the softmax and two gradients, in float32; in chunks a fraction of that."""
    overrides = ("cluster.devices_per_node=1", "model=llama3_8b", "training.seq_len=8192",
                 "training.local_batch_size=4")  # fmt: skip
    whole = Shapes(resolved(*overrides, "training.loss_chunk_size=0"))
    hidden = 2 * whole.tokens * 4096 * whole.bytes
    assert whole.tokens == 4 * 8192
    assert loss_bytes(whole) - hidden == 12 * whole.tokens * 128_256
    assert loss_bytes(Shapes(resolved(*overrides))) < loss_bytes(whole) / 4
