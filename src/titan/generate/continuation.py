"""Prompts, and what a model puts behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from titan.data.text_stream import TextStream
from titan.data.tokenizer import Tokenizer, mend
from titan.errors import CheckpointError, Problem
from titan.generate.options import GenerateOptions, refusal
from titan.generate.source import Speaker
from titan.models.cache import CachedModel
from titan.models.sampling import Sampling, draw, only_words, row_generators

END_OF_TEXT, FULL, CONTEXT = "end of text", "max_new_tokens", "context"
"""Why a continuation ended."""


@dataclass
class Continuation:
    """A prompt and what has come behind it so far."""

    index: int
    prompt: str
    prompt_tokens: list[int]
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: str = ""
    """Why; empty while it goes on."""

    def take(self, token: int, ends: frozenset[int], most_tokens: int, context: int) -> str:
        """Go on by a token; returns the characters that are whole with it."""
        piece = ""
        if token in ends:
            self.ended = END_OF_TEXT
        else:
            self.tokens.append(token)
            piece = self.stream.push(token)
            if len(self.tokens) == most_tokens:
                self.ended = FULL
            elif len(self.prompt_tokens) + len(self.tokens) == context:
                self.ended = CONTEXT
        if self.ended:
            piece += self.stream.finish()
        self.text += piece
        return piece


def encode_prompts(prompts: Sequence[str], speaker: Speaker, options: GenerateOptions) -> list[Continuation]:
    """Return the prompts in tokens.

    Raises:
        CommandError: If one has no token, or leaves no room in the model's context.
    """
    found, problems = [], []
    context = speaker.config.max_seq_len
    for index, prompt in enumerate(map(mend, prompts)):
        tokens = encode_prompt(prompt, speaker.tokenizer, options.begin_text)
        name = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        if not tokens:
            why = "With begin_text = false nothing stands before it, and a model goes on from something."
            problems.append(Problem(f"{name} is empty", why, "begin_text=true   or some text"))
        elif len(tokens) >= context:
            problems.append(
                Problem(
                    f"{name} has {len(tokens):,} tokens, and the model's context is {context:,}",
                    "Prompt and continuation have to fit into it (model.max_seq_len).",
                    f"a prompt of at most {context - 1:,} tokens",
                )
            )
        else:
            found.append(Continuation(index, prompt, tokens, TextStream(speaker.tokenizer, tokens)))
    if problems:
        raise refusal(problems)
    return found


def encode_prompt(prompt: str, tokenizer: Tokenizer, begin_text: bool = True) -> list[int]:
    """Return the tokens to go on from."""
    return [tokenizer.bos] * begin_text + [int(token) for token in tokenizer.encode_text(prompt)]


def longest_row(rows: Sequence[Continuation], max_new_tokens: int, context: int) -> int:
    """Return how many tokens the longest row of a batch may take, its filling included."""
    lengths = [len(row.prompt_tokens) for row in rows]
    return max(lengths) + min(max_new_tokens, context - min(lengths))


def go_on(
    model: CachedModel,
    rows: Sequence[Continuation],
    speaker: Speaker,
    options: GenerateOptions,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Iterator[tuple[Continuation, str]]:
    """Continue some prompts together, until the last of them has ended.

    Args:
        model: The speaker's.
        rows: What to continue; each is filled in.
        speaker: Whose tokens they are.
        options: How.
        agree: Makes the chosen tokens those of one process, where several choose.

    Yields:
        A row that has gone on by a token, and the characters that are whole with it.

    Raises:
        CheckpointError: If the model's logits are no numbers.
    """
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    generators = row_generators(options.seed, [row.index for row in rows])
    ends, context = speaker.ends if options.stop_at_end else frozenset(), speaker.config.max_seq_len
    logits = model.begin([row.prompt_tokens for row in rows], longest_row(rows, options.max_new_tokens, context))
    while True:
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                "the model's logits are not finite\n"
                "  Its weights are no good, or they are too large for the format.  Try  dtype=float32"
            )
        chosen = agree(sampling.choose(only_words(logits, speaker.tokenizer.n_tokens), draw(generators)))
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not row.ended:
                yield row, row.take(token, ends, options.max_new_tokens, context)
        if all(row.ended for row in rows):
            return
        logits = model.go_on(chosen)


def batches(rows: Sequence[Continuation], size: int) -> Iterator[Sequence[Continuation]]:
    """Yield the rows in their order, so many at a time."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
