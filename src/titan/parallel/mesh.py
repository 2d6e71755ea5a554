"""The device mesh: where this rank stands on every axis, and the groups that are needed of it.

    axes      (pp, dp_replicate, dp_shard, cp, tp)   what the config names, outermost first; only counted, because
                                                     ranks are numbered along them
    storage   (pp, dp_replicate, fsdp, tp)           how weights are laid out: fsdp is dp_shard x cp, because context
                                                     parallel ranks hold the same weights and can share them out
    cp        the ranks that share a sequence        where dp_shard is 1 too, the same as fsdp
    loss      the ranks that see other tokens        dp_replicate x dp_shard x cp; where one of the storage axes is all
                                                     of it, the same as that one

Every group takes all ranks to make and a while to connect, so an axis of degree 1 has none (fsdp always has one), and
what is the same is made once. (PyTorch can flatten dims of one mesh, but slicing by a flattened name is
deprecated since 2.11.)
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import _redistribute, debug

from titan.config.degrees import AXES
from titan.config.schema import ParallelismConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's place and groups."""

    degrees: dict[str, int]
    """Of every axis."""
    coordinates: dict[str, int]
    """This rank's index on every axis."""
    storage: DeviceMesh
    """The axes of storage whose degree is not 1, and fsdp."""
    loss_group: dist.ProcessGroup
    """The ranks that see other tokens, with this one."""
    cp_group: dist.ProcessGroup | None

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh that `fully_shard` takes: sharded over its last dim, replicated over one before it, if there is one.

        With one replica there is none, or every gradient would be summed over one rank.
        """
        return self.storage["fsdp"] if self.degrees["dp_replicate"] == 1 else self.storage["dp_replicate", "fsdp"]

    @property
    def tp(self) -> DeviceMesh:
        """The ranks that share matrices; there have to be several."""
        return self.storage["tp"]

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks that have other pipeline stages, with this one; None without a pipeline."""
        return self.storage.get_group("pp") if self.degrees["pp"] > 1 else None

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank sees."""
        return self.coordinates["dp_replicate"] * self.degrees["dp_shard"] + self.coordinates["dp_shard"]

    @property
    def data_ranks(self) -> int:
        """Into how many shares the rows are cut."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]


def build_mesh(parallelism: ParallelismConfig, device_type: str) -> Mesh:
    """Return the mesh of resolved degrees over all ranks of the default process group."""
    degrees = {axis: getattr(parallelism, axis) for axis in AXES}
    pp, dp_replicate, dp_shard, cp, tp = degrees.values()
    coordinates, rest = {}, dist.get_rank()
    for axis, degree in reversed(degrees.items()):
        rest, coordinates[axis] = divmod(rest, degree)
    sizes = {"pp": pp, "dp_replicate": dp_replicate, "fsdp": dp_shard * cp, "tp": tp}
    present = {axis: size for axis, size in sizes.items() if size > 1 or axis == "fsdp"}
    storage = init_device_mesh(device_type, tuple(present.values()), mesh_dim_names=tuple(present))
    cp_group = None
    if cp > 1:
        cp_group = storage.get_group("fsdp") if dp_shard == 1 else _middle_group(device_type, cp, tp)
    if dp_replicate == 1 or dp_shard * cp == 1:
        loss_group = storage.get_group("fsdp" if dp_replicate == 1 else "dp_replicate")
    else:
        loss_group = _middle_group(device_type, dp_replicate * dp_shard * cp, tp)
    return Mesh(degrees, {axis: coordinates[axis] for axis in AXES}, storage, loss_group, cp_group)


def leave_process_group() -> None:
    """End the default process group and all others, so that this process can start new ones.

    PyTorch only forgets a gloo group: its threads and connections end with the last reference to it (2.13). DTensor's
    caches hold meshes, and take an old one for a new one of the same shape; what else refers to it lies in cycles. Left
    to chance, each rank would close old connections at a moment of its own, in the middle of what new groups do.
    """
    dist.destroy_process_group()
    debug._clear_sharding_prop_cache()
    getattr(_redistribute, "clear_redistribute_planner_cache", lambda: None)()  # new in 2.13
    for cache in _find_caches_of_dtensor():
        cache.cache_clear()
    gc.collect()


_found_caches: dict[int, Any] = {}
"""The caches of DTensor that were found so far, for a program may have frozen what the collector knows."""


def _find_caches_of_dtensor() -> Iterable[Any]:
    """Return what `functools.cache` made; there is no list of them, and some are attributes or in closures."""
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper and str(found.__module__).startswith("torch.distributed.tensor"):
            _found_caches[id(found)] = found
    return _found_caches.values()


def _middle_group(device_type: str, size: int, inner: int) -> dist.ProcessGroup:
    """Return this rank's group of `size` ranks that are `inner` apart."""
    outer = dist.get_world_size() // (size * inner)
    shape = {"outer": outer, "group": size, "inner": inner}
    present = {name: count for name, count in shape.items() if count > 1 or name == "group"}
    assert math.prod(present.values()) == dist.get_world_size(), "the degrees' product is the world size"
    return init_device_mesh(device_type, tuple(present.values()), mesh_dim_names=tuple(present)).get_group("group")
