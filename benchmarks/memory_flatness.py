"""Memory of 500 steps through the command, on one CPU process and on two: its peak, and whether it grows.

Two measures, for each can hide a leak that the other shows. `memory_gib` of metrics.jsonl is the peak of the resident
set since the process started: what a user is shown, but silent while a leak fills room that start-up has used before.
The anonymous resident memory (RssAnon) is read from outside, of the largest process of the run, many times a second;
pages of mapped files, which the kernel takes and gives as it likes, are not in it. Checkpoints are saved on the way.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import TITAN, OtherLoad, describe_machine, environment, read_metrics, unix_seconds, write_result

STEPS, EARLY, LATE = 500, (100, 200), (400, 500)
MOST_GROWTH = 0.02
SHAPE = ("model=llama3_debug", "training.seq_len=64", "training.local_batch_size=4")
CASES = {"1_process": 1, "2_processes": 2}
_POLL_SECONDS = 0.05
_GIB = 1 << 30


def main() -> int:
    """Measure, print and write the figures; 1 where memory grows."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    machine, others = describe_machine(), OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: measure(Path(folder), processes) for case, processes in CASES.items()}
    path = write_result(
        "memory_flatness",
        machine,
        cores_busy_elsewhere=others.cores(),
        steps=STEPS,
        overrides=SHAPE,
        most_growth=MOST_GROWTH,
        cases=cases,
    )
    print(f"{'':<13}{'peak GiB':>10}{'growth of peak':>16}{'growth of RssAnon':>19}{'slope of RssAnon':>18} KiB/step")
    for case, found in cases.items():
        print(
            f"{case:<13}{found['peak_gib']:>10.3f}{found['growth_of_peak']:>16.2%}"
            f"{found['growth_of_resident']:>19.2%}{found['slope_of_resident_kib_per_step']:>18.2f}"
        )
    print(f"growth: steps {LATE[0]} to {LATE[1]} over steps {EARLY[0]} to {EARLY[1]}; written to {path.name}")
    grows = [case for case, found in cases.items() if max(_growths(found)) > MOST_GROWTH]
    for case in grows:
        print(f"FAILED: {case}: memory grows by more than {MOST_GROWTH:.0%}", file=sys.stderr)
    return 1 if grows else 0


def measure(folder: Path, processes: int) -> dict[str, Any]:
    """Train; return the peak in GiB, the growths as fractions, and the slope of the resident memory in KiB a step."""
    directory = folder / f"run_{processes}"
    command = [
        *(*TITAN, *SHAPE, "cluster.device=cpu", f"cluster.devices_per_node={processes}", f"training.steps={STEPS}"),
        *("metrics.log_every=1", "checkpoint.interval=50", f"run.dir={directory}", f"data.cache_dir={folder}/cache"),
    ]
    with (folder / f"output_{processes}").open("w+") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        seconds, resident = watch(process)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{output.read()}")
    rows = read_metrics(directory)
    steps = np.interp(seconds, [unix_seconds(row) for row in rows], [row["step"] for row in rows], left=0, right=np.inf)
    peaks = {row["step"]: row["memory_gib"] for row in rows}
    medians = [np.median(resident[(steps > first) & (steps <= last)]) for first, last in (EARLY, LATE)]
    means = [statistics.mean(peaks[step] for step in range(first + 1, last + 1)) for first, last in (EARLY, LATE)]
    settled = (steps > EARLY[0]) & (steps <= STEPS)
    slope, _ = np.polyfit(steps[settled], resident[settled] / 1024, 1)
    return {
        "peak_gib": round(peaks[STEPS], 4),
        "peak_gib_of_steps": {step: round(peaks[step], 4) for step in (1, 10, *range(50, STEPS + 1, 50))},
        "growth_of_peak": round(means[1] / means[0] - 1, 5),
        "resident_gib": [round(float(median) / _GIB, 4) for median in medians],
        "growth_of_resident": round(float(medians[1] / medians[0]) - 1, 5),
        "slope_of_resident_kib_per_step": round(float(slope), 3),
    }


def watch(process: subprocess.Popen[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return times (Unix seconds) and the anonymous resident bytes of the largest process of a run, until it ends."""
    seconds, resident = [], []
    while process.poll() is None:
        seconds.append(time.time())
        resident.append(max(map(_resident_bytes, [process.pid, *_children(process.pid)])))
        time.sleep(_POLL_SECONDS)
    return np.array(seconds), np.array(resident)


def _children(pid: int) -> list[int]:
    # the launcher's threads start none, so its main thread has them all
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has just ended
        return []


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def _growths(found: dict[str, Any]) -> tuple[float, float]:
    return found["growth_of_peak"], found["growth_of_resident"]


if __name__ == "__main__":
    sys.exit(main())
