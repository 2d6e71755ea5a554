"""`python -m titan.prepare`: tokenise a source or a mixture once."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from titan.config.check import check_preparation
from titan.config.degrees import resolve_data
from titan.config.load import compose
from titan.config.schema import DataConfig, DataKind, TokenizerConfig
from titan.data.mixture import components_of, find_prepared, source_of, write_mixture
from titan.data.prepare import Preparation, Progress, describe_progress, prepare_source
from titan.data.prepared import Prepared
from titan.data.tokenizer import build_tokenizer
from titan.errors import ConfigError, Problem
from titan.launch.environment import current_machine


def main(arguments: list[str]) -> bool:
    """Run the command line; returns True, for what was asked is there."""
    given = build_parser().parse_intermixed_args(arguments)
    config, tokenizer_config = load(given.overrides, given.config_dir, is_copied=given.to is not None)
    assert config.cache_dir is not None, "resolved"
    preparation = Preparation(
        build_tokenizer(tokenizer_config), config.cache_dir, workers=config.prepare_workers, report=_report
    )
    began = time.monotonic()
    if given.to is None:
        parts = {name: part for name, (part, _) in find_prepared(config, preparation).items()}
    else:
        parts = prepare_to(Path(given.to).absolute(), config, preparation)
    for name, part in parts.items():
        for line in summary(part):
            print(f"{name + ': ' if name else ''}{line}")
    where = f"data=prepared data.path={given.to}" if given.to else "the same overrides"
    print(f"done in {time.monotonic() - began:.1f} s; trained on with  {where}")
    return True


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    command = argparse.ArgumentParser(
        prog="python -m titan.prepare", description="Tokenise a source or a mixture once, in parallel and resumably."
    )
    command.add_argument("overrides", nargs="*", metavar="group=option|key=value", help="as for titan.train")
    command.add_argument("--to", metavar="DIR", help="write it here (default: into data.cache_dir)")
    command.add_argument("--config-dir", metavar="DIR", help="a folder of config groups of your own")
    return command


def load(
    overrides: list[str], config_dir: str | None = None, is_copied: bool = False
) -> tuple[DataConfig, TokenizerConfig]:
    """Compose and check what concerns the data.

    Args:
        overrides: Of the command line.
        config_dir: A folder of config groups of the user's own.
        is_copied: Whether all is to be in one folder of its own.

    Raises:
        ConfigError: With all problems found.
    """
    config = compose(overrides, config_dir)
    data = resolve_data(config.data, config.data.cache_dir or current_machine().cache_dir)
    problems = list(check_preparation(replace(config, data=data)))
    if data.kind is DataKind.prepared:
        problems.append(
            Problem("data=prepared is prepared already", suggestion=f"python -m titan.prepare show {data.path}")
        )
    if is_copied and data.kind is DataKind.mixture:
        problems += [
            Problem(
                f"data.components.{name}.kind = prepared is prepared already, and --to tokenises all of a mixture",
                f"What is in {component.path} is neither made again nor copied.",
                "the same without --to   which prepares the others into data.cache_dir, where a run with the same "
                "overrides finds them",
            )
            for name, component in components_of(data).items()
            if component.kind is DataKind.prepared
        ]
    if problems:
        raise ConfigError(problems)
    return data, config.tokenizer


def prepare_to(folder: Path, config: DataConfig, preparation: Preparation) -> dict[str, Prepared]:
    """Write a folder to train on with data=prepared; of a mixture, one below it for each component.

    Raises:
        DataError: As `prepare_source`.
    """
    if config.kind is not DataKind.mixture:
        return {"": prepare_source(config, folder, preparation)}
    components = components_of(config)
    found = {
        name: prepare_source(source_of(component), folder / name, preparation, name)
        for name, component in components.items()
    }
    write_mixture(folder, {name: component.weight for name, component in components.items()})
    return found


def summary(prepared: Prepared) -> list[str]:
    """Return what a person wants to know of prepared data, as lines."""
    lines = [
        f"{prepared.documents:,} documents, {prepared.text_bytes:,} bytes of text, {prepared.tokens:,} tokens "
        f"({prepared.text_bytes / max(1, prepared.tokens):.2f} bytes a token); the longest has "
        f"{prepared.longest_document_tokens:,}"
    ]
    lines += [f"left out {count:,}: {reason}" for reason, count in prepared.skipped.items()]
    count = len(prepared.parts)
    lines.append(f"{count:,} part{'s' * (count != 1)} in {prepared.path}, digest {prepared.digest}")
    return lines


def _report(component: str, progress: Progress) -> None:
    print(describe_progress(progress, component), flush=True)
