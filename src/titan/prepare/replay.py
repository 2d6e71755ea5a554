"""`python -m titan.prepare replay`: which documents made up a step, and what they say."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from titan.checkpoint.manifest import committed_steps, step_folder
from titan.config.load import load_config
from titan.config.schema import DataConfig, DataKind, SourceConfig, TitanConfig
from titan.data.digest import step_digest
from titan.data.mixture import load_rows
from titan.data.prepare import Preparation
from titan.data.rows import Piece, Rows
from titan.data.shard import Shard
from titan.data.source import open_source
from titan.data.stream import StreamedPiece
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import CommandError, TitanError
from titan.run_directory import RunDirectory, read_objects

_SHOWN_CHARACTERS = 200
_LOCATED = (DataKind.jsonl, DataKind.text, DataKind.python_stdlib)
"""Kinds whose records have a line in a file."""


def main(arguments: list[str]) -> bool:
    """Print a step; returns whether its rows are those that the run has written down, where it has."""
    given = _parse(arguments)
    directory = RunDirectory(Path(given.run))
    if not directory.config.is_file():
        raise CommandError(f"{given.run} is not a run: it has no {directory.config.name}\n  Try  <run.dir> of a run")
    config = load_config(directory.config)
    if not 1 <= given.step <= config.training.steps:
        raise CommandError(
            f"--step {given.step} is none of the run's steps, which are 1 to {config.training.steps}\n"
            f"  Try  --step {min(max(1, given.step), config.training.steps)}"
        )
    wanted = _selected(given.rows, config.training.global_batch_size)
    tokenizer = build_tokenizer(config.tokenizer)
    if config.data.streaming:
        told, digest = _replay_stream(config, directory, given.step, wanted, tokenizer, given.whole)
    else:
        told, digest = _replay_prepared(config, given.step, wanted, tokenizer, given.whole)
    recorded = _recorded_digest(directory.rows, given.step)
    if given.json:
        print(json.dumps({"step": given.step, "digest": digest, "recorded_digest": recorded, "rows": told}))
    else:
        for line in _format(told, given.step, config.training.global_batch_size, given.whole):
            print(line)
        print(f"digest     {digest}{_verdict(digest, recorded)}")
    if recorded not in (None, digest):
        print(f"step {given.step} had other rows: the run has written down {recorded}", file=sys.stderr)
        return False
    return True


def load_run_rows(config: TitanConfig, tokenizer: Tokenizer) -> Rows:
    """Return the rows of a run from its frozen config, tokenised again if they are no longer there."""
    assert config.data.cache_dir is not None, "resolved before the config was frozen"
    preparation = Preparation(tokenizer, config.data.cache_dir, workers=config.data.prepare_workers)
    return load_rows(config.data, config.training.seq_len, preparation, config.data.packing, config.data.mask_documents)


def _replay_prepared(
    config: TitanConfig, step: int, wanted: list[int], tokenizer: Tokenizer, whole: bool
) -> tuple[list[dict[str, Any]], str]:
    """Return what the wanted rows of a step are made of, and the digest of all of them."""
    rows = load_run_rows(config, tokenizer)
    numbers = rows.order(config.training.global_batch_size, config.training.seed).rows_of_step(step - 1)
    shards = _shards_by_name(config.data)
    told = []
    for index in wanted:
        pieces = []
        for piece in rows.documents_of(int(numbers[index])):
            shard = shards.get((piece.component, piece.shard))
            where = shard.locate(piece.record) if shard is not None else None
            text = tokenizer.decode(rows.read_tokens(piece, whole).tolist())
            pieces.append(_told(piece, piece.component, piece.shard, where, piece.document_tokens, text))
        told.append({"row": index, "number": int(numbers[index]), "pieces": pieces})
    read = rows.read(numbers)
    return told, step_digest(read.at(index) for index in range(len(numbers)))


def _shards_by_name(config: DataConfig) -> dict[tuple[str, str], Shard]:
    """Return the files that can still be looked into for a record's line, by component and name."""
    parts: dict[str, SourceConfig] = dict(config.components) if config.kind is DataKind.mixture else {"": config}
    found: dict[tuple[str, str], Shard] = {}
    for name, part in parts.items():
        if part.kind in _LOCATED:
            with contextlib.suppress(TitanError):  # the text may be gone, its tokens are there
                found |= {(name, shard.name): shard for shard in open_source(part).shards}
    return found


def _replay_stream(
    config: TitanConfig, directory: RunDirectory, step: int, wanted: list[int], tokenizer: Tokenizer, whole: bool
) -> tuple[list[dict[str, Any]], str]:
    """Return the same for a run whose data is streamed: made again, from the newest checkpoint before the step on."""
    from titan.data.feed import build_stream_feed, open_streams
    from titan.data.loader import Share

    training = config.training
    text = open_streams(config.data, tokenizer)
    plan = build_stream_feed(
        text, Share(training.global_batch_size, training.global_batch_size, 0, 1), training.seq_len, training.seed
    ).plan
    names = list(text.sources)
    first, cursors = _cursors_before(directory, step, plan.initial_cursors())
    streams = range(plan.streams)
    sources = plan.open(streams, cursors)
    for before in range(first, step - 1):
        for _ in plan.rows_of(before, streams, sources):
            pass
    rows, told = [], []
    for place, row, number in plan.rows_of(step - 1, streams, sources):
        rows.append(row)
        if place not in wanted:
            continue
        pieces = []
        for piece in sources[number].pieces:
            tokens = piece.tokens if whole else piece.tokens[piece.first : piece.first + piece.length]
            component, where = names[number // plan.streams], piece.shard.locate(piece.record)
            text = tokenizer.decode(tokens.tolist())
            pieces.append(_told(piece, component, piece.shard.name, where, len(piece.tokens), text))
        told.append({"row": place, "number": None, "pieces": pieces})
    return told, step_digest(rows)


def _told(
    piece: Piece | StreamedPiece, component: str, shard: str, where: str | None, document_tokens: int, text: str
) -> dict[str, Any]:
    """Return a piece of a row as it is printed with --json."""
    return {
        "component": component,
        "shard": shard,
        "record": piece.record,
        "where": where,
        "first": piece.first,
        "position": piece.position,
        "length": piece.length,
        "document_tokens": document_tokens,
        "text": text,
    }


def _cursors_before(directory: RunDirectory, step: int, initial: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the newest step before this one that was saved with its cursors, and these; else 0 and the beginning."""
    from titan.checkpoint.files import read_metadata, read_tensor, tensor_infos
    from titan.checkpoint.state import CURSORS

    for saved in reversed(committed_steps(directory.checkpoints)):
        if saved < step:
            folder = step_folder(directory.checkpoints, saved)
            infos = tensor_infos(read_metadata(folder))
            if CURSORS in infos and tuple(infos[CURSORS].shape) == initial.shape:
                return saved, read_tensor(folder, CURSORS, infos[CURSORS]).numpy()
    return 0, initial


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = argparse.ArgumentParser(
        prog="python -m titan.prepare replay",
        description="Say which documents made up a step of a run. Exit code 1: the run has written down other rows.",
    )
    command.add_argument("run", metavar="RUN_DIR", help="the run's folder")
    command.add_argument("--step", type=int, required=True, help="as in the log, from 1")
    command.add_argument("--rows", metavar="I[,J]", help="rows of the step, from 0 (default: all)")
    command.add_argument("--whole", action="store_true", help="show the whole of every document, not only its piece")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command.parse_args(arguments)


def _selected(text: str | None, count: int) -> list[int]:
    if text is None:
        return list(range(count))
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        chosen = [-1]
    if any(not 0 <= index < count for index in chosen):
        raise CommandError(f"--rows {text} is none of the step's rows, which are 0 to {count - 1}\n  Try  --rows 0")
    return chosen


def _format(told: list[dict[str, Any]], step: int, count: int, whole: bool) -> Iterator[str]:
    yield f"step       {step}, {count} rows"
    for row in told:
        number = "" if row["number"] is None else f"      number {row['number']:,} of the data"
        yield f"row {row['row']}{number}"
        for piece in row["pieces"]:
            component = f"{piece['component']}: " if piece["component"] else ""
            last = piece["first"] + piece["length"] - 1
            where = piece["where"] or f"{piece['shard']}, record {piece['record']:,}"
            yield (
                f"  {piece['position']:>6}   {component}{where}: tokens "
                f"{piece['first']:,} to {last:,} of {piece['document_tokens']:,}"
            )
            text = piece["text"]
            if not whole and len(text) > _SHOWN_CHARACTERS:
                half = _SHOWN_CHARACTERS // 2
                text = f"{text[:half]} ... {text[-half:]}"
            yield from (f"           | {line}" for line in text.splitlines())


def _recorded_digest(path: Path, step: int) -> str | None:
    """Return what the run has written down of a step's rows; None where it has not."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((row.get("digest") for row in reversed(read_objects(lines)) if row.get("step") == step), None)


def _verdict(digest: str, recorded: str | None) -> str:
    if recorded is None:
        return "   (the run has written down none)"
    return "   as the run has written down" if recorded == digest else f"   but the run has written down {recorded}"
