"""Logging: the console shows one rank, every rank has a file.

A rank's file also takes what native code writes to stdout and stderr (an abort in a collective, say), because the
file descriptors themselves are pointed at it. The console rank keeps the real descriptors, so what native code says
there is seen at once, and copies only titan's own lines to its file.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("titan")


class _Console(logging.StreamHandler):
    """A handler that looks the stream up at each line, so that redirection and progress bars work."""

    def __init__(self) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        bar = sys.modules.get("tqdm")
        if bar is None or not self.stream.isatty():
            return super().emit(record)
        # A line above the progress bar, not through it.
        bar.tqdm.write(self.format(record), file=self.stream)
        return None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Let a run go on whose console nobody reads any more (`| head`, a closed terminal): its files have it all."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            return super().handleError(record)
        silence(self.stream)
        return None


class _RankLog(logging.FileHandler):
    """A rank's file."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Let a run go on whose disk is full: the line stays in the buffer, and comes with the next that has room."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def silence(stream: TextIO) -> None:
    """Let what is still written to a stream go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def start_logging(level: int = logging.INFO) -> None:
    """Send titan's own lines to the console, plainly; warnings of libraries go to stderr as ever."""
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        console = _Console()
        console.setLevel(level)
        console.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(console)


def start_rank_log(path: Path, rank: int, on_console: bool) -> None:
    """Give this rank its log file.

    Args:
        path: The file; appended to, its folder is created.
        rank: The global rank, shown in every line.
        on_console: Whether this is the one rank that also writes to the console.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not on_console:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    file = _RankLog(path)
    file.name = "rank"
    formatter = logging.Formatter(f"%(asctime)s.%(msecs)03dZ rank {rank} %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.datefmt = "%Y-%m-%dT%H:%M:%S"
    file.setFormatter(formatter)
    logger.setLevel(logging.DEBUG)  # what the console need not show is in the file
    logger.propagate = False
    for handler in [h for h in logger.handlers if h.name == "rank"]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(file)
    if file.stream is not None:
        faulthandler.enable(file.stream)
