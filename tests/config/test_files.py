"""Which files a path stands for: every one that is meant is found, or an error names it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from titan.config.files import NotReadable, find_files
from titan.config.schema import DataKind, SourceConfig, TokenizerConfig
from titan.config.sources import check_source
from titan.data.source import open_source
from titan.errors import DataError


def write(*files: Path) -> None:
    """Write files of one record."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text":"a"}\n')


@contextmanager
def as_nobody() -> Iterator[None]:
    """Have the rights of somebody whom permissions hold for, which they do not for root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def found(path: Path, kind: str = "jsonl", below: Path | None = None) -> list[str]:
    """Return what is found, by its name below the folder."""
    return [str(file.relative_to(below or path)) for file in find_files(str(path), kind)]


def test_linked_folders_are_read_as_a_glob_reads_them(tmp_path: Path) -> None:
    """A link to a folder elsewhere, at any depth, leads to its files; the order is that of the names."""
    folder = tmp_path / "folder"
    write(folder / "b.jsonl", tmp_path / "elsewhere" / "c.jsonl", tmp_path / "third" / "d.jsonl")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deeper").symlink_to(tmp_path / "third")
    (folder / "z.jsonl").symlink_to(tmp_path / "third" / "d.jsonl")
    expected = ["a/c.jsonl", "a/deeper/d.jsonl", "b.jsonl", "z.jsonl"]
    assert found(folder) == expected
    assert found(folder / "**" / "*.jsonl", below=folder) == expected


def test_a_folder_is_read_once_however_many_ways_lead_to_it(tmp_path: Path) -> None:
    """Links that go round in circles end, and a folder's own name comes before that of a link to it."""
    write(tmp_path / "m" / "a.jsonl", tmp_path / "m" / "n" / "b.jsonl")
    (tmp_path / "a_link").symlink_to(tmp_path / "m" / "n")
    (tmp_path / "m" / "n" / "up").symlink_to(tmp_path)
    (tmp_path / "z_link").symlink_to(tmp_path / "m")
    assert found(tmp_path) == ["m/a.jsonl", "m/n/b.jsonl"]


def test_hidden_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    """Nobody means .git/config by a folder of texts; a path that is itself below a hidden folder is meant."""
    write(tmp_path / ".git" / "config", tmp_path / "a.txt", tmp_path / ".hidden", tmp_path / "b" / ".c" / "d.txt")
    assert found(tmp_path, "text") == ["a.txt"]
    assert found(tmp_path / ".git", "text") == ["config"]


NOT_READ = {
    "a dangling link": "is a link to /nowhere/blob, which is not there",
    "a dangling link of a glob": "is a link to /nowhere/blob, which is not there",
    "a dangling link itself": "is a link to /nowhere/blob, which is not there",
    "bzip2": "is in a compression that is not read; there are plain, .gz and .zst",
    "xz": "is in a compression that is not read; there are plain, .gz and .zst",
}


def not_read(folder: Path, name: str) -> tuple[Path, Path]:
    """Return a path to read, and what cannot be read of it."""
    write(folder / "good.jsonl")
    (folder / "other kind.txt").symlink_to("/nowhere")
    if name in ("bzip2", "xz"):
        bad = folder / ("a.jsonl.bz2" if name == "bzip2" else "b/a.json.xz")
        write(bad)
        return folder, bad
    bad = folder / "link.jsonl"
    bad.symlink_to("/nowhere/blob")
    return {"a dangling link": folder, "a dangling link of a glob": folder / "*.jsonl"}.get(name, bad), bad


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_read_is_named_and_never_left_out(tmp_path: Path, name: str) -> None:
    """Before a run it is a problem of the config, while running a DataError; both name the file and what to type."""
    path, bad = not_read(tmp_path, name)
    config = SourceConfig(DataKind.jsonl, path=str(path))
    with pytest.raises(DataError) as caught:
        open_source(config)
    (problem,) = check_source(config, "data", TokenizerConfig())
    assert problem.what == f"data.path = {path}: {bad} {NOT_READ[name]}"
    assert str(bad) in problem.suggestion
    assert f"{bad} {NOT_READ[name]}\n  Try  {problem.suggestion}" == str(caught.value)


@pytest.mark.parametrize("closed", ["sub", "sub/a.jsonl"])
@pytest.mark.parametrize("pattern", ["", "*/*.jsonl", "**/*.jsonl"])
def test_what_may_not_be_read_is_named(public: Path, pattern: str, closed: str) -> None:
    """A folder or a file without permission is an error, not an absence, also where a glob looks."""
    write(public / "sub" / "a.jsonl", public / "top.jsonl")
    (public / closed).chmod(0)
    with as_nobody(), pytest.raises(NotReadable, match=rf"{public / closed} cannot be read: Permission denied"):
        find_files(str(public / pattern), "jsonl")
    (public / closed).chmod(0o755)
    assert found(public / pattern, below=public)[0] == "sub/a.jsonl"


def test_a_path_that_is_no_name_matches_nothing(tmp_path: Path) -> None:
    """What cannot be a file is not there."""
    write(tmp_path / "file")
    for path in ("a\0b", f"{tmp_path}/file/below", f"{tmp_path}/nope"):
        assert find_files(path, "jsonl") == []
