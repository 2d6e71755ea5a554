"""The commands that README and docs/ show: found in code blocks and in code of a line, and read as a shell reads them.

A block with a line that begins with `$` is a console: those lines are commands, the others what they print. In any
other block without a language every line is a command, unless the block shows none at all: then it is a picture, a
listing or output. Above a block, `<!-- needs: 8 GPUs -->` says why its commands cannot be tried, and `<!-- picture -->`
that what looks like commands is none.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.command import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = (
    "python",
    "make",
    "torchrun",
    "pip",
    "sbatch",
    "srun",
    "docker",
    "sky",
    "kubectl",
    "source",
    "tail",
    "cat",
    "ls",
)
_PROGRAM = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}|(?:launchers|tests)/\S+\.sh)(?:\s|$)")
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--\s*(?P<words>.*?)\s*-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    """The file's name."""
    line: int
    """Where it begins."""
    language: str
    """What stands behind its fence."""
    text: str
    """What is in it."""
    comment: str
    """The HTML comment right above it."""

    @property
    def is_console(self) -> bool:
        """Whether commands stand behind a prompt."""
        return any(line.startswith("$ ") for line in self.text.splitlines())


@dataclass(frozen=True)
class Command:
    """A command that a page shows."""

    page: str
    line: int
    text: str
    """In one line, without prompt and comment."""
    needs: str = ""
    """Why it cannot be tried here."""
    is_mention: bool = False
    """Whether it stands in a sentence, where it need not be whole."""

    @property
    def words(self) -> list[str]:
        """It, as a shell splits it."""
        return shlex.split(self.text)

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """Return the blocks of code of a page."""
    text = path.read_text()
    for match in _BLOCK.finditer(text):
        comment = _COMMENT.search(text[: match.start()].rstrip())
        yield Block(
            path.name,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["text"],
            comment["words"] if comment else "",
        )


def commands_of(block: Block) -> list[Command]:
    """Return the commands of a block."""
    if block.language not in ("", "sh", "bash", "console") or block.comment == "picture":
        return []
    needs = block.comment.removeprefix("needs:").strip() if block.comment.startswith("needs:") else ""
    lines = [(number, line) for number, line in _joined(block) if line.strip()]
    if block.is_console:
        lines = [(number, line[2:]) for number, line in lines if line.startswith("$ ")]
    elif not any(_PROGRAM.match(line) for _, line in lines):
        return []
    return [Command(block.page, number, _without_comment(line), needs) for number, line in lines]


def inline(path: Path) -> list[Command]:
    """Return the commands in a page's code of a line."""
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), path.read_text(), flags=re.DOTALL)
    text = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    found = []
    for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        words = " ".join(match[1].split())
        if _PROGRAM.match(words) and " " in words:
            found.append(Command(path.name, text.count("\n", 0, match.start()) + 1, words, is_mention=True))
    return found


def code(path: Path) -> list[tuple[int, str]]:
    """Return all code of a page with its lines: commands, output, and what stands between backticks."""
    text = path.read_text()
    spans = [(block.line, block.text) for block in blocks(path)]
    rest = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    spans += [
        (rest.count("\n", 0, match.start()) + 1, match[1]) for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest)
    ]
    return spans


def all_commands() -> list[Command]:
    """Return every command of every page."""
    found = []
    for path in PAGES:
        found += [command for block in blocks(path) for command in commands_of(block)]
        found += inline(path)
    return found


def _joined(block: Block) -> Iterator[tuple[int, str]]:
    """Return a block's lines, with those that end with a backslash joined."""
    text, number = "", 0
    for offset, line in enumerate(block.text.splitlines(), start=1):
        number = number if text else block.line + offset
        if line.rstrip().endswith("\\"):
            text += line.strip().removesuffix("\\").rstrip() + " "
            continue
        yield number, (text + line.strip() if text else line)
        text = ""


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#\s.*$", "", line).strip()
