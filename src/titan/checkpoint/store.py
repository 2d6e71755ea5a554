"""Checkpoints of a run: written beside, renamed when complete, the oldest removed after that.

The tensors go through PyTorch's distributed checkpoint, so a run can be resumed on another mesh: every tensor is
stored under its plain name with its place in the whole. The data needs no state (`titan.data.batch` is a function of
the step), and neither does the learning rate.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from titan.errors import CheckpointError

_COMMITTED = re.compile(r"step_(\d{8,})")

NamedParameters = list[tuple[str, nn.Parameter]]


class CheckpointStore:
    """The checkpoints folder of a run.

    Args:
        folder: <run.dir>/checkpoints.
        keep_latest: How many to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_latest: int) -> None:
        self.folder, self.keep_latest = folder, keep_latest

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        return committed_steps(self.folder)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(
        self, step: int, parameters: NamedParameters, optimizer: torch.optim.Optimizer, extra: dict[str, int]
    ) -> Path:
        """Write a checkpoint; every rank takes part, and all return once it is committed."""
        final = self.path(step)
        temporary = self.folder / f".{final.name}.tmp"

        def start() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def commit() -> None:
            if final.exists():  # the same step, saved by a run that was stopped right after
                shutil.rmtree(final)
            temporary.rename(final)
            # Later ones are there when a run was resumed from an earlier step; they must not push this one out.
            until_now = [other for other in self.steps() if other <= step]
            for old in until_now[: -self.keep_latest] if self.keep_latest else []:
                shutil.rmtree(self.path(old))

        _on_first_rank(start)
        state = _state(parameters, optimizer) | {"step": step, **extra}
        dcp.save(state, checkpoint_id=temporary)
        _on_first_rank(commit)
        return final

    def load(self, step: int, parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Read a checkpoint into the model and the optimizer, on any mesh.

        Returns:
            What was given to `save` as `extra`.

        Raises:
            CheckpointError: If the step was not saved, or does not fit this model.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"checkpoint.load_step = {step}: {self.folder} has no such checkpoint\n  There are: {there}\n"
                "  Try  checkpoint.load_step=-1   (the newest)"
            )
        _create_optimizer_state(optimizer)
        state: dict[str, Any] = _state(parameters, optimizer) | {"tokens": 0}
        _load(state, self.path(step))
        _fill_copies(parameters, optimizer)
        return {"tokens": state["tokens"]}


def load_weights(folder: Path, parameters: NamedParameters) -> None:
    """Read the weights of another run's checkpoint, on any mesh.

    Raises:
        CheckpointError: If the folder is not a checkpoint or does not fit this model.
    """
    _load({f"model.{name}": parameter.detach() for name, parameter in parameters}, folder)
    _fill_copies(parameters)


def committed_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = (_COMMITTED.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def _load(state: dict[str, Any], folder: Path) -> None:
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no file .metadata")
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        first, _ = next(iter(error.failures.values()))  # of any rank; the others' are in their logs
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(first)}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def _state(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, parameter in parameters:
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optimizer.{name}.{key}"] = value
    return state


def _fill_copies(parameters: NamedParameters, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Where two parameters of this rank have one name (an embedding and a tied output), give the first the last's."""
    loaded = dict(parameters)
    for name, parameter in parameters:
        source = loaded[name]
        if parameter is source:
            continue
        parameter.detach().copy_(source.detach())
        for key, value in (optimizer.state[source] if optimizer is not None else {}).items():
            if isinstance(value, Tensor):
                optimizer.state[parameter][key].copy_(value)  # type: ignore[union-attr]


def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state its tensors, so that there is something to load into; moves no weight."""
    for group in optimizer.param_groups:
        learning_rate, decay = group["lr"], group["weight_decay"]
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        group["_restore"] = (learning_rate, decay)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group.pop("_restore")
    optimizer.zero_grad()


def _on_first_rank(action: Callable[[], None]) -> None:
    """Act on rank 0 while all others wait; an error there is an error everywhere."""
    error: list[BaseException | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as caught:
            error[0] = caught
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]
