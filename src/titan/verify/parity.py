"""`python -m titan.verify parity`: any layout against one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from titan import worker
from titan.config.check import check_config
from titan.config.degrees import (
    AXES,
    DATA_AXES,
    describe_degrees,
    pipeline_microbatches,
    stages_of_ranks,
    world_size,
)
from titan.config.load import compose, save_config
from titan.config.schema import (
    ActivationCheckpointConfig,
    Attention,
    CheckpointConfig,
    CheckpointMode,
    CompileConfig,
    ContextMethod,
    Device,
    Dtype,
    Float8Recipe,
    ModelConfig,
    ParallelismConfig,
    TitanConfig,
)
from titan.config.vocabulary import count_tokens
from titan.errors import ConfigError, Problem, TitanError
from titan.launch.environment import Rank, current_machine
from titan.launch.local import launch_local
from titan.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.distributed import Store

    from titan.trainer.record import Difference, Record

MOST_RANKS = 64
"""More processes than this on one machine are refused: they would only wait for each other."""
_STEPS_VARIABLE = "TITAN_RECORD_STEPS"


@dataclass(frozen=True)
class Tolerance:
    """The largest differences at which two runs count as the same; all relative, in the units of `Difference`."""

    loss: float
    grad_norm: float
    gradient: float
    weight: float


FLOAT32 = Tolerance(loss=1e-5, grad_norm=1e-4, gradient=1e-4, weight=1e-4)
"""Only the order of sums differs, some of 1e-7 each."""
BFLOAT16 = Tolerance(loss=1e-3, grad_norm=1e-2, gradient=5e-2, weight=5e-2)
"""Each product is rounded to 8 bits (4e-3), and a layout moves where that happens. AdamW makes most of it for the
weights: its first steps move each by the whole learning rate, whichever way its gradient points, however small."""
FLOAT8 = Tolerance(loss=1e-2, grad_norm=1e-1, gradient=3e-1, weight=1e-1)
"""To 3 or 4 bits (6e-2); and tensor parallelism gives each part of a matrix a scale of its own."""


def main(arguments: list[str]) -> bool:
    """Run the command line; returns whether the layout is the same as one process."""
    given = _parse(arguments)
    return parity(given.overrides, given.config_dir, given.steps, given.shrink, given.json, given.keep)


def rank_main(arguments: list[str], job: worker.Job | None = None) -> NoReturn:
    """Be a rank of one of the runs, and end.

    Args:
        arguments: The command line without the program.
        job: What the rank does; None records.
    """
    code = worker.main(arguments, job=job or _record, on_console=False)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def folder_of_runs(keep: str | None, name: str) -> Iterator[Path]:
    """Give a folder to the runs of a proof: `keep`, or a temporary one that only a run that fails leaves behind."""
    folder = Path(keep or tempfile.mkdtemp(prefix=f"titan_{name}_")).absolute()
    is_kept = keep is not None
    try:
        yield folder
    except TitanError as error:
        is_kept = is_kept or not isinstance(error, ConfigError)
        raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


def parity(
    overrides: Sequence[str],
    config_dir: str | None = None,
    steps: int = 3,
    shrink: bool = False,
    as_json: bool = False,
    keep: str | None = None,
) -> bool:
    """Hold a layout against one process; prints what it finds.

    Args:
        overrides: The layout, as for `titan.train`.
        config_dir: A folder of one's own config groups.
        steps: Steps to train, at most those of the config.
        shrink: Whether to shrink the model and the rows to what the layout needs.
        as_json: Print one JSON object and nothing else.
        keep: A folder for the two runs; None takes a temporary one.

    Returns:
        Whether the two are the same.

    Raises:
        ConfigError: If the config is wrong, or not one for a CPU.
        RanksFailed: If a rank fails; its log is kept.
    """
    with folder_of_runs(keep, "parity") as folder:
        layout = build_layout(compose(overrides, config_dir), folder / "layout", shrink)
        reference = build_reference(layout, folder / "one_process")
        steps = min(steps, layout.training.steps)
        say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
        for line in describe_run(layout, shrink, steps):
            say(line)
        records = [
            _run(config, steps, say, title) for title, config in (("one process", reference), ("the layout", layout))
        ]
        report = build_report(layout, records[1], records[0])
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            say("")
            for line in format_report(report):
                say(line)
        return report["verdict"] == "the same"


def build_layout(
    config: TitanConfig,
    directory: Path,
    shrink: bool,
    checkpoint: CheckpointConfig | None = None,
    also: Sequence[ParallelismConfig] = (),
) -> TitanConfig:
    """Return the config as CPU processes of this machine run it, resolved and checked.

    Args:
        config: Composed.
        directory: Of the run.
        shrink: Whether to shrink the model and the rows to what the layout needs.
        checkpoint: What to save and to load; None does neither.
        also: Other layouts that the shrunk model has to fit.

    Raises:
        ConfigError: If it is wrong, or needs more processes than make sense here.
    """
    settings, cluster = config.parallelism, config.cluster
    degrees = [getattr(settings, axis) for axis in AXES]
    if cluster.devices_per_node is None:
        # One process is what there is to compare with, so an open degree becomes 2.
        ranks = math.prod(2 if degree == -1 else max(degree, 1) for degree in degrees)
    else:
        ranks = (cluster.nodes or 1) * cluster.devices_per_node
    if ranks > MOST_RANKS:
        fixed = math.prod(getattr(settings, axis) for axis in AXES if axis not in DATA_AXES)
        raise ConfigError(
            [
                Problem(
                    f"{ranks} ranks are {ranks} processes of this machine, and at most {MOST_RANKS} make sense",
                    "What a layout does shows at small degrees too.",
                    f"cluster.nodes=1 cluster.devices_per_node={2 * fixed}"
                    if 2 * fixed <= MOST_RANKS
                    else "cluster.nodes=1 cluster.devices_per_node=16 parallelism.tp=2   and 2 for the other degrees",
                )
            ]
        )
    config = replace(
        config,
        run=replace(config.run, dir=str(directory)),
        cluster=replace(cluster, nodes=1, devices_per_node=ranks, device=Device.cpu),
        checkpoint=checkpoint or CheckpointConfig(mode=CheckpointMode["disabled"]),
        profiling=replace(config.profiling, enable=False, memory_snapshot=False),
        validation=replace(config.validation, interval=0, sample_prompts=[]),
        training=replace(config.training, attention=Attention.default),  # which kernels there are depends on the device
    )
    if shrink:
        config = shrink_config(config, also)
    # float32 unless the config says otherwise: what a layout changes shows best there
    return check_config(config, replace(current_machine(), gpus=0, has_bfloat16=False))


def build_reference(layout: TitanConfig, directory: Path) -> TitanConfig:
    """Return the same training in one process: no parallelism, nothing compiled, nothing recomputed."""
    training = layout.training
    if layout.float8.recipe is not Float8Recipe.none and layout.parallelism.pp > 1:
        # positions that are multiplied together may share a scale
        training = replace(training, local_batch_size=training.local_batch_size // pipeline_microbatches(layout))
    return replace(
        layout,
        training=training,
        run=replace(layout.run, dir=str(directory)),
        cluster=replace(layout.cluster, devices_per_node=1),
        parallelism=ParallelismConfig(dp_shard=1),
        compile=CompileConfig(),
        activation_checkpoint=ActivationCheckpointConfig(),
        float8=replace(layout.float8, fsdp_all_gather=False, precompute_scales=False),
    )


def shrink_config(config: TitanConfig, also: Sequence[ParallelismConfig] = ()) -> TitanConfig:
    """Return the config with the smallest model and rows that its layout can cut as it cuts the whole ones.

    Args:
        config: To shrink.
        also: Other layouts that have to cut the same model.
    """
    model, layouts = config.model, [config.parallelism, *also]
    tp, cp = (math.lcm(*(getattr(layout, axis) for layout in layouts)) for axis in ("tp", "cp"))
    over_heads = [layout.tp * (layout.cp if layout.cp_method is ContextMethod.all_to_all else 1) for layout in layouts]
    n_kv_heads = min(model.n_kv_heads, max(2, math.lcm(*over_heads)))
    n_heads = n_kv_heads * (model.n_heads // model.n_kv_heads)
    unit = 16 * tp  # float8 wants multiples of 16 on every rank
    n_layers = model.n_layers
    if all(layout.pp_modules is None for layout in layouts):
        n_layers = min(n_layers, max(2, *map(_blocks_of, layouts)))
    tokens = tp * -(-count_tokens(config.tokenizer) // tp)
    parts = cp * 2 * tp
    shape = ModelConfig(
        **{field: getattr(model, field) for field in ("name", "max_seq_len", "norm_eps", "rope_theta", "family")},
        rope_scaling=model.rope_scaling,
        tie_embeddings=model.tie_embeddings,
        dim=16 * n_heads,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=unit * max(1, 32 * n_heads // unit),
        vocab_size=min(model.vocab_size, tokens),
    )
    seq_len = min(config.training.seq_len, parts * max(1, 64 // parts))
    return replace(config, model=shape, training=replace(config.training, seq_len=seq_len))


def _blocks_of(layout: ParallelismConfig) -> int:
    stages = sum(map(len, stages_of_ranks(layout))) if layout.pp > 1 else 1
    return stages + layout.pp_less_first + layout.pp_less_last


def build_report(layout: TitanConfig, record: Record, reference: Record) -> dict[str, Any]:
    """Return what was found, as plain data."""
    from titan.trainer.record import compare_records

    difference = compare_records(record, reference)
    tolerance = tolerance_of(layout)
    return {
        "verdict": "the same" if is_same(difference, tolerance) else "different",
        "model": layout.model.name,
        "parallelism": {key: getattr(value, "name", value) for key, value in asdict(layout.parallelism).items()},
        "ranks": world_size(layout.cluster),
        "dtype": layout.training.param_dtype.name,
        "steps": [
            {"step": step, "loss": loss, "reference_loss": expected, "grad_norm": norm, "reference_grad_norm": wanted}
            for step, (loss, expected, norm, wanted) in enumerate(
                zip(record.losses, reference.losses, record.grad_norms, reference.grad_norms, strict=True), 1
            )
        ],
        "parameters": len(record.weights),
        "difference": asdict(difference),
        "tolerance": asdict(tolerance),
    }


def tolerance_of(config: TitanConfig) -> Tolerance:
    """Return what a config's number formats allow."""
    if config.float8.recipe is not Float8Recipe.none:
        return FLOAT8
    training, narrow = config.training, Dtype.bfloat16
    is_exact = narrow not in (training.param_dtype, training.reduce_dtype, config.optimizer.state_dtype)
    return FLOAT32 if is_exact else BFLOAT16


def is_same(difference: Difference, tolerance: Tolerance) -> bool:
    """Return whether no difference is above its tolerance; one that is no number is."""
    return all(getattr(difference, name) <= allowed for name, allowed in asdict(tolerance).items())


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """Return the report as lines of a table."""
    from titan.trainer.record import apart

    difference, tolerance = report["difference"], report["tolerance"]
    rows: list[tuple[str, str, str, str, str, str]] = [("", "one process", "the layout", "difference", "allowed", "")]
    for row in report["steps"]:
        for title, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
            value, expected = row[key], row[f"reference_{key}"]
            found = apart(value, expected)
            rows.append(
                (
                    f"step {row['step']}  {title}",
                    f"{expected:.7f}",
                    f"{value:.7f}",
                    f"{found:.1e}",
                    f"{tolerance[key]:.0e}",
                    _mark(found, tolerance[key]),
                )
            )
    for title, key in (("gradients of step 1", "gradient"), (f"weights after step {len(report['steps'])}", "weight")):
        rows.append(
            (
                f"{title}, worst of {report['parameters']}",
                "",
                difference[f"{key}_of"],
                f"{difference[key]:.1e}",
                f"{tolerance[key]:.0e}",
                _mark(difference[key], tolerance[key]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        title, *cells = row
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([title.ljust(widths[0]), *aligned]).rstrip()
    yield ""
    yield f"verdict: {report['verdict']}"


def _mark(difference: float, allowed: float) -> str:
    return "" if difference <= allowed else "<-- different"


def describe_run(layout: TitanConfig, shrink: bool, steps: int) -> Iterator[str]:
    """Return what is trained, as lines."""
    model, training = layout.model, layout.training
    yield (
        f"model    {model.name}{', shrunk' if shrink else ''}: dim {model.dim}, {model.n_layers} blocks, "
        f"{model.n_heads} heads, {model.n_kv_heads} kv heads, {model.vocab_size:,} words"
    )
    ranks = world_size(layout.cluster)
    yield f"layout   {describe_degrees(layout.parallelism)} = {ranks} rank{'s' * (ranks != 1)}"
    yield (
        f"batch    {training.global_batch_size} rows x {training.seq_len} tokens, {steps} steps, "
        f"{training.param_dtype.name}"
    )


def _run(config: TitanConfig, steps: int, say: Any, title: str) -> Record:
    from titan.trainer.record import Record

    directory = RunDirectory(Path(config.run.dir))
    directory.path.mkdir(parents=True, exist_ok=True)
    save_config(config, directory.config)
    began = time.monotonic()
    before = dict(os.environ)
    os.environ |= {_STEPS_VARIABLE: str(steps), "OMP_NUM_THREADS": "1"}
    try:
        launch_local(directory, world_size(config.cluster), 0, ("titan.verify", "record"))
    finally:
        os.environ.clear()
        os.environ.update(before)
    say(f"{title:<12} {time.monotonic() - began:.1f} s")
    return Record.load(_record_file(directory))


def _record(config: TitanConfig, rank: Rank, store: Store | None) -> float | None:
    """The job of a rank."""
    import torch.distributed as dist

    from titan.trainer.record import record_run

    device, data = worker.join_ranks(config, rank, store)
    record = record_run(config, device, data, int(os.environ[_STEPS_VARIABLE]))
    if record is not None:
        record.save(_record_file(RunDirectory(Path(config.run.dir))))
    dist.destroy_process_group()
    return record.losses[-1] if record is not None else None


def _record_file(directory: RunDirectory) -> Path:
    return directory.path / "record.pt"


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = argparse.ArgumentParser(
        prog="python -m titan.verify parity",
        description="Hold the composed layout against one process, on the CPU. Exit code 0: the same, 1: different.",
    )
    command.add_argument("overrides", nargs="*", metavar="group=option|key=value", help="as for titan.train")
    command.add_argument(
        "--steps", type=_positive, default=3, help="steps to train, at most training.steps (default: 3)"
    )
    command.add_argument("--shrink", action="store_true", help="shrink model and rows to what the layout needs")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--keep", metavar="DIR", help="keep both runs, their logs and records in this folder")
    command.add_argument("--config-dir", metavar="DIR", help="a folder of config groups of your own")
    return command.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number
