"""Saving and loading: how long training waits, in every mode, beside PyTorch's own `save`, in the same processes.

Four processes hold a model with AdamW of some GiB, sharded by FSDP, and take their steps. In every turn the state is
saved by plain `torch.distributed.checkpoint.save` and by titan in each mode, each to a new folder of the same disk;
then it is loaded by both. The order of the sides changes from turn to turn, because a disk is never as fast twice. What
is compared is taken within a turn; the time of the checksums is taken inside of the synchronous save.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from record import OtherLoad, describe_machine, spread, write_result

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import compose
from titan.config.schema import CheckpointMode, TitanConfig
from titan.data.prepared import write_documents

RANKS = 4
PLAIN = "plain torch.distributed.checkpoint.save"
SIDES = (PLAIN, "sync", "async", "async_pinned")
MODEL = ("model.dim=768", "model.n_heads=12", "model.n_kv_heads=12", "model.ffn_dim=2048")
LAYERS = 14


def main() -> int:
    """Measure all sides in turn, print and write the figures; 1 where checksums cost more than they may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"blocks of the model (default: {LAYERS}: 1.1 GiB)")
    parser.add_argument("--folder", help="where to save to (default: a temporary folder)")
    arguments = parser.parse_args()
    machine = describe_machine()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = OtherLoad()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tokens = Path(folder) / "tokens"
        write_documents(tokens, [np.random.default_rng(0).integers(0, 256, 1 << 20)], 256)
        with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
            jobs = [(rank, Path(folder), arguments.layers, arguments.repeats) for rank in range(RANKS)]
            found = pool.starmap(_rank, jobs, chunksize=1)[0]
    others = load.cores()
    cost = found.pop("checksum share")
    figures = {
        "gib": found.pop("gib"),
        "step_seconds": spread(found.pop("step")),
        "seconds": {side: spread(seconds) for side, seconds in found.items()},
        "checksum_share": spread(cost),
        "times_plain": {
            side: spread([own / plain for own, plain in zip(found[side], found[PLAIN], strict=True)])
            for side in SIDES
            if side != PLAIN
        },
    }
    print(f"\n{figures['gib']:.2f} GiB of state, {RANKS} processes, {arguments.repeats} turns; medians, least to most")
    for side, seconds in figures["seconds"].items():
        print(f"{side:<42} {seconds['median']:>7.3f} s   {seconds['least']:.3f} to {seconds['most']:.3f}")
    print(f"{'checksums, as a share of a synchronous save':<42} {figures['checksum_share']['median']:>7.1%}")
    path = write_result("checkpoints", machine, **figures, other_busy_cores=others)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return int(figures["checksum_share"]["median"] > 0.15)


def _config(folder: Path, layers: int) -> TitanConfig:
    return check_config(
        compose(
            [
                *(*MODEL, f"model.n_layers={layers}", "training.seq_len=32", "training.local_batch_size=1"),
                *(
                    f"cluster.devices_per_node={RANKS}",
                    "cluster.device=cpu",
                    "checkpoint=sync",
                    "training.steps=100000",
                ),
                *("checkpoint.interval=1000000", "checkpoint.keep_latest=1", f"run.dir={folder}"),
            ]
        ),
        Machine(),
    )


def _rank(rank: int, folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    """Be one rank; returns the seconds of every side in every turn."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from titan.checkpoint import files
    from titan.checkpoint.manifest import step_folder
    from titan.checkpoint.state import optimizer_state, weights_state
    from titan.checkpoint.store import CheckpointStore
    from titan.config.schema import CheckpointContent
    from titan.data.prepared import open_prepared
    from titan.data.rows import PreparedRows
    from titan.trainer.build import build_trainer
    from titan.trainer.device import select_device
    from titan.trainer.loop import build_meter, run_step, steps_of_batches
    from titan.trainer.resume import load_checkpoint
    from titan.trainer.saving import Saver

    config = _config(folder, layers)
    device = select_device(config.cluster.device, rank, 1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    rows = PreparedRows(open_prepared(folder / "tokens"), config.training.seq_len, padding=0)
    trainer = build_trainer(config, device, rows)
    meter = build_meter(trainer)
    batches = steps_of_batches(trainer, meter)

    def together(action: Callable[[], object]) -> float:
        """Return the seconds that the slowest rank took."""
        dist.barrier()
        began = time.perf_counter()
        action()
        seconds = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    def state() -> dict[str, torch.Tensor]:
        return weights_state(trainer.parameters) | optimizer_state(trainer.parameters, trainer.optimizer)

    def plain() -> None:
        dcp.save(state(), checkpoint_id=folder / "plain")

    def by_titan(mode: str) -> float:
        """Return the seconds that training waited, from the save to its end."""
        checkpoint = replace(config.checkpoint, mode=CheckpointMode[mode], interval=1)
        trainer.config = replace(config, checkpoint=checkpoint)
        trainer.store = CheckpointStore(folder / "titan", checkpoint)
        saver = Saver(trainer, meter)
        meter.checkpoint_seconds = 0.0
        dist.barrier()
        saver.after_step(saver.wishes())
        while mode != "sync":
            run_step(trainer, next(batches), saver.wait_for_copies).result.read()
            if not _any_rank(saver.wishes().is_saving):
                break
        saver.settle()
        saver.close()
        if saver.failures:
            raise SystemExit("a save has failed, so there is nothing to compare")
        waited = torch.tensor(meter.checkpoint_seconds)
        dist.all_reduce(waited, op=dist.ReduceOp.MAX)
        return waited.item()

    def timed() -> float:
        """Save with checksums whose time is taken; notes their share of the save."""
        original = files.xxhash.xxh3_128
        files.xxhash.xxh3_128 = _Timed  # type: ignore[assignment,misc]
        _Timed.seconds = 0.0
        try:
            waited = by_titan("sync")
        finally:
            files.xxhash.xxh3_128 = original  # type: ignore[misc]
        slowest = torch.tensor(_Timed.seconds)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found["checksum share"].append(slowest.item() / waited)
        return waited

    sides: dict[str, Callable[[], float]] = {
        PLAIN: lambda: together(plain),
        "sync": timed,
        "async": lambda: by_titan("async"),
        "async_pinned": lambda: by_titan("async_pinned"),
    }
    others = ("load, plain", "load, verified", "step", "checksum share")
    found: dict[str, Any] = {side: [] for side in (*SIDES, *others)}
    for _ in range(2):
        found["step"].append(together(lambda: run_step(trainer, next(batches)).result.read()))
    found["gib"] = sum(t.numel() * t.element_size() for t in state().values()) / 2**30
    for turn in range(repeats):
        for side in (*SIDES[turn % len(SIDES) :], *SIDES[: turn % len(SIDES)]):
            found[side].append(sides[side]())
            if rank == 0:
                print(f"{turn + 1}/{repeats}  {side:<42} {found[side][-1]:.3f} s", flush=True)
                if side == PLAIN and turn < repeats - 1:
                    shutil.rmtree(folder / "plain")
            dist.barrier()
    assert trainer.store is not None
    for turn in range(repeats):
        order = [("load, plain", lambda: dcp.load(state(), checkpoint_id=folder / "plain"))]

        def verified() -> None:
            assert trainer.store is not None
            saved = trainer.store.find("")
            assert saved is not None
            load_checkpoint(trainer, trainer.store, saved.path, saved.manifest, CheckpointContent.all)

        order.append(("load, verified", verified))
        for name, action in order if turn % 2 else reversed(order):
            found[name].append(together(action))
    assert step_folder(folder / "titan", trainer.store.steps()[-1]).is_dir()
    dist.destroy_process_group()
    found["step"] = found["step"][1:]
    return found


def _any_rank(value: int) -> bool:
    import torch
    import torch.distributed as dist

    values = torch.tensor(value)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return bool(values.item())


_XXH3 = xxhash.xxh3_128


class _Timed:
    """A checksum that knows how long it took, of all that there were."""

    seconds = 0.0

    def __init__(self) -> None:
        self.digest = _XXH3()

    def update(self, data: Any) -> None:
        """Take data in."""
        began = time.perf_counter()
        self.digest.update(data)
        _Timed.seconds += time.perf_counter() - began

    def hexdigest(self) -> str:
        """Return the checksum."""
        return self.digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
