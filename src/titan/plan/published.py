"""What TorchTitan published of its runs, and what a plan says of the same.

The runs are written as titan's configs, so they go through all that a plan of a user's goes through. Where the
program was another (`titan.plan.assumptions.TORCHTITAN_2024`), or its defaults, that is stated here: all logits at once
(loss_chunk_size=0), FlashAttention 2, as many microbatches in a pipeline as it has ranks, keys and values gathered
under context parallelism.

The two constants that are fitted are fitted to the first row alone. `python -m titan.plan published` prints the table.

A second set of rows is of June 2025, by a later program, and a third of titan itself on one GPU; no constant was chosen
by them.

Source:
    https://github.com/pytorch/torchtitan/tree/main/benchmarks: llama3_h100_202412_torchtitan.md (tables 1 to 6),
    asyncTP_llama3_h100_2025-06_torchtitan.md, llama3-8b_h200_202506_trainy-whitefiber.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from titan.config.check import check_config
from titan.config.degrees import Machine, world_size
from titan.config.keys import schema_keys
from titan.config.load import compose
from titan.config.schema import TitanConfig
from titan.plan.assumptions import TITAN, TORCHTITAN_2024, TORCHTITAN_2025, Assumptions, System
from titan.plan.calibration import fit
from titan.plan.devices import find_device
from titan.plan.planner import Plan, build_plan

MEMORY_BOUND = 0.15
"""How far a plan's memory may be off."""
SPEED_BOUND = 0.25
"""How far its tokens/s may be off."""


@dataclass(frozen=True)
class Row:
    """A published run."""

    table: str
    """Where it is published."""
    name: str
    overrides: tuple[str, ...]
    tokens_per_second: float
    """Of a GPU."""
    memory_gib: float | None = None
    device: str = "h100_96gb"


# Values and no choices of groups beside cluster and model, so that few compositions serve all rows.
_COMMON = ("cluster=simulated", "cluster.devices_per_node=8", "training.loss_chunk_size=0", "training.attention=flash")
_COMPILED = ("compile.enable=true", "compile.loss=false")
_FLOAT8 = (*_COMPILED, "float8.recipe=tensorwise")
_SMALL = (*_COMMON, "model=llama3_8b", "training.seq_len=8192", "training.local_batch_size=2",
          "activation_checkpoint.mode=selective")  # fmt: skip
_LONG = (*_COMMON, *_FLOAT8, "model=llama3_8b", "training.local_batch_size=1",
         "activation_checkpoint.mode=full")  # fmt: skip
_70B = (*_COMMON, *_FLOAT8, "model=llama3_70b", "parallelism.tp=8", "cluster.nodes=32",
        "training.seq_len=8192", "training.local_batch_size=16", "activation_checkpoint.mode=full")  # fmt: skip
_405B = (*_COMMON, *_FLOAT8, "model=llama3_405b", "parallelism.tp=8", "parallelism.pp=8",
         "parallelism.pp_microbatches=8", "parallelism.async_tp=true", "cluster.nodes=64",
         "activation_checkpoint.mode=full")  # fmt: skip
_MANY = (*_405B, "training.seq_len=8192", "training.local_batch_size=32")


def _long(model: tuple[str, ...], cp: int, *others: str) -> tuple[str, ...]:
    return (*model, f"parallelism.cp={cp}", f"training.seq_len={32768 * cp}", *others)


ROWS = (
    Row("1", "8B, 8 GPUs", _SMALL, 5762, 82.4),
    Row("1", "8B, 8 GPUs, compile", (*_SMALL, *_COMPILED), 6667, 77.0),
    Row("1", "8B, 8 GPUs, compile, float8", (*_SMALL, *_FLOAT8), 8532, 76.8),
    Row("2", "8B, 8 GPUs, cp 1, 32,768", _long(_LONG, 1), 3890, 83.9),
    Row("2", "8B, 8 GPUs, cp 2, 65,536", _long(_LONG, 2), 2540, 84.2),
    Row("2", "8B, 8 GPUs, cp 4, 131,072", _long(_LONG, 4), 1071, 84.0),
    Row("2", "8B, 8 GPUs, cp 8, 262,144", _long(_LONG, 8, "model.max_seq_len=262144"), 548, 84.5),
    Row("3", "8B, 128 GPUs", (*_SMALL, "cluster.nodes=16"), 5605, 67.0),
    Row("3", "8B, 128 GPUs, compile", (*_SMALL, *_COMPILED, "cluster.nodes=16"), 6514, 62.0),
    Row("3", "8B, 128 GPUs, compile, float8", (*_SMALL, *_FLOAT8, "cluster.nodes=16"), 8380, 61.8),
    Row("4", "70B, 256 GPUs, tp 8", _70B, 829, 71.9),
    Row("4", "70B, 256 GPUs, tp 8, async", (*_70B, "parallelism.async_tp=true"), 876, 67.6),
    Row("5", "405B, 512 GPUs, tp 8, pp 8, 1F1B", (*_MANY, "parallelism.pp_schedule=1F1B"), 100, 82.5),
    Row("5", "405B, 512 GPUs, tp 8, pp 8, interleaved", (*_MANY, "parallelism.pp_schedule=Interleaved1F1B"), 128, 72.7),
    *(
        Row("6", f"405B, 512 GPUs, tp 8, pp 8, cp {cp}, {32768 * cp:,}",
            _long(_405B, cp, "training.local_batch_size=8", "model.max_seq_len=262144"), speed, memory)
        for cp, speed, memory in ((1, 76, 75.3), (2, 47, 75.9), (4, 31, 77.1), (8, 16, 84.9))
    ),
)  # fmt: skip


_70B_BF16 = tuple(word for word in _70B if not word.startswith("float8"))
_8B_TP = (*_COMMON, *_COMPILED, "model=llama3_8b", "parallelism.tp=8", "cluster.nodes=8",
          "training.seq_len=8192", "training.local_batch_size=12", "activation_checkpoint.mode=selective")  # fmt: skip
_ASYNC = ("parallelism.async_tp=true",)
LATER_ROWS = (
    Row("asyncTP", "70B, 256 H100, tp 8", _70B_BF16, 597.3),
    Row("asyncTP", "70B, 256 H100, tp 8, async", (*_70B_BF16, *_ASYNC), 652.4),
    Row("asyncTP", "70B, 256 H100, tp 8, float8", _70B, 809.8),
    Row("asyncTP", "70B, 256 H100, tp 8, float8, async", (*_70B, *_ASYNC), 942.4),
    Row("asyncTP", "70B, 256 H100, tp 8, rowwise", (*_70B_BF16, "float8.recipe=rowwise"), 599.6),
    Row("asyncTP", "70B, 256 H100, tp 8, rowwise, async", (*_70B_BF16, "float8.recipe=rowwise", *_ASYNC), 624.8),
    Row("asyncTP", "8B, 64 H100, tp 8", _8B_TP, 4378),
    Row("asyncTP", "8B, 64 H100, tp 8, async", (*_8B_TP, *_ASYNC), 4809.4),
    Row("asyncTP", "8B, 64 H100, tp 8, float8", (*_8B_TP, "float8.recipe=tensorwise"), 5078.1),
    Row("asyncTP", "8B, 64 H100, tp 8, float8, async", (*_8B_TP, "float8.recipe=tensorwise", *_ASYNC), 5570.1),
    Row("asyncTP", "8B, 64 H100, tp 8, rowwise", (*_8B_TP, "float8.recipe=rowwise"), 3708.5),
    Row("asyncTP", "8B, 64 H100, tp 8, rowwise, async", (*_8B_TP, "float8.recipe=rowwise", *_ASYNC), 3914.9),
    Row("H200", "8B, 32 H200, float8", (*_SMALL, *_FLOAT8, "cluster.nodes=4"), 10938, 47.96, "h200"),
    Row("H200", "8B, 64 H200, float8", (*_SMALL, *_FLOAT8, "cluster.nodes=8"), 10753, 46.97, "h200"),
)
"""Of June 2025, by a later program: no constant was chosen by them."""

_OWN = ("cluster=simulated", "cluster.devices_per_node=1", "compile.enable=true", "training.seq_len=8192")
_CUT = (*_OWN, "model=llama3_8b", "model.n_layers=8", "training.local_batch_size=2")
OWN_ROWS = (
    Row("H100", "8B cut to 8 layers, 1 GPU", _CUT, 33933, 72.7, "h100"),
    Row("H100", "8B cut to 8 layers, 1 GPU, float8", (*_CUT, "float8.recipe=tensorwise"), 41145, 67.0, "h100"),
    Row("H100", "3.2 1B, 1 GPU", (*_OWN, "model=llama3_2_1b", "training.local_batch_size=4"), 53966, None, "h100"),
)
"""titan's own, from docs/performance.md: no constant was chosen by them."""


@dataclass(frozen=True)
class Compared:
    """A published run beside its plan."""

    row: Row
    plan: Plan

    @property
    def memory_error(self) -> float | None:
        """How much too high the plan's memory is, as a share; None where none was published."""
        return None if self.row.memory_gib is None else self.plan.memory_gib / self.row.memory_gib - 1

    @property
    def speed_error(self) -> float:
        """How much too high the plan's tokens/s are, as a share."""
        assert self.plan.tokens_per_second_per_device is not None, "of an H100"
        return self.plan.tokens_per_second_per_device / self.row.tokens_per_second - 1

    @property
    def missed(self) -> list[str]:
        """What is further off than its bound."""
        errors = (("memory", self.memory_error, MEMORY_BOUND), ("tokens/s", self.speed_error, SPEED_BOUND))
        return [what for what, error, bound in errors if error is not None and abs(error) > bound]


def configs_of(rows: Sequence[Row]) -> list[TitanConfig]:
    """Return published runs as titan's resolved configs."""
    composed: dict[str, TitanConfig] = {}
    found = []
    for row in rows:
        model = next(word for word in row.overrides if word.startswith("model="))
        if model not in composed:  # what takes the time
            composed[model] = compose(["cluster=simulated", model])
        config = composed[model]
        for word in row.overrides:
            config = _set(config, *word.split("="))
        found.append(check_config(config, Machine(gpus=8)))
    return found


def _set(config: TitanConfig, name: str, text: str) -> TitanConfig:
    """Return a config with one key set, as an override would."""
    key = schema_keys()[name]
    if key.is_node:  # the choice of a group, which is composed
        return config
    group, _, leaf = name.partition(".")
    value = key.type[text] if issubclass(key.type, Enum) else text == "true" if key.type is bool else int(text)
    return replace(config, **{group: replace(getattr(config, group), **{leaf: value})})


def fitted_to_first_row() -> Assumptions:
    """Return the assumptions with the two constants that the first row gives."""
    row, (config,) = ROWS[0], configs_of(ROWS[:1])
    tokens = config.training.global_batch_size * config.training.seq_len
    seconds = tokens / (row.tokens_per_second * world_size(config.cluster))
    return fit(config, find_device(row.device), Assumptions(), seconds, row.memory_gib, TORCHTITAN_2024)


def compare(rows: Sequence[Row] = ROWS, system: System = TORCHTITAN_2024) -> list[Compared]:
    """Return rows beside their plans."""
    assumptions = fitted_to_first_row()
    return [
        Compared(row, build_plan(config, find_device(row.device), assumptions, system))
        for row, config in zip(rows, configs_of(rows), strict=True)
    ]


def report() -> Iterator[str]:
    """Return the constants and all comparisons as lines of Markdown."""
    yield from constants()
    yield ""
    yield from table(compare())
    yield ""
    yield "Of June 2025, with the same constants:"
    yield ""
    yield from table(compare(LATER_ROWS, TORCHTITAN_2025))
    yield ""
    yield "Of titan itself, with the same constants:"
    yield ""
    yield from table(compare(OWN_ROWS, TITAN))


def constants() -> Iterator[str]:
    """Return the assumptions of the comparison: the two fitted to the first row, and the others."""
    yield "| assumption | value | |"
    yield "|---|---:|---|"
    for place, (name, value) in enumerate(fitted_to_first_row().describe()):
        yield f"| `{name}` | {value:.3g} | {'fitted to the first row' if place < 2 else 'stated'} |"


def table(compared: Sequence[Compared]) -> Iterator[str]:
    """Return a comparison as lines of Markdown."""
    yield "| table | run | GiB published | planned | off | tokens/s a GPU published | planned | off | |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    for each in compared:
        row, plan = each.row, each.plan
        note = "fitted" if row is ROWS[0] else f"**{' and '.join(each.missed)} missed**" if each.missed else ""
        error = each.memory_error
        memory = f"- | {plan.memory_gib:.1f} | -"
        if error is not None:
            memory = f"{row.memory_gib} | {plan.memory_gib:.1f} | {error:+.1%}"
        speed = f"{row.tokens_per_second:,} | {plan.tokens_per_second_per_device:,.0f} | {each.speed_error:+.1%}"
        yield f"| {row.table} | {row.name} | {memory} | {speed} | {note} |"
