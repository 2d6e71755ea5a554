"""Rules on the held-out text: it can be found, and none of it is trained on."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan.config.files import NotReadable
from titan.config.schema import DataKind, SourceConfig, TitanConfig
from titan.config.sources import check_source, files_of, manifests_of, sources_of
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
    yield from _check_samples(config)
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


def _check_samples(config: TitanConfig) -> Iterator[Problem]:
    settings, seq_len = config.validation, config.training.seq_len
    if not settings.sample_prompts:
        return
    if settings.data is None:
        yield Problem(
            "validation.sample_prompts is set, but nothing is validated",
            "Prompts are continued after each validation.",
            "validation=text validation.data.path=/path/to/held_out   or  validation.sample_prompts=[]",
        )
    if not 1 <= settings.sample_tokens < seq_len:
        yield Problem(
            f"validation.sample_tokens = {settings.sample_tokens} is not between 1 and {seq_len - 1}",
            f"Prompt and continuation have to fit into training.seq_len = {seq_len}.",
            f"validation.sample_tokens={min(64, max(1, seq_len // 2))}",
        )
    if settings.sample_temperature < 0:
        yield Problem(
            f"validation.sample_temperature = {settings.sample_temperature:g} is below 0",
            "Logits are divided by it; 0 stands for the likeliest token every time.",
            "validation.sample_temperature=0.8",
        )
    if not 0 < settings.sample_top_p <= 1:
        yield Problem(
            f"validation.sample_top_p = {settings.sample_top_p:g} is not above 0 and at most 1",
            "It is a share of the probability; 1 draws from all tokens.",
            "validation.sample_top_p=0.95",
        )
    elif settings.sample_top_p < 1 and settings.sample_temperature == 0:
        yield Problem(
            f"validation.sample_top_p = {settings.sample_top_p:g} would change nothing: "
            "validation.sample_temperature = 0 draws nothing",
            suggestion="validation.sample_temperature=1",
        )


def _check_is_held_out(data: SourceConfig, config: TitanConfig) -> Iterator[Problem]:
    held_out = list(_texts(data))
    mine = _files(held_out)
    for where, source in sources_of(config.data).items():
        trained = list(_texts(source))
        if pair := next((pair for pair in itertools.product(held_out, trained) if _overlap(*pair)), None):
            one, other = map(_describe, pair)
            hint = f"'{where}.split=\"train[1%:]\"' 'validation.data.split=\"train[:1%]\"'"
            yield Problem(
                f"validation.data is {one}, and {where} trains on {'the same' if one == other else other}",
                "A loss on text that is trained on would say nothing new.",
                f"validation.data.split=validation   or  {hint}" if data.kind is DataKind.huggingface else _CHOOSE,
            )
        elif both := sorted(mine[each] for each in _files(trained).keys() & mine.keys()):
            count = f"{len(both):,} file{'s' * (len(both) != 1)}"
            yield Problem(
                f"validation.data has {count} that {where} trains on: {both[0]}{', ...' * (len(both) > 1)}",
                "A loss on text that is trained on would say nothing new.",
                f"{where}.path=/path/without/them   or  {_CHOOSE}" if source.path else _CHOOSE,
            )


def _texts(source: SourceConfig) -> Iterator[SourceConfig]:
    """Yield a source, and where it is prepared also the sources that it was made from."""
    yield source
    if source.kind is not DataKind.prepared or not source.path:
        return
    for manifest in manifests_of(source.path):
        yield SourceConfig(DataKind.prepared, path=str(manifest.parent))
        try:
            told = json.loads(manifest.read_text())["source"]
            names = {name: told[name] for name in ("path", "dataset", "subset", "split")}
            yield SourceConfig(DataKind[told["kind"]], **names)
        except (OSError, ValueError, LookupError, TypeError):  # which the run will say in full
            continue


def _files(sources: list[SourceConfig]) -> dict[tuple[int, int], Path]:
    """Return the files of some sources, by what each is known by under all its names."""
    found = {}
    for source in sources:
        with contextlib.suppress(NotReadable, OSError):  # which is told of the source
            for file in files_of(source):
                status = file.stat()
                found[status.st_dev, status.st_ino] = file
    return found


def _overlap(one: SourceConfig, other: SourceConfig) -> bool:
    """Return whether two sources that are no files may have a document in common."""
    if one.kind is not other.kind or _place(one) != _place(other):
        return False
    if one.kind is DataKind.huggingface:
        return any(mine.overlaps(theirs) for mine in _slices(one.split) for theirs in _slices(other.split))
    return one.kind is DataKind.prepared


def _place(source: SourceConfig) -> tuple[str | None, str]:
    """Return the one spelling of where a source is: a folder without its links, or a dataset's name; and the subset."""
    name = source.dataset if source.kind is DataKind.huggingface else source.path
    return os.path.realpath(name) if name and os.path.isdir(name) else name, source.subset or "default"


def _describe(source: SourceConfig) -> str:
    if source.kind is DataKind.prepared:
        return f"prepared in {source.path}"
    return f"the split {source.split} of {source.dataset}{f' ({source.subset})' if source.subset else ''}"


# ---- splits of a dataset


class _Edge(NamedTuple):
    """Where a slice of a split begins or ends."""

    unit: str
    """Documents, or percent with the way they are rounded."""
    is_from_end: bool
    number: int


@dataclass(frozen=True)
class _Slice:
    """One of the parts that a split such as train[:10%]+test consists of."""

    split: str
    first: _Edge | None = None
    """None is the beginning."""
    stop: _Edge | None = None
    """None is the end."""

    def is_before(self, other: _Slice) -> bool:
        """Return whether it surely ends before the other begins: both edges are counted alike."""
        if self.stop is None or other.first is None or self.stop[:2] != other.first[:2]:
            return False
        return self.stop.number <= other.first.number

    def overlaps(self, other: _Slice) -> bool:
        """Return whether it may have a document that the other has too."""
        if self.split != other.split and "all" not in (self.split, other.split):
            return False
        return not (self.is_before(other) or other.is_before(self))


_SLICE = re.compile(r"([^\[(]+)(?:\[(-?[\d_]+)?(%)?:(-?[\d_]+)?(%)?\])?(?:\((\w+)\))?")
"""As the datasets library reads it."""


def _slices(split: str) -> Iterator[_Slice]:
    for part in split.split("+"):
        found = _SLICE.fullmatch(part.strip())
        if found is None:  # which the library will refuse
            yield _Slice(part.partition("[")[0].strip())
            continue
        name, first, first_percent, stop, stop_percent, rounding = found.groups()
        unit = f"% {rounding or 'closest'}" if first_percent or stop_percent else "documents"
        yield _Slice(name, _edge(first, unit), _edge(stop, unit))


def _edge(number: str | None, unit: str) -> _Edge | None:
    return None if number is None else _Edge(unit, int(number) < 0, int(number))
