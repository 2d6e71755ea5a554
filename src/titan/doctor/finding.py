"""What a check finds, and the one way in which checks are run: none may end the examination, however it fails.

A check that raises is a finding, and so is one that does not answer in its time: file servers that are gone and drivers
that hang are what people call a doctor for. Each runs in a thread of its own, which is left behind where it hangs.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|AUTH", re.IGNORECASE)
_SHORTEST_SECRET = 6


class Level(Enum):
    """How bad it is."""

    ok = "ok"
    note = "note"
    problem = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at."""
    level: Level
    what: str
    """What was found."""
    advice: str = ""
    """What to do about it."""
    values: dict[str, Any] = field(default_factory=dict)
    """What was measured, with units in the names."""


def ok(check: str, what: str, /, **values: Any) -> Finding:
    """Return a finding that nothing has to be done about."""
    return Finding(check, Level.ok, what, "", values)


def note(check: str, what: str, advice: str = "", /, **values: Any) -> Finding:
    """Return a finding that limits what can be done here, or how fast."""
    return Finding(check, Level.note, what, advice, values)


def problem(check: str, what: str, advice: str, /, **values: Any) -> Finding:
    """Return a finding that a run would fail of."""
    return Finding(check, Level.problem, what, advice, values)


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    name: str
    find: Callable[[], Iterable[Finding]]


def examine(checks: Sequence[Check], seconds: float) -> list[Finding]:
    """Run checks at the same time; returns what they found, in their order, with no secret in it.

    Args:
        checks: What to look at.
        seconds: How long each may take.
    """
    found: dict[str, list[Finding]] = {}

    def run(check: Check) -> None:
        try:
            found[check.name] = list(check.find())
        except Exception as error:
            what = f"could not be looked at: {type(error).__name__}: {error}"
            found[check.name] = [note(check.name, what, "the rest was looked at all the same")]

    threads = [threading.Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"did not answer within {seconds:.0f} s"
    for check in checks:
        found.setdefault(check.name, [problem(check.name, late, "what it looks at hangs, or is very slow")])
    return [without_secrets(finding) for check in checks for finding in found[check.name]]


def without_secrets(finding: Finding) -> Finding:
    """Return a finding in which no value of a variable that looks like a secret is left, whoever has quoted it."""
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET]

    def hide(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    values = {name: hide(value) for name, value in finding.values.items()}
    return replace(finding, what=hide(finding.what), advice=hide(finding.advice), values=values)
