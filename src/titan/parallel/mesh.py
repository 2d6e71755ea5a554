"""The device mesh, seen four ways.

    axes      (pp, dp_replicate, dp_shard, cp, tp)   every axis that the config names, outermost first
    storage   (pp, dp_replicate, fsdp, tp)           how weights are laid out: fsdp is dp_shard x cp, because context
                                                     parallel ranks hold the same weights and can share them out
    batch     (pp, batch, cp, tp)                    who sees which rows: batch is dp_replicate x dp_shard
    loss      (pp, loss, tp)                         who has a share of the loss: loss is dp_replicate x dp_shard x cp

They are plain meshes over the same ranks in the same order. (PyTorch can flatten dims of one mesh, but
slicing by a flattened name is deprecated since 2.11.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan.config.degrees import AXES
from titan.config.schema import ParallelismConfig


@dataclass(frozen=True)
class Mesh:
    """The four views, and this rank's place in them."""

    axes: DeviceMesh
    storage: DeviceMesh
    batch: DeviceMesh
    loss: DeviceMesh

    def degree(self, axis: str) -> int:
        """Return the size of an axis."""
        return self.axes[axis].size()

    def coordinate(self, axis: str) -> int:
        """Return this rank's index on an axis."""
        return self.axes.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the ranks that differ from this one on this axis only."""
        return self.axes.get_group(axis)

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh that `fully_shard` takes: sharded over its last dim, replicated over one before it, if there is one.

        With one replica there is none, or every gradient would be summed over one rank.
        """
        return self.storage["fsdp"] if self.degree("dp_replicate") == 1 else self.storage["dp_replicate", "fsdp"]

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank sees."""
        return self.batch.get_local_rank("batch")

    @property
    def data_ranks(self) -> int:
        """Into how many shares the rows are cut."""
        return self.batch["batch"].size()

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """The ranks that see other tokens, with this one."""
        return self.loss.get_group("loss")


def build_mesh(parallelism: ParallelismConfig, device_type: str) -> Mesh:
    """Return the mesh of resolved degrees over all ranks of the default process group."""
    pp, dp_replicate, dp_shard, cp, tp = (getattr(parallelism, axis) for axis in AXES)
    return Mesh(
        axes=init_device_mesh(device_type, (pp, dp_replicate, dp_shard, cp, tp), mesh_dim_names=AXES),
        storage=init_device_mesh(
            device_type,
            (pp, dp_replicate, dp_shard * cp, tp),
            mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
        ),
        batch=init_device_mesh(
            device_type, (pp, dp_replicate * dp_shard, cp, tp), mesh_dim_names=("pp", "batch", "cp", "tp")
        ),
        loss=init_device_mesh(device_type, (pp, dp_replicate * dp_shard * cp, tp), mesh_dim_names=("pp", "loss", "tp")),
    )
