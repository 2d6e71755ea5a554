"""The model on its device, or on the devices that share it, with a checkpoint's weights."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan.config.schema import Device, Dtype
from titan.errors import CheckpointError, Problem
from titan.generate.options import GenerateOptions, refusal
from titan.generate.source import Speaker
from titan.models.cache import CachedModel
from titan.parallel.apply import allocate, plain_parameters
from titan.parallel.tensor import apply_tensor_parallel
from titan.trainer.hugging_face import fill


def choose_device(options: GenerateOptions, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Raises:
        CommandError: If there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device is Device.cpu or (options.device is Device.auto and not gpus):
        return torch.device("cpu")
    if options.tp > gpus:
        what = f"tp = {options.tp} needs as many GPUs" if gpus else f"device = {options.device.name}"
        raise refusal([Problem(f"{what}, but PyTorch sees {gpus}", suggestion=f"tp={gpus}" if gpus else "device=cpu")])
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(options: GenerateOptions, device: torch.device) -> torch.dtype:
    """Return what to compute in."""
    if options.dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, options.dtype.name)


def check_tp(speaker: Speaker, tp: int) -> None:
    """See that every process gets the same whole share.

    Raises:
        CommandError: If not.
    """
    config = speaker.config
    sizes = {name: getattr(config, name) for name in ("n_kv_heads", "ffn_dim", "vocab_size")}
    allowed = [n for n in range(1, config.n_kv_heads + 1) if not any(size % n for size in sizes.values())]
    if tp not in allowed:
        name, size = next((name, size) for name, size in sizes.items() if size % tp)
        raise refusal(
            [
                Problem(
                    f"tp = {tp} does not divide the model's {name} = {size}",
                    f"Each process needs a whole share. Allowed here: {', '.join(map(str, allowed))}.",
                    f"tp={max(n for n in allowed if n <= tp)}",
                )
            ]
        )


def load_model(
    speaker: Speaker, longest: int, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None
) -> CachedModel:
    """Return the model, filled.

    Args:
        speaker: Whose weights.
        longest: Tokens of the longest row.
        device: This process's.
        dtype: Of the weights and of what is computed.
        mesh: The processes that share every matrix; None for this one alone.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    with torch.device("meta"):
        model = speaker.family.build(speaker.config, longest).to(dtype)
    if mesh is not None:
        # a token at a time cannot be cut along the sequence, and every process chooses among all words
        apply_tensor_parallel(model, speaker.family.cut_of, mesh, sequence_parallel=False, loss_parallel=False)
    allocate(model, device, device)
    try:
        fill(plain_parameters(model), speaker.source.weights)
    except OSError as error:
        raise CheckpointError(
            f"{speaker.source.path} cannot be read any more: {error.strerror or error}\n"
            "  A run that goes on removes old checkpoints.  Try  the same command again"
        ) from error
    return CachedModel(model.requires_grad_(False).eval())
