"""Float8: which linears, what is gathered, the scales; emulated on the CPU, which rounds as the hardware does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tests.support.configs import compose
from titan.checkpoint.manifest import Manifest
from titan.checkpoint.state import optimizer_state, weights_state
from titan.checkpoint.store import CheckpointStore
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import CheckpointConfig, CheckpointContent, Float8Config, Float8Recipe
from titan.data.rows import PreparedRows
from titan.errors import ConfigError
from titan.models.llama import LLAMA
from titan.parallel.float8 import Float8Result, apply_float8, check_float8_units, gather_in_float8, group_names
from titan.trainer.build import Trainer, build_trainer, load_data
from titan.trainer.loop import build_meter, run_step, steps_of_batches
from titan.trainer.record import Record, compare_records, record_run
from titan.trainer.resume import load_checkpoint
from titan.verify.parity import BFLOAT16, FLOAT8, is_same

from .layouts import layout_config, open_packed
from .matrix import mesh
from .pool import RankPool

CPU = torch.device("cpu")
WIDE = ("model.dim=64", "model.ffn_dim=128", "optimizer.lr=1e-3", "float8.emulate=true")
"""Wide enough that every tensor-parallel rank has a multiple of 16 keys; and AdamW's first steps move each weight
by the whole learning rate, whichever way rounding turns a small gradient, so that is small."""
BLOCK = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def exchange(tp: int = 1, *shape: str, **options: Any) -> tuple[Float8Result, nn.Module]:
    """Build the small model on meta and exchange its linears."""
    config = layout_config(1, shape)
    with torch.device("meta"):
        model = LLAMA.build(config.model, 32)
    settings = Float8Config(**{"recipe": Float8Recipe.tensorwise, "emulate": True} | options)
    return apply_float8(model, settings, CPU, LLAMA.cut_of, tp), model


def leaves(names: list[str]) -> set[str]:
    """Return names without their blocks."""
    return {".".join(name.split(".")[-2:]) for name in names}


def test_every_linear_is_exchanged_or_named() -> None:
    """All of the blocks and never the output, which is Llama's and stays the class that has the chunked loss."""
    result, model = exchange(1, *WIDE)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*result.converted, *result.skipped} == linears
    assert not set(result.converted) & set(result.skipped)
    assert result.skipped == {"output": "float8.convert_output = false"}
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name in linears}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == set(result.converted)
    assert kinds["output"] == "Linear"


def test_the_output_is_exchanged_where_asked() -> None:
    """And not by leaving it out of a list."""
    result, model = exchange(1, *WIDE, "model.vocab_size=320", convert_output=True)
    assert result.skipped == {}
    assert type(model.get_submodule("output")).__name__ == "Float8Linear"


def test_the_log_names_what_was_skipped_in_groups() -> None:
    """Equal reasons in one line, with blocks as ranges; a filter that fits nothing is said, too."""
    options = {"filter_fqns": ["wk", "wv", "layers.2", "wx"]}
    result, _ = exchange(1, *WIDE, **options)
    assert len(result.converted) == 3 * 5
    assert result.describe(Float8Config(Float8Recipe.tensorwise, emulate=True, **options)) == [
        "float8 tensorwise on 15 linears",
        "float8 leaves layers.0-3.attention.wk (4 x 1 linears): float8.filter_fqns has wk",
        "float8 leaves layers.0-3.attention.wv (4 x 1 linears): float8.filter_fqns has wv",
        "float8 leaves layers.2.attention.wq, wo (2 linears): float8.filter_fqns has layers.2",
        "float8 leaves layers.2.feed_forward.w1, w2, w3 (3 linears): float8.filter_fqns has layers.2",
        "float8 leaves output: float8.convert_output = false",
        "float8.filter_fqns has wx, which names no linear here",
    ]
    assert group_names({f"layers.{i}.a.{w}": "r" for i in (0, 1, 2, 5) for w in ("x", "y")}) == [
        "layers.0-2,5.a.x, y (4 x 2 linears): r"
    ]


@pytest.mark.parametrize(
    ("tp", "kept"), [(1, {*BLOCK, *FEED_FORWARD}), (2, {"attention.wq", "attention.wo", *FEED_FORWARD}), (4, set())]
)
def test_sizes_are_those_of_a_rank(tp: int, kept: set[str]) -> None:
    """With dim 32 and 4 kv heads of 4, two ranks have 8 rows of keys each, and four ranks 8 of queries."""
    result, _ = exchange(tp, "model.dim=32", "model.ffn_dim=64" if tp < 4 else "model.ffn_dim=32")
    assert leaves(result.converted) == kept
    if tp == 2:
        assert result.skipped["layers.0.attention.wk"] == "32 x 8 on a rank is not a multiple of 16"


LARGE = ("model.dim=2048", "model.ffn_dim=8192", "model.n_heads=16", "model.n_kv_heads=4")


@pytest.mark.parametrize(
    ("recipe", "tp", "kept"),
    [
        # rows and columns: wq, wo 2048 x 2048, wk, wv 512 x 2048, w1, w3 8192 x 2048, w2 2048 x 8192
        ("tensorwise", 1, {"attention.wq", "attention.wo", *FEED_FORWARD}),
        ("tensorwise", 2, {"attention.wo", *FEED_FORWARD}),  # wq has 1024 rows then
        ("rowwise", 1, {"feed_forward.w1", "feed_forward.w3"}),  # more than 2048 rows and more than 1024 columns
        ("rowwise", 4, set()),
    ],
)
def test_small_linears_are_left_alone(recipe: str, tp: int, kept: set[str]) -> None:
    """As torchao's tables say: tensorwise up to 1024 rows with 4096 columns, rowwise up to 2048 rows."""
    result, _ = exchange(tp, *LARGE, recipe=Float8Recipe[recipe], auto_filter_small_kn=True)
    assert leaves(result.converted) == kept
    assert "auto_filter_small_kn" in result.skipped["layers.0.attention.wk"]


def test_a_gpu_without_float8_is_refused_by_name() -> None:
    """On the rank, before the data: what the device is, what it would need, and what to type."""
    config, device = Float8Config(Float8Recipe.rowwise), torch.device("cuda", 0)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA A100"),
        pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0(.|\n)*float8\.emulate=true"),
    ):
        check_float8_units(config, device)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)):
        check_float8_units(config, device)
    check_float8_units(Float8Config(Float8Recipe.rowwise, emulate=True), CPU)


def build(packed: Path, *overrides: str) -> Trainer:
    """Return a trainer on two ranks that share the weights."""
    config = layout_config(2, (*WIDE, "float8=tensorwise", "parallelism.dp_shard=2", *overrides))
    return build_trainer(config, CPU, open_packed(packed, config))


def take_steps(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of the next steps."""
    batches = steps_of_batches(trainer, build_meter(trainer))
    results = [run_step(trainer, next(batches)).result.read() for _ in range(steps)]
    batches.close()
    return [(result.loss, result.grad_norm) for result in results]


def gathered_scales(packed: Path) -> tuple[list[float], list[float], list[float], int, int]:
    """Return the scales after a step: titan's, torchao's, each weight's alone; exchanges for them, and in a step."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    trainer = build(packed)
    take_steps(trainer, 1)
    found = gather_in_float8(trainer.parts, trainer.mesh.storage.get_group("fsdp"))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        found.compute_scales()
    theirs = nn.ModuleList()
    for shard in found.shards:
        linear = Float8Linear.from_float(nn.Linear(16, 16, bias=False, device="meta"), shard.linear.config)
        wrapped = WeightWithDynamicFloat8CastTensor(shard.local.clone(), linear.linear_mm_config, torch.float8_e4m3fn)
        weight = DTensor.from_local(wrapped, trainer.mesh.fsdp, [Shard(0)], run_check=False)
        linear.weight = nn.Parameter(weight)
        theirs.append(linear)
    precompute_float8_dynamic_scale_for_fsdp(theirs)
    alone = [448 / weight.full_tensor().abs().max().double() for weight in (shard.parameter for shard in found.shards)]
    with mock.patch("torchao.float8.float8_utils.all_reduce") as on_the_fly:
        take_steps(trainer, 1)
    return (
        [shard.scale.item() for shard in found.shards],
        [linear.weight._local_tensor._precomputed_scale.item() for linear in theirs],
        [scale.float().item() for scale in alone],
        reduce.call_count,
        on_the_fly.call_count,
    )


def test_scales_are_computed_in_one_exchange(pools: Callable[[int], RankPool], packed_file: Path) -> None:
    """To the bit those of torchao's own function, and the largest element's; a gathering then exchanges none."""
    ours, theirs, alone, exchanges, on_the_fly = pools(2).run(gathered_scales, packed_file)[0]
    assert len(ours) == 4 * 7
    assert ours == theirs == alone
    assert (exchanges, on_the_fly) == (1, 0)


def gathered_bytes(packed: Path, *overrides: str) -> list[int]:
    """Return the bytes of every gathering of a step's first forward pass."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    trainer = build(packed, *overrides)
    gather = DefaultAllGather.__call__
    sizes = []

    def noting(self: DefaultAllGather, output_tensor: torch.Tensor, *arguments: Any, **others: Any) -> Any:
        sizes.append(output_tensor.numel() * output_tensor.element_size())
        return gather(self, output_tensor, *arguments, **others)

    with mock.patch.object(DefaultAllGather, "__call__", noting):
        batch = next(steps_of_batches(trainer, build_meter(trainer))).batches[0]
        with torch.no_grad():
            trainer.parts[0](batch.tokens, batch.starts, batch.labels)
    return sizes


def test_a_block_travels_in_float8(pools: Callable[[int], RankPool], packed_file: Path) -> None:
    """A byte for each weight of a block's matrices, and four for each of its norms."""
    matrices, norms = 64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 3, 2 * 64
    float8 = pools(2).run(gathered_bytes, packed_file)[0]
    assert float8.count(matrices + 4 * norms) == 4
    whole = pools(2).run(gathered_bytes, packed_file, "float8.fsdp_all_gather=false")[0]
    assert whole.count(4 * (matrices + norms)) == 4
    assert len(whole) == len(float8)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, mesh(dp_shard=2)), pytest.param(4, mesh(dp_shard=2, tp=2), marks=pytest.mark.slow)],
)
def test_what_is_gathered_in_float8_is_what_is_cast_afterwards(
    record: Callable[..., Record], world_size: int, layout: tuple[str, ...]
) -> None:
    """Cast before they travel, with scales computed before or then, weights train as those that are cast after it."""
    overrides = (*WIDE, "float8=tensorwise", *layout)
    after = record(world_size, *overrides, "float8.fsdp_all_gather=false")
    for others in ((), ("float8.precompute_scales=false",)):
        found = record(world_size, *overrides, *others)
        assert (found.losses, found.grad_norms) == (after.losses, after.grad_norms)
        assert all(torch.equal(found.weights[name], weight) for name, weight in after.weights.items())
        assert found.validation_losses == after.validation_losses


def loaded_back(packed: Path, folder: Path) -> tuple[list[Any], list[Any], bool]:
    """Take two steps, save, take two more, load, and take those again; returns both, and whether tensors are plain."""
    trainer = build(packed, "training.steps=4")
    take_steps(trainer, 2)
    state = weights_state(trainer.parameters) | optimizer_state(trainer.parameters, trainer.optimizer)
    is_plain = all(
        type(tensor.to_local() if isinstance(tensor, DTensor) else tensor) is torch.Tensor for tensor in state.values()
    )
    store = CheckpointStore(folder, CheckpointConfig(keep_latest=0))
    store.save(Manifest(2, 0, "all", "", {}), state, "", in_background=False)
    saved = store.result()
    store.close()
    first = take_steps(trainer, 2)
    load_checkpoint(trainer, store, saved.path, saved.manifest, CheckpointContent.all)  # type: ignore[union-attr]
    return first, take_steps(trainer, 2), is_plain


def test_a_run_that_goes_back_has_the_scales_of_the_weights_it_goes_back_to(
    pools: Callable[[int], RankPool], packed_file: Path, tmp_path: Path
) -> None:
    """In the same process, to the bit; and what is saved knows nothing of float8."""
    first, again, is_plain = pools(2).run(loaded_back, packed_file, tmp_path)[0]
    assert first == again
    assert is_plain


def slow(*case: Any) -> Any:
    """Return a case that waits for make test-slow."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("recipe", "world_size", "layout"),
    [
        ("tensorwise", 2, mesh(dp_shard=2)),
        ("tensorwise", 2, mesh(pp=2)),
        ("rowwise_with_gw_hp", 2, mesh(tp=2)),
        ("rowwise", 2, mesh(dp_shard=2)),
        slow("tensorwise", 2, (*mesh(cp=2), "activation_checkpoint=selective")),
        slow("tensorwise", 2, (*mesh(dp_shard=2), "parallelism.cpu_offload=true")),
        slow("rowwise", 2, (*mesh(tp=2), "compile=inductor")),
        slow("tensorwise", 4, (*mesh(dp_shard=2, tp=2), "compile=inductor", "compile.backend=aot_eager")),
    ],
)
def test_a_recipe_on_a_mesh_stays_near_one_process(
    record: Callable[..., Record], recipe: str, world_size: int, layout: tuple[str, ...]
) -> None:
    """Float8 is what one process has, up to a scale for what a rank multiplies by; and it is not float32."""
    rows = 1 if "parallelism.pp=2" in layout else 2  # a pipeline multiplies them one by one
    one = record(1, *WIDE, f"float8={recipe}", f"training.local_batch_size={rows}")
    found = record(world_size, *WIDE, f"float8={recipe}", *layout)
    difference = compare_records(found, one)
    assert is_same(difference, FLOAT8), difference
    assert found.validation_losses == pytest.approx(one.validation_losses, rel=FLOAT8.loss)
    assert compare_records(one, record(1, *WIDE[:3], *mesh())).loss > 1e-7


OUTPUT = (*WIDE, "model.vocab_size=320", "float8.convert_output=true")
"""As many words as the rows have, and a multiple of 16 on two ranks."""


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ("float8=tensorwise", *mesh(dp_shard=2))),
        (2, ("float8=rowwise", *mesh(tp=2))),
        slow(2, ("float8=tensorwise", *mesh(pp=2), "training.loss_chunk_size=16")),
        slow(2, ("float8=rowwise_with_gw_hp", *mesh(cp=2), "training.loss_chunk_size=7")),
        slow(1, ("float8=tensorwise", *mesh(), "training.param_dtype=bfloat16", "compile=inductor")),
        slow(2, ("float8=tensorwise", *mesh(dp_shard=2), "compile=inductor", "training.loss_chunk_size=16")),
    ],
)
def test_a_float8_output_has_its_loss_in_chunks(
    record: Callable[..., Record], world_size: int, layout: tuple[str, ...]
) -> None:
    """In chunks, on any mesh, compiled or not, it is what all logits at once give one process; and not float32's."""
    recipe = layout[0]
    kept = [setting for setting in layout if setting.startswith("training.param_dtype")]
    rows = 1 if "parallelism.pp=2" in layout else 2
    whole = record(1, *OUTPUT, recipe, *kept, "training.loss_chunk_size=0", f"training.local_batch_size={rows}")
    found = record(world_size, *OUTPUT, *layout)
    difference = compare_records(found, whole)
    assert is_same(difference, FLOAT8), difference
    assert found.validation_losses == pytest.approx(whole.validation_losses, rel=FLOAT8.loss)
    exact = record(1, *OUTPUT, recipe, *kept, "float8.convert_output=false", f"training.local_batch_size={rows}")
    assert compare_records(whole, exact).gradient_of
    assert whole.losses != exact.losses


@pytest.mark.slow
def test_bfloat16_weights_are_cast_from_float32(record: Callable[..., Record]) -> None:
    """Gathered in float8 they are rounded once, gathered in bfloat16 twice: near, and not the same."""
    overrides = (*WIDE, "float8=tensorwise", *mesh(dp_shard=2), "training.param_dtype=bfloat16")
    once, twice = record(2, *overrides), record(2, *overrides, "float8.fsdp_all_gather=false")
    assert 0 < compare_records(once, twice).weight < FLOAT8.weight
    assert compare_records(once, twice).loss < BFLOAT16.loss


STEPS = 200


def learning_curve(cache: Path, *overrides: str) -> Record | None:
    """Train the debug model on Python's own sources and validate on some of its rows."""
    config = compose(
        [
            f"training.steps={STEPS}",
            "training.seq_len=64",
            "training.local_batch_size=2",
            "training.global_batch_size=2",
            "training.param_dtype=bfloat16",
            "data.prepare_workers=1",
            "optimizer.lr=1e-3",
            "lr_scheduler.warmup_steps=20",
            "validation.rows=32",
            "checkpoint=disabled",
            "run.dir=unused",
            "cluster.devices_per_node=1",
            *overrides,
        ]
    )
    config = check_config(config, Machine(cache_dir=str(cache)))
    rows = load_data(config, is_writer=True)
    assert isinstance(rows, PreparedRows)
    return record_run(config, CPU, rows, held_out=rows)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_float8_learns_as_bfloat16_does(pools: Callable[[int], RankPool], cache: Path) -> None:
    """After 200 steps of the debug model both losses, of the last steps' rows and of others, are within 1 %."""
    run = pools(1).run
    plain = run(learning_curve, cache)[0]
    float8 = run(learning_curve, cache, "float8=tensorwise", "float8.emulate=true")[0]
    assert float8.losses != plain.losses
    assert plain.validation_losses[-1] < plain.validation_losses[0] - 2, "it has to learn for this to mean anything"
    assert float8.validation_losses[-1] == pytest.approx(plain.validation_losses[-1], rel=0.01)
    assert sum(float8.losses[-20:]) == pytest.approx(sum(plain.losses[-20:]), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), (*OUTPUT[len(WIDE) :], "compile=inductor")])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_hardware_rounds_as_its_emulation(
    record: Callable[..., Record], packed_file: Path, recipe: str, more: tuple[str, ...]
) -> None:
    """A GPU's float8 products train as the emulated ones do, in bfloat16; the output's and compiled ones too."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    overrides = (*WIDE[:3], f"float8={recipe}", "training.param_dtype=bfloat16", *mesh(), *more)
    emulated = record(1, *overrides, "float8.emulate=true")
    config = layout_config(1, (*overrides, "float8.emulate=true"))
    config.float8.emulate = False
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = record_run(config, torch.device("cuda", 0), open_packed(packed_file, config))
    finally:
        dist.destroy_process_group()
    assert found is not None
    difference = compare_records(found, emulated)
    assert is_same(difference, FLOAT8), difference
