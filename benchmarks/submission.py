"""Time from `cluster=slurm` to the shell's prompt on a login node: one job, and sweeps of four and of twelve points.

Every job is held, so that none of them runs beside the next measurement, and cancelled at the end. A first submission
that is not counted writes Python's bytecode. Needs a SLURM cluster; `tests/slurm/cluster.sh exec` in front gives one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import TITAN, describe_machine, run, spread, write_result

MOST_SECONDS = 2.0
CASES = {
    "one job": (),
    "a sweep of 4 points, 2 arrays": ("--multirun", "cluster.nodes=1,2", "training.seed=1,2"),
    "a sweep of 12 points, 2 arrays": ("--multirun", "cluster.nodes=1,2", "training.seed=1,2,3,4,5,6"),
}
MARKED = tuple(CASES)[:2]
"""The cases that have to keep to the mark; the third shows what a point costs."""


def main() -> int:
    """Measure, print and write the figures; 1 where a submission takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if shutil.which("sbatch") is None:
        print("FAILED: there is no SLURM here; try tests/slurm/cluster.sh exec in front", file=sys.stderr)
        return 1
    machine = describe_machine()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        submit(Path(name) / "first")
        for turn in range(arguments.repeats):
            for index, (case, more) in enumerate(CASES.items()):
                seconds[case].append(submit(Path(name) / f"{turn}_{index}", *more))
    figures = {case: spread(times) for case, times in seconds.items()}
    path = write_result("submission", machine, repeats=arguments.repeats, seconds=figures)
    for case, found in figures.items():
        print(f"{case:<34}{found['median']:>8.3f}{found['least']:>8.3f}{found['most']:>8.3f}  s")
    print(f"written to {path.name}")
    too_long = [case for case in MARKED if figures[case]["median"] >= MOST_SECONDS]
    for case in too_long:
        print(f"FAILED: {case} took {figures[case]['median']} s, which is not under {MOST_SECONDS}", file=sys.stderr)
    return 1 if too_long else 0


def submit(directory: Path, *more: str) -> float:
    """Submit and cancel; returns the seconds from the command to its end."""
    start = time.time()
    said = run([*TITAN, "cluster=slurm", "cluster.device=cpu", "+cluster.sbatch.hold=", f"run.dir={directory}", *more])
    seconds = time.time() - start
    jobs = re.findall(r"^cancel +scancel (\d+)", said, re.MULTILINE)
    subprocess.run(["scancel", *jobs], check=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
