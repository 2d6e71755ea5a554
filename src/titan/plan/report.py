"""A plan as text for a terminal, and as a table for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import fields

from titan.config.degrees import accumulation_steps, describe_degrees, pipeline_microbatches
from titan.config.schema import ActivationCheckpointMode, Float8Recipe
from titan.plan.planner import GIB, Plan

_MEMORY = {
    "parameters": "this rank's shards, float32",
    "optimizer": "two moments of each",
    "gradients": "of the shards, float32",
    "whole_gradients": "waiting for the step's last microbatch",
    "activations": "from forward to backward",
    "logits": "of the loss; or a block computed again, if that is more",
    "gathered": "weights that FSDP has gathered, gradients on their way",
    "exchanged": "what pipeline stages receive and hand on",
    "overhead": "what the allocator reserves beyond",
}
_TIME = {
    "products": "matrix products",
    "attention": "of a causal mask",
    "elementwise": "norms, rotary positions, silu, casts",
    "loss": "over the words",
    "tensor_parallel": "exchanges along tp",
    "context_parallel": "exchanges along cp",
    "fsdp": "weights and gradients, where nothing hides them",
    "pipeline": "handing on to other stages",
    "idle": "the pipeline's bubble",
    "host": "operations not handed out in time",
    "optimizer": "the update",
}


def describe(plan: Plan) -> Iterator[str]:
    """Return the plan as lines."""
    yield from _heading(plan)
    yield ""
    yield f"memory of the fullest rank{_which(plan)}"
    yield from _columns([(name, f"{gib:.2f} GiB", what) for name, gib, what in memory_rows(plan)])
    yield f"  {_verdict(plan)}"
    if plan.memory.host:
        yield f"  and {plan.memory.host / GIB:.2f} GiB of a rank in the CPU's memory (parallelism.cpu_offload)"
    yield ""
    yield from _time(plan)
    yield ""
    yield "assumed"
    rows = [(name, f"{value:g}") for name, value in (*device_rows(plan), *plan.assumptions.describe())]
    half = (len(rows) + 1) // 2
    yield from _columns(
        [
            (*left, *(rows[half + index] if half + index < len(rows) else ("", "")))
            for index, left in enumerate(rows[:half])
        ],
        left=(0, 2),
    )
    for note in (*plan.notes, *limits(plan)):
        yield f"  {note}"


def memory_rows(plan: Plan) -> list[tuple[str, float, str]]:
    """Return the items of the memory: name, GiB, what it is."""
    items = [(name, getattr(plan.memory, name) / GIB, what) for name, what in _MEMORY.items()]
    return [item for item in items if item[1]] + [("total", plan.memory_gib, "what PyTorch reserves at its peak")]


def time_rows(plan: Plan) -> list[tuple[str, float, str]]:
    """Return what a step's time goes into: name, seconds, what it is."""
    if plan.timing is None:
        return []
    items = [(name, getattr(plan.timing, name), what) for name, what in _TIME.items()]
    return [item for item in items if item[1]] + [("step", plan.timing.step, "")]


def device_rows(plan: Plan) -> list[tuple[str, float]]:
    """Return what is taken from the device's data sheet."""
    device = plan.device
    shown = [field.name for field in fields(device) if field.name.endswith(("tflops", "bandwidth", "gib"))]
    return [(name, value) for name in shown if (value := getattr(device, name)) is not None]


def limits(plan: Plan) -> Iterator[str]:
    """Return what the plan leaves out, as far as it concerns this config."""
    config = plan.config
    if not plan.device.is_peak_known:
        yield "nobody knows the device's peak: matmul_efficiency is in TFLOP/s"
    if plan.device.name == "cpu":
        yield "the memory is titan's own: Python and PyTorch take some 0.3 GiB of each process beside"
    if config.data.mask_documents:
        yield "documents are kept apart: attention is counted as if each row were one, so it is an upper bound"
    if config.float8.recipe is not Float8Recipe.none and config.float8.auto_filter_small_kn:
        yield "float8.auto_filter_small_kn is not counted: all that fits is taken for float8"
    if config.float8.recipe is not Float8Recipe.none and not plan.device.has_float8:
        yield f"{plan.device.name} has no float8 units: the products are counted in {config.training.param_dtype.name}"
    if config.activation_checkpoint.mode is ActivationCheckpointMode.memory_budget:
        yield "activation_checkpoint.memory_budget: taken for a share of the way from full to none"
    yield "not counted: reading data, checkpoints, validation, and ranks that are slower than others"


def describe_layout(plan: Plan) -> str:
    """Return degrees, schedule, batch and recomputing in one line."""
    config, settings = plan.config, plan.config.parallelism
    parts = [describe_degrees(settings)]
    if settings.pp > 1:
        parts.append(settings.pp_schedule_csv or settings.pp_schedule.name)
    parts.append(f"recompute {config.activation_checkpoint.mode.name}")
    if config.float8.recipe is not Float8Recipe.none:
        parts.append(f"float8 {config.float8.recipe.name}")
    return ", ".join(parts)


def to_html(plan: Plan) -> str:
    """Return the plan as HTML for a notebook."""
    heading = "<br>".join(html.escape(line) for line in _heading(plan))
    memory = _html_table("memory of the fullest rank", "GiB", memory_rows(plan))
    time = _html_table("a step", "s", time_rows(plan)) if plan.timing else ""
    rates = "<br>".join(html.escape(line.strip()) for line in _rates(plan))
    return f"<p>{heading}</p>{memory}<p>{html.escape(_verdict(plan))}</p>{time}<p>{rates}</p>"


def _html_table(title: str, unit: str, rows: Sequence[tuple[str, float, str]]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td align='right'>{value:.2f}</td><td>{html.escape(what)}</td></tr>"
        for name, value, what in rows
    )
    return f"<table><tr><th>{title}</th><th>{unit}</th><th></th></tr>{body}</table>"


def _heading(plan: Plan) -> Iterator[str]:
    config, device = plan.config, plan.device
    training, cluster = config.training, config.cluster
    yield f"model      {config.model.name}, {plan.parameters:,} parameters, {plan.flops_per_token:.3e} FLOPs a token"
    yield f"cluster    {cluster.nodes} x {cluster.devices_per_node} {device.name} ({device.note or 'as given'})"
    yield f"layout     {describe_layout(plan)}"
    pieces = pipeline_microbatches(config) if config.parallelism.pp > 1 else 1
    count = pieces * accumulation_steps(config)
    rows = training.local_batch_size // pieces
    yield (
        f"batch      {training.global_batch_size:,} rows x {training.seq_len:,} tokens a step, "
        f"{count} microbatch{'es' * (count != 1)} of {rows} row{'s' * (rows != 1)} on each data rank, "
        f"{training.param_dtype.name}"
    )


def _which(plan: Plan) -> str:
    if plan.config.parallelism.pp == 1:
        return ""
    blocks = sum(len(stage.blocks) for stage in plan.stages)
    ends = [name for name in ("embedding", "output") if any(getattr(stage, f"has_{name}") for stage in plan.stages)]
    stages = f" in {len(plan.stages)} stages" if len(plan.stages) > 1 else ""
    return f", pp {plan.fullest_rank}: {blocks} blocks{stages}{''.join(f', {end}' for end in ends)}"


def _verdict(plan: Plan) -> str:
    there = f"{plan.available_gib:.1f} GiB there are"
    if plan.device.name != "cpu":
        there += f" ({plan.device.memory_gib:g} less {plan.assumptions.outside_gib:g} that are not PyTorch's)"
    left = plan.available_gib - plan.memory_gib
    return f"{there}: " + (
        f"it fits, {left:.1f} GiB are left" if plan.fits else f"it does NOT fit, {-left:.1f} GiB lack"
    )


def _time(plan: Plan) -> Iterator[str]:
    if plan.timing is None:
        yield f"step       not predicted: nobody knows the peak of --device {plan.device.name}"
        yield "           --peak-tflops N, or --calibrate <run.dir> with a run on the same machine"
        return
    step = plan.timing.step
    yield "a step of the slowest rank"
    yield from _columns([(name, f"{s:.3f} s", f"{s / step:6.1%}", what) for name, s, what in time_rows(plan)], (0, 3))
    yield from _rates(plan)
    axes = [f"{axis} {_size(count)}" for axis, count in plan.timing.traffic.items() if count]
    if axes:
        yield f"  a rank receives in a step: {', '.join(axes)}"


def _rates(plan: Plan) -> Iterator[str]:
    if plan.timing is None:
        return
    total, each, mfu = plan.tokens_per_second, plan.tokens_per_second_per_device, plan.mfu
    has_float8 = plan.config.float8.recipe is not Float8Recipe.none
    of = f" of {plan.device.peak_tflops:g} TFLOP/s{', the peak of bfloat16' * has_float8}"
    shown = f", mfu {mfu:.1%}{of}" if mfu is not None else ""
    yield f"  {total:,.0f} tokens/s, {each:,.0f} a device{shown}"
    if plan.timing.bubble:
        yield f"  the pipeline stands idle for {plan.timing.bubble:.1%} of the step"


def _columns(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = (0, 2)) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
