"""A run under faults: the same command again and again, as a scheduler or a patient user would type it.

After every attempt, whatever ended it, the run directory is held against the undisturbed run: what is there must be
right to the bit, and what is missing must be explained by what happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import IO, Any

from tests.faults.reference import Reference, different, digests
from tests.faults.report import Record, Report
from tests.support.command import (
    FAULT,
    Finished,
    Started,
    finish,
    kill_all,
    processes_with,
    start,
    wait_until,
)
from titan.checkpoint.manifest import Damaged, Manifest, committed_steps, step_folder
from titan.run_directory import RunDirectory

HANG_SECONDS = 150
"""An attempt that takes longer hangs: the longest that is expected here ends in a tenth of it on a quiet machine."""
GONE_SECONDS = 15


def read_until(stream: IO[str] | None, words: str) -> None:
    """Read what a command says on a stream until some words come; it may not end before."""
    assert stream is not None
    said = []
    for line in stream:
        said.append(line)
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}:\n{''.join(said)}")


@dataclass(frozen=True)
class Attempt:
    """One start of the command, and how it ended."""

    finished: Finished
    resumed: int
    """The step that it went on from."""
    reached: int
    """The last step that it finished."""
    newest: int
    """The newest whole checkpoint that it left; 0 without any."""
    first_step_seconds: float | None
    """From the start of the command to the first step that was new; None if there was none."""


@dataclass
class Run:
    """A run directory and the command that goes with it.

    Args:
        folder: To stand in; the run is in <folder>/run.
        arguments: Of the command.
        environment: Of the command, without faults.
        reference: What the run has to be.
        draw: For every choice.
        report: Takes what is found.
        interval: Steps between two checkpoints.
        lost_intervals: How many intervals of steps a crash may cost: one, and a second where a save goes on while
            the next steps are done.
        before_spike: The run without the spike that the reference goes back at: what is written before it.
    """

    folder: Path
    arguments: list[str]
    environment: dict[str, str]
    reference: Reference
    draw: Random
    report: Report
    interval: int
    lost_intervals: int = 1
    before_spike: Reference | None = None
    _judged: set[tuple[int, str]] = field(default_factory=set)
    _recovering: list[Record] = field(default_factory=list)

    @property
    def directory(self) -> RunDirectory:
        """Its files."""
        return RunDirectory(self.folder / "run")

    @property
    def checkpoints(self) -> Path:
        """Its checkpoints."""
        return self.directory.checkpoints

    def whole_steps(self) -> list[int]:
        """Return the steps whose checkpoints have every byte that their manifests say, found out independently."""

        def is_whole(step: int) -> bool:
            folder = step_folder(self.checkpoints, step)
            try:
                manifest = Manifest.read(folder)
                return not manifest.damage(folder) and manifest.run in ("", self.directory.read_identity())
            except Damaged:
                return False

        return [step for step in committed_steps(self.checkpoints) if is_whole(step)]

    def newest(self) -> int:
        """Return the newest whole checkpoint's step; 0 without any."""
        return max(self.whole_steps(), default=0)

    def last_row(self) -> int:
        """Return the last step in metrics.jsonl; 0 without any."""
        return max((step for step, _, _ in self.rows()), default=0)

    def rows(self) -> list[tuple[int, float, float]]:
        """Return step, loss and gradient norm of every step's row."""
        return [(row["step"], row["loss"], row["grad_norm"]) for row in self._whole_rows() if "loss" in row]

    def validations(self) -> list[tuple[int, float, int]]:
        """Return step, loss and tokens of every validation."""
        rows = [row for row in self._whole_rows() if "loss" not in row]
        return [(row["step"], row["validation_loss"], row["validation_tokens"]) for row in rows]

    def _whole_rows(self) -> list[dict[str, Any]]:
        """Return all rows but the last, if a full disk or a kill has cut that one short."""
        if not self.directory.metrics.exists():
            return []
        whole, _, _ = self.directory.metrics.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    # -- an attempt --------------------------------------------------------------------------------------------------

    def start(self, faults: str = "") -> Started:
        """Start the command with faults planted, without waiting."""
        self.report.count("starts")
        planted = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": faults} if faults else {}
        return start(["-m", "titan.train", *self.arguments], self.folder, self.environment | planted)

    def attempt(
        self,
        faults: str = "",
        codes: tuple[int, ...] = (1,),
        meanwhile: Callable[[Started], None] = lambda process: None,
    ) -> Attempt:
        """Start the command, wait for its end, and hold all that it leaves against the reference.

        Args:
            faults: To plant.
            codes: It must end with one of these.
            meanwhile: Called once it is started.
        """
        expected = self.newest()
        resumes = len(self.directory.read_events("resume"))
        began = time.time()
        process = self.start(faults)
        try:
            meanwhile(process)
            finished = finish(process, HANG_SECONDS)
            wait_until(lambda: not processes_with(process.mark), "the end of all its processes", GONE_SECONDS)
        finally:
            kill_all(process)
        story = f"{faults or 'no fault'}, from step {expected}\n{finished.text}"
        assert finished.code in codes, f"exit code {finished.code}, not one of {codes}: {story}"
        resumed = [event["step"] for event in self.directory.read_events("resume")[resumes:]]
        assert not resumed or resumed == [expected], f"resumed at {resumed}: {story}"
        new = [row for row in self._timed_rows() if row[1] >= began]
        assert resumed or not (expected and new), f"it began anew: {story}"
        self.judge(story)
        attempt = Attempt(
            finished,
            resumed=expected,
            reached=new[-1][0] if new else expected,
            newest=self.newest(),
            first_step_seconds=new[0][1] - began if new else None,
        )
        if attempt.first_step_seconds is not None:
            for record in self._recovering:
                record.recovery_seconds = attempt.first_step_seconds
            self._recovering.clear()
        return attempt

    def judge(self, story: str) -> None:
        """Hold every row, and every checkpoint not looked at before, against the reference."""
        rows = self.rows()
        assert [row[0] for row in rows] == sorted({row[0] for row in rows}), f"rows out of order: {story}"
        before = self.before_spike.rows if self.before_spike else {}
        for row in rows:
            assert row in (self.reference.rows.get(row[0]), before.get(row[0])), f"another step {row[0]}: {story}"
        validated = self.validations()
        assert validated == self.reference.validations[: len(validated)], f"another validation: {story}"
        for step in self.whole_steps():
            folder = step_folder(self.checkpoints, step)
            saved = step, Manifest.read(folder).time
            if saved not in self._judged and step in self.reference.steps:
                wrong = different(digests(folder), self.reference.digests(step))
                assert not wrong, f"another checkpoint of step {step} ({', '.join(wrong)}): {story}"
                self._judged.add(saved)

    # -- a fault and what came of it ---------------------------------------------------------------------------------

    def survive(
        self,
        name: str,
        faults: str = "",
        codes: tuple[int, ...] = (1,),
        meanwhile: Callable[[Started], None] = lambda process: None,
        lost_steps: int | None = None,
    ) -> Attempt:
        """Let a fault end an attempt, and record it: at most so many steps may have to be done again.

        Args:
            name: The fault's, in the table.
            faults: To plant.
            codes: See `attempt`.
            meanwhile: See `attempt`.
            lost_steps: None takes what the interval allows.
        """
        attempt = self.attempt(faults, codes, meanwhile)
        lost = attempt.reached - attempt.newest
        most = self.interval * self.lost_intervals if lost_steps is None else lost_steps
        assert lost <= most, f"{name}: {lost} steps lost, {faults}\n{attempt.finished.text}"
        self._recovering.append(self.report.add(name, attempt.finished.code, lost, faults))
        return attempt

    def damage_newest(self, name: str, damage: Callable[[Path, Random], object]) -> None:
        """Damage the newest checkpoint, which the next attempt has to find and set aside, and record it."""
        *_, before, newest = self.whole_steps()
        damage(step_folder(self.checkpoints, newest), self.draw)
        assert self.newest() == before, f"{name}: step {newest} is still whole"
        self._recovering.append(self.report.add(name, None, newest - before, f"step {newest}"))

    def complete(self, faults: str = "") -> None:
        """Let the run come to its end without another fault that would end it: it must be the reference, whole."""
        self.attempt(faults, codes=(0,))
        self.expect_end()

    def expect_end(self) -> None:
        """Hold the end of the run against the reference's: every row, every tensor of the last checkpoint, the status.

        And nothing unfinished may lie about among the checkpoints.
        """
        last = max(self.reference.rows)
        assert self.rows() == list(self.reference.rows.values())
        assert self.validations() == self.reference.validations
        assert self.newest() == last
        assert different(digests(step_folder(self.checkpoints, last)), self.reference.digests(last)) == []
        status = self.directory.read_status()
        assert (status["state"], status["step"]) == ("complete", last)
        assert [path.name for path in self.checkpoints.glob(".*")] == []
        self.report.ended_right()

    def _timed_rows(self) -> list[tuple[int, float]]:
        rows = [row for row in self._whole_rows() if "loss" in row]
        return [(row["step"], datetime.fromisoformat(row["time"]).timestamp()) for row in rows]
