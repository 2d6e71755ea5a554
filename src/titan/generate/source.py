"""What a path has to generate with: weights, the model's shape, a tokenizer, and the tokens that end a text.

A titan run is asked for its newest whole checkpoint, as when the run itself goes on: one that is damaged is passed
over, and told. A damaged checkpoint that was named itself is an error.

The tokenizer is the run's own, of which the checkpoint's config has kept the fingerprint: another file under the same
path is refused, for it would give a text of other words. A checkpoint that was imported has its tokenizer beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan.checkpoint.hugging_face import CONFIG, is_hugging_face, read_json
from titan.checkpoint.manifest import NAME, Damaged, committed_steps, step_folder
from titan.checkpoint.weights import check_usable
from titan.config.load import load_tokenizer
from titan.config.schema import ModelConfig, TokenizerConfig, TokenizerKind
from titan.config.tokenizer_files import guess_kind
from titan.convert.sources import HUGGING_FACE, TITAN, Source, family_of, open_source, read_manifest
from titan.convert.transfer import GENERATION, TOKENIZER
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import CheckpointError, ConfigError, Problem
from titan.generate.options import GenerateOptions, refusal
from titan.models.family import load_family
from titan.run_directory import RunDirectory, short_path

_WITHOUT_FILE = (TokenizerKind.bytes, TokenizerKind.llama3)
_ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>")
"""Of Llama 3's own tokenizer, what its chat models end with in the place of the end of text."""


@dataclass(frozen=True)
class Speaker:
    """All that text is made with, but for the model itself."""

    source: Source
    config: ModelConfig
    family: Any
    tokenizer: Tokenizer
    ends: frozenset[int]
    """Tokens that end a text."""


def open_speaker(options: GenerateOptions, say: Callable[[str], object]) -> Speaker:
    """Return what a checkpoint has to generate with.

    Args:
        options: Of the command.
        say: Is told of checkpoints that are passed over, as lines.

    Raises:
        CheckpointError: If there is none that is whole.
        CommandError: If there is no tokenizer, or it is not one for this model.
        ConfigError: If the tokenizer cannot be loaded, or is not the one that the checkpoint names.
    """
    source = open_source(find_checkpoint(Path(options.checkpoint or ""), options.verify, say))
    config = source.config
    if source.kind not in (TITAN, HUGGING_FACE) or config is None:
        raise CheckpointError(
            f"{source.path} is a {source.kind}, and text comes from a titan checkpoint or a Hugging Face folder\n"
            f"  Try  python -m titan.convert import {source.path} CHECKPOINT   and  checkpoint=CHECKPOINT"
        )
    if options.family is not None:
        config = replace(config, family=options.family)
        family = load_family(config.family)
    else:
        family = family_of(config)
    tokenizer = build_tokenizer(choose_tokenizer(source, options))
    if tokenizer.n_tokens > config.vocab_size:
        raise refusal(
            [
                Problem(
                    f"the tokenizer has {tokenizer.n_tokens:,} tokens, and the model only {config.vocab_size:,} rows "
                    "for them",
                    "It is not the one that this model was trained with.",
                    "tokenizer=... tokenizer.path=/path/to/that/one",
                )
            ]
        )
    return Speaker(source, config, family, tokenizer, frozenset(find_ends(source, tokenizer)))


def find_checkpoint(path: Path, verify: bool, say: Callable[[str], object]) -> Path:
    """Return the folder to open: of a run, its newest checkpoint that is whole.

    Args:
        path: What was named.
        verify: Whether to hold every byte against its checksum.
        say: Is told of those that are not whole.

    Raises:
        CheckpointError: If there is none.
    """
    if (path / NAME).is_file():
        check_usable(short_path(path), damage_of(path, verify))
        return path
    run = RunDirectory(path)
    folder = run.checkpoints if run.checkpoints.is_dir() else path
    steps = committed_steps(folder)
    if not steps:
        if path.is_dir() and not is_hugging_face(path) and (folder != path or run.config.is_file()):
            raise CheckpointError(
                f"{path} cannot be used: this run has no checkpoint yet\n"
                "  It saves every checkpoint.interval steps, and after the last."
            )
        if path.is_dir() and not any(path.iterdir()):
            raise CheckpointError(f"{path} cannot be used: it is empty\n  Try  checkpoint=runs/NAME")
        return path  # of another format, or of none, which `open_source` says
    for step in reversed(steps):
        found = step_folder(folder, step)
        if not (damage := damage_of(found, verify)):
            return found
        say(f"{short_path(found)} is damaged and passed over: {damage[0]}")
    raise CheckpointError(f"{path} cannot be used: none of its {len(steps)} checkpoints is whole")


def damage_of(folder: Path, verify: bool) -> list[str]:
    """Return what is wrong with a checkpoint's files, one line each."""
    try:
        return read_manifest(folder).damage(folder, checksums=verify)
    except (CheckpointError, Damaged, OSError) as error:
        return [str(error).removeprefix(f"{folder} cannot be used: ")]


def choose_tokenizer(source: Source, options: GenerateOptions) -> TokenizerConfig:
    """Return the tokenizer that was asked for, else the checkpoint's own.

    Raises:
        CommandError: If there is none.
    """
    if options.tokenizer is not None:
        if options.tokenizer_path is None and options.tokenizer not in _WITHOUT_FILE:
            what = f"tokenizer = {options.tokenizer.name} reads a file, and tokenizer.path is not set"
            raise refusal([Problem(what, suggestion="tokenizer.path=/path/to/it   or  tokenizer=bytes")])
        return TokenizerConfig(options.tokenizer, options.tokenizer_path)
    if options.tokenizer_path is not None:
        return _guess(Path(options.tokenizer_path), f"tokenizer.path = {options.tokenizer_path}")
    if source.kind == TITAN:
        try:
            own = load_tokenizer(source.path / "config.yaml")
        except ConfigError as error:
            raise CheckpointError("\n  ".join(problem.what for problem in error.problems)) from error
        if own is not None:
            return own
        if (source.path / TOKENIZER).is_dir():
            return _guess(source.path / TOKENIZER, f"{short_path(source.path)}/{TOKENIZER}")
    return _guess(source.path, f"{source.kind} {short_path(source.path)}")


def find_ends(source: Source, tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the tokens at which a text ends: the tokenizer's, and those that the files beside the weights name."""
    yield tokenizer.eos
    if tokenizer.config.kind in (TokenizerKind.llama3, TokenizerKind.tiktoken):
        yield from (tokenizer.special[name] for name in _ENDS_OF_TURN if name in tokenizer.special)
    folder = source.path if source.kind == HUGGING_FACE else source.path / TOKENIZER
    for name in (GENERATION, CONFIG):
        if (folder / name).is_file():
            named = read_json(folder / name).get("eos_token_id")
            for token in named if isinstance(named, list) else [named]:
                if isinstance(token, int) and not isinstance(token, bool):
                    yield token


def _guess(path: Path, what: str) -> TokenizerConfig:
    found = guess_kind(path)
    if found is None:
        raise refusal(
            [
                Problem(
                    f"{what} has no tokenizer",
                    "There is neither a tokenizer.json nor a tokenizer.model.",
                    "tokenizer.path=/path/to/tokenizer.json   or  tokenizer=llama3   or  tokenizer=bytes",
                )
            ]
        )
    kind, where = found
    return TokenizerConfig(kind, str(where))
