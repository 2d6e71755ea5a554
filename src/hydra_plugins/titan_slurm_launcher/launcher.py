"""The launcher of sweeps on SLURM: composes every point here, and gives them all to titan to check and submit.

Hydra executes this module at every start to look for plugins, so it imports nothing that takes time. It must not
have `from __future__ import annotations`: Hydra looks at the dataclass before the module is registered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class TitanSlurmLauncherConf:
    """Nothing to set: what a job asks for is in titan's own group, cluster."""

    _target_: str = "hydra_plugins.titan_slurm_launcher.launcher.TitanSlurmLauncher"


class TitanSlurmLauncher(Launcher):
    """Points of a sweep as SLURM job arrays."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over what Hydra has."""
        self.task_function, self.config = task_function, config
        # Hydra's sweeper composes every point to see whether it can be, and throws the result away: a tenth of a second
        # each. Kept here, it need not be made again.
        loader = hydra_context.config_loader
        self._compose, self._composed = loader.load_sweep_config, dict[tuple[str, ...], DictConfig]()

        def load_sweep_config(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            composed = self._composed[tuple(sweep_overrides)] = self._compose(master_config, sweep_overrides)
            return composed

        loader.load_sweep_config = load_sweep_config  # type: ignore[method-assign]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all points, have them submitted, and return the last loss of each where titan waits for it."""
        submit_points: Any = getattr(self.task_function, "submit_points", None)
        if submit_points is None:
            raise HydraException("hydra/launcher=titan_slurm starts titan.train and nothing else")
        points = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            # popped, for the same overrides may come twice, and each point is an object of its own
            composed = self._composed.pop(tuple(overrides), None) or self._compose(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
                folder = Path(str(composed.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)
                composed.hydra.runtime.output_dir = str(folder.absolute())
            points.append(composed)
        returns = []
        for overrides, composed, result in zip(job_overrides, points, submit_points(points), strict=True):
            status = JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED
            returns.append(JobReturn(overrides=list(overrides), cfg=composed, status=status, _return_value=result))
        return returns


ConfigStore.instance().store(
    group="hydra/launcher", name="titan_slurm", node=TitanSlurmLauncherConf, provider="titan_slurm_launcher"
)
