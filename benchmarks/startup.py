"""Time from the command to its first step on one CPU process, split into parts; and the time of `--cfg job`.

The whole is measured on the command itself, untouched, from outside: the front end ends when `config.yaml` is
written, the first step when its row of metrics.jsonl is. The parts come from `startup_clock.py`, which runs the same
command and reads the clock between them; the two take turns, and their totals are shown beside each other. A start
that is not counted comes first: it writes Python's bytecode, reads the libraries from disk and tokenises the data.
A turn that other processes disturb is taken again, as in `training.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from record import (
    MOST_DISTURBED_TURNS,
    QUIET_CORES,
    TITAN,
    OtherLoad,
    describe_machine,
    read_metrics,
    run,
    spread,
    unix_seconds,
    write_result,
)

MOST_FRONT_END_SECONDS = 1.0
MOST_CFG_JOB_SECONDS = 0.7
CLOCK = Path(__file__).with_name("startup_clock.py")

Seconds = dict[str, float]


def main() -> int:
    """Measure, print and write the figures; 1 where the front end or `--cfg job` takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="starts of the command, and of it with the clock")
    parser.add_argument("--cfg-job-repeats", type=int, default=10)
    arguments = parser.parse_args()
    machine = describe_machine()
    turns: list[tuple[Seconds, Seconds, Seconds]] = []
    busy: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = time_parts(folder, "first")
        cfg_job = [time_cfg_job() for _ in range(arguments.cfg_job_repeats)]
        while len(turns) < arguments.repeats and len(busy) < arguments.repeats + MOST_DISTURBED_TURNS:
            others, number = OtherLoad(), len(busy)
            turn = (
                time_command(folder, f"whole_{number}"),
                time_parts(folder, f"parts_{number}"),
                time_command(folder, f"two_{number}", "cluster.devices_per_node=2"),
            )
            busy.append(others.cores())
            if busy[-1] <= QUIET_CORES:
                turns.append(turn)
            else:
                print(f"{busy[-1]:.2f} cores busy elsewhere: again", flush=True)
    if len(turns) < arguments.repeats:
        print(f"FAILED: the machine is too busy to measure: {len(busy) - len(turns)} disturbed turns", file=sys.stderr)
        return 1
    whole, parts, two_ranks = zip(*turns, strict=True)
    figures = {
        "cfg_job_seconds": spread(cfg_job),
        "front_end_seconds": spread([start["front end"] for start in whole]),
        "first_step_seconds": spread([start["first step"] for start in whole]),
        "first_step_seconds_with_clock": spread([sum(start.values()) for start in parts]),
        "first_step_seconds_of_2_processes": spread([start["first step"] for start in two_ranks]),
        "parts_seconds": {part: spread([start[part] for start in parts]) for part in parts[0]},
        "data_seconds_first_time": round(first["data"], 4),
    }
    path = write_result("startup", machine, cores_busy_elsewhere=busy, repeats=arguments.repeats, **figures)
    return report(figures, path)


def time_cfg_job() -> float:
    """Return the seconds that `--cfg job` takes, from starting Python to its end."""
    start = time.time()
    run([*TITAN, "--cfg", "job"])
    return time.time() - start


def time_command(folder: Path, name: str, *more: str) -> Seconds:
    """Return the seconds from the command to the frozen config, and to the first step."""
    directory = folder / name
    start = time.time()
    run([*TITAN, *_overrides(folder, directory), *more])
    frozen, stepped = (directory / "config.yaml").stat().st_mtime, unix_seconds(read_metrics(directory)[0])
    return {"front end": frozen - start, "first step": stepped - start}


def time_parts(folder: Path, name: str) -> Seconds:
    """Return the seconds of each part, in order, from the command to the end of the first step."""
    marks = folder / f"{name}.json"
    start = time.time()
    run([sys.executable, str(CLOCK), str(marks), *_overrides(folder, folder / name)])
    seconds, before = {}, start
    for part, end in json.loads(marks.read_text()):
        seconds[part] = end - before
        before = end
    return seconds


def report(figures: dict, path: Path) -> int:
    """Print the figures; return the exit code."""
    print(f"{'part':<34}{'median':>8}{'least':>8}{'most':>8}  s")
    totals = {
        "first step, parts added up": figures["first_step_seconds_with_clock"],
        "first step, untouched command": figures["first_step_seconds"],
        "first step, 2 processes": figures["first_step_seconds_of_2_processes"],
        "front end, untouched command": figures["front_end_seconds"],
        "--cfg job": figures["cfg_job_seconds"],
    }
    for part, seconds in {**figures["parts_seconds"], **totals}.items():
        print(f"{part:<34}{seconds['median']:>8.3f}{seconds['least']:>8.3f}{seconds['most']:>8.3f}")
    print(f"{'data, before it is tokenised':<34}{figures['data_seconds_first_time']:>8.3f}")
    print(f"written to {path.name}")
    limits = {"front_end_seconds": MOST_FRONT_END_SECONDS, "cfg_job_seconds": MOST_CFG_JOB_SECONDS}
    too_long = [name for name, limit in limits.items() if figures[name]["median"] >= limit]
    for name in too_long:
        print(f"FAILED: {name} {figures[name]['median']} is not under {limits[name]}", file=sys.stderr)
    return 1 if too_long else 0


def _overrides(folder: Path, directory: Path) -> list[str]:
    # everything else as a user gets it: the debug model on Python's own source
    return ["cluster.device=cpu", "training.steps=1", f"run.dir={directory}", f"data.cache_dir={folder}/cache"]


if __name__ == "__main__":
    sys.exit(main())
