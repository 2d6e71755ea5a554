"""Whether checkpoints are what was saved: every file against its checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan.checkpoint.manifest import NAME, committed_steps, step_folder
from titan.convert.describe import size_text
from titan.convert.sources import read_manifest
from titan.errors import CheckpointError
from titan.run_directory import RunDirectory, short_path


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint."""

    folder: Path
    damage: list[str]
    """One line for each file that is not what was saved."""
    summary: str

    def lines(self) -> Iterator[str]:
        """Return it as text."""
        where = short_path(self.folder)
        if not self.damage:
            yield f"{where}  whole: {self.summary}"
        yield from (f"{where}  damaged: {line}" for line in self.damage)


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint that a path is, or those of a run or of its folder of checkpoints.

    Raises:
        CheckpointError: If there is none.
    """
    if (path / NAME).is_file():
        return [path]
    for folder in (RunDirectory(path).checkpoints, path):
        if steps := committed_steps(folder):
            return [step_folder(folder, step) for step in steps]
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there")
    raise CheckpointError(
        f"{path} is no titan checkpoint: it has no {NAME}, and no checkpoints of a run\n"
        "  Only titan's own checkpoints have checksums."
    )


def check_whole(folder: Path) -> Verdict:
    """Read a checkpoint's files and hold them against its manifest."""
    try:
        manifest = read_manifest(folder)
        damage = manifest.damage(folder)
    except (CheckpointError, OSError) as error:
        return Verdict(folder, [str(error).removeprefix(f"{folder} cannot be used: ")], "")
    return Verdict(folder, damage, f"{len(manifest.files)} files, {size_text(manifest.bytes)}, step {manifest.step:,}")
