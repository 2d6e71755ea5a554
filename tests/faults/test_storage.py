"""Disks that are full, read-only or slow: training goes on, saving is tried again, and what was saved stays."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import STEPS, MakeReference, MakeRun
from tests.faults.supervisor import read_until
from tests.support.command import Started, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SIZE = "4m"
"""Of a disk: five checkpoints fit, with their logs."""
NOT_SAVED = "a checkpoint could not be saved"

Mount = Callable[[Path], Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Return what makes a small disk of a folder."""
    mounted = []

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "titan", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"a disk of its own needs root: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, left_bytes: int = 0) -> Path:
    """Leave so much of a disk free; returns the file that takes the rest."""
    filler = disk / "filler"
    rest = shutil.disk_usage(disk).free - left_bytes
    with filler.open("ab") as file:
        while rest > 0:
            try:
                rest -= file.write(bytes(min(rest, 4096)))
                file.flush()
            except OSError:
                break
    return filler


def remount(folder: Path, mode: str) -> None:
    """Make a disk writable or not, as soon as no file on it is being written."""

    def is_done() -> bool:
        return subprocess.run(["mount", "-o", f"remount,{mode}", folder], capture_output=True).returncode == 0

    wait_until(is_done, f"{folder} to become {mode}")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_is_full_for_a_while(
    make_run: MakeRun, undisturbed: MakeReference, tmp_path: Path, mount: Mount, mode: str
) -> None:
    """Full in the midst of the first save, and later to the last byte: the run goes on, and lacks nothing in the end.

    No row of metrics either: what could not be written is written later.
    """
    disk = mount(tmp_path / "disk")
    retries = "checkpoint.retry_seconds=0.2", "checkpoint.max_failures=1000"
    run = make_run(undisturbed(), f"checkpoint={mode}", *retries, folder=disk)
    fill(disk, run.reference.shard_bytes)

    def make_room_and_take_it(process: Started) -> None:
        for _ in range(2):
            read_until(process.stderr, NOT_SAVED)
            (disk / "filler").unlink()
            read_until(process.stdout, "saved checkpoints/")
            fill(disk)
        read_until(process.stderr, NOT_SAVED)
        (disk / "filler").unlink()

    attempt = run.attempt("slow:0:0.03", (0,), make_room_and_take_it)
    assert "Traceback" not in attempt.finished.text
    run.report.add("the disk is full in the midst of a save, and has room again", 0, 0, mode)
    for _ in range(2):
        run.report.add("the disk is full to the last byte, and has room again", 0, 0, mode)
    run.expect_end()


def test_a_disk_that_stays_full(make_run: MakeRun, undisturbed: MakeReference, tmp_path: Path, mount: Mount) -> None:
    """After max_failures in a row the run ends with 73; the older checkpoints are whole, and with room it goes on."""
    disk = mount(tmp_path / "disk")
    retries = "checkpoint.retry_seconds=0.1", "checkpoint.max_failures=3"
    run = make_run(undisturbed(), "checkpoint=sync", *retries, folder=disk)
    kept = []

    def take_all_room(process: Started) -> None:
        read_until(process.stdout, "saved checkpoints/step_00000006")
        fill(disk)
        kept.extend(run.whole_steps())

    run.survive("the disk stays full", "slow:0:0.03", (73,), take_all_room, lost_steps=STEPS)
    assert set(kept) <= set(run.whole_steps())
    assert {3, 6} <= set(kept)
    (disk / "filler").unlink()
    run.complete()


def test_a_folder_that_becomes_read_only(
    make_run: MakeRun, undisturbed: MakeReference, here: Path, mount: Mount
) -> None:
    """As some file systems do after an error: training goes on, and saves again once it is writable."""
    checkpoints = mount(here / "run" / "checkpoints")
    retries = "checkpoint.retry_seconds=0.2", "checkpoint.max_failures=1000"
    run = make_run(undisturbed(), "checkpoint=async", *retries, lost_intervals=2)

    def forbid_and_allow(process: Started) -> None:
        read_until(process.stdout, "saved checkpoints/")
        remount(checkpoints, "ro")
        read_until(process.stderr, NOT_SAVED)
        remount(checkpoints, "rw")

    run.attempt("slow:0:0.03", (0,), forbid_and_allow)
    run.report.add("the checkpoints are read-only for a while", 0, 0, "")
    run.expect_end()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_slow_disk(make_run: MakeRun, undisturbed: MakeReference, mode: str) -> None:
    """Where one rank writes slowly, training waits for it with sync, and goes on with async; nothing is lost."""
    run = make_run(undisturbed(), f"checkpoint={mode}", "checkpoint.interval=30")
    rank = run.draw.randrange(2)
    run.attempt(f"slow:{rank}:write:0.0005;slow:0:0.1", (0,))
    *saves, _ = run.directory.read_events("save")
    assert len(saves) == 2
    for save in saves:
        share = save["waited_seconds"] / save["seconds"]
        assert share < 0.5 if mode == "async" else share > 0.9, save
    run.report.add(f"the disk of one rank is slow, checkpoint={mode}", 0, 0, f"rank {rank}")
    run.expect_end()
