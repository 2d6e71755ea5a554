"""What the model says in the midst of training: prompts continued after each validation, on the mesh that trains.

There is no second model and no second way through the mesh. A validation already runs the model forward on every
layout, and where the loss would be computed stands a function that can be exchanged: here for one that writes down the
logits at one position of each row. A token is then a validation of one batch, and all of FSDP, tensor, context and
pipeline parallelism work as they do there.

There is no cache of keys and values either, which would be another one for every way to share a sequence: each token
takes a forward pass over its whole row. Rows are as short as prompts and continuations allow, except where a shape is
compiled or what is computed depends on it (float8). So samples are to be short.

Each data rank continues some of the prompts. After every token one exchange tells all ranks all tokens, so every rank
knows when the last text has ended and none waits for another. Nothing that training depends on is touched, as in a
validation. In float32 the text is the same on every layout, up to two tokens that are equally likely; in bfloat16
layouts round differently, and texts may part.

Shape letters: B rows of a micro-batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan.config.schema import Float8Recipe, TitanConfig
from titan.data.batch import IGNORED_LABEL
from titan.data.loader import Batch
from titan.data.text_stream import decode_behind
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import ConfigError, Problem, TitanError
from titan.log import logger
from titan.metrics.sinks import JsonLines
from titan.models.sampling import Sampling, draw, only_words, row_generators
from titan.parallel.collectives import all_gather
from titan.parallel.context import positions_of_rank
from titan.parallel.fsdp import forget_forward
from titan.run_directory import utc_now
from titan.trainer.build import Trainer

_SHOWN = 60
"""Characters of a prompt's end and of its continuation on the console."""


class Samples:
    """The samples of one run.

    Args:
        trainer: Whose model speaks.

    Raises:
        ConfigError: If a prompt and its continuation do not fit into a row.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.prompts = trainer.config.validation.sample_prompts if trainer.held_out is not None else []
        self._file = None
        if self.prompts:
            self.tokenizer = build_tokenizer(trainer.config.tokenizer)
            self.rows = encode_samples(trainer.config, self.tokenizer)
        # also of a run that has no prompts any more, and goes back
        if dist.get_rank() == 0 and (self.prompts or trainer.directory.samples.is_file()):
            self._file = JsonLines(trainer.directory.samples, trainer.state.step)

    def take(self, step: int, end_if_told: Callable[[], None]) -> None:
        """Continue every prompt with the weights of a step; a failure is a warning.

        NOTE: One that only some ranks have, such as a GPU without memory, is found as in a step: by the watchdog.

        Raises:
            Stopped: From `end_if_told`.
        """
        if not self.prompts:
            return
        try:
            texts = continue_rows(self.trainer, self.rows, self.tokenizer, step, end_if_told)
            if self._file is not None:
                self._write(step, [decode_behind(self.tokenizer, *pair) for pair in zip(self.rows, texts, strict=True)])
        except _Told as told:
            raise told.error from None
        except Exception as error:
            logger.warning(f"step {step}: no samples: {type(error).__name__}: {error}")

    def rewind(self, step: int) -> None:
        """Drop the samples beyond a step that the run has gone back to."""
        if self._file is not None:
            self._file.rewind(step)

    def close(self) -> None:
        """Write what a full disk has kept waiting, if that can be done."""
        if self._file is not None:
            self._file.close()

    def _write(self, step: int, texts: Sequence[str]) -> None:
        assert self._file is not None, "rank 0"
        # A run that was killed behind this and before the validation's own row does both again.
        self._file.rewind(step - 1)
        steps = self.trainer.config.training.steps
        for prompt, text in zip(self.prompts, texts, strict=True):
            self._file.write({"step": step, "prompt": prompt, "text": text, "time": utc_now()})
            shown = f"{shorten(prompt, is_end=True)} | {shorten(text)}"
            logger.info(f"step {step:>{len(str(steps))}}/{steps}  sample  {shown}")


def encode_samples(config: TitanConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the prompts of a config in tokens.

    Raises:
        ConfigError: If one does not fit into a row with its continuation.
    """
    settings, seq_len = config.validation, config.training.seq_len
    rows = [[tokenizer.bos, *map(int, tokenizer.encode_text(prompt))] for prompt in settings.sample_prompts]
    problems = [
        Problem(
            f"validation.sample_prompts has a prompt of {len(row):,} tokens: {shorten(prompt)}",
            f"With validation.sample_tokens = {settings.sample_tokens} that is more than training.seq_len = {seq_len}.",
            f"validation.sample_tokens={seq_len - len(row)}" if len(row) < seq_len else "a shorter prompt",
        )
        for row, prompt in zip(rows, settings.sample_prompts, strict=True)
        if len(row) + settings.sample_tokens > seq_len
    ]
    if problems:
        raise ConfigError(problems)
    return rows


def continue_rows(
    trainer: Trainer,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    step: int,
    end_if_told: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the tokens behind each prompt, the same on every rank; without that which ends a text.

    Args:
        trainer: Whose model speaks.
        prompts: In tokens.
        tokenizer: Theirs.
        step: Decides what is drawn, with the run's seed.
        end_if_told: Called on all ranks alike, before every token; may raise.
    """
    settings, mesh = trainer.config.validation, trainer.mesh
    sampling = Sampling(settings.sample_temperature, top_p=settings.sample_top_p)
    generators = row_generators(trainer.config.training.seed, [f"{step}/{row}" for row in range(len(prompts))])
    size = trainer.config.training.local_batch_size
    rows = [[*prompt] for prompt in prompts]
    alive, most = list(range(len(rows))), settings.sample_tokens
    with _pointed(trainer, max(map(len, rows)) + most) as point:
        while alive:
            chosen = torch.zeros(len(rows), dtype=torch.int64, device=trainer.device)
            draws = draw(
                generators
            )  # of all rows on every rank, for a row's next token may be another rank's to choose
            for first in range(0, len(alive), size * mesh.data_ranks):
                _call(end_if_told)
                mine = alive[first + mesh.data_rank * size :][:size]
                logits = point.logits([rows[row] for row in mine], size)
                if logits is not None and mine:
                    scores = only_words(logits[: len(mine)].float().cpu(), tokenizer.n_tokens)
                    tokens = 1 + sampling.choose(scores, draws[mine])
                    is_known = scores.amax(-1) > -torch.inf
                    chosen[mine] = tokens.masked_fill(~is_known, 0).to(chosen.device)
            # The one exchange of a token, of all ranks: who has the last stage, or the position, or the row, tells it.
            dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
            told = (chosen - 1).tolist()
            if any(told[row] < 0 for row in alive):
                raise TitanError("the logits are no numbers")
            for row in alive:
                rows[row].append(told[row])
            alive = [
                row for row in alive if rows[row][-1] != tokenizer.eos and len(rows[row]) < len(prompts[row]) + most
            ]
    behind = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [tokens[:-1] if tokens[-1] == tokenizer.eos else tokens for tokens in behind]


class _Told(Exception):
    """The run is to stop, which is no failure of the samples'."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _call(end_if_told: Callable[[], None]) -> None:
    try:
        end_if_told()
    except Exception as error:
        raise _Told(error) from error


@dataclass
class _Pointer:
    """Takes the place of the loss in a model: writes down the logits at the one position that has a label."""

    trainer: Trainer
    width: int
    """Tokens of a row."""
    positions: Tensor | None
    """Which of them this rank has; None for all."""
    found: list[Tensor] = field(default_factory=list)
    """Logits and whether they are of this rank's positions, of one microbatch after the other."""

    def logits(self, rows: Sequence[Sequence[int]], size: int) -> Tensor | None:
        """Return the logits behind the last token of each row; None on a rank that has not got them all.

        Every rank runs a whole micro-batch, even one of no rows, for others wait for it.

        Shape:
            Returns (size, V), or (size, V) in which rows of another rank's positions are -inf.
        """
        tokens = torch.zeros(size, self.width, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED_LABEL)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            labels[index, len(row) - 1] = 0
        self.found.clear()
        self.trainer.evaluate([Batch(tokens, labels).at(self.positions).to(self.trainer.device)])
        return torch.cat(self.found) if self.found else None

    def __call__(self, output: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """Stand in for `Decoder.loss`. Shape: hidden (B, S, D), or a part of S; labels (B, S). Returns ()."""
        config, mesh = self.trainer.config, self.trainer.mesh
        is_cut = config.parallelism.tp > 1 and config.parallelism.sequence_parallel
        if is_cut:
            hidden = all_gather(hidden, 1, mesh.tp.get_group())
        is_meant = labels != IGNORED_LABEL
        at = is_meant.int().argmax(1)
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), at].unsqueeze(1)
        # As from the blocks: with sequence parallelism the output gathers what it takes for parts, of which all are
        # this one position.
        logits = output(chosen)[:, 0]
        if logits.shape[-1] < config.model.vocab_size:  # some of the words
            logits = all_gather(logits, 1, mesh.tp.get_group())
        self.found.append(logits.masked_fill(~is_meant.any(1, keepdim=True), -torch.inf))
        return torch.zeros((), device=hidden.device)


@contextlib.contextmanager
def _pointed(trainer: Trainer, longest: int) -> Iterator[_Pointer]:
    """Let the model write down logits instead of losses, in rows that are long enough; then all is as before."""
    config, mesh = trainer.config, trainer.mesh
    settings, seq_len = config.parallelism, config.training.seq_len
    unit = 2 * settings.cp * settings.tp  # what context and sequence parallelism cut rows into
    width = min(seq_len, -(-longest // unit) * unit)
    positions = trainer.positions
    if config.compile.enable or config.float8.recipe is not Float8Recipe.none:
        width = seq_len
    if width < seq_len:
        at = mesh.coordinates["cp"]
        positions = positions_of_rank(width, settings.cp, at, settings.cp_head_tail and settings.cp > 1)
    pointer = _Pointer(trainer, width, positions if settings.cp > 1 else None)
    before = [(part.loss, part.positions) for part in trainer.parts]
    try:
        for part in trainer.parts:
            part.loss = pointer
            if width < seq_len:
                part.positions = None if positions is None else positions.to(trainer.device)
        yield pointer
    finally:
        for part, (loss, own) in zip(trainer.parts, before, strict=True):
            part.loss, part.positions = loss, own
            forget_forward(part)


def shorten(text: str, is_end: bool = False) -> str:
    """Return a text as one short line."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    if len(line) <= _SHOWN:
        return line
    return f"...{line[3 - _SHOWN :]}" if is_end else f"{line[: _SHOWN - 3]}..."
