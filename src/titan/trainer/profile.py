"""Looking closely at some steps: a trace for chrome://tracing or Perfetto, where the time went, and the GPU's memory.

    <run.dir>/profiles/steps_10_12.rank_00000.json.gz         the trace
                       steps_10_12.rank_00000.summary.json    shares of the time, and all operators
                       steps_10_12.rank_00000.summary.txt     the same as a table, which rank 0 shows on the console
                       steps_10_12.rank_00000.memory.pickle   with memory_snapshot, for https://pytorch.org/memory_viz
                       out_of_memory.rank_00000.memory.pickle where the memory ran out before that

One of each a rank. What the shares mean: `titan.trainer.breakdown`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from titan.config.schema import ProfilingConfig
from titan.log import logger
from titan.trainer.breakdown import break_down

_MOST_ENTRIES = 100_000
"""Allocations that a snapshot remembers, the last ones."""


class Profile:
    """Is told of every step, and looks at those that the config asks for; does nothing where it asks for none.

    Args:
        config: What to look at, and when.
        folder: Where to write.
        rank: This rank.
        step: The one that the run goes on from. Steps before it are not looked at.
    """

    def __init__(self, config: ProfilingConfig, folder: Path, rank: int, step: int = 0) -> None:
        self.config, self.folder, self.rank = config, folder, rank
        self.last_step = config.start_step + config.steps - 1
        self._done = step
        self._traced: list[int] = []
        is_wanted = step < config.start_step
        self._profile: profile | None = None
        self._records_memory = config.memory_snapshot and is_wanted
        if config.enable and is_wanted:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=lambda _: self._action(self._done + 1),
                on_trace_ready=self._write_trace,
                acc_events=True,  # or it warns that the events of a second round would not be there
            )
        elif (config.enable or config.memory_snapshot) and not is_wanted:
            logger.info(
                f"profile: step {config.start_step} is past: the run goes on from step {step}. Nothing is profiled\n"
                f"  Try  profiling.start_step={step + 2}"
            )

    def __enter__(self) -> Profile:
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ENTRIES)
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, torch.OutOfMemoryError):
            self._write_memory("out_of_memory")
        self._stop_recording_memory()
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def step(self, step: int) -> None:
        """Tell that a step is done."""
        self._done = step
        if self._profile is not None:
            if self._action(step) in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
                self._traced.append(step)
            self._profile.step()
        if step == self.last_step:
            self._write_memory(f"steps_{self.config.start_step}_{step}")
            self._stop_recording_memory()

    def _action(self, step: int) -> ProfilerAction:
        """Return what to do in a step; the one before the first is traced and thrown away, as warm-up."""
        if step == self.config.start_step - 1:
            return ProfilerAction.WARMUP
        if step == self.last_step:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.RECORD if self.config.start_step <= step < self.last_step else ProfilerAction.NONE

    def _write_trace(self, finished: profile) -> None:
        if not self._traced:  # the run ends in the first of them
            return
        first, last = self._traced[0], self._traced[-1]
        name = f"steps_{first}_{last}.rank_{self.rank:05d}"
        path = self.folder / f"{name}.json.gz"
        with self._surviving("trace"):
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(path))
            found = break_down(finished.events() or [], len(self._traced))
            title, table = f"profile of steps {first} to {last}", list(found.lines())
            (self.folder / f"{name}.summary.json").write_text(json.dumps(found.to_json(), indent=2) + "\n")
            (self.folder / f"{name}.summary.txt").write_text("\n".join([title, *table]) + "\n")
            logger.info("\n".join([f"{title}: {path}", *(f"  {line}" for line in table)]))

    def _write_memory(self, name: str) -> None:
        if not self._records_memory:
            return
        with self._surviving("memory snapshot"):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{name}.rank_{self.rank:05d}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            logger.info(f"memory snapshot: {path}")

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Go on where something cannot be written: the run is worth more than a look at it."""
        try:
            yield
        except OSError as error:
            logger.warning(f"no {what} of rank {self.rank}: {self.folder} cannot be written to ({error.strerror})")

    def _stop_recording_memory(self) -> None:
        if self._records_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._records_memory = False
