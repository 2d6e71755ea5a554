"""`python -m titan.doctor`: what would go wrong on this machine, and what to do about it.

Looks at Python, PyTorch and packages, at devices and their speed, at ranks that exchange something, at the place for
runs, at limits, SLURM and keys. Every finding is ok, a note (something cannot be done here, or is slow) or a problem (a
run would fail of it). A check that fails or hangs is a finding too. Nothing is left behind, and no secret is shown.

Exit codes: 0 no problem; 1 there are problems; 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from titan.command import exit_code
from titan.doctor.computing import find_computing
from titan.doctor.finding import Check, Finding, Level, examine
from titan.doctor.software import find_compiler, find_conf, find_locale, find_packages, find_python
from titan.doctor.storage import find_storage
from titan.doctor.surroundings import (
    find_hub_cache,
    find_keys,
    find_limits,
    find_memory,
    find_shared_memory,
    find_slurm,
)

_SECONDS = 17.0
_SHARE_OF_FILES = 0.35
"""Of the time: for what needs no torch. The rest is for what does."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    parsed = build_parser().parse_args(arguments)
    findings: list[Finding] = []

    def run() -> int:
        findings.extend(find_all(parsed.run_dir, parsed.seconds))
        if parsed.json:
            print(json.dumps([{**asdict(each), "level": each.level.name} for each in findings], indent=2))
        else:
            print("\n".join(describe(findings)))
        return int(any(each.level is Level.problem for each in findings))

    code = exit_code(run)
    sys.stderr.flush()
    if any("did not answer" in each.what for each in findings):
        os._exit(code)  # a thread that hangs would be waited for
    sys.exit(code)


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m titan.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs"),
        metavar="PATH",
        help="where runs are to be kept; runs if not given",
    )
    parser.add_argument("--json", action="store_true", help="all findings as JSON, with what was measured")
    parser.add_argument(
        "--seconds", type=_positive, default=_SECONDS, help=f"how long all of it may take; {_SECONDS:g} if not given"
    )
    return parser


def find_all(run_dir: Path, seconds: float) -> list[Finding]:
    """Look at everything; takes no longer than some seconds, whatever hangs."""
    began = time.monotonic()
    checks = [
        Check("python", find_python),
        Check("packages", find_packages),
        Check("conf", find_conf),
        Check("compiler", find_compiler),
        Check("locale", find_locale),
        Check("memory", find_memory),
        Check("shm", find_shared_memory),
        Check("files", find_limits),
        Check("run_dir", lambda: find_storage(run_dir)),
        Check("hub_cache", find_hub_cache),
        Check("keys", find_keys),
        Check("slurm", find_slurm),
    ]
    findings = examine(checks, _SHARE_OF_FILES * seconds)
    # after the others, whose work would be in what is measured
    return findings + find_computing(seconds - (time.monotonic() - began))


def describe(findings: Sequence[Finding]) -> list[str]:
    """Return findings as lines: problems last, where one looks first."""
    width = max(len(each.check) for each in findings)
    lines = []
    for level in (Level.ok, Level.note, Level.problem):
        for each in findings:
            if each.level is not level:
                continue
            lines.append(f"{level.name:<8} {each.check:<{width}}  {each.what}")
            if each.advice:
                lines.append(f"{'':<8} {'':<{width}}  Try  {each.advice}")
    counts = {level: sum(each.level is level for each in findings) for level in Level}
    words = [f"{counts[Level.ok]} ok", _count(counts[Level.note], "note"), _count(counts[Level.problem], "problem")]
    return [*lines, "", ", ".join(words)]


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a number above 0")
    return value


if __name__ == "__main__":
    main()
