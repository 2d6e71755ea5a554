"""The checkpoints folder of a run: saving, finding the newest that is whole, and clearing up.

Saving is all or nothing. The ranks write into a hidden folder, every file is checksummed and synced, rank 0 writes the
manifest and renames: before that rename there is no checkpoint, after it there is one. Whatever goes wrong before it
is an error on every rank (`StorageError`), and the checkpoints that were there are still there.

Loading is decided by rank 0 and checked by all: the newest checkpoint whose every byte has its checksum. One that does
not is renamed to damaged_step_..., which keeps it for whoever wants to look, and the one before is tried.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from titan.checkpoint.files import TensorInfo, read_metadata, read_tensors, tensor_infos, write_tensors
from titan.checkpoint.first_rank import on_first_rank
from titan.checkpoint.manifest import (
    Damaged,
    FileRecord,
    Manifest,
    commit,
    committed_steps,
    record_of_file,
    recover,
    remove,
    rename_aside,
    step_folder,
    sync_folder,
)
from titan.checkpoint.staging import Copies
from titan.checkpoint.state import MODEL, OPTIMIZER
from titan.config.schema import CheckpointConfig, CheckpointMode
from titan.errors import CheckpointError, StorageError
from titan.log import logger
from titan.run_directory import write_synced

CONFIG = "config.yaml"
DAMAGED, FOREIGN = "damaged", "foreign"
"""What the names of checkpoints begin with that were set aside: not whole, or not this run's."""

T = TypeVar("T")
Note = Callable[..., None]
"""Takes the name of an event and its details: `RunDirectory.append_event`."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed."""

    manifest: Manifest
    path: Path
    seconds: float = 0.0
    """How long it took to write."""


class CheckpointStore:
    """The checkpoints of a run.

    Every method is for all ranks together, unless it says otherwise.

    Args:
        folder: <run.dir>/checkpoints.
        settings: Of the run.
        timeout_seconds: The longest wait for another rank that writes or reads.
        note: Writes down what happens to a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        timeout_seconds: float = 1800,
        note: Note = lambda *_, **__: None,
    ) -> None:
        self.folder, self.settings, self.note = folder, settings, note
        # Its own, and on the CPU: a save in the background must not get between the collectives of training.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, dist.ProcessGroup), "of all ranks"
        self.group = group
        self.is_first = dist.get_rank() == 0
        self._copies = Copies(is_kept=settings.mode is CheckpointMode.async_pinned)
        self._writer = ThreadPoolExecutor(1, "checkpoint", _take_device, (_device(),))
        self._copier = ThreadPoolExecutor(1, "staging", _take_device, (_device(),))
        self._in_flight: Future[Saved] | None = None

    # -- saving ------------------------------------------------------------------------------------------------------

    @property
    def is_saving(self) -> bool:
        """Whether a save goes on in the background on this rank."""
        return self._in_flight is not None and not self._in_flight.done()

    def save(self, manifest: Manifest, state: Mapping[str, Tensor], config: str, in_background: bool) -> None:
        """Save; the outcome is what `result` returns.

        Args:
            manifest: What is known of the checkpoint, without files.
            state: By name; unchanged until `wait_for_copies` has returned, if in the background.
            config: The frozen config's text.
            in_background: Return when the state is copied, or with async_pinned even before.
        """
        assert self._in_flight is None, "`result` of the save before comes first"
        state = dict(state)
        if not in_background:
            done: Future[Saved] = Future()
            try:
                done.set_result(self._write(manifest, state, config, None))
            except StorageError as error:
                done.set_exception(error)
            self._in_flight = done
        elif self.settings.mode is CheckpointMode.async_pinned:
            finished = self._copies.start(state, self._copier)
            self._in_flight = self._writer.submit(lambda: self._write(manifest, state, config, finished()))
        else:
            copies = self._copies.copy(state)
            self._in_flight = self._writer.submit(self._write, manifest, state, config, copies)

    def wait_for_copies(self) -> None:
        """Return when the state that is being saved may change; on this rank alone."""
        self._copies.wait()

    def result(self) -> Saved | StorageError | None:
        """Wait for the save in hand, and return what came of it: the same on every rank. None if there is none."""
        if self._in_flight is None:
            return None
        future, self._in_flight = self._in_flight, None
        error = future.exception()
        if error is None:
            return future.result()
        if not isinstance(error, StorageError):
            raise error
        return error

    def close(self) -> None:
        """Let the save in hand end, whatever comes of it; on this rank alone."""
        self._writer.shutdown()
        self._copier.shutdown()

    def _write(
        self, manifest: Manifest, state: dict[str, Tensor], config: str, copies: Mapping[str, Tensor] | None
    ) -> Saved:
        began = time.perf_counter()
        final = step_folder(self.folder, manifest.step)
        temporary = self._agree(lambda: self._start(final, manifest.content))
        try:
            mine = write_tensors(state, temporary, self.group, copies.__getitem__ if copies is not None else None)
            written: list[Any] = [None] * dist.get_world_size()
            dist.gather_object(mine, written if self.is_first else None, group=self.group)
            saved = self._agree(lambda: self._commit(temporary, final, manifest, written, config))
            return replace(saved, seconds=time.perf_counter() - began)
        except StorageError:
            if self.is_first:
                shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
            raise

    def _start(self, final: Path, content: str) -> Path:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        for failed in self.folder.glob(".step_*.tmp"):  # what could not be removed when it failed
            shutil.rmtree(failed, ignore_errors=True)
        needed = self._size_of_newest(content)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            # A save that cannot end would take what logs and metrics need.
            raise StorageError(f"no space left: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free")
        temporary = self.folder / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        return temporary

    def _size_of_newest(self, content: str) -> int:
        """Return the bytes of the newest checkpoint with as much in it; 0 where there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                manifest = Manifest.read(step_folder(self.folder, step))
                if manifest.content == content and manifest.step:  # at step 0 there is no optimizer's state
                    return manifest.bytes
        return 0

    def _commit(
        self, temporary: Path, final: Path, manifest: Manifest, written: list[dict[str, FileRecord]], config: str
    ) -> Saved:
        write_synced(temporary / CONFIG, config)
        files = {name: record for part in written for name, record in part.items()}
        manifest = replace(manifest, files=files | {CONFIG: record_of_file(temporary / CONFIG)})
        commit(temporary, final, manifest)
        try:
            self._remove_old(manifest.step)
        except OSError as error:
            logger.warning(f"old checkpoints in {self.folder} cannot be removed: {error}")
        return Saved(manifest, final)

    def _remove_old(self, step: int) -> None:
        """Remove what the settings do not keep, now that `step` is there."""
        settings = self.settings
        if not settings.keep_latest:
            return
        resumable = []
        for other in self.steps():
            try:
                if other <= step and Manifest.read(step_folder(self.folder, other)).content == "all":
                    resumable.append(other)
            except Damaged:
                continue  # left for whoever loads it to find
        for old in resumable[: -settings.keep_latest]:
            is_for_good = old == 0 or (settings.keep_every and old % settings.keep_every == 0)
            if not is_for_good:  # step 0 is there because save_initial asked for it
                remove(step_folder(self.folder, old))

    # -- finding -----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending; of this rank's view of the folder."""
        return committed_steps(self.folder)

    def find(self, run: str) -> Saved | None:
        """Return the newest checkpoint that a run can go on from; None where none was ever saved.

        Args:
            run: The identity of the run; a checkpoint of another one is set aside.

        Raises:
            CheckpointError: If there are some but none is whole; with `strict`, if the newest is not. Also if a rank
                cannot see the folder.
        """
        try:
            for line in self._agree(lambda: recover(self.folder)):
                logger.info(line)
            return self._find(run)
        except StorageError as error:
            raise CheckpointError(f"{self.folder} cannot be used: {error}") from error

    def _find(self, run: str) -> Saved | None:
        lost: list[str] = []
        while True:
            candidate = self._agree(lambda: self._newest(run))
            if candidate is None:
                return self._agree(lambda: self._nothing(lost))
            saved, wrong = candidate
            wrong = wrong or self.check(saved)
            if not wrong:
                return saved
            is_foreign = bool(run and saved.manifest.run not in ("", run))
            lost.append(self._agree(partial(self._set_aside, saved.path, wrong, is_foreign)))

    def _newest(self, run: str) -> tuple[Saved, list[str]] | None:
        """Return the newest checkpoint and what is wrong with its manifest."""
        weights_only = []
        for step in reversed(self.steps()):
            if step < self.settings.load_step:
                break
            path = step_folder(self.folder, step)
            nothing = Manifest(step, 0, "all", run, {})
            try:
                manifest = Manifest.read(path)
            except Damaged as error:
                return Saved(nothing, path), [str(error)]
            if manifest.step != step:
                return Saved(manifest, path), [f"it was saved as step {manifest.step}"]
            if run and manifest.run not in ("", run):
                return Saved(manifest, path), ["it was saved by another run"]
            if manifest.content == "all":
                return Saved(manifest, path), []
            weights_only.append(path.name)
        if weights_only:
            raise CheckpointError(
                f"{self.folder} has {', '.join(weights_only)}, which holds weights alone: no run can go on from it\n"
                f"  Try  run.dir=ANOTHER checkpoint.initial_load={self.folder / weights_only[0]}"
            )
        return None

    def check(self, saved: Saved) -> list[str]:
        """Hold a checkpoint's files against its manifest, each rank some of them; returns what is wrong."""
        names = sorted(saved.manifest.files)[dist.get_rank() :: dist.get_world_size()]
        missing_here = "" if saved.path.is_dir() else f"rank {dist.get_rank()} does not see {saved.path}"
        try:
            wrong = saved.manifest.damage(saved.path, names, self.settings.verify)
        except OSError as error:
            missing_here, wrong = f"rank {dist.get_rank()}: {error}", []
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (missing_here, wrong), group=self.group)
        if blind := [text for text, _ in found if text]:
            why = f"{blind[0]}\n  Is it on a file system that all nodes share?"
            raise CheckpointError(f"{saved.path} cannot be read: {why}")
        return [line for _, lines in found for line in lines]

    def _set_aside(self, path: Path, wrong: list[str], is_foreign: bool) -> str:
        text = f"{path.name} {'cannot be used' if is_foreign else 'is damaged'}: {'; '.join(wrong)}"
        if self.settings.strict:
            raise CheckpointError(f"{text}\n  checkpoint.strict=false would set it aside and take the one before")
        aside = rename_aside(path, FOREIGN if is_foreign else DAMAGED)
        logger.warning(f"{text}; set aside as {aside.name}")
        self.note("quarantine", checkpoint=path.name, moved_to=aside.name, why="; ".join(wrong))
        return text

    def _nothing(self, lost: list[str]) -> None:
        """Return where no checkpoint was ever saved; else refuse to begin anew over a run that had begun."""
        aside = sorted(entry.name for prefix in (DAMAGED, FOREIGN) for entry in self.folder.glob(f"{prefix}_*"))
        floor = self.settings.load_step
        if lost or aside or floor >= 0:
            there = ", ".join(map(str, self.steps())) or "none"
            what = f"no usable checkpoint{f' from step {floor} on' * (floor >= 0)} in {self.folder}"
            seen = "".join(f"\n  {text}" for text in lost) or f"\n  Set aside before: {', '.join(aside)}" * bool(aside)
            raise CheckpointError(
                f"{what}{seen}\n  There are: {there}\n  Try  run.dir=ANOTHER   to begin anew; nothing was deleted"
            )

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(
        self,
        folder: Path,
        state: dict[str, Tensor],
        is_wanted: Callable[[str], bool] = lambda name: name.startswith((MODEL, OPTIMIZER)),
        can_cast: Callable[[str], bool] = lambda name: False,
        metadata: Metadata | None = None,
    ) -> None:
        """Fill tensors in place from a checkpoint, on any mesh; nothing is changed before all of them fit.

        Args:
            folder: The checkpoint's.
            state: By name.
            is_wanted: Whether the checkpoint may not have a name that is missing from every rank's `state`.
            can_cast: Whether the one of this name may be saved in another format.
            metadata: The checkpoint's, where it has been read already.

        Raises:
            CheckpointError: If they do not fit, on every rank; with what this rank has found.
        """
        metadata = metadata or read_metadata(folder)
        infos = tensor_infos(metadata)
        wrong = misfits(state, infos, can_cast)
        names = sorted(filter(is_wanted, infos))
        counts = torch.tensor([name in state for name in names] + [bool(wrong)], dtype=torch.int32)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.group)
        wrong += [f"{name} is not in this model" for name, is_known in zip(names, counts, strict=False) if not is_known]
        if wrong or counts[-1]:
            more = [f"and {len(wrong) - 8} more"] * (len(wrong) > 8)
            lines = [*wrong[:8], *more] or ["another rank says why"]
            listed = "\n".join(f"  {line}" for line in lines)
            raise CheckpointError(f"{folder} does not fit this model:\n{listed}")
        read_tensors(state, folder, self.group, metadata)

    def _agree(self, action: Callable[[], T]) -> T:
        return on_first_rank(action, self.group)


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _take_device(device: int | None) -> None:
    """Give a thread its rank's GPU; a new one has the first, and would take memory there."""
    if device is not None:
        torch.cuda.set_device(device)


def misfits(state: Mapping[str, Tensor], infos: Mapping[str, TensorInfo], can_cast: Callable[[str], bool]) -> list[str]:
    """Return which tensors a checkpoint does not have as they are wanted, one line each."""
    wrong = []
    for name, tensor in state.items():
        found = infos.get(name)
        if found is None:
            wrong.append(f"{name} is not in the checkpoint")
        elif found.shape != tensor.shape:
            wrong.append(f"{name} is {_shape(found.shape)} in the checkpoint, and {_shape(tensor.shape)} here")
        elif found.dtype != tensor.dtype and not can_cast(name):
            wrong.append(f"{name} is {found.dtype} in the checkpoint, and {tensor.dtype} here")
    return wrong


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a number"
