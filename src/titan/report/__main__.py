"""The command for a look at runs: `python -m titan.report RUN_DIR... [--text] [--output PATH]`.

Writes one page of HTML, which needs no network and no JavaScript: curves, where the time went, restarts and faults,
validation, samples, config. A directory that holds runs, as a sweep makes it, gives all of them side by side, and so do
several directories. A run that still goes on can be looked at as well.

Exit codes: 0 done; 2 the command is wrong, or the page cannot be written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from titan.command import exit_code
from titan.errors import CommandError
from titan.report.page import build_page
from titan.report.runs import Run, find_runs
from titan.report.terminal import describe
from titan.run_directory import RunDirectory, short_path, utc_now, write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = build_parser().parse_args(arguments)
    return exit_code(lambda: show(parsed.runs, parsed.text, parsed.output))


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m titan.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's directory, or a sweep's")
    parser.add_argument("--text", action="store_true", help="for the terminal, instead of a page")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="where the page goes (default: RUN_DIR/report.html, or ./report.html for several)",
    )
    return parser


def show(paths: Sequence[Path], as_text: bool, output: Path | None) -> None:
    """Write the page, or the terminal's lines, or both.

    Raises:
        CommandError: If there is no run, or something cannot be read or written.
    """
    try:
        runs = find_runs(paths)
        if as_text:
            width = shutil.get_terminal_size((120, 24)).columns
            for line in describe(runs, time.time(), width):
                print(line)
        if output or not as_text:
            write_page(runs, paths, output)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be read: {error.strerror}") from error


def write_page(runs: Sequence[Run], paths: Sequence[Path], output: Path | None) -> None:
    """Write the page and say where it is.

    Args:
        runs: What is on it.
        paths: What was asked for.
        output: The file; None chooses.

    Raises:
        CommandError: If it cannot be written there.
    """
    title = ", ".join(short_path(path.absolute()) for path in paths)
    path = output or (RunDirectory(paths[0]).report if len(paths) == 1 else Path("report.html"))
    page = build_page(runs, title, time.time(), f"{utc_now()[:19].replace('T', ' ')} UTC")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise CommandError(
            f"{short_path(path.absolute())} cannot be written: {error.strerror}\n  Try  --output /tmp/report.html"
        ) from None
    live = sum(run.is_live for run in runs)
    going_on = f", {live} still going on" if live and len(runs) > 1 else ", still going on" if live else ""
    of = f"{len(runs)} runs" if len(runs) > 1 else f"step {runs[0].step:,}"
    print(f"{short_path(path.absolute())}  ({of}{going_on}, {len(page.encode()) / 1e6:.2f} MB)")


if __name__ == "__main__":
    sys.exit(main())
