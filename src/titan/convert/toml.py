"""From a TorchTitan config in TOML to titan's command line: `python -m titan.convert toml FILE`.

Translating word by word would be wrong in silence, because what a file leaves out is not the same in both programs:
TorchTitan then recomputes every second block and saves nothing, titan the other way round. So the file is completed
with TorchTitan's defaults first, all of it is translated, and only what titan's own defaults do not already say is
printed. What is printed is composed and held against titan's rules before anyone can paste it.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.keys import flatten, schema_keys
from titan.config.load import compose, option_groups
from titan.config.schema import DataKind, TitanConfig, TokenizerConfig, TokenizerKind
from titan.convert.torchtitan_options import (
    IGNORED,
    OPTIONS,
    RENAMED,
    VERSION,
    Option,
    find_option,
)
from titan.convert.torchtitan_rules import Given, NoEquivalent, Overrides
from titan.errors import CommandError, ConfigError, Problem

_PLAIN = re.compile(r"[\w./:*+@~-]+")
"""Text that Hydra's grammar takes without quotes."""
_SAID = (".path", ".dataset")
"""Keys that an option may leave open, so that they are always said."""
_WITHOUT_THEM_NO_RUN = ("model.name", "model.flavor")
"""Options whose value has to have an equivalent."""


@dataclass(frozen=True)
class Remark:
    """What a reader of the translation should know of one option."""

    option: str
    value: Any
    text: str
    is_default: bool

    def lines(self) -> list[str]:
        """Return it as it is printed."""
        default = ", which is TorchTitan's default" if self.is_default and self.value is not None else ""
        return [f"  {self.option} = {_toml(self.value)}{default}", f"    {self.text}"]


@dataclass(frozen=True)
class Translation:
    """A TorchTitan config in titan's words."""

    overrides: list[str]
    """What is typed behind `python -m titan.train`."""
    config: TitanConfig | None
    """What that composes to; None if titan refuses it."""
    refusal: ConfigError | None
    """Why titan refuses it."""
    ranks: int
    """The number of ranks that it was checked for."""
    missing: list[Remark]
    """What has no equivalent."""
    differing: list[Remark]
    """What differs in meaning."""
    absent: list[str]
    """Files that the overrides name and that are not here."""
    renamed: list[str]
    """Options that the file calls by an earlier name."""

    def lines(self) -> Iterator[str]:
        """Return what is printed, line by line."""
        yield " \\\n    ".join(["python -m titan.train", *_wrapped([shlex.quote(text) for text in self.overrides])])
        yield ""
        yield from self._of_ranks()
        for title, remarks in (("no equivalent", self.missing), ("differs in meaning", self.differing)):
            if remarks:
                yield from ("", title)
                for remark in remarks:
                    yield from remark.lines()
        if self.absent:
            yield from ("", "not here, so not looked into")
            yield from (f"  {text}" for text in self.absent)
        if self.renamed:
            yield from ("", f"names of earlier versions, read as those of {VERSION}")
            yield from (f"  {text}" for text in self.renamed)

    def _of_ranks(self) -> Iterator[str]:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        if self.refusal is not None:
            yield f"refused for {ranks}: see the end"
            return
        yield f"checked for {ranks}. Neither program has their number in its config: titan takes all GPUs of a machine,"
        yield "the ranks that torchrun in front of it has started, or cluster=slurm cluster.nodes=N"


def read_toml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a TorchTitan config.

    Returns:
        The options that it names, by the names of TorchTitan 0.2.2; what was renamed, in words.

    Raises:
        CommandError: If it cannot be read, or says something that TorchTitan would not understand.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CommandError(f"{path} cannot be read: {reason}") from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CommandError(f"{path} is not TOML: {error}") from error
    values, renamed, problems = {}, [], []
    spelled: dict[str, str] = {}
    for written, value in _leaves(tables):
        name = RENAMED.get(written, written)
        if name in IGNORED:
            continue
        if name != written:
            renamed.append(f"{written} is {name}")
        option = find_option(name)
        if option is None:
            problems.append(_unknown(written))
            continue
        value = _repair(option, value)
        if not option.accepts(value):
            problems.append(_wrong_kind(option, value))
        elif name in spelled:
            problems.append(Problem(f"{spelled[name]} and {written} are the same option", suggestion=f"{name} alone"))
        values[name], spelled[name] = value, written
    if problems:
        raise CommandError(_listed(problems, path))
    return values, renamed


def translate(path: Path, ranks: int | None = None) -> Translation:
    """Translate a TorchTitan config.

    Args:
        path: The TOML file.
        ranks: How many ranks it is for; None checks with the smallest number that its degrees and batch allow.

    Raises:
        CommandError: If the file cannot be understood, or is for a model that titan does not have.
    """
    named, renamed = read_toml(path)
    values = {option.name: option.default for option in OPTIONS} | named
    refused: Translation | None = None
    for count in _rank_counts(values) if ranks is None else [ranks]:
        given = Given(values, frozenset(named), max(1, count // _ranks_of_a_copy(values)))
        overrides, missing, differing = _translate_options(given, path)
        texts = _needed(overrides)
        config, absent, refusal = _check(texts, count)
        translation = Translation(texts, config, refusal, count, missing, differing, absent, renamed)
        if refusal is None:
            return translation
        refused = refused or translation
    assert refused is not None
    return refused


def _translate_options(given: Given, path: Path) -> tuple[Overrides, list[Remark], list[Remark]]:
    overrides: Overrides = {}
    missing, differing, problems = [], [], []
    for option in OPTIONS:
        value, is_default = given[option.name], option.name not in given.named
        if option.needs and not given[option.needs]:
            continue
        try:
            overrides |= option.apply(given)
        except NoEquivalent as error:
            if option.name in _WITHOUT_THEM_NO_RUN:
                problems.append(Problem(f"{option.name} = {_toml(value)} has no equivalent", str(error)))
            missing.append(Remark(option.name, value, str(error), is_default))
            continue
        if option.is_noted(given):
            (differing if option.keys else missing).append(Remark(option.name, value, option.note, is_default))
    if problems:
        raise CommandError(_listed(problems, path))
    return overrides, missing, differing


def _needed(overrides: Overrides) -> list[str]:
    """Return the overrides that change something: options of groups, then keys that those do not already set so."""
    groups = option_groups()
    chosen = [f"{key}={value}" for key, value in _in_order(overrides) if key in groups]
    keys = {key: f"{key}={_hydra(value)}" for key, value in _in_order(overrides) if key not in groups}
    said = [text for key, text in keys.items() if key.endswith(_SAID)]
    composed = flatten(compose([*chosen, *said]))
    changing = [text for key, text in keys.items() if text in said or composed[key] != overrides[key]]
    return [*chosen, *changing]


def _in_order(overrides: Overrides) -> list[tuple[str, Any]]:
    """Return them in the order of titan's groups."""
    order = list(schema_keys())
    return sorted(overrides.items(), key=lambda each: order.index(each[0]))


def _check(texts: list[str], ranks: int) -> tuple[TitanConfig | None, list[str], ConfigError | None]:
    """Compose the overrides and apply titan's rules, but for files that are on another machine."""
    try:
        config = compose(texts)
        trial, absent = _without_absent_files(config)
        machine = Machine(gpus=8, has_bfloat16=True, started_ranks=ranks, started_ranks_per_node=math.gcd(8, ranks))
        check_config(trial, machine)
    except ConfigError as error:
        return None, [], error
    return config, absent, None


def _without_absent_files(config: TitanConfig) -> tuple[TitanConfig, list[str]]:
    absent = []
    trial = config
    if config.tokenizer.path is not None and not Path(config.tokenizer.path).exists():
        absent.append(f"tokenizer.path = {config.tokenizer.path}")
        trial = replace(trial, tokenizer=TokenizerConfig(kind=TokenizerKind.bytes))
    if config.data.path is not None and not Path(config.data.path).exists():
        absent.append(f"data.path = {config.data.path}")
        data = replace(trial.data, kind=DataKind.huggingface, path=None, dataset="unseen/unseen")
        trial = replace(trial, data=data)
    validation = config.validation.data
    if validation is not None and validation.path is not None and not Path(validation.path).exists():
        absent.append(f"validation.data.path = {validation.path}")
        unseen = replace(validation, kind=DataKind.huggingface, path=None, dataset="unseen/held_out")
        trial = replace(trial, validation=replace(config.validation, data=unseen))
    if config.checkpoint.initial_load is not None and not Path(config.checkpoint.initial_load).exists():
        absent.append(f"checkpoint.initial_load = {config.checkpoint.initial_load}")
        trial = replace(trial, checkpoint=replace(trial.checkpoint, initial_load=None, exclude=[]))
    return trial, absent


def _ranks_of_a_copy(values: dict[str, Any]) -> int:
    """Return how many ranks see the same rows."""
    axes = ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree")
    ranks = 1
    for axis in axes:
        ranks *= max(1, values[f"parallelism.{axis}"])
    return ranks


def _rank_counts(values: dict[str, Any]) -> list[int]:
    """Return the numbers of ranks to try: what the degrees say, or the first that the batch divides into."""
    replicas, shards = (values[f"parallelism.data_parallel_{kind}_degree"] for kind in ("replicate", "shard"))
    least = _ranks_of_a_copy(values) * max(1, replicas) * max(1, shards)
    least = least if least <= 8 else -(-least // 8) * 8  # whole machines
    return [least * more for more in ((1, 2, 4, 8) if shards == -1 else (1,))]


def _leaves(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _repair(option: Option, value: Any) -> Any:
    """Read what TorchTitan reads too: names with commas for a list, a number for a number of layers."""
    if isinstance(option.default, list) and isinstance(value, str) and str not in option.kinds:
        return [name.strip() for name in value.split(",") if name.strip()]
    if option.name == "activation_checkpoint.selective_ac_option" and type(value) is int:
        return str(value)
    return value


def _unknown(name: str) -> Problem:
    known = [*(option.name for option in OPTIONS), *RENAMED]
    last = name.rpartition(".")[2]
    near = [each for each in known if each.rpartition(".")[2] == last]
    near += [each for each in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if each not in near]
    return Problem(
        f"{name} is not an option of TorchTitan {VERSION}", f"Nearest: {', '.join(near[:3])}" if near else ""
    )


def _wrong_kind(option: Option, value: Any) -> Problem:
    kinds = option.kinds or (type(option.default),)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    wanted = " or ".join(words[kind] for kind in kinds if kind in words)
    return Problem(f"{option.name} = {_toml(value)} is not {wanted}")


def _listed(problems: list[Problem], path: Path) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {path}\n\n" + "\n\n".join(map(str, problems))


def _toml(value: Any) -> str:
    if value is None:
        return "(not set)"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _hydra(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_hydra(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)


def _wrapped(texts: list[str], width: int = 110) -> list[str]:
    """Return the texts in lines of a readable length."""
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 1 + len(text) <= width:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return lines
