"""`python -m titan.prepare show | verify`: what a prepared folder holds, and whether every byte of it is sound."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from titan.data.mixture import open_folder
from titan.data.prepared import Prepared, find_damage
from titan.data.rows import find_plan_damage
from titan.prepare.make import summary


def main(arguments: list[str]) -> bool:
    """Say what is in a folder; returns True."""
    command = argparse.ArgumentParser(prog="python -m titan.prepare show", description="Say what is in prepared data.")
    command.add_argument("path", type=Path, metavar="DIR")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    given = command.parse_args(arguments)
    found = open_all(given.path)
    if given.json:
        print(json.dumps({name: _told(part) for name, part in found.items()} if "" not in found else _told(found[""])))
        return True
    for name, part in found.items():
        for line in _lines(part):
            print(f"{name + ': ' if name else ''}{line}")
    return True


def verify_main(arguments: list[str]) -> bool:
    """Hold every file against its checksum; returns whether all are sound."""
    command = argparse.ArgumentParser(
        prog="python -m titan.prepare verify",
        description="Hold prepared data against its checksums. Exit code 1: damaged.",
    )
    command.add_argument("path", type=Path, metavar="DIR")
    given = command.parse_args(arguments)
    damage = []
    for name, part in open_all(given.path).items():
        found = [*find_damage(part), *find_plan_damage(part)]
        damage += found
        for line in found:
            print(line)
        if not found:
            files = sum(len(each.checksums) for each in part.parts)
            print(f"{name + ': ' if name else ''}{files} files are as their checksums say, digest {part.digest}")
    return not damage


def open_all(path: Path) -> dict[str, Prepared]:
    """Return what is in a folder, by component; under an empty name where it is no mixture.

    Raises:
        DataError: If it was not prepared, or is damaged.
    """
    return {name: part for name, (part, _) in open_folder(path).items()}


def _lines(prepared: Prepared) -> list[str]:
    source = " ".join(f"{name}={value}" for name, value in prepared.source.items() if value is not None)
    return [
        f"source     {source or 'given as tokens'}",
        f"tokenizer  {prepared.tokenizer}, {prepared.vocab_size:,} tokens",
        *summary(prepared),
    ]


def _told(prepared: Prepared) -> dict[str, Any]:
    return {
        "path": str(prepared.path),
        "source": prepared.source,
        "tokenizer": prepared.tokenizer,
        "vocab_size": prepared.vocab_size,
        "documents": prepared.documents,
        "tokens": prepared.tokens,
        "text_bytes": prepared.text_bytes,
        "longest_document_tokens": prepared.longest_document_tokens,
        "skipped": prepared.skipped,
        "parts": len(prepared.parts),
        "digest": prepared.digest,
    }
