"""Rules on the held-out text: it can be found, and none of it is trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from titan.config.files import NotReadable
from titan.config.schema import DataKind, SourceConfig, TitanConfig
from titan.config.sources import check_source, files_of, sources_of
from titan.errors import Problem

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
    if settings.data.kind is DataKind.mixture:
        yield Problem(
            "validation.data.kind = mixture, but held-out text is one source",
            "Its rows are looked at in their own order, each once.",
            "validation=text validation.data.path=/path/to/held_out",
        )
        return
    problems = list(check_source(settings.data, "validation.data", config.tokenizer))
    yield from problems or _check_is_held_out(settings.data, config)


def _check_is_held_out(data: SourceConfig, config: TitanConfig) -> Iterator[Problem]:
    mine = {_identity(file): file for file in files_of(data)}
    for where, source in sources_of(config.data).items():
        if _names(source) and _names(source) == _names(data):
            what = ", ".join(f"{name} = {value}" for name, value in _names(data).items())
            is_hub = data.kind is DataKind.huggingface
            yield Problem(
                f"validation.data is the same as {where}: {what}",
                "A loss on text that is trained on would say nothing new.",
                "validation.data.split=validation" if is_hub else _CHOOSE,
            )
            continue
        try:
            theirs = {_identity(file) for file in files_of(source)}
        except NotReadable:  # which is told of the data
            continue
        both = sorted(mine[each] for each in theirs & mine.keys())
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


def _identity(file: Path) -> tuple[int, int]:
    """Return what a file is known by under all its names, links included."""
    status = os.stat(file)
    return status.st_dev, status.st_ino
