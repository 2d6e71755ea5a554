"""Logging, where something is in its way."""

from __future__ import annotations

from pathlib import Path

from tests.support.command import clean_environment, finish, start

LOGS = """
from pathlib import Path
from titan.log import logger, start_logging, start_rank_log
start_logging()
start_rank_log(Path("full.log"), 0, on_console=True)
logger.warning("one")
logger.warning("two")
"""


def test_a_full_disk_is_no_traceback_for_every_line(here: Path, cache: Path) -> None:
    """A rank's file that takes nothing, as on a full disk, costs the console neither its lines nor its calm."""
    (here / "full.log").symlink_to("/dev/full")
    finished = finish(start(["-c", LOGS], here, clean_environment(cache)))
    assert (finished.code, finished.out, finished.err) == (0, "", "one\ntwo\n")
