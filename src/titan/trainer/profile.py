"""A PyTorch profiler trace of some steps, one file a rank, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from titan.config.schema import ProfilingConfig
from titan.log import logger


class Profile:
    """Counts steps and traces those that the config asks for; does nothing where it asks for none."""

    def __init__(self, config: ProfilingConfig, folder: Path, rank: int) -> None:
        self.config, self.folder, self.rank = config, folder, rank
        self._profile: profile | None = None
        if config.enable:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                # step 1 has index 0, and one step of warm-up goes before
                schedule=schedule(wait=config.start_step - 2, warmup=1, active=config.steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Profile:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)

    def step(self) -> None:
        """Tell that a step is done."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, finished: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.config.start_step + self.config.steps - 1
        path = self.folder / f"steps_{self.config.start_step}_{last}.rank_{self.rank:05d}.json.gz"
        finished.export_chrome_trace(str(path))
        logger.info(f"profile of steps {self.config.start_step} to {last}: {path}")
