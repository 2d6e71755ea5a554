"""Rules on the held-out text: it can be found, and none of it is trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from titan.config.files import SUFFIXES, find_files, find_standard_library
from titan.config.schema import DataKind, SourceConfig, TitanConfig
from titan.errors import Problem

_BY_PATH = (DataKind.text, DataKind.jsonl, DataKind.parquet, DataKind.arrow, DataKind.prepared)
_CHOOSE = "validation=text validation.data.path=/path/to/held_out   or  validation=none"


def check_validation(config: TitanConfig) -> Iterator[Problem]:
    """Where a run validates, there is text to validate on, which it does not train on."""
    settings = config.validation
    if settings.rows == 0 or settings.rows < -1:
        yield Problem(
            f"validation.rows = {settings.rows} is not a number of rows",
            "-1 stands for all rows of the held-out text.",
            "validation.rows=-1",
        )
    if settings.interval <= 0:
        return
    if settings.data is None:
        yield Problem(
            f"validation.interval = {settings.interval}, but no held-out text is chosen",
            "A loss on text that is trained on would say nothing new.",
            _CHOOSE,
        )
        return
    problems = list(_check_source(settings.data))
    yield from problems or _check_is_held_out(settings.data, config)


def _check_source(data: SourceConfig) -> Iterator[Problem]:
    kind = data.kind
    if kind is DataKind.mixture:
        yield Problem(
            "validation.data.kind = mixture, but held-out text is one source",
            "Its rows are looked at in their own order, each once.",
            "validation=text validation.data.path=/path/to/held_out",
        )
    elif kind is DataKind.huggingface and not data.dataset:
        yield Problem(
            "validation.data.dataset is not set, but validation=huggingface needs it",
            suggestion="validation.data.dataset=allenai/c4 validation.data.subset=en",
        )
    elif kind in _BY_PATH and not data.path:
        yield Problem(
            f"validation.data.path is not set, but validation={kind.name} needs it",
            suggestion="validation.data.path=/path/to/held_out",
        )
    elif kind not in _BY_PATH and data.path is not None:
        yield Problem(
            f"validation.data.path = {data.path} is set, but validation={kind.name} reads no path",
            suggestion=f"validation=text validation.data.path={data.path}",
        )
    elif kind is DataKind.prepared:
        if not Path(data.path or "").is_dir():
            yield Problem(
                f"validation.data.path = {data.path} is not a folder",
                suggestion="validation.data.path=/path/to/prepared",
            )
    elif kind in _BY_PATH:
        files = _files(data)
        if not any(file.stat().st_size for file in files):
            found = "holds no file to read" if Path(data.path or "").exists() else "does not exist or matches nothing"
            if files:
                found = f"holds {len(files)} file{'s' * (len(files) > 1)}, all of them empty"
            yield Problem(
                f"validation.data.path = {data.path} {found}",
                f"validation={kind.name} takes a file, a folder or a glob such as '/path/**/*.jsonl.gz'.",
                "validation.data.path=/path/to/held_out   or  validation=none",
            )


def _check_is_held_out(data: SourceConfig, config: TitanConfig) -> Iterator[Problem]:
    trained_on = (
        {"data": config.data}
        if config.data.kind is not DataKind.mixture
        else {f"data.components.{name}": component for name, component in config.data.components.items()}
    )
    mine = {_identity(file): file for file in _files(data)}
    for where, source in trained_on.items():
        if _names(source) and _names(source) == _names(data):
            what = ", ".join(f"{name} = {value}" for name, value in _names(data).items())
            is_hub = data.kind is DataKind.huggingface
            yield Problem(
                f"validation.data is the same as {where}: {what}",
                "A loss on text that is trained on would say nothing new.",
                "validation.data.split=validation" if is_hub else _CHOOSE,
            )
            continue
        both = sorted(mine[each] for each in {_identity(file) for file in _files(source)} & mine.keys())
        if both:
            count = f"{len(both):,} file{'s' * (len(both) != 1)}"
            yield Problem(
                f"validation.data has {count} that {where} trains on: {both[0]}{', ...' * (len(both) > 1)}",
                "A loss on text that is trained on would say nothing new.",
                _CHOOSE
                if source.kind is DataKind.python_stdlib
                else f"{where}.path=/path/without/them   or  {_CHOOSE}",
            )


def _names(source: SourceConfig) -> dict[str, str | None]:
    """Return what says which text a source is, where it is not files."""
    if source.kind is DataKind.huggingface:
        return {"dataset": source.dataset, "subset": source.subset, "split": source.split}
    return {"path": source.path} if source.kind is DataKind.prepared else {}


def _files(source: SourceConfig) -> list[Path]:
    if source.kind is DataKind.python_stdlib:
        return find_standard_library()
    return find_files(source.path, source.kind.name) if source.kind.name in SUFFIXES and source.path else []


def _identity(file: Path) -> tuple[int, int]:
    """Return what a file is known by under all its names, links included."""
    status = os.stat(file)
    return status.st_dev, status.st_ino
