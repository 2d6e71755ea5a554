"""What makes a folder a checkpoint: a manifest that names every file with its size and checksum.

    step_00000500/
        manifest.json       step, tokens, versions, and every other file with size and checksum; written last
        config.yaml         the frozen config of the run
        .metadata           PyTorch's: where each piece of each tensor is
        __0_0.distcp ...    the pieces, one file a rank

PyTorch's own format has no checksum that its reader looks at: a flipped bit in a tensor loads as another number. The
checksums are XXH3 of 128 bits, which costs less than a tenth of a second for a GiB and which `xxh128sum` repeats. They
tell damage from wholeness, not friend from foe. The manifest carries one of itself too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from titan.errors import TitanError
from titan.run_directory import write_synced
from titan.version import __version__

NAME = "manifest.json"
FORMAT = 1
_COMMITTED = re.compile(r"step_(\d{8,})")
_PIECE_BYTES = 1 << 24


class Damaged(TitanError):
    """A checkpoint is not what was saved; the text says in which way."""

    exit_code = 66


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint."""

    bytes: int
    checksum: str
    """XXH3, 128 bits, in hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    tokens: int
    content: str
    """all: a run can go on from it; weights: the model alone."""
    run: str
    """The identity of the run that saved it; empty where no run did."""
    files: dict[str, FileRecord]
    """By name."""
    mesh: dict[str, int] = field(default_factory=dict)
    """The degrees of the axes it was saved on."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data it was trained on, and the row where the next step begins."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of titan, torch and Python."""
    time: str = ""
    """When it was saved, ISO 8601, UTC."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write manifest.json and have the disk keep it, and the folder's list of files."""
        manifest = asdict(self)
        content = {"checksum": _checksum(manifest), "manifest": manifest}
        write_synced(folder / NAME, _text(content))
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return a checkpoint's manifest.

        Raises:
            Damaged: If there is none, or it is not as it was written.
            OSError: If it cannot be read for another reason.
        """
        try:
            text = (folder / NAME).read_text()
            content = json.loads(text)
            found = content["manifest"]
            is_whole = content["checksum"] == _checksum(found) and text == _text(content)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"it has no {NAME}") from None
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"{NAME} cannot be read") from None
        if not is_whole:
            raise Damaged(f"{NAME} does not have its own checksum")
        if found["format"] != FORMAT:
            raise Damaged(f"its format is {found['format']}, and this titan reads {FORMAT}")
        files = {name: FileRecord(**record) for name, record in found.pop("files").items()}
        if outside := [name for name in files if not is_inside(name)]:
            raise Damaged(f"{NAME} names a file outside of the checkpoint: {outside[0]}")
        return cls(files=files, **found)

    def damage(self, folder: Path, names: Iterable[str] | None = None, checksums: bool = True) -> list[str]:
        """Hold files against the manifest; returns what is wrong, one line a file.

        Args:
            folder: The checkpoint's.
            names: Which files; None for all.
            checksums: Read them whole; False compares sizes only.

        Raises:
            OSError: If a file cannot be read although it is there.
        """
        wrong = []
        for name in self.files if names is None else names:
            record, path = self.files[name], folder / name
            try:
                size = path.stat().st_size
                if not path.is_file():  # a device, say, may have no end
                    wrong.append(f"{name} is no file")
                elif size != record.bytes:
                    wrong.append(f"{name} has {size:,} bytes instead of {record.bytes:,}")
                elif checksums and checksum_of_file(path) != record.checksum:
                    wrong.append(f"{name} does not have its checksum: its content has changed")
            except FileNotFoundError:
                wrong.append(f"{name} is missing")
        return wrong


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_text(manifest).encode())


def checksum_of_file(path: Path) -> str:
    """Return the checksum of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def record_of_file(path: Path) -> FileRecord:
    """Return a file's size and checksum."""
    return FileRecord(path.stat().st_size, checksum_of_file(path))


def is_inside(name: str) -> bool:
    """Whether the name of a file stays in the folder that it is taken from."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def versions() -> dict[str, str]:
    """Return what a checkpoint or a proof was made with."""
    return {"titan": __version__, "torch": version("torch"), "python": platform.python_version()}


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    matches = (_COMMITTED.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def sync_folder(folder: Path) -> None:
    """Have the disk keep a folder's list of files: what a rename has done is lost with the power otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make a checkpoint of a folder with all its files: by one rename, after everything else is on the disk.

    A checkpoint that is there already is replaced. Between the two renames that this takes, a crash would leave the
    old one under `replaced_name`, where `recover` finds it.
    """
    manifest.write(temporary)
    if final.exists():
        replaced = final.with_name(replaced_name(final.name))
        remove(replaced)
        final.rename(replaced)
        temporary.rename(final)
        sync_folder(final.parent)
        remove(replaced)
    else:
        temporary.rename(final)
        sync_folder(final.parent)


def replaced_name(name: str) -> str:
    """Return what a checkpoint is called while a new one takes its place."""
    return f".{name}.replaced"


def remove(folder: Path) -> None:
    """Remove a folder, which stops being a checkpoint at once and not file by file."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.removed")
        folder.rename(gone)
        shutil.rmtree(gone)


def recover(folder: Path) -> list[str]:
    """Clear up what a crash left among checkpoints; returns what was found, as lines.

    NOTE: only where no run is saving to the folder.
    """
    found = []
    for path in sorted(folder.glob(".step_*")) if folder.is_dir() else []:
        if path.name.endswith(".replaced"):
            final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
            if not final.exists():
                path.rename(final)
                found.append(f"{final.name}: its replacement was not finished; the one before is back")
                continue
        elif path.name.endswith(".tmp"):
            found.append(f"{path.name}: a save that was not finished, removed")
        shutil.rmtree(path, ignore_errors=True)
    return found


def rename_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint so that it no longer counts; returns what it is called now."""
    number = 0
    while (aside := path.with_name(f"{prefix}_{path.name}{f'_{number}' * (number > 0)}")).exists():
        number += 1
    path.rename(aside)
    return aside
