"""Which files a path stands for: a file, everything below a folder, or a glob; always in the same order.

What a path stands for is either returned or an error that names it. Of a folder only what is hidden and what is of
another kind is left out.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from titan.errors import DataError

COMPRESSIONS = (".gz", ".zst")
SUFFIXES = {"jsonl": (".jsonl", ".json", ".ndjson"), "text": (), "parquet": (".parquet",), "arrow": (".arrow",)}
"""What counts inside a folder, before .gz or .zst; empty means every file."""
_UNREAD_COMPRESSIONS = {
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".lzma": "unlzma",
    ".lz4": "unlz4 --rm",
    ".br": "brotli -d -j",
    ".zip": "unzip",
    ".Z": "uncompress",
}
"""Each with what undoes it."""


class NotReadable(DataError):
    """What a path stands for is there, and cannot be read.

    Args:
        what: Which file or folder, and why.
        suggestion: What to type.
    """

    def __init__(self, what: str, suggestion: str) -> None:
        super().__init__(what, suggestion)
        self.what, self.suggestion = what, suggestion

    def __str__(self) -> str:
        return f"{self.what}\n  Try  {self.suggestion}"


def find_files(path: str, kind: str) -> list[Path]:
    """Return the files that `path` stands for, sorted.

    Args:
        path: A file, a folder (searched to any depth, links followed, what is hidden left out) or a glob, in which **
            crosses folders.
        kind: jsonl, text, parquet or arrow; decides what counts inside a folder.

    Raises:
        NotReadable: At a folder or a file that may not be read, a link that leads nowhere, or a file of this kind in a
            compression that titan does not read.
    """
    if glob.has_magic(path) and not os.path.exists(path):
        found = [Path(name) for name in glob.glob(path, recursive=True)]
        _check_folders(path)
    elif os.path.isdir(path):
        found = [file for file in _walk(path) if _counts(file, SUFFIXES[kind])]
    else:
        found = [Path(path)]
    files = [file for file in sorted(found) if _is_file(file)]
    for file in files:
        _check_compression(file, SUFFIXES[kind])
    return files


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


def _walk(path: str) -> Iterator[Path]:
    """Yield all files below a folder, each folder once; by its own name rather than through a link, if it has both."""
    seen: set[tuple[int, int]] = set()
    starts = [path]
    while starts:
        links: list[str] = []
        for start in starts:
            if _identity(start) in seen:
                continue
            # not rglob, which gives up at the first folder that cannot be read
            for folder, folders, names in os.walk(start, onerror=_refuse):
                seen.add(_identity(folder))
                below = [(name, os.path.join(folder, name)) for name in folders if not name.startswith(".")]
                links += [file for _, file in below if os.path.islink(file)]
                folders[:] = [name for name, file in below if not os.path.islink(file) and _identity(file) not in seen]
                yield from (Path(folder, name) for name in names if not name.startswith("."))
        starts = sorted(links)


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> NoReturn:
    name = Path(error.filename)
    raise NotReadable(
        f"{name} cannot be read: {error.strerror}", f"chmod -R u+rX {name}   or a path without it"
    ) from error


def _check_folders(path: str) -> None:
    """Refuse a folder in which a glob would have to look: what finds the files passes over it without a word."""
    parts = Path(path).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    for count in range(first, len(parts)):
        for folder in glob.glob(os.path.join(*parts[:count], "") if count else "./", recursive=True):
            try:
                os.scandir(folder).close()
            except OSError as error:
                _refuse(error)


def _check_compression(file: Path, suffixes: tuple[str, ...]) -> None:
    undo = _UNREAD_COMPRESSIONS.get(file.suffix)
    if undo is not None and suffixes and file.stem.endswith(suffixes):
        raise NotReadable(
            f"{file} is in a compression that is not read; there are plain, {' and '.join(COMPRESSIONS)}",
            f"{undo} {file}   or a glob without it, such as '{file.parent}/*{Path(file.stem).suffix}'",
        )


def _is_file(file: Path) -> bool:
    """Return whether it is a file; False for folders, and for what is not there."""
    try:
        status = os.stat(file)
    except ValueError:  # no name that a file can have
        return False
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if not os.path.islink(file):
                return False
            raise NotReadable(
                f"{file} is a link to {os.readlink(file)}, which is not there", f"rm {file}   or fetch it again"
            ) from error
        _refuse(error)
    if not stat.S_ISREG(status.st_mode):
        return False
    if not os.access(file, os.R_OK):
        _refuse(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file)))
    return True


def _counts(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file of a folder is of the kind, going by its name."""
    name = file.name
    for compression in (*COMPRESSIONS, *_UNREAD_COMPRESSIONS):
        name = name.removesuffix(compression)
    return not suffixes or name.endswith(suffixes)
