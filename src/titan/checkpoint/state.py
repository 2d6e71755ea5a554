"""What a run is made of between two steps: weights, the optimizer's state, and every random generator.

    model.<parameter>              as the bare model names it
    optimizer.<parameter>.<key>    exp_avg, exp_avg_sq, step
    rng.<rank>                     all generators of a rank, as bytes of JSON
    data.cursors                   with data.streaming: where each stream's next row begins, `titan.data.stream.Cursor`

Prepared data needs no state (`titan.data.batch` is a function of the step), and neither does the learning rate.
"""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor, nn

NamedParameters = list[tuple[str, nn.Parameter]]
MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."
CURSORS = "data.cursors"


def weights_state(parameters: NamedParameters) -> dict[str, Tensor]:
    """Return the weights by their names in a checkpoint; not copied."""
    return {f"{MODEL}{name}": parameter.detach() for name, parameter in parameters}


def optimizer_state(parameters: NamedParameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by their names in a checkpoint; not copied."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def rng_name(rank: int) -> str:
    """Return the name of a rank's generators in a checkpoint."""
    return f"{RNG}{rank:05d}"


def rng_state() -> Tensor:
    """Return the state of this process's generators: torch's on CPU and GPU, Python's, NumPy's. Shape: (N,), uint8."""
    name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def set_rng_state(state: Tensor) -> None:
    """Put this process's generators where `rng_state` has found them."""
    found = json.loads(state.numpy().tobytes())
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(found["torch"]), dtype=torch.uint8))
    if found["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(found["cuda"]), dtype=torch.uint8))
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(found["numpy"]))


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state its tensors, all zero, so that there is something to load into; moves no weight."""
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
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()  # the step that was just counted


def fill_copies(parameters: NamedParameters, optimizer: torch.optim.Optimizer | None = None) -> None:
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
