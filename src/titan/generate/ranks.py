"""A model shared by several processes of this machine, with tensor parallelism: `tp=N`.

The processes are started as those of a training run are (`titan.launch.local`), each with the same options. All
compute the same logits, of which each has some words, and gather them; rank 0 chooses, so that no two ever go on with
different tokens, and shows the text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from titan.config.schema import Device, Dtype, TokenizerKind
from titan.errors import INTERRUPTED, TitanError
from titan.generate.options import GenerateOptions
from titan.launch.environment import Rank, current_rank, threads_per_rank
from titan.launch.local import launch_local
from titan.log import logger, silence, start_rank_log
from titan.run_directory import RunDirectory
from titan.verify.parity import folder_of_runs
from titan.worker import die_with_launcher, meet, tell_agent

_TIMEOUT_SECONDS = 600
_GRACE_SECONDS = 5.0


def run_ranks(options: GenerateOptions, prompts: Sequence[str], as_json: bool) -> None:
    """Start the processes and wait for them.

    Raises:
        RanksFailed: If one fails; its log is kept.
    """
    with folder_of_runs(None, "generate") as folder:
        directory = RunDirectory(folder)
        given = {key: getattr(value, "name", value) for key, value in dataclasses.asdict(options).items()}
        directory.config.write_text(json.dumps({"options": given, "prompts": list(prompts), "json": as_json}))
        launch_local(directory, options.tp, _GRACE_SECONDS, ("titan.generate", "rank"))


def rank_main(arguments: Sequence[str]) -> NoReturn:
    """Be one of the processes, and end."""
    die_with_launcher()
    directory, rank = RunDirectory(Path(arguments[0]).parent), current_rank() or Rank()
    start_rank_log(directory.log(rank.rank, rank.attempt), rank.rank, on_console=rank.rank == 0)
    code = 0
    try:
        _speak(json.loads(directory.config.read_text()), rank)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        logger.error(str(error) if isinstance(error, TitanError) else traceback.format_exc())
        tell_agent(error)
        code = error.exit_code if isinstance(error, TitanError) else 1
    sys.stdout.flush()
    os._exit(code)  # threads of a process that failed may hang in a collective


def _speak(given: dict[str, Any], rank: Rank) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from titan.generate.continuation import encode_prompts
    from titan.generate.model import choose_device
    from titan.generate.run import speak
    from titan.generate.source import open_speaker

    options = _read(given["options"])
    device = choose_device(options, rank.local_rank)
    torch.set_num_threads(threads_per_rank(rank.local_world_size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=meet(rank, _TIMEOUT_SECONDS),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=_TIMEOUT_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )
    mesh = init_device_mesh(device.type, (rank.world_size,))
    speaker = open_speaker(options, lambda line: None)
    rows = encode_prompts(given["prompts"], speaker, options)

    def agree(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.contiguous()
        dist.broadcast(tokens, 0)
        return tokens

    printer = _printer(len(rows), options.echo, given["json"]) if rank.rank == 0 else None
    speak(speaker, rows, options, device, printer, mesh, agree)
    dist.destroy_process_group()


def _printer(count: int, echo: bool, as_json: bool) -> Any:
    """Return a printer that goes on where nobody reads any more, for the others would wait for it."""
    from titan.generate.run import Printer

    class Patient(Printer):
        def _write(self, text: str) -> None:
            try:
                super()._write(text)
            except BrokenPipeError:
                silence(sys.stdout)

    return Patient(count, echo, as_json)


def _read(given: dict[str, Any]) -> GenerateOptions:
    kinds: dict[str, type[Enum]] = {"device": Device, "dtype": Dtype, "tokenizer": TokenizerKind}
    named = {key: kinds[key][given[key]] for key in kinds if given[key] is not None}
    return GenerateOptions(**{**given, **named})
