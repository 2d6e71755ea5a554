"""From options to text on the terminal."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan.convert.transfer import describe_source
from titan.errors import TitanError
from titan.generate.continuation import Continuation, batches, encode_prompts, go_on, longest_row
from titan.generate.model import check_tp, choose_device, choose_dtype, load_model
from titan.generate.options import GenerateOptions
from titan.generate.source import Speaker, open_speaker

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(options: GenerateOptions, prompts: Sequence[str], as_json: bool) -> None:
    """Continue the prompts, in this process or in those that it starts.

    Args:
        options: Checked.
        prompts: At least one.
        as_json: Print one JSON object a prompt.

    Raises:
        CheckpointError: If there are no usable weights.
        CommandError: If the options are not for this model or machine.
        ConfigError: If the tokenizer cannot be loaded.
        TitanError: If the device has too little memory.
        RanksFailed: If a process of tensor parallelism fails.
    """
    speaker = open_speaker(options, say)
    rows = encode_prompts(prompts, speaker, options)
    device = choose_device(options)
    if options.tp == 1:
        try:
            speak(speaker, rows, options, device, Printer(len(rows), options.echo, as_json))
        except torch.OutOfMemoryError as error:
            advice = "batch_size=1   or  tp=2, on as many GPUs   or  device=cpu"
            raise TitanError(f"{torch.cuda.get_device_name(device)} has too little memory\n  Try  {advice}") from error
        return
    check_tp(speaker, options.tp)
    from titan.generate.ranks import run_ranks

    run_ranks(replace(options, checkpoint=str(speaker.source.path.absolute()), verify=False), prompts, as_json)


def speak(
    speaker: Speaker,
    rows: Sequence[Continuation],
    options: GenerateOptions,
    device: torch.device,
    printer: Printer | None,
    mesh: DeviceMesh | None = None,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> None:
    """Load the model and continue all rows.

    Args:
        speaker: Whose text it is.
        rows: What to continue.
        options: How.
        device: This process's.
        printer: Shows what comes; None is silent, as all but one of several processes are.
        mesh: The processes that share every matrix.
        agree: As for `go_on`.
    """
    tell = say if printer is not None else lambda line: None
    tell(describe_source(speaker.source))
    began = time.monotonic()
    some = list(batches(rows, options.batch_size))
    longest = max(longest_row(batch, options.max_new_tokens, speaker.config.max_seq_len) for batch in some)
    dtype = choose_dtype(options, device)
    model = load_model(speaker, longest, device, dtype, mesh)
    where = f"{device.type}{f', tp {options.tp}' * (options.tp > 1)}, {str(dtype).removeprefix('torch.')}"
    tell(f"loaded   in {time.monotonic() - began:.1f} s: {where}")
    began = time.monotonic()
    for batch in some:
        for row, piece in go_on(model, batch, speaker, options, agree):
            if printer is not None:
                printer.piece(row, piece)
        if printer is not None:
            printer.batch(batch)
    tell(describe_speed(rows, time.monotonic() - began))


class Printer:
    """Shows continuations: one as it comes, several in their order, or all as JSON.

    Args:
        count: How many there will be.
        echo: Whether prompts are shown.
        as_json: Whether to print objects.
    """

    def __init__(self, count: int, echo: bool, as_json: bool) -> None:
        self.count, self.echo, self.as_json = count, echo, as_json
        self._has_begun = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says, text of a model has any character

    def piece(self, row: Continuation, piece: str) -> None:
        """Show what has come, where there is one prompt alone."""
        if self.count > 1 or self.as_json:
            return
        if not self._has_begun and self.echo:
            self._write(row.prompt)
        self._has_begun = True
        self._write(piece + "\n" * bool(row.ended))

    def batch(self, rows: Sequence[Continuation]) -> None:
        """Show what is complete, where there are several."""
        for row in rows:
            if self.as_json:
                self._write(json.dumps(describe(row), ensure_ascii=False) + "\n")
            elif self.count > 1:
                self._write(f"--- {row.index + 1}/{self.count}\n{row.prompt * self.echo}{row.text}\n")

    def _write(self, text: str) -> None:
        if sys.stdout.isatty() and not self.as_json:  # what a model says is no command to a terminal
            text = _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
        sys.stdout.write(text)
        sys.stdout.flush()


def describe(row: Continuation) -> dict[str, object]:
    """Return a continuation as an object of --json."""
    return {
        "prompt": row.prompt,
        "text": row.text,
        "tokens": row.tokens,
        "prompt_tokens": len(row.prompt_tokens),
        "ended": row.ended,
    }


def describe_speed(rows: Sequence[Continuation], seconds: float) -> str:
    """Return how many tokens there were, in which time, and why they ended."""
    given, new = (sum(len(getattr(row, name)) for row in rows) for name in ("prompt_tokens", "tokens"))
    reasons = [row.ended for row in rows]
    ended = ", ".join(f"{reason}{f' ({reasons.count(reason)})' * (len(rows) > 1)}" for reason in dict.fromkeys(reasons))
    return (
        f"done     {new:,} tokens behind {given:,} in {seconds:.1f} s: {new / max(seconds, 1e-9):,.1f} tokens/s; "
        f"ended by {ended}"
    )


def say(line: str) -> None:
    """Print a line that is not text of the model's."""
    print(line, file=sys.stderr, flush=True)
