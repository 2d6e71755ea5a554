"""The schema: every field says what it is, and something reads it."""

from __future__ import annotations

import re
from pathlib import Path

import titan
from tests.support.reads import undocumented_fields, unread_fields
from titan.config.keys import schema_keys
from titan.config.load import conf_dir

SCHEMA = Path(titan.__file__).parent / "config" / "schema.py"

PLANTED = '''
from dataclasses import dataclass

@dataclass
class RunConfig:
    name: str
    """The name."""
    steps: int
    """Read nowhere: other objects have steps too."""
    silent: int

@dataclass
class TitanConfig:
    run: RunConfig
    """The run."""
'''

READER = """
class Trainer:
    config: TitanConfig
    state: State

def fit(trainer: Trainer):
    run, state = trainer.config.run, trainer.state
    while state.steps < state.end:
        run.steps = run.silent
    return run.name
"""


def test_every_field_has_a_docstring() -> None:
    """No field of the schema goes without a docstring under it."""
    assert undocumented_fields(SCHEMA.read_text()) == []


def test_every_field_is_read() -> None:
    """No field of the schema is there for nothing: code or another key's interpolation reads each."""
    code = [path.read_text() for path in SCHEMA.parents[1].rglob("*.py") if path != SCHEMA]
    unread = unread_fields(SCHEMA.read_text(), code)
    keys = {f"{key.parent.__name__}.{name.rpartition('.')[2]}": name for name, key in schema_keys().items()}
    files = "".join(path.read_text() for path in conf_dir().rglob("*.yaml"))
    interpolated = set(re.findall(r"\$\{([\w.]+)\}", files))
    assert [field for field in unread if keys.get(field) not in interpolated] == []


def test_a_field_without_docstring_or_reader_would_be_found() -> None:
    """The two checks above find what they look for: a namesake's reader, or a write, is not a reader."""
    assert undocumented_fields(PLANTED) == ["RunConfig.silent"]
    assert unread_fields(PLANTED, [READER]) == ["RunConfig.steps"]
    assert unread_fields(PLANTED, []) == [
        *("RunConfig.name", "RunConfig.steps", "RunConfig.silent"),
        "TitanConfig.run",
    ]
