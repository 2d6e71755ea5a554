"""Which layout is fastest: every sensible one is planned, and the ones that fit are ranked.

The training stays the same: the global batch, the length of a row and the model are those of the config. What is
varied is how it is laid out: the degrees, the rows of a microbatch, what is computed again, the pipeline's schedule,
float8. The tree is cut early: a layout whose shards alone are too large is not planned, and where nothing has to be
computed again, computing something again is slower for sure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from titan.config.check import RULES_OF_LAYOUT
from titan.config.degrees import AXES, describe_degrees, resolve_float8, world_size
from titan.config.schema import (
    ActivationCheckpointMode,
    Float8Recipe,
    PipelineSchedule,
    TitanConfig,
)
from titan.plan.assumptions import Assumptions
from titan.plan.devices import Accelerator
from titan.plan.memory import Memory, rank_memory
from titan.plan.planner import GIB, Plan, build_plan
from titan.plan.rank import Shapes
from titan.plan.speed import time_step

_SHORTEST_PART = 2048  # tokens of a row that a rank of cp has at least
_MOST_ROWS = 16
_SHARDS = (8, 64, 512)  # ranks of a group that shares out the weights, beside all
_MOST_STAGES = 8  # of a rank
_MODES = (ActivationCheckpointMode.none, ActivationCheckpointMode.selective, ActivationCheckpointMode.full)


@dataclass(frozen=True)
class Failure:
    """A layout that cannot be."""

    layout: str
    why: str


@dataclass
class Search:
    """What was found."""

    best: list[Plan] = field(default_factory=list)
    """The fastest first."""
    failures: list[Failure] = field(default_factory=list)
    """Why layouts cannot be, the simplest first."""
    fitting: int = 0
    tried: int = 0


def search(
    config: TitanConfig, device: Accelerator, assumptions: Assumptions, best: int = 10, failures: int = 5
) -> Search:
    """Return the fastest layouts of a resolved config's training on its cluster.

    Args:
        config: Resolved.
        device: Of every rank; its peak is known.
        assumptions: What it reaches.
        best: How many to return.
        failures: How many of those that cannot be.
    """
    available = build_plan(config, device, assumptions).available_gib * GIB
    result = Search()
    found: list[tuple[float, TitanConfig]] = []
    reasons: set[object] = set()

    def fails(key: object, layout: str, why: str) -> None:
        if len(result.failures) < failures and key not in reasons:
            reasons.add(key)
            result.failures.append(Failure(layout, why))

    for base in _layouts(config):
        if isinstance(base, Failure):
            fails("rows", base.layout, base.why)
            continue
        layout = describe_degrees(base.parallelism)
        problem = next((problem for rule in RULES_OF_LAYOUT for problem in rule(base)), None)
        if problem is not None:
            fails(problem.what.partition("=")[0], layout, problem.what)
            continue
        too_much: list[tuple[float, str]] = []
        for candidate, memory in _fitting(base, device, assumptions, available):
            result.tried += 1
            if candidate is None:
                too_much.append((memory.total, largest_item(memory)))
                continue
            timing = time_step(candidate, device, assumptions)
            assert timing is not None, "the peak is known"
            found.append((timing.step, candidate))
        if too_much and not (found and found[-1][1].parallelism is base.parallelism):
            needed, most = min(too_much)
            rows = Shapes(base).microbatch_rows
            settings = base.parallelism
            fails(
                (settings.pp, settings.cp, settings.tp, most),
                f"{layout}, microbatches of {rows}",
                f"needs {needed / GIB:.1f} GiB even with activation_checkpoint=full, {most} most of all, "
                f"and there are {available / GIB:.1f}",
            )
    result.fitting = len(found)
    found.sort(key=lambda each: each[0])
    result.best = [build_plan(each, device, assumptions) for _, each in found[:best]]
    return result


def largest_item(memory: Memory) -> str:
    """Return what takes most of a rank's memory."""
    items = [field.name for field in fields(memory) if field.name not in ("host", "overhead")]
    return max(items, key=lambda name: getattr(memory, name))


def overrides_of(config: TitanConfig, given: TitanConfig) -> list[str]:
    """Return what is to be typed behind the given config's command line for this one."""
    settings, before = config.parallelism, given.parallelism
    words = [f"parallelism.{axis}={getattr(settings, axis)}" for axis in AXES]
    for key in ("pp_schedule", "pp_microbatches", "pp_stages_per_rank", "async_tp", "pp_modules", "pp_schedule_csv"):
        value = getattr(settings, key)
        if value != getattr(before, key):
            shown = {True: "true", False: "false", None: "null"}.get(value, getattr(value, "name", value))
            words.append(f"parallelism.{key}={shown}")
    training = config.training
    words.append(f"training.local_batch_size={training.local_batch_size}")
    words.append(f"training.global_batch_size={training.global_batch_size}")
    words.append(f"activation_checkpoint.mode={config.activation_checkpoint.mode.name}")
    if config.float8.recipe is not given.float8.recipe:
        words.append(f"float8.recipe={config.float8.recipe.name}")
    return words


def least_devices(plan: Plan, most: int = 1 << 17) -> int | None:
    """Return the smallest number of devices, of the plan's times powers of two, on which some layout fits."""
    nodes = plan.config.cluster.nodes or 1
    while True:
        cluster = replace(plan.config.cluster, nodes=nodes)
        if world_size(cluster) > most:
            return None
        for base in _layouts(replace(plan.config, cluster=cluster), is_short=True):
            if isinstance(base, Failure) or any(True for rule in RULES_OF_LAYOUT for _ in rule(base)):
                continue
            tried = _fitting(base, plan.device, plan.assumptions, plan.available_gib * GIB)
            if any(candidate is not None for candidate, _ in tried):
                return world_size(cluster)
        nodes *= 2


def _layouts(config: TitanConfig, is_short: bool = False) -> Iterator[TitanConfig | Failure]:
    """Return every way to lay the training out, before recomputing and float8 are chosen; the simplest first."""
    cluster, training, model = config.cluster, config.training, config.model
    ranks, per_node = world_size(cluster), cluster.devices_per_node or 1
    rows = training.global_batch_size
    tps = [n for n in _divisors(per_node) if model.n_kv_heads % n == 0]
    cps = [n for n in _powers(64) if n == 1 or training.seq_len // n >= _SHORTEST_PART]
    pps = [n for n in _powers(64) if n == 1 or 2 * n <= model.n_layers]
    for pp, cp, tp in itertools.product(pps, cps, tps):
        data, rest = divmod(ranks, pp * cp * tp)
        if rest or data < 1:
            continue
        if rows % data:
            why = f"training.global_batch_size = {rows} rows cannot be shared out to {data} data ranks"
            yield Failure(f"pp {pp} x cp {cp} x tp {tp}", why)
            continue
        own = rows // data
        shards = [data, *(n for n in _SHARDS if n < data and data % n == 0)][: 1 if is_short else None]
        for shard in shards:
            for local, pieces, schedule, stages in _pieces(config, pp, own):
                is_async = config.parallelism.async_tp and tp > 1
                settings = replace(
                    config.parallelism, pp=pp, cp=cp, tp=tp, dp_shard=shard, dp_replicate=data // shard,
                    pp_schedule=schedule, pp_microbatches=pieces, pp_stages_per_rank=stages, pp_modules=None,
                    pp_schedule_csv=None, async_tp=is_async,
                )  # fmt: skip
                float8 = replace(config.float8, fsdp_all_gather=None, precompute_scales=None)
                yield replace(
                    config,
                    parallelism=settings,
                    training=replace(training, local_batch_size=local),
                    float8=resolve_float8(float8, settings),
                )


def _pieces(config: TitanConfig, pp: int, own: int) -> Iterator[tuple[int, int, PipelineSchedule, int]]:
    """Return rows of a micro-batch, microbatches of a pipeline, schedule and stages of a rank."""
    settings = config.parallelism
    if pp == 1:
        for local in sorted({*_powers(_MOST_ROWS), config.training.local_batch_size}):
            if own % local == 0:
                yield local, settings.pp_microbatches, settings.pp_schedule, settings.pp_stages_per_rank
        return
    layers = config.model.n_layers + settings.pp_less_first + settings.pp_less_last
    for rows in _powers(4):
        pieces, rest = divmod(own, rows)
        if rest or pieces < pp:
            continue
        yield own, pieces, PipelineSchedule["1F1B"], settings.pp_stages_per_rank
        if pieces % pp:
            continue
        for stages in _powers(_MOST_STAGES)[1:]:
            if layers >= 2 * pp * stages:
                yield own, pieces, PipelineSchedule["Interleaved1F1B"], stages
        if not config.compile.enable:
            yield own, pieces, PipelineSchedule["ZBVZeroBubble"], settings.pp_stages_per_rank


def _fitting(
    base: TitanConfig, device: Accelerator, assumptions: Assumptions, available: float
) -> Iterator[tuple[TitanConfig | None, Memory]]:
    """Return of every number format the way that fits with the least recomputing, and its memory.

    None, with the memory that recomputing everything leaves, where none fits.
    """
    ranks = range(base.parallelism.pp)
    looked_at = sorted({0, min(1, len(ranks) - 1), len(ranks) - 1})
    for recipe in _recipes(base, device):
        float8 = replace(base.float8, recipe=recipe, fsdp_all_gather=None, precompute_scales=None)
        changed = replace(base, float8=resolve_float8(float8, base.parallelism))
        least = _fullest(_recomputing(changed, ActivationCheckpointMode.full), looked_at, assumptions)
        if least.total > available:
            yield None, least
            continue
        for mode in _MODES:
            candidate = _recomputing(changed, mode)
            memory = least if mode is _MODES[-1] else _fullest(candidate, looked_at, assumptions)
            if memory.total <= available:
                yield candidate, memory
                break


def _recomputing(config: TitanConfig, mode: ActivationCheckpointMode) -> TitanConfig:
    return replace(config, activation_checkpoint=replace(config.activation_checkpoint, mode=mode))


def _fullest(config: TitanConfig, ranks: list[int], assumptions: Assumptions) -> Memory:
    shapes = Shapes(config)
    return max((rank_memory(config, rank, assumptions, shapes=shapes) for rank in ranks), key=lambda each: each.total)


def _recipes(config: TitanConfig, device: Accelerator) -> list[Float8Recipe]:
    given = config.float8.recipe
    if not device.has_float8 or not config.compile.enable:
        return [given]
    return list(
        dict.fromkeys([Float8Recipe.none, given if given is not Float8Recipe.none else Float8Recipe.tensorwise])
    )


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
