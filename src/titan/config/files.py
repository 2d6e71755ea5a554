"""Which files a path stands for: a file, everything below a folder, or a glob; always in the same order."""

from __future__ import annotations

import glob
import os
import sysconfig
from pathlib import Path

COMPRESSIONS = (".gz", ".zst")
SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "text": (), "parquet": (".parquet",), "arrow": (".arrow",)}
"""What counts inside a folder, before .gz or .zst; empty means every file."""


def find_files(path: str, kind: str) -> list[Path]:
    """Return the files that `path` stands for, sorted.

    Args:
        path: A file, a folder (searched to any depth) or a glob, in which ** crosses folders.
        kind: jsonl, text, parquet or arrow; decides what counts inside a folder.
    """
    if glob.has_magic(path) and not os.path.exists(path):
        found = [Path(name) for name in glob.glob(path, recursive=True)]
    elif os.path.isdir(path):
        # not rglob, which gives up at the first folder that cannot be read
        found = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        found = [file for file in found if _has_suffix(file, SUFFIXES[kind])]
    else:
        found = [Path(path)]
    return sorted(file for file in found if os.path.isfile(file))  # False also where a file cannot be looked at


def fixed_part(path: str) -> str:
    """Return the longest part of a path that is no glob."""
    if not glob.has_magic(path) or os.path.exists(path):
        return path
    parts = Path(path).parts
    return str(Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))]))


def find_standard_library() -> list[Path]:
    """Return the source files of the Python standard library, without installed packages, sorted."""
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(file for file in found if file.is_file())


def _has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    name = file.name
    if name.startswith("."):
        return False
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return not suffixes or name.endswith(suffixes)
