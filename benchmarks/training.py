"""Training speed and memory of titan beside what one would run instead, on one process or one GPU.

    python benchmarks/training.py                          on a CPU: the debug model, and one of 51 million parameters
    python benchmarks/training.py --device cuda            on a GPU: Llama 3 8B cut to 8 layers, and Llama 3.2 1B
    python benchmarks/training.py --case debug --repeats 5

The rivals are in rivals.py; torchtitan takes part where it is installed (pip install 'titan[benchmarks]').

All sides of a case train the same shape on the same rows with fused AdamW and clipping at norm 1. titan's side is the
command itself, `python -m titan.train`, with its own step times from metrics.jsonl: loading, logging and the process
group are in them. The others get their rows ready-made. On a CPU a rate is that of the median step of a process after
two steps of warm-up, in which all is compiled. On a GPU the host runs ahead of the device, and a program that waited
for it after each step would be another one: there a rate is that of all measured steps together, from a device that has
nothing left to do to the next such moment, which are titan's logged steps; what a program does between its steps is in
it. There the warm-up has as many steps as are measured.

Each repetition is a process of its own and the sides take turns, so none has the quieter minutes. On a CPU a turn
during which other processes kept a fifth of a core busy is taken again and written down apart: OpenMP's threads wait
for each other at every operation, so that what shares a core with one of them costs far more than its share. A CPU that
has no units for bfloat16 is measured in float32 alone, and has a file of its own, training_cpu_float32.json.

On a GPU each side takes the micro-batch with which it is fastest, as `--choose-rows` finds it out among 1, 2, 4 and 8
rows; what it found on one H100 of 80 GB is written down below. MFU is given in both conventions: operations of the
model, 6 N + 12 L H E S for each token (full attention), or half of the second term (causal); N are the parameters in
matrix products, L layers, H heads, E head size, S sequence length. What has a mark comes first; `--minutes` ends it,
and a side that has had no turn by then is left out. Every figure says how many turns it is of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import (
    MOST_DISTURBED_TURNS,
    QUIET_CORES,
    TITAN,
    OtherLoad,
    describe_machine,
    environment,
    read_metrics,
    spread,
    write_result,
)
from rivals import WARM_UP, Run, command

LONGEST_SECONDS = 600
"""A process that takes longer is given up."""


@dataclass(frozen=True)
class Side:
    """One program with one choice of settings."""

    program: str
    """titan, transformers or torchtitan."""
    dtype: str = "float32"
    compile: bool = False
    float8: bool = False
    recompute: str = "none"
    kept_memory: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables."""
        settings = [self.dtype, *["compiled"] * self.compile, *["float8"] * self.float8]
        settings += [f"{self.recompute} recomputation"] * (self.recompute != "none")
        settings += ["freed memory kept"] * self.kept_memory
        return f"{self.program}, {', '.join(settings)}"


@dataclass(frozen=True)
class Mark:
    """What a side is to reach beside another one."""

    ours: Side
    theirs: Side
    least: float


@dataclass(frozen=True)
class Case:
    """A model, its rows and who trains it."""

    name: str
    overrides: tuple[str, ...]
    rows: int
    seq_len: int
    sides: tuple[Side, ...]
    marks: tuple[Mark, ...] = ()
    steps: int = 4
    """Measured ones."""
    repeats: int = 3
    fastest_rows: dict[Side, int] = field(default_factory=dict)
    """The micro-batch of a side, if it is another than `rows`; 0 where none fits. One that does not fit loses a row."""

    def warm_up(self, device: str) -> int:
        """Return the steps before those that are measured."""
        return WARM_UP if device == "cpu" else self.steps

    def rows_of(self, side: Side) -> int:
        """Return the rows of a side's micro-batch."""
        return self.fastest_rows.get(side, self.rows)


EAGER = Side("titan"), Side("transformers"), Side("torchtitan")
COMPILED = tuple(replace(side, compile=True) for side in EAGER)
BFLOAT16 = tuple(replace(side, dtype="bfloat16", compile=True) for side in EAGER)
CPU = (
    Case(
        "debug",
        ("model=llama3_debug",),
        8,
        512,
        (*EAGER, Side("transformers", kept_memory=True), *COMPILED, *BFLOAT16),
        (Mark(COMPILED[0], COMPILED[1], 1.2), Mark(BFLOAT16[0], COMPILED[1], 3.0)),
    ),
    Case(
        "51M",
        (
            "model=llama3_debug",
            "model.dim=512",
            "model.n_layers=10",
            "model.n_heads=8",
            "model.n_kv_heads=8",
            "model.ffn_dim=1536",
            "model.vocab_size=16384",
        ),
        2,
        512,
        (EAGER[0], *COMPILED, *BFLOAT16),
        # nearly all of its time is matrix products, which are the same library's for all
        (Mark(COMPILED[0], COMPILED[1], 1.0), Mark(BFLOAT16[0], BFLOAT16[1], 1.0)),
        steps=3,
        repeats=2,
    ),
)
_ON_GPU = tuple(
    Side(program, "bfloat16", compiled, float8, recompute)
    for compiled, recompute in ((True, "none"), (True, "selective"), (False, "none"), (False, "selective"))
    for float8 in ((False, True) if compiled else (False,))
    for program in ("titan", "torchtitan")
)
_GPU_MARKS = tuple(
    Mark(
        Side("titan", "bfloat16", True, float8, recompute), Side("torchtitan", "bfloat16", True, float8, recompute), 1.1
    )
    for float8 in (False, True)
    for recompute in ("none", "selective")
)
CUDA = (
    Case("8B cut to 8 layers", ("model=llama3_8b", "model.n_layers=8"), 2, 8192, _ON_GPU, _GPU_MARKS, 8, 2),
    Case("3.2 1B", ("model=llama3_2_1b", "model.tie_embeddings=false"), 4, 8192, _ON_GPU, _GPU_MARKS, 8, 2),
)
_TRIED_ROWS = (1, 2, 3, 4, 6, 8)

Result = dict[str, Any]


def main() -> int:
    """Measure, print and write the figures; 1 where titan misses a mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", action="append", help="the name of a case; may be given again (default: all)")
    parser.add_argument("--repeats", type=int, help="processes of each side")
    parser.add_argument("--steps", type=int, help="measured steps of each process")
    parser.add_argument("--busy", action="store_true", help="measure although others use the machine; writes no result")
    parser.add_argument("--side", action="append", help="a part of the names of the sides to measure (default: all)")
    parser.add_argument("--rows", type=int, help="rows of every side's micro-batch; writes no result")
    parser.add_argument("--choose-rows", action="store_true", help="only find out with how many rows each is fastest")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no turn after so many, of all cases")
    given = parser.parse_args()
    only_float32 = is_float32_only(given.device)
    cases = [case for case in (CPU if given.device == "cpu" else CUDA) if not given.case or case.name in given.case]
    machine, found, missed = describe_machine(), {}, []
    began = time.monotonic()
    for index, case in enumerate(cases):
        sides = tuple(side for side in case.sides if side.dtype == "float32" or not only_float32)
        sides = tuple(side for side in sides if not given.side or any(part in side.name for part in given.side))
        case = replace(case, sides=sides, repeats=given.repeats or case.repeats, steps=given.steps or case.steps)
        case = replace(case, rows=given.rows, fastest_rows={}) if given.rows else case
        print(f"\n{case.name}: {' '.join(case.overrides)}, {case.seq_len} tokens a row", flush=True)
        if given.choose_rows:
            choose_rows(case, given.device)
            continue
        deadline = began + 60 * given.minutes * (index + 1) / len(cases)
        found[case.name] = measure(case, given.device, given.busy, deadline)
        missed += report(case, found[case.name])
    if not given.busy and not given.rows and found:
        path = write_result(f"training_{given.device}{'_float32' * only_float32}", machine, cases=found)
        print(f"\nwritten to {path.name}")
    for line in missed:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if missed else 0


def is_float32_only(device: str) -> bool:
    """Return whether the device is a CPU without units for bfloat16, where titan chooses float32 by itself."""
    from titan.launch.environment import has_bfloat16

    return device == "cpu" and not has_bfloat16()


def measure(case: Case, device: str, busy: bool, deadline: float) -> Result:
    """Run all sides of a case in turn; return its figures."""
    sides = [side for side in _installed(case.sides) if case.rows_of(side)]
    quiet: dict[Side, list[Result]] = {side: [] for side in sides}
    disturbed: dict[Side, list[Result]] = {side: [] for side in sides}
    rows = {side: case.rows_of(side) for side in sides}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(case.repeats):
            for side in sides:
                while time.monotonic() < deadline:
                    others = OtherLoad()
                    result = run_side(case, side, Path(name), device, rows[side])
                    if result is None and device == "cuda" and rows[side] > 1 and not quiet[side]:
                        rows[side] -= 1  # out of memory
                        continue
                    if result is None:
                        break
                    result["cores_busy_elsewhere"] = others.cores()
                    is_quiet = device == "cuda" or busy or result["cores_busy_elsewhere"] <= QUIET_CORES
                    (quiet if is_quiet else disturbed)[side].append(result)
                    note = "" if is_quiet else f"   {result['cores_busy_elsewhere']:.2f} cores busy elsewhere: again"
                    print(f"  {side.name:<60}{result['tokens_per_second']:>10,.0f} tok/s{note}", flush=True)
                    if is_quiet:
                        break
                    if len(disturbed[side]) > MOST_DISTURBED_TURNS:
                        raise SystemExit("FAILED: the machine is too busy to measure")
    return {
        "model": " ".join(case.overrides),
        "seq_len": case.seq_len,
        "parameters": sorted(
            {turn["parameters"] for turns in quiet.values() for turn in turns if "parameters" in turn}
        ),
        "sides": [
            describe(case, side, rows[side], quiet[side], disturbed[side], device) for side in sides if quiet[side]
        ],
        "marks": [
            {"ours": mark.ours.name, "theirs": mark.theirs.name, "least": mark.least, **compare(mark, quiet)}
            for mark in case.marks
            if quiet.get(mark.ours) and quiet.get(mark.theirs)
        ],
    }


def compare(mark: Mark, turns: dict[Side, list[Result]]) -> dict[str, Any]:
    """Return how many times as fast ours is, of medians and turn by turn, and both peaks of memory."""
    ours, theirs = ([turn["tokens_per_second"] for turn in turns[side]] for side in (mark.ours, mark.theirs))
    ratios = [our / their for our, their in zip(ours, theirs, strict=False)]  # time may end between the two
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"ratio": round(ratio, 3), "least_turn": round(min(ratios), 3), "most_turn": round(max(ratios), 3)}


def describe(
    case: Case, side: Side, rows: int, turns: list[Result], disturbed: list[Result], device: str
) -> dict[str, Any]:
    """Return the figures of one side."""
    from titan.config.load import compose
    from titan.config.schema import Dtype
    from titan.models.flops import flops_per_token, peak_tflops

    rates = [turn["tokens_per_second"] for turn in turns]
    figures = {
        "name": side.name,
        "rows": rows,
        "turns": len(turns),
        "tokens_per_second": spread(rates, 1),
        "peak_memory_gib": spread([turn["peak_memory_gib"] for turn in turns], 3),
        "first_step_seconds": spread([turn["first_step_seconds"] for turn in turns], 2),
        "first_loss": turns[0]["first_loss"],
        "last_loss": turns[0]["last_loss"],
        "cores_busy_elsewhere": [turn["cores_busy_elsewhere"] for turn in turns],
        "disturbed_turns": [round(turn["tokens_per_second"], 1) for turn in disturbed],
    }
    model = compose(list(case.overrides)).model
    full = flops_per_token(model, case.seq_len)
    causal = full - 6 * model.n_layers * model.dim * case.seq_len
    rate = statistics.median(rates)
    figures["tflops"] = {"full": round(full * rate / 1e12, 3), "causal": round(causal * rate / 1e12, 3)}
    if device == "cuda":
        import torch

        peak = peak_tflops(torch.cuda.get_device_name(), Dtype.bfloat16)
        if peak is not None:
            figures["mfu"] = {name: round(value / peak, 4) for name, value in figures["tflops"].items()}
    return figures


def report(case: Case, found: Result) -> list[str]:
    """Print a case's figures; return what is missed."""
    print(f"\n{'':<60}{'median':>9}{'least':>9}{'most':>9}  tok/s{'peak':>8} GiB  first step")
    for side in found["sides"]:
        rate, memory = side["tokens_per_second"], side["peak_memory_gib"]["median"]
        mfu = "".join(f"  MFU {value:.1%} ({name})" for name, value in side.get("mfu", {}).items())
        print(
            f"{side['name']:<60}{rate['median']:>9,.0f}{rate['least']:>9,.0f}{rate['most']:>9,.0f}"
            f"{memory:>15.2f}{side['first_step_seconds']['median']:>14.1f} s{mfu}"
        )
    print()
    missed = []
    for mark in found["marks"]:
        print(
            f"{mark['ours']} / {mark['theirs']}: {mark['ratio']:.2f} (turns: {mark['least_turn']:.2f} to "
            f"{mark['most_turn']:.2f}; the mark: {mark['least']})"
        )
        if mark["ratio"] < mark["least"]:
            missed.append(f"{case.name}: {mark['ours']} is {mark['ratio']} times {mark['theirs']}, not {mark['least']}")
    return missed


def choose_rows(case: Case, device: str) -> None:
    """Print with how many rows each side is fastest."""
    with tempfile.TemporaryDirectory() as folder:
        for side in _installed(case.sides):
            rates: dict[int, float] = {}
            for rows in _TRIED_ROWS:
                result = run_side(replace(case, steps=3), side, Path(folder), device, rows)
                if result is None:  # out of memory, as more rows would be
                    break
                rates[rows] = result["tokens_per_second"]
            tried = ", ".join(f"{rows}: {rate:,.0f}" for rows, rate in rates.items())
            fastest = max(rates, key=lambda rows: rates[rows], default=0)
            print(f"  {side.name:<60}{fastest:>3} rows   (tokens/s: {tried})", flush=True)


def _installed(sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side.program != "torchtitan" or find_spec("torchtitan")]


def freeze(case: Case, folder: Path, device: str, rows: int) -> Path:
    """Return the frozen config that the rivals read."""
    from titan.config.check import check_config
    from titan.config.load import compose, save_config
    from titan.launch.environment import current_machine

    path = folder / f"frozen_{rows}" / "config.yaml"
    if not path.exists():
        path.parent.mkdir()
        config = compose(_overrides(case, path.parent, folder, device, rows))
        save_config(check_config(config, current_machine()), path)
    return path


def run_side(case: Case, side: Side, folder: Path, device: str, rows: int) -> Result | None:
    """Train in a process of its own; return what it gave, or None where it has failed."""
    directory, warm_up = folder / f"run_{time.monotonic_ns()}", case.warm_up(device)
    steps = case.steps + warm_up
    if side.program == "titan":
        arguments = [
            *(*TITAN, *_overrides(case, directory, folder, device, rows)),
            f"training.steps={steps}",
            f"metrics.log_every={1 if device == 'cpu' else case.steps}",
            f"training.param_dtype={side.dtype}",
            f"activation_checkpoint={side.recompute}",
            f"compile={'inductor' if side.compile else 'none'}",
            f"float8={'tensorwise' if side.float8 else 'none'}",
            *["float8.convert_output=true"] * side.float8,  # as torchtitan does by itself
        ]
    else:
        run = Run(
            str(freeze(case, folder, device, rows)),
            steps,
            warm_up,
            side.compile,
            side.dtype == "bfloat16",
            side.float8,
            side.recompute,
            side.kept_memory,
        )
        arguments = command(side.program, run)
    done = _run(arguments, environment() if device == "cpu" else None)
    if done is None or done.returncode:
        tail = "" if done is None else (done.stdout + done.stderr).strip().splitlines()[-1]
        print(f"  {side.name:<60}failed with {rows} rows: {tail}", flush=True)
        return None
    if side.program == "titan":
        metrics = read_metrics(directory)
        result = {
            "step_seconds": [row["step_seconds"] for row in metrics if row["step"] > warm_up],
            "first_step_seconds": metrics[0]["step_seconds"],
            "peak_memory_gib": metrics[-1]["memory_gib"],
            "first_loss": metrics[0]["loss"],
            "last_loss": metrics[-1]["loss"],
        }
    else:
        result = json.loads(done.stdout.splitlines()[-1])
    return result | {"tokens_per_second": rows * case.seq_len / statistics.median(result["step_seconds"])}


def _overrides(case: Case, directory: Path, folder: Path, device: str, rows: int) -> list[str]:
    return [
        *(*case.overrides, f"cluster.device={device}", "cluster.devices_per_node=1"),
        *(f"training.seq_len={case.seq_len}", f"training.local_batch_size={rows}"),
        *("training.max_grad_norm=1.0", "checkpoint=disabled"),
        *(f"run.dir={directory}", f"data.cache_dir={folder}/cache"),
    ]


def _run(arguments: Sequence[str], env: dict[str, str] | None) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return None


if __name__ == "__main__":
    sys.exit(main())
