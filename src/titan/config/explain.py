"""What is wrong with a command line that does not compose: every mistake in it, not only the first.

Hydra stops at the first mistake and speaks of its own machinery. Here each override is held against the groups and
the schema by itself, then the sound ones are composed together; what still fails is traced to the override or the
file it came from, that one is left out, and the rest is tried again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, SearchPathException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from titan.config.keys import find_key, is_known, is_no_switch, schema_keys, table_of, takes, unknown_key, wrong_value
from titan.errors import ConfigError, Problem

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What Hydra, OmegaConf and PyYAML raise for a user's mistake."""

Groups = dict[str, list[str]]
"""The options of every group that can be seen, the user's own included."""


def explain_mistakes(
    error: Exception,
    overrides: Sequence[str],
    groups: Groups,
    recompose: Callable[[list[str]], object],
    is_sweep: bool = False,
) -> list[Problem]:
    """Return every problem of a command line.

    Args:
        error: What composing it raised.
        overrides: The command line.
        groups: What can be chosen.
        recompose: Composes other overrides in the same way; may raise ConfigError with problems of its own.
        is_sweep: Whether values with commas are meant as several points.

    Raises:
        Exception: `error` itself, where it is no user's mistake but a defect.
    """
    problems: list[Problem] = []
    sound: list[str] = []
    for text in overrides:
        points = _points(text) if is_sweep else [text]
        # once, where several points of a sweep have the same mistake
        found = {problem.what: problem for point in points for problem in check_override(point, groups)}
        problems += found.values()
        if not found:
            sound += points[:1]
    while True:
        try:
            recompose(sound)
        except ConfigError as others:
            return problems + others.problems
        except Exception as next_error:
            problem, culprit = _explain_error(next_error, sound, groups)
            problems.append(problem)
            if culprit is None:
                return problems
            sound.remove(culprit)
        else:
            return problems or [_explain_error(error, [], groups)[0]]


def check_override(text: str, groups: Groups) -> Iterator[Problem]:
    """Yield what is wrong with one override by itself."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        what = f"{text} cannot be read as an override"
        if equals:
            quoted = f"'{key}=\"{value}\"'   where the value has spaces or any of , : = [ ] {{ }} ( )"
            yield Problem(what, gist(error).partition(" expecting ")[0], quoted)
        else:
            yield Problem(what, "It has no value.", f"{text}=...")
        return
    key = override.key_or_group
    if not key:
        yield Problem(f"{text} names no key", suggestion="group=option   or  key=value")
    elif key.split(".")[0].split("/")[0] == "hydra" and key not in groups:
        return  # Hydra's own schema holds it
    elif override.is_sweep_override():
        if key not in groups and not is_known(key):
            yield _unknown(override, groups)
    elif key in groups:
        yield from _check_choice(override, groups)
    elif not is_known(key):
        yield _unknown(override, groups)
    elif (known := find_key(key)) is None or (override.is_delete() and known.is_node and key not in schema_keys()):
        return  # an entry of a table: any name, and any value that is no list
    elif override.is_delete():
        yield Problem(
            f"{text} takes a key away, but every key has to have a value",
            suggestion=f"{key}=null" if known.is_optional else f"{key}=...",
        )
    else:
        yield from _check_value(key, override.value())


def check_switches(overrides: Sequence[str]) -> None:
    """See that no switch is set to a number, which OmegaConf takes for true.

    Raises:
        ConfigError: With all that are.
    """
    problems = []
    for text in overrides:
        known, value = schema_keys().get(_key(text)), text.partition("=")[2]
        if known is not None and known.type is bool and value.isdecimal() and is_no_switch(int(value)):
            problems.append(wrong_value(known, value))
    if problems:
        raise ConfigError(problems)


def _check_choice(override: Override, groups: Groups) -> Iterator[Problem]:
    group, option = override.key_or_group, override.value()
    if override.is_delete():
        if any(key.is_required for name, key in schema_keys().items() if name.startswith(f"{group}.")):
            yield Problem(
                f"~{group} leaves the group {group} out, but some of its keys have no default",
                f"There are: {', '.join(groups[group])}",
                f"{group}=...   with one of these",
            )
        return
    for name in option if isinstance(option, list) else [option]:
        path, _, last = f"{group}/{name}".removesuffix(".yaml").rpartition("/")
        if not isinstance(name, str) or last not in groups.get(path, []):
            yield _unknown_option(group, "null" if name is None else str(name), groups[group])


def _check_value(key: str, value: Any) -> Iterator[Problem]:
    known = find_key(key)
    assert known is not None, "checked before"
    has_entries = known.is_table and find_key(f"{key}.any") is not None
    if (known.is_node or has_entries) and isinstance(value, dict):
        for name, inner in value.items():
            below = f"{key}.{name}"
            if find_key(below) is not None:
                yield from _check_value(below, inner)
            else:
                yield unknown_key(below)
        return
    if known.is_node and key not in schema_keys():
        yield wrong_value(known, value)
        return
    if not takes(known, value):
        yield wrong_value(known, value)


def _unknown(override: Override, groups: Groups) -> Problem:
    key, value = override.key_or_group, override.input_line or ""
    value = value.partition("=")[2] or "..."
    if override.is_delete():
        return replace(unknown_key(key), suggestion=f"leave ~{key} out")
    group, _, option = key.partition("/")
    if option and group in groups:  # a path in conf/ instead of a choice
        near, value = [group], option
    else:
        near = difflib.get_close_matches(key, groups, n=1, cutoff=0.7)
    if "." in key or not (near or "/" in key or override.package is not None):
        return unknown_key(key, value)
    listed = ", ".join(group for group in groups if group.partition("/")[0] != "hydra")
    if not near:
        return Problem(f"{key} is not a config group", f"Groups: {listed}", "--help   for all options")
    options = groups[near[0]]
    meant = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return Problem(
        f"{key} is not a config group",
        f"Groups: {listed}" + ("" if meant else f"\nOf the group {near[0]} there are: {', '.join(options)}"),
        f"{near[0]}={meant[0]}" if meant else f"{near[0]}=...   with one of these",
    )


_WHY = {"optimizer": "\nAdamW is the one that titan has; examples/own_loop.py trains with an optimizer of your own."}
"""What is to be said of a group's options beside their names."""


def _unknown_option(group: str, option: str, options: list[str]) -> Problem:
    near = difflib.get_close_matches(option, options, n=3, cutoff=0.5)
    if option == "null":
        near = [name for name in options if name == "none"]
    return Problem(
        f"{group}={option} is not an option of the group {group}",
        f"There are: {', '.join(options) or 'none yet'}" + _WHY.get(group, ""),
        "   or  ".join(f"{group}={name}" for name in near) if near else f"{group}=...   with one of these",
    )


def _explain_error(error: Exception, overrides: list[str], groups: Groups) -> tuple[Problem, str | None]:
    """Return what failed, and the override to blame where there is one."""
    message = str(error)
    in_file = re.match(r"In '([^']+)': ", message)
    culprit = _chooses(in_file.group(1), overrides) if in_file else None
    full_key = re.search(r"full_key: (\S+)", message)
    key = full_key.group(1) if full_key else ""

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_missing_file(error.missing_cfg_file, in_file, groups), culprit
    if isinstance(error, SearchPathException):
        return Problem(gist(error), suggestion="--config-dir /path/to/a/folder   with groups of your own"), None
    if isinstance(error, yaml.YAMLError):
        return _explain_yaml(error, overrides)
    is_nested = key.partition(".")[0] == "experiment" or (not key and "Did you mean to override" in message)
    if in_file and in_file.group(1).startswith("experiment/") and is_nested:
        where = f"{in_file.group(1)}.yaml"
        return Problem(
            f"{where} sets keys of the whole config, but does not say so",
            "Without `# @package _global_` all that it says is about a key experiment, which there is not.",
            f"# @package _global_   as the first line of {where}",
        ), culprit
    if in_file:
        where = f"{in_file.group(1)}.yaml"
        found = unknown_key(key) if "ConfigKeyError" in message.splitlines()[0] else None
        what = f"{found.what if found else f'{key} has a value of the wrong type'}   (in {where})"
        why = found.why if found else gist(error)
        return Problem(
            what, why, f"correct {where}" + (f", where {found.suggestion} is near" if found else "")
        ), culprit
    if isinstance(error, InterpolationResolutionError) and (open_key := re.search(r"value: (\w+)\.(\w+)", message)):
        group, name = open_key.groups()
        culprit = next((text for text in overrides if _key(text) == group), None)
        if culprit is not None:
            option = culprit.partition("=")[2].removesuffix(".yaml")
            where, others = f"{group}/{option}.yaml", [each for each in groups[group] if each != option]
            return Problem(
                f"{group}.{name} is not set   (in {where})",
                "A file of one's own says all that has no default, or takes it from another one.",
                f"defaults: [{others[-1]}, _self_]   as the first line of {where}   or  {name}: ...",
            ), culprit
    if isinstance(error, InterpolationResolutionError):
        culprit = next((text for text in overrides if _key(text) == key), None) or _mentions("${", message, overrides)
        to_set = _key(culprit) if culprit else key
        return Problem(f"{culprit or key} refers to something that is not there", gist(error), f"{to_set}=..."), culprit
    for text in overrides:
        node = _closed_node(_key(text)) or (key if _key(text) == key and key.startswith("hydra.") else None)
        if node and not isinstance(error, COMPOSITION_ERRORS):  # OmegaConf has no error of its own for this
            if node == "validation.data":
                listed = ", ".join(option for option in groups["validation"] if option != "none")
                return Problem(
                    f"{text} is about held-out text, of which no kind is chosen",
                    f"There are: {listed}",
                    f"validation=text {text}",
                ), text
            return Problem(
                f"{text} sets a key below {node}, which is null here",
                "What is null cannot be filled in from the command line, only from a file.",
                f"--config-dir DIR   with a file of your own that sets {node}",
            ), text
    if not isinstance(error, COMPOSITION_ERRORS):
        raise error
    culprit = next(
        (text for text in overrides if re.search(rf"(?<![\w.]){re.escape(_key(text))}(?!\w|\.\w)", message)), None
    )
    if culprit is None:
        return Problem(gist(error), suggestion="--hydra-help   for Hydra's flags, --help for groups and keys"), None
    return _explain_refused(culprit, error), culprit


def _explain_refused(text: str, error: Exception) -> Problem:
    """Return the problem of an override that is well formed, but that Hydra refuses in this command line."""
    key, plain = _key(text), text.lstrip("+")
    if "Ambiguous value" in str(error):
        what = f"{text} has several values"
        value = plain.partition("=")[2]
        known = schema_keys().get(key)
        other = ""
        if known is not None and "list" in str(known.type):
            other = f"   or  {key}=[{value}]"
        elif known is not None and known.type is str:
            other = f"   or  '{key}=\"{value}\"'"
        return Problem(what, "Several values are a sweep, one run for each.", f"--multirun {plain}{other}")
    if text != plain and ("already" in str(error) or "Multiple values" in str(error)):
        return Problem(f"{text} adds what is there already", "A + is for what the config does not have.", plain)
    if text == plain and key in schema_keys() and schema_keys()[key].is_table:
        return Problem(f"{text} adds entries to a table", "What adds has a + before it.", f"+{text}")
    if text == plain and (table := table_of(key)) is not None:
        entry = key.rpartition(".")[2]
        return Problem(f"{text}, but {table.name} has no {entry} yet", "A new entry has a + before it.", f"+{text}")
    table = next((name for name, known in schema_keys().items() if known.is_table and key.startswith(f"{name}.")), "")
    if "not in struct" in gist(error) and table:
        entry = key.removeprefix(f"{table}.").partition(".")[0]
        return Problem(
            f"{text}, but {table} has no {entry} yet", suggestion=f"'+{table}.{entry}={{kind:text,path:...}}'"
        )
    if key.startswith("hydra"):
        return Problem(f"{text} is refused by Hydra", gist(error), "--cfg hydra   for Hydra's own keys")
    if meant := re.search(r"Did you mean to override (\S+?)\?", str(error)):
        return Problem(f"{text} is not in the defaults list", gist(error), f"{meant.group(1)}={text.partition('=')[2]}")
    return Problem(f"{text} does not compose", gist(error), "--help   for the groups and keys there are")


def _explain_missing_file(missing: str, in_file: re.Match[str] | None, groups: Groups) -> Problem:
    group, _, option = missing.removesuffix(".yaml").rpartition("/")
    if not group:
        return Problem(
            f"--config-name {option}: there is no {option}.yaml", suggestion="--config-name train   or leave it out"
        )
    problem = _unknown_option(group, option, groups.get(group, []))
    if in_file is None or in_file.group(1) == "train":
        return problem
    return Problem(f"{problem.what}   (in {in_file.group(1)}.yaml)", problem.why, f"correct {in_file.group(1)}.yaml")


def _explain_yaml(error: yaml.YAMLError, overrides: list[str]) -> tuple[Problem, str | None]:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return Problem(f"a config file is not valid YAML: {gist(error)}"), None
    assert isinstance(error, yaml.MarkedYAMLError)
    name = str(mark.name)
    started = f"(line {error.context_mark.line + 1}):" if error.context_mark else ""
    problem = Problem(
        f"{name}, line {mark.line + 1} is not valid YAML",
        " ".join(filter(None, (str(error.context or ""), started, str(error.problem)))),
        f"correct {name}",
    )
    *_, group, file = ("", *name.split("/"))
    return problem, _chooses(f"{group}/{file.removesuffix('.yaml')}", overrides)


def _chooses(file: str, overrides: list[str]) -> str | None:
    """Return the override that chose a group's file."""
    group, _, option = file.rpartition("/")
    return next(
        (text for text in overrides if text.lstrip("+") in (f"{group}={option}", f"{group}={option}.yaml")), None
    )


def _mentions(part: str, message: str, overrides: list[str]) -> str | None:
    names = re.findall(r"'([^']+)'", message)
    return next((text for text in overrides if part in text and any(name in text for name in names)), None)


def _closed_node(key: str) -> str | None:
    """Return the nearest key at or above this one that holds keys and may be null."""
    while key:
        known = schema_keys().get(key)
        if known is not None and known.is_node and known.is_optional:
            return key
        key = key.rpartition(".")[0]
    return None


def _points(text: str) -> list[str]:
    """Return an override of a sweep as one override a point."""
    try:
        override = OverridesParser.create().parse_override(text)
        if override.is_discrete_sweep():
            return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError):  # unreadable, or a glob(), which needs the options to choose from
        pass
    return [text]


def _key(text: str) -> str:
    return text.split("=", 1)[0].lstrip("+~")


def gist(error: BaseException) -> str:
    """Return the part of an error's text that speaks to a user."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("In '") and len(lines) > 1:
        lines = lines[1:]
    text = lines[0].strip() if lines else type(error).__name__
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        text += " " + gist(cause)
    return text
