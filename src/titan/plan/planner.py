"""The plan of a run: what its fullest rank holds, how long a step takes, what travels.

`plan_config` is what `python -m titan.plan` calls. It resolves and checks a config as `titan.train` does, for the
machine that is planned for instead of the one it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titan.config.check import check_config
from titan.config.degrees import Machine, world_size
from titan.config.load import retyped
from titan.config.schema import ClusterKind, Device, Dtype, TitanConfig
from titan.errors import ConfigError, Problem
from titan.launch.environment import current_machine
from titan.models.flops import count_parameters, flops_per_token
from titan.plan.assumptions import TITAN, Assumptions, System
from titan.plan.devices import Accelerator, find_device, present_device
from titan.plan.memory import Memory, rank_memory
from titan.plan.rank import Shapes, Stage, stages_of
from titan.plan.speed import Timing, time_step

GIB = 1 << 30
ASSUMED_DEVICE = "h100"
"""What is planned for where neither the command nor the machine says it."""
ASSUMED_PER_NODE = 8


@dataclass(frozen=True)
class Plan:
    """What a run would take, on the rank that has most of it."""

    config: TitanConfig
    """Resolved."""
    device: Accelerator
    """Of every rank."""
    assumptions: Assumptions
    memory: Memory
    """Of the fullest rank."""
    fullest_rank: int
    """Which that is, along `pp`."""
    stages: tuple[Stage, ...]
    """What it has of the model."""
    timing: Timing | None
    """Of a step; None where the device's peak is not known."""
    notes: tuple[str, ...] = ()
    """What was taken for granted beside the assumptions."""

    @property
    def devices(self) -> int:
        """Ranks in all."""
        return world_size(self.config.cluster)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return count_parameters(self.config.model)

    @property
    def memory_gib(self) -> float:
        """What PyTorch reserves on the fullest rank, at its peak."""
        return self.memory.total / GIB

    @property
    def available_gib(self) -> float:
        """What there is for PyTorch on a device; of a CPU's memory every rank of a node has its share."""
        if self.device.name == "cpu":
            return self.device.memory_gib / (self.config.cluster.devices_per_node or 1)
        return self.device.memory_gib - self.assumptions.outside_gib

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is there."""
        return self.memory_gib <= self.available_gib

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward, as `titan.models.flops` counts them."""
        return flops_per_token(self.config.model, self.config.training.seq_len)

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks together."""
        return self.config.training.global_batch_size * self.config.training.seq_len

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together."""
        return None if self.timing is None else self.tokens_per_step / self.timing.step

    @property
    def tokens_per_second_per_device(self) -> float | None:
        """Of one device."""
        return None if self.tokens_per_second is None else self.tokens_per_second / self.devices

    @property
    def mfu(self) -> float | None:
        """Share of the bfloat16 peak, as metrics.jsonl has it: None in float32, and where the peak is not known."""
        speed, peak = self.tokens_per_second_per_device, self.device.peak_tflops
        is_known = self.device.is_peak_known and self.config.training.param_dtype is Dtype.bfloat16
        return speed * self.flops_per_token / peak / 1e12 if speed and peak and is_known else None

    def __str__(self) -> str:
        from titan.plan.report import describe

        return "\n".join(describe(self))

    def _repr_html_(self) -> str:
        from titan.plan.report import to_html

        return to_html(self)


def plan_config(
    config: TitanConfig,
    device: str | Accelerator | None = None,
    assumptions: Assumptions | None = None,
    machine: Machine | None = None,
) -> Plan:
    """Check a config and plan its run, without a GPU and without starting anything.

    Args:
        config: Composed; what it leaves open is filled in for the machines that are planned for.
        device: By its name in `titan.plan.devices`, or one of your own; None is the GPU of this machine, its CPU where
            the config would train on that, else an H100.
        assumptions: What the device reaches; None takes those that titan ships.
        machine: This one; None looks.

    Raises:
        ConfigError: If the config is wrong, as `titan.train` would say; or names a model that cannot be planned.
    """
    resolved, found, notes = resolve(retyped(config), device, machine)
    return build_plan(resolved, found, assumptions or Assumptions(), notes=notes)


def build_plan(
    config: TitanConfig,
    device: Accelerator,
    assumptions: Assumptions,
    system: System = TITAN,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of a resolved config."""
    shapes, ranks = Shapes(config), stages_of(config)
    memories = [rank_memory(config, rank, assumptions, system, shapes) for rank in range(len(ranks))]
    fullest = max(range(len(ranks)), key=lambda rank: memories[rank].total)
    timing = time_step(config, device, assumptions, system, shapes)
    return Plan(config, device, assumptions, memories[fullest], fullest, ranks[fullest], timing, notes)


def resolve(
    config: TitanConfig, device: str | Accelerator | None, machine: Machine | None = None
) -> tuple[TitanConfig, Accelerator, tuple[str, ...]]:
    """Return the resolved and checked config, the device, and what was taken for granted about the machines.

    Raises:
        ConfigError: As `plan_config`.
    """
    machine = replace(machine or current_machine(), started_ranks=None, started_ranks_per_node=None)
    found = find_device(device) if isinstance(device, str) else device
    cluster, notes = config.cluster, []
    is_elsewhere = cluster.kind is not ClusterKind.local
    if found is None and cluster.device is not Device.cpu and (machine.gpus or is_elsewhere):
        name = present_device() if machine.gpus else None
        found = find_device(name or ASSUMED_DEVICE)
        notes.append(f"--device {found.name}, {'as in this machine' if name else 'for nothing says another'}")
    elif found is None:
        found = find_device("cpu")
        notes.append("--device cpu, for this is where it would train; --device h100 plans for GPUs")
    if found.name == "cpu":
        machine = replace(machine, gpus=0)
        cluster = replace(cluster, device=Device.cpu if cluster.device is Device.auto else cluster.device)
        is_elsewhere &= cluster.kind is ClusterKind.slurm
    elif cluster.device is Device.cpu:
        raise ConfigError(
            [
                Problem(
                    f"cluster.device = cpu, and --device is {found.name}",
                    suggestion="--device cpu   or  cluster.device=auto",
                )
            ]
        )
    else:
        asks_slurm = cluster.kind is ClusterKind.slurm and not isinstance(device, str | Accelerator)
        if cluster.devices_per_node is None and not asks_slurm:
            per_node = machine.gpus or ASSUMED_PER_NODE
            where = "as this machine has" if machine.gpus else "for cluster.devices_per_node is not set"
            notes.append(f"{per_node} devices a node, {where}")
            cluster = replace(cluster, devices_per_node=per_node)
        machine = replace(machine, gpus=cluster.devices_per_node or ASSUMED_PER_NODE)
    resolved = check_config(replace(config, cluster=cluster), machine)
    if resolved.model.family != "llama":
        raise ConfigError(
            [
                Problem(
                    f"model.family = {resolved.model.family} cannot be planned",
                    "What a block keeps and computes is known of titan's own Llama alone.",
                    "cluster=simulated in titan.train   which builds one rank of any family and counts its weights",
                )
            ]
        )
    return resolved, found, tuple(notes)
