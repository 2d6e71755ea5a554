"""`python -m titan.prepare replay`: which documents made up a step, and what they say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan.config.load import load_config
from titan.config.schema import TitanConfig
from titan.data.digest import step_digest
from titan.data.mixture import Preparation, load_rows
from titan.data.rows import Row, Rows
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import CommandError
from titan.run_directory import RunDirectory

_SHOWN_CHARACTERS = 200


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
    if config.data.streaming:
        raise CommandError(
            "the run's data is streamed: which documents a step has depends on all before it\n"
            "  Try  python -m titan.prepare   and a run without data.streaming"
        )
    tokenizer = build_tokenizer(config.tokenizer)
    rows = load_run_rows(config, tokenizer)
    numbers = rows.order(config.training.global_batch_size, config.training.seed).rows_of_step(given.step - 1)
    wanted = _selected(given.rows, len(numbers))
    told = [_tell(rows, int(numbers[index]), index, tokenizer, given.whole) for index in wanted]
    digest = step_digest(_each(rows.read(numbers)))
    recorded = _recorded_digest(directory.path, given.step)
    if given.json:
        print(json.dumps({"step": given.step, "digest": digest, "recorded_digest": recorded, "rows": told}))
    else:
        for line in _format(told, given.step, len(numbers), given.whole):
            print(line)
        print(f"digest     {digest}{_verdict(digest, recorded)}")
    if recorded not in (None, digest):
        print(f"step {given.step} had other rows: the run has written down {recorded}", file=sys.stderr)
        return False
    return True


def load_run_rows(config: TitanConfig, tokenizer: Tokenizer) -> Rows:
    """Return the rows of a run from its frozen config, tokenised again if they are no longer there."""
    assert config.data.cache_dir is not None, "resolved before the config was frozen"
    preparation = Preparation(tokenizer, config.tokenizer, config.data.cache_dir, workers=config.data.prepare_workers)
    return load_rows(config.data, config.training.seq_len, preparation, config.data.packing, config.data.mask_documents)


def _each(rows: Row) -> Iterator[Row]:
    return (rows.at(index) for index in range(len(rows.inputs)))


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


def _tell(rows: Rows, row: int, index: int, tokenizer: Tokenizer, whole: bool) -> dict[str, Any]:
    pieces = []
    for piece in rows.documents_of(row):
        text = tokenizer.decode(rows.read_tokens(piece, whole).tolist())
        pieces.append(asdict(piece) | {"text": text})
    return {"row": index, "number": row, "pieces": pieces}


def _format(told: list[dict[str, Any]], step: int, count: int, whole: bool) -> Iterator[str]:
    yield f"step       {step}, {count} rows"
    for row in told:
        yield f"row {row['row']}      number {row['number']:,} of the data"
        for piece in row["pieces"]:
            component = f"{piece['component']}: " if piece["component"] else ""
            last = piece["first"] + piece["length"] - 1
            yield (
                f"  {piece['position']:>6}   {component}{piece['shard']}, record {piece['record']:,}: tokens "
                f"{piece['first']:,} to {last:,} of {piece['document_tokens']:,}"
            )
            text = piece["text"]
            if not whole and len(text) > _SHOWN_CHARACTERS:
                half = _SHOWN_CHARACTERS // 2
                text = f"{text[:half]} ... {text[-half:]}"
            yield from (f"           | {line}" for line in text.splitlines())


def _recorded_digest(run: Path, step: int) -> str | None:
    """Return what the run has written down of a step's rows; None where it has not."""
    found = None
    try:
        with (run / "data.jsonl").open() as file:
            for line in file:
                told = json.loads(line)
                if told.get("step") == step:
                    found = told.get("digest")
    except (OSError, ValueError, AttributeError):
        return found
    return found


def _verdict(digest: str, recorded: str | None) -> str:
    if recorded is None:
        return "   (the run has written down none)"
    return "   as the run has written down" if recorded == digest else f"   but the run has written down {recorded}"
