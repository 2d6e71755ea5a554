"""How a command ends: with its own code, or with one message and the code of what ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titan.command import exit_code
from titan.errors import INTERRUPTED, CommandError


def test_a_command_ends_with_its_own_code() -> None:
    """Nothing to say is 0."""
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1


def test_what_ends_it_is_one_message_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake's is its own, and Ctrl-C is answered with what it leaves."""

    def mistake() -> None:
        raise CommandError("a.txt: there is no such file")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert exit_code(mistake) == CommandError.exit_code
    assert exit_code(interrupt, "interrupted; the same command goes on") == INTERRUPTED
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "a.txt: there is no such file\n\ninterrupted; the same command goes on\n"


def test_a_defect_keeps_its_traceback() -> None:
    """Which whoever mends it needs."""
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["titan.convert", "toml", "run.toml"],
        ["titan.plan", "model=llama3_8b", "--device", "h100"],
        ["titan.doctor", "--seconds", "1"],
    ],
)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    """`| head` ends a command as it ends every other: without a word."""
    (tmp_path / "run.toml").write_text('[model]\nname = "llama3"\nflavor = "8B"\n')
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
