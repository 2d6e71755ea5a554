"""Run the fault suite and write what it found into docs/reliability.md: `make reliability`.

FAULT_SEED and FAULT_ROUNDS are the suite's, see tests/faults/conftest.py. Nothing is written if a test has failed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, describe_machine, write_result

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: make reliability -->\n", "<!-- end of figures -->\n"
SUITE = ["-m", "pytest", "-q", "-m", "faults", "tests/faults", "--durations=15"]


def main() -> int:
    """Run the suite, keep what it found, and write the table; with --table, only write the table."""
    if "--table" not in sys.argv[1:]:
        machine = describe_machine()
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "records.json"
            environment = os.environ | {"FAULT_RECORDS": str(records)}
            code = subprocess.run([sys.executable, *SUITE], cwd=REPOSITORY, env=environment).returncode
            if code:
                return code
            write_result("reliability", machine, **json.loads(records.read_text()))
    result = json.loads((RESULTS / "reliability.json").read_text())
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = [*_table(result["records"]), "", *_totals(result), "", _origin(result)]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after)
    return 0


def _table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| fault | times | same end | exit codes | steps lost, at most | back after, s (median) |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for fault in dict.fromkeys(record["fault"] for record in records):
        found = [record for record in records if record["fault"] == fault]
        codes = sorted({record["exit_code"] for record in found if record["exit_code"] is not None})
        back = [record["recovery_seconds"] for record in found if record["recovery_seconds"] is not None]
        cells = [
            fault,
            str(len(found)),
            str(sum(record["same_end"] for record in found)),
            ", ".join("SIGKILL" if code == -9 else str(code) for code in codes) or "–",
            str(max(record["lost_steps"] for record in found)),
            f"{statistics.median(back):.1f}" if back else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _totals(result: dict[str, Any]) -> list[str]:
    records, checks = result["records"], result["checks"]
    back = [record["recovery_seconds"] for record in records if record["recovery_seconds"] is not None]
    lost = [record["lost_steps"] for record in records]
    different = sum(not record["same_end"] for record in records)
    return [
        f"- **{len(records)} faults** in {result['runs']} runs of two ranks, {checks['starts']} starts of the command.",
        f"- **Wrong results accepted: {different + checks['bits accepted']}.** Every run ended with the bits of its "
        f"undisturbed one; of {checks['bits flipped']:,} single bits flipped in the files of a checkpoint, "
        f"{checks['bits accepted']} were accepted.",
        "- **Hangs: 0; processes left behind: 0.** Either fails the suite.",
        f"- Steps done again for a fault: {statistics.mean(lost):.1f} on average, {max(lost)} at most, with a "
        "checkpoint every 3 steps.",
        f"- From the next start of the command to its first new step: {statistics.median(back):.1f} s in the median, "
        f"{max(back):.1f} s at most, most of it Python's imports.",
    ]


def _origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = f"Python {machine['python']}, torch {machine['versions']['torch']}"
    changed = " with changes on top" if machine["changed_since_commit"] else ""
    return (
        f"Seed {result['seed']}; {result['seconds'] / 60:.0f} minutes on {machine['cpu']}, {machine['cores']} cores, "
        f"no GPU, gloo; {versions}; commit {machine['commit'][:7]}{changed}, {machine['time'][:10]}."
    )


if __name__ == "__main__":
    sys.exit(main())
