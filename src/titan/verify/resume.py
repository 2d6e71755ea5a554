"""`python -m titan.verify resume`: a run that was interrupted is the run that was not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from titan import worker
from titan.checkpoint.manifest import step_folder, versions
from titan.config.degrees import describe_degrees, world_size
from titan.config.load import compose
from titan.config.schema import CheckpointConfig, CheckpointMode, TitanConfig
from titan.errors import ConfigError, Problem, Stopped
from titan.launch.dispatch import freeze
from titan.launch.environment import Rank
from titan.launch.local import launch_local
from titan.run_directory import RunDirectory, utc_now
from titan.verify import parity
from titan.verify.parity import Tolerance, build_layout, describe_run, tolerance_of

if TYPE_CHECKING:
    from torch.distributed import Store

    from titan.trainer.build import Trainer

_STOP_AFTER, _COPY = "TITAN_STOP_AFTER", "TITAN_COPY_STATE"
ROWS = "rows.jsonl"
"""In a run directory here: the digest of the rows of every step, as the ranks were given them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was compared."""

    what: str
    is_same: bool
    detail: str


def main(arguments: list[str]) -> bool:
    """Run the command line; returns whether the interrupted run is the undisturbed one."""
    given = _parse(arguments)
    return prove(
        given.overrides,
        given.onto.split() if given.onto is not None else None,
        given.steps,
        given.stop_after,
        shrink=given.shrink,
        proof=Path(given.proof),
        keep=given.keep,
        config_dir=given.config_dir,
    )


def prove(
    overrides: Sequence[str],
    onto: Sequence[str] | None,
    steps: int,
    stop_after: int | None,
    shrink: bool,
    proof: Path,
    keep: str | None = None,
    config_dir: str | None = None,
) -> bool:
    """Train once undisturbed and once interrupted; print and write down what differs.

    Args:
        overrides: The layout, as for `titan.train`.
        onto: More overrides for the part after the interruption; None goes on with the same layout.
        steps: Of each run.
        stop_after: The step after which the second run is stopped; None takes the middle.
        shrink: Whether to shrink the model and the rows to what the layout needs.
        proof: The file to write.
        keep: A folder for the two runs; None takes a temporary one.
        config_dir: A folder of one's own config groups.

    Raises:
        ConfigError: If the config is wrong, or not one for a CPU.
        RanksFailed: If a rank fails; its log is kept.
    """
    stop_after = steps // 2 if stop_after is None else stop_after
    if not 0 < stop_after < steps:
        raise ConfigError(
            [Problem(f"--stop-after {stop_after} is not between 0 and --steps {steps}", suggestion="--steps 6")]
        )
    with parity.folder_of_runs(keep, "resume") as folder:
        undisturbed, interrupted, resumed = build_configs(overrides, onto, steps, folder, shrink, config_dir)
        for line in _describe(undisturbed, resumed, stop_after, shrink):
            print(line, flush=True)
        _train("undisturbed", undisturbed)
        _train(f"to step {stop_after}", interrupted, stop_after)
        _train("and on", resumed, copy=folder / "copy")
        report = build_report(undisturbed, interrupted, resumed, folder, stop_after)
        proof.write_text(json.dumps(report, indent=2) + "\n")
        for line in format_report(report):
            print(line)
        print(f"proof    {proof}")
        return report["verdict"] == "the same"


def build_configs(
    overrides: Sequence[str],
    onto: Sequence[str] | None,
    steps: int,
    folder: Path,
    shrink: bool = False,
    config_dir: str | None = None,
) -> tuple[TitanConfig, TitanConfig, TitanConfig]:
    """Return the configs of the undisturbed run, and of the interrupted one's two parts, in folders below `folder`."""

    def build(texts: Sequence[str], name: str) -> TitanConfig:
        config = compose(texts, config_dir)
        mode = config.checkpoint.mode
        checkpoint = CheckpointConfig(
            mode=CheckpointMode["sync"] if mode is CheckpointMode["disabled"] else mode,
            interval=steps,
            keep_latest=0,
            initial_load=config.checkpoint.initial_load,
            exclude=config.checkpoint.exclude,
        )
        config = replace(
            config,
            training=replace(config.training, steps=steps),
            metrics=replace(config.metrics, log_every=1),
        )
        return build_layout(config, folder / name, shrink, checkpoint, layouts)

    again = [*overrides, *(onto or [])]
    layouts = [compose(texts, config_dir).parallelism for texts in (overrides, again)]
    undisturbed = build(overrides, "undisturbed")
    if onto is not None and not any(text.startswith("training.global_batch_size=") for text in onto):
        again.append(f"training.global_batch_size={undisturbed.training.global_batch_size}")
    return undisturbed, build(overrides, "interrupted"), build(again, "interrupted")


def rank_main(arguments: list[str]) -> NoReturn:
    """Be a rank of one of the runs, and end."""
    parity.rank_main(arguments, _train_and_note)


def _train_and_note(config: TitanConfig, rank: Rank, store: Store | None) -> float | None:
    """The job of a rank: train as ever, stop where that is asked for, and note what the ranks are given."""
    from titan.trainer.record import note_rows, save_copy

    stop_after = int(os.environ.get(_STOP_AFTER, "0"))

    def around(trainer: Trainer) -> contextlib.AbstractContextManager[object]:
        if _COPY in os.environ:
            save_copy(trainer, Path(os.environ[_COPY]))
        return note_rows(trainer, trainer.directory.path / ROWS)

    return worker.train(
        config, rank, store, around, lambda trainer: signal.SIGTERM if trainer.state.step == stop_after else 0
    )


def _train(title: str, config: TitanConfig, stop_after: int = 0, copy: Path | None = None) -> None:
    directory = RunDirectory(Path(config.run.dir))
    freeze(config, directory, [])
    variables = {_STOP_AFTER: str(stop_after)} | ({_COPY: str(copy)} if copy is not None else {})
    began = time.monotonic()
    try:
        launch_local(directory, world_size(config.cluster), 0, ("titan.verify", "train"), variables)
    except Stopped:
        if not stop_after:
            raise
    print(f"{title:<12} {time.monotonic() - began:.1f} s", flush=True)


def build_report(
    undisturbed: TitanConfig, interrupted: TitanConfig, resumed: TitanConfig, folder: Path, stop_after: int
) -> dict[str, Any]:
    """Return what was found, as plain data."""
    has_same_layout = undisturbed.parallelism == resumed.parallelism and undisturbed.cluster == resumed.cluster
    tolerance = None if has_same_layout else tolerance_of(undisturbed)
    ours, theirs = (Path(config.run.dir) for config in (resumed, undisturbed))
    steps = undisturbed.training.steps
    findings = [
        *_compare_states(ours, folder / "copy", stop_after),
        *_compare_rows(ours, theirs, steps),
        *_compare_curves(ours, theirs, steps, tolerance),
        *_compare_ends(ours, theirs, steps, tolerance),
    ]
    return {
        "verdict": "the same" if all(finding.is_same for finding in findings) else "different",
        "findings": [asdict(finding) for finding in findings],
        "model": asdict(undisturbed.model),
        "layout": describe_degrees(undisturbed.parallelism),
        "resumed_on": describe_degrees(resumed.parallelism),
        "dtype": undisturbed.training.param_dtype.name,
        "checkpoint_mode": undisturbed.checkpoint.mode.name,
        "steps": steps,
        "stopped_after": stop_after,
        "losses": [row["loss"] for row in _rows(theirs / "metrics.jsonl")],
        "tolerance": None if tolerance is None else asdict(tolerance),
        "versions": versions(),
        "time": utc_now(),
    }


def _compare_states(run: Path, copy: Path, step: int) -> Iterator[Finding]:
    """Hold the state as it was saved against the state as it was loaded, and saved again at once."""
    from titan.checkpoint.canonical import combined, state_digests

    saved, loaded = (state_digests(step_folder(folder, step)) for folder in (run / "checkpoints", copy))
    changed = sorted(name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name))
    detail = f"{len(saved)} tensors, digest {combined(saved)}"
    yield Finding(
        f"state after step {step}, saved and loaded", not changed, f"{changed[0]} differs" if changed else detail
    )


def _compare_rows(run: Path, reference: Path, steps: int) -> Iterator[Finding]:
    ours, theirs = ({row["step"]: row["digest"] for row in _rows(folder / ROWS)} for folder in (run, reference))
    wrong = [step for step in range(1, steps + 1) if step not in ours or ours[step] != theirs.get(step)]
    yield Finding("rows of every step", not wrong, f"step {wrong[0]} differs" if wrong else f"{steps} digests")


def _compare_curves(run: Path, reference: Path, steps: int, tolerance: Tolerance | None) -> Iterator[Finding]:
    from titan.trainer.record import apart

    ours, theirs = (_rows(folder / "metrics.jsonl") for folder in (run, reference))
    for title, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        if [row["step"] for row in ours] != list(range(1, steps + 1)):
            yield Finding(f"{title} of every step", False, "steps are missing")
            continue
        worst = max(apart(a[key], b[key]) for a, b in zip(ours, theirs, strict=True))
        yield _within(f"{title} of every step", worst, tolerance and getattr(tolerance, key))


def _compare_ends(run: Path, reference: Path, steps: int, tolerance: Tolerance | None) -> Iterator[Finding]:
    from titan.checkpoint.files import read_metadata, read_tensor, tensor_infos
    from titan.checkpoint.state import MODEL, RNG
    from titan.trainer.record import tensors_apart

    ours, theirs = (step_folder(folder / "checkpoints", steps) for folder in (run, reference))
    infos, others = (tensor_infos(read_metadata(folder)) for folder in (ours, theirs))
    worst, names = 0.0, [name for name in others if not name.startswith(RNG)]
    if missing := [name for name in names if infos.get(name) != others[name]]:
        yield Finding(f"state after step {steps}", False, f"{missing[0]} is missing, or of another shape")
        return
    for name in names:
        if tolerance is not None and not name.startswith(MODEL):
            continue  # a moment is a sum of gradients, which differ by the order of their sums
        mine, expected = (read_tensor(folder, name, infos[name]) for folder in (ours, theirs))
        worst = max(worst, tensors_apart(mine, expected))
    what = f"weights after step {steps}" if tolerance is not None else f"weights and optimizer after step {steps}"
    yield _within(what, worst, tolerance and tolerance.weight)


def _within(what: str, worst: float, allowed: float | None) -> Finding:
    if worst == 0.0:
        return Finding(what, True, "bit for bit")
    limit = f"allowed {allowed:.0e}" if allowed is not None else "allowed is nothing"
    return Finding(what, allowed is not None and worst <= allowed, f"apart by {worst:.1e}, {limit}")


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """Return the report as lines of a table."""
    width = max(len(finding["what"]) for finding in report["findings"])
    yield ""
    for finding in report["findings"]:
        yield f"{finding['what']:<{width}}  {'same' if finding['is_same'] else 'DIFFERENT':<9}  {finding['detail']}"
    yield ""
    yield f"verdict: {report['verdict']}"


def _describe(config: TitanConfig, resumed: TitanConfig, stop_after: int, shrink: bool) -> Iterator[str]:
    yield from describe_run(config, shrink, config.training.steps)
    yield f"resumed  after step {stop_after}, on {describe_degrees(resumed.parallelism)}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = argparse.ArgumentParser(
        prog="python -m titan.verify resume",
        description="Prove that an interrupted run is the undisturbed one, on the CPU. Exit code 0: the same, 1: not.",
    )
    command.add_argument("overrides", nargs="*", metavar="group=option|key=value", help="as for titan.train")
    command.add_argument(
        "--onto",
        metavar="'OVERRIDES'",
        help="go on with another layout: more overrides, in quotes, such as 'parallelism=fsdp_tp parallelism.tp=2'",
    )
    command.add_argument("--steps", type=int, default=6, help="steps to train (default: 6)")
    command.add_argument("--stop-after", type=int, metavar="STEP", help="where to interrupt (default: the middle)")
    command.add_argument("--shrink", action="store_true", help="shrink model and rows to what the layout needs")
    command.add_argument(
        "--proof",
        metavar="FILE",
        default="resume_proof.json",
        help="where to write what was found (default: %(default)s)",
    )
    command.add_argument("--keep", metavar="DIR", help="keep both runs, their logs and checkpoints in this folder")
    command.add_argument("--config-dir", metavar="DIR", help="a folder of config groups of your own")
    return command.parse_intermixed_args(arguments)
