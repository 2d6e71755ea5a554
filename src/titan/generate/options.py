"""What `python -m titan.generate` can be told, and what is wrong with what it was told.

Words are key=value, as for titan.train, with one difference: a text is taken as it is typed. Hydra's grammar would
want quotes inside of the shell's quotes around every prompt with a comma in it. Only a prompt in brackets that reads as
a list of texts is taken for several.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from titan.config.keys import Key, walk_keys, wrong_value
from titan.config.schema import Device, Dtype, TokenizerKind
from titan.errors import CommandError, Problem


@dataclass(frozen=True)
class GenerateOptions:
    """Every option, by its key."""

    checkpoint: str | None = None
    """A run directory (its newest whole checkpoint), a checkpoint, or a Hugging Face folder."""
    prompt: list[str] = dataclasses.field(default_factory=list)
    """What to go on from; [first,second] are several. An empty one begins a text."""
    prompts_file: str | None = None
    """A file with a prompt on each line, or .jsonl with {"prompt": ...} on each; - reads standard input."""
    max_new_tokens: int = 128
    """Tokens after each prompt, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token every time; 1 draws with the model's own probabilities."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this share of the probability together."""
    seed: int = 0
    """What is drawn; the same seed gives the same text."""
    stop_at_end: bool = True
    """End at a token that ends a text; false goes on behind it."""
    begin_text: bool = True
    """Put the token that begins a text before each prompt, as before each text in training."""
    batch_size: int = 8
    """Prompts that are continued together."""
    echo: bool = True
    """Show the prompt before its continuation."""
    tokenizer: TokenizerKind | None = None
    """Another tokenizer than the checkpoint's."""
    tokenizer_path: str | None = None
    """Its file, or its folder; without tokenizer=..., its kind is seen from the file."""
    device: Device = Device.auto
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: Dtype = Dtype.auto
    """What to compute in; auto is bfloat16 on cuda and float32 on a CPU."""
    tp: int = 1
    """Processes, or GPUs, that share every matrix: for a model that one GPU does not hold."""
    family: str | None = None
    """A model family of your own as package.module:NAME; the one that a checkpoint names is not imported."""
    verify: bool = True
    """Hold every byte of a titan checkpoint against its checksum first; false looks at sizes only."""


_OF_A_FIELD = {"tokenizer_path": "tokenizer.path"}


@functools.cache
def option_keys() -> dict[str, Key]:
    """Return the options by their keys, `name` being that of the field."""
    return {_OF_A_FIELD.get(key.name, key.name): key for key in walk_keys(GenerateOptions)}


def describe_options() -> Iterator[str]:
    """Yield a line for each option: key, default, what it says."""
    node = ast.parse(inspect.getsource(GenerateOptions)).body[0]
    assert isinstance(node, ast.ClassDef)
    said = {
        line.target.id: " ".join(following.value.value.split())
        for line, following in zip(node.body, node.body[1:], strict=False)
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    defaults = GenerateOptions()
    for name, key in option_keys().items():
        default = getattr(defaults, key.name)
        text = default.name if isinstance(default, Enum) else json.dumps(default)
        values = (
            f" ({', '.join(key.type.__members__)})" if inspect.isclass(key.type) and issubclass(key.type, Enum) else ""
        )
        yield f"{f'{name}={text}':<22} {said[key.name]}{values}"


def read_options(words: Sequence[str]) -> GenerateOptions:
    """Return the options of a command line.

    Raises:
        CommandError: With every mistake in it.
    """
    given: dict[str, object] = {}
    problems: list[Problem] = []
    for word in words:
        name, equals, text = word.partition("=")
        key = option_keys().get(name)
        if key is None or not equals:
            problems.append(_unknown(name, text if equals else "..."))
        elif key.name in given:
            again = "prompt='[first,second]'   for several" if name == "prompt" else f"{name}={text}   once"
            problems.append(Problem(f"{name} is given twice", suggestion=again))
        else:
            try:
                given[key.name] = _convert(key, text)
            except ValueError:
                problems.append(wrong_value(dataclasses.replace(key, name=name), text))
    options = GenerateOptions(**given)  # type: ignore[arg-type]
    problems += _check(options, given)
    if problems:
        raise refusal(problems)
    return options


def refusal(problems: Sequence[Problem]) -> CommandError:
    """Return the error of a wrong command."""
    count = len(problems)
    title = f"{count} problem{'s' * (count != 1)} in the command"
    return CommandError(title + "\n\n" + "\n\n".join(map(str, problems)))


def read_prompts(options: GenerateOptions) -> list[str]:
    """Return the prompts of the options.

    Raises:
        CommandError: If a file of them cannot be read, or has none.
    """
    if options.prompts_file is None:
        return options.prompt
    where = f"prompts_file = {options.prompts_file}"
    try:
        read = sys.stdin.buffer.read() if options.prompts_file == "-" else Path(options.prompts_file).read_bytes()
        lines = read.decode().splitlines()
    except OSError as error:
        raise refusal([Problem(f"{where} cannot be read: {error.strerror or error}")]) from error
    except UnicodeDecodeError as error:
        raise refusal([Problem(f"{where} is not UTF-8", f"Byte {error.start:,} is not.")]) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise refusal([Problem(f"{where} has no prompt in it", "Lines of blanks alone do not count.")])
    if not options.prompts_file.endswith(".jsonl"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise refusal([Problem(f'{where}: line {number} is not an object with a "prompt" that is text')])
        prompts.append(prompt)
    return prompts


def _convert(key: Key, text: str) -> object:
    """Return a value; raises ValueError where it is none of the key's type."""
    if text == "null" and key.is_optional:
        return None
    if key.type is str:
        return text
    if typing.get_origin(key.type) is list:
        return _several(text)
    if inspect.isclass(key.type) and issubclass(key.type, Enum):
        if text not in key.type.__members__:
            raise ValueError(text)
        return key.type[text]
    if key.type is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return int(text) if key.type is int else float(text)


def _several(text: str) -> list[str]:
    """Return the texts of a list, or the text itself where it is none."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        found = yaml.load(text, Loader=yaml.BaseLoader)  # which takes every word for text
    except yaml.YAMLError:
        return [text]
    is_list = isinstance(found, list) and found and all(isinstance(each, str) for each in found)
    return found if is_list else [text]


def _unknown(name: str, value: str) -> Problem:
    near = difflib.get_close_matches(name, option_keys(), n=3, cutoff=0.5)
    if name in option_keys():
        return Problem(f"{name} has no value", suggestion=f"{name}=...")
    return Problem(
        f"{name} is not a key of titan.generate",
        f"Nearest: {', '.join(near)}" if near else "",
        f"{near[0]}={value}" if near else "--help   for all keys",
    )


def _check(options: GenerateOptions, given: dict[str, object]) -> Iterator[Problem]:
    if not options.checkpoint:
        yield Problem(
            "checkpoint is not set",
            "What to take the model from: a run directory, a checkpoint of one, or a Hugging Face folder.",
            "checkpoint=runs/NAME",
        )
    if not options.prompt and options.prompts_file is None:
        yield Problem("prompt is not set", suggestion="prompt='Once upon a time'   or  prompts_file=prompts.txt")
    if options.prompt and options.prompts_file is not None:
        yield Problem("prompt and prompts_file are both set", "Prompts come from one place.", "one of the two")
    for name, least in (("max_new_tokens", 1), ("top_k", 0), ("batch_size", 1), ("tp", 1), ("seed", 0)):
        if (number := getattr(options, name)) < least:
            yield Problem(f"{name} = {number} is below {least}", suggestion=f"{name}={least}")
    if not 0 <= options.temperature < math.inf:
        why = "Logits are divided by it; 0 stands for the likeliest token every time."
        yield Problem(f"temperature = {options.temperature:g} is not a number from 0 on", why, "temperature=0.8")
    if not 0 < options.top_p <= 1:
        why = "It is a share of the probability; 1 draws from all tokens."
        yield Problem(f"top_p = {options.top_p:g} is not above 0 and at most 1", why, "top_p=0.95")
    if options.temperature == 0 and (idle := [name for name in ("top_k", "top_p") if name in given]):
        yield Problem(
            f"{' and '.join(idle)} would change nothing: temperature = 0 draws nothing",
            "It takes the likeliest token every time.",
            f"temperature=1 {' '.join(f'{name}={given[name]}' for name in idle)}",
        )
