"""Whole runs of one rank in this process: as titan's worker does them, without the seconds that a process takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import titan.parallel.apply
from tests.support.command import TINY
from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import FaultToleranceConfig, TitanConfig
from titan.launch.dispatch import freeze
from titan.run_directory import RunDirectory
from titan.trainer.build import Trainer, build_trainer, load_data, load_held_out
from titan.trainer.device import select_device
from titan.trainer.loop import fit
from titan.trainer.resume import resume
from titan.trainer.watchdog import Watchdog


@pytest.fixture(scope="package", autouse=True)
def process_group() -> Iterator[None]:
    """A world of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Runs:
    """Runs in folders below one, on one text."""

    def __init__(self, folder: Path, text: Path, cache: Path) -> None:
        self.folder, self.text, self.cache = folder, text, cache

    def config(self, name: str, *overrides: str) -> TitanConfig:
        """Return a checked config of a run of six steps, in the folder of that name."""
        common = ("training.steps=6", "metrics.log_every=1", "checkpoint.interval=2", "cluster.device=cpu")
        where = (f"run.dir={self.folder / name}", f"data.path={self.text}", f"data.cache_dir={self.cache}")
        return check_config(
            compose([*TINY, *common, *where, *overrides]), Machine(gpus=min(1, torch.cuda.device_count()))
        )

    def build(self, config: TitanConfig) -> Trainer:
        """Return a trainer that has resumed where there is something to resume."""
        freeze(config, RunDirectory(Path(config.run.dir)), [])
        texts = load_data(config, True), load_held_out(config, True)
        trainer = build_trainer(config, select_device(config.cluster.device, 0, 1), *texts)
        resume(trainer)
        return trainer

    def fit(self, trainer: Trainer, stop_after: int = 0, warning: Callable[[], int] | None = None) -> float | None:
        """Train to the end, or until a signal after some step, or whenever `warning` says."""
        off = Watchdog(
            FaultToleranceConfig(step_timeout_seconds=0), trainer.directory, 0, 1, 0, report=lambda hung: None
        )
        return fit(trainer, off, warning or (lambda: 15 if trainer.state.step == stop_after else 0))

    def train(self, name: str, *overrides: str, change: Callable[[Trainer], None] = lambda trainer: None) -> Trainer:
        """Run a config from where its folder stands to the end."""
        trainer = self.build(self.config(name, *overrides))
        change(trainer)
        self.fit(trainer)
        return trainer


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what lets models be built from then on with FSDP around them, as those of several ranks are."""
    return lambda: monkeypatch.setattr(titan.parallel.apply, "has_fsdp", lambda parallelism: True)


@pytest.fixture
def runs(tmp_path: Path, text_file: Path, cache: Path) -> Runs:
    """Runs in an empty folder."""
    return Runs(tmp_path, text_file, cache)
