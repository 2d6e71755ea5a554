"""What happens to a checkpoint on a disk after it was saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random


def flip(path: Path, draw: Random) -> tuple[int, int]:
    """Change one bit of a file; returns where: byte and bit."""
    place = draw.randrange(path.stat().st_size), draw.randrange(8)
    flip_at(path, *place)
    return place


def flip_at(path: Path, byte: int, bit: int) -> None:
    """Change a given bit of a file; a second time, change it back."""
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def cut(path: Path, length: int) -> None:
    """Keep the beginning of a file."""
    with path.open("r+b") as file:
        file.truncate(length)


def any_of(checkpoint: Path, draw: Random, pattern: str = "*") -> Path:
    """Return one of a checkpoint's files."""
    return draw.choice(sorted(checkpoint.glob(pattern)))


def truncate_shard(checkpoint: Path, draw: Random) -> None:
    """Cut a shard anywhere."""
    shard = any_of(checkpoint, draw, "*.distcp")
    cut(shard, draw.randrange(1, shard.stat().st_size))


def empty_folder(checkpoint: Path) -> None:
    """Delete all files of a checkpoint."""
    for file in checkpoint.iterdir():
        file.unlink()


Damage = Callable[[Path, Random], object]
DAMAGES: dict[str, Damage] = {
    "a shard is cut short": truncate_shard,
    "a shard is empty": lambda checkpoint, draw: cut(any_of(checkpoint, draw, "*.distcp"), 0),
    "a bit is flipped in a shard": lambda checkpoint, draw: flip(any_of(checkpoint, draw, "*.distcp"), draw),
    "a bit is flipped in any file": lambda checkpoint, draw: flip(any_of(checkpoint, draw), draw),
    "a bit is flipped in the manifest": lambda checkpoint, draw: flip(checkpoint / "manifest.json", draw),
    "a shard is deleted": lambda checkpoint, draw: any_of(checkpoint, draw, "*.distcp").unlink(),
    ".metadata is deleted": lambda checkpoint, draw: (checkpoint / ".metadata").unlink(),
    "manifest.json is deleted": lambda checkpoint, draw: (checkpoint / "manifest.json").unlink(),
    "the folder is emptied": lambda checkpoint, draw: empty_folder(checkpoint),
}
"""By what the table of results calls them."""


def put_foreign(checkpoints: Path, foreign: Path) -> None:
    """Put a checkpoint of another run among those of a run."""
    shutil.copytree(foreign, checkpoints / foreign.name)
