"""What the fault suite has found, for `benchmarks/reliability.py` to put into docs/reliability.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Record:
    """One fault that was injected, and what came of it. Its test has failed if the run did not end as it should."""

    fault: str
    exit_code: int | None
    """Of the command that it struck; None where it struck between two."""
    lost_steps: int
    """Steps that had to be done again."""
    planted: str
    """Where exactly."""
    test: str = ""
    same_end: bool = False
    """Whether the run has ended bit-identical to the undisturbed one, whatever else had struck it."""
    recovery_seconds: float | None = None
    """From the start of the next command to its first new step; None where there was none."""


@dataclass
class Report:
    """All faults of one session."""

    seed: int
    records: list[Record] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)
    """How often something was tried, and how often it was accepted although it is wrong, by name."""
    runs: int = 0
    """Runs that ended bit-identical to the undisturbed one."""
    test: str = ""
    """The one that is running."""

    def add(self, fault: str, exit_code: int | None, lost_steps: int, planted: str) -> Record:
        """Record a fault."""
        record = Record(fault, exit_code, lost_steps, planted, self.test)
        self.records.append(record)
        return record

    def count(self, name: str, number: int = 1) -> None:
        """Count what is no fault of a run."""
        self.checks[name] = self.checks.get(name, 0) + number

    def ended_right(self) -> None:
        """Note that the run of the test in hand has ended as the undisturbed one."""
        self.runs += 1
        for record in self.records:
            record.same_end |= record.test == self.test

    def write(self, path: Path, failed: int, seconds: float) -> None:
        """Write it all to a file."""
        content = asdict(self) | {"failed_tests": failed, "seconds": round(seconds, 1)}
        del content["test"]
        path.write_text(json.dumps(content, indent=1) + "\n")
