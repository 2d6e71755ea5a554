"""The place where runs are kept: whether it can be written, how fast, how much fits, and whether two runs keep apart.

What is written is removed again, and no folder is made: where the directory is not there yet, its nearest parent is
looked at, which is where a run would make it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from titan.doctor.finding import Finding, note, ok, problem
from titan.run_directory import unique_temporary

_GIB, _MIB = 2**30, 2**20
WRITTEN_MIB = 64
_LITTLE_GIB = 10
_SLOW_MIB_PER_SECOND = 50
_SKEW_SECONDS = 5.0


def find_storage(run_dir: Path) -> Iterator[Finding]:
    """Look at a run directory, or at where it would be made."""
    path = run_dir.expanduser().absolute()
    folder = next(each for each in (path, *path.parents) if each.exists())
    shown = str(path) if folder == path else f"{path} (looked at {folder}, for it is not there yet)"
    advice = "--run-dir /path/that/can/be/written   and the same for run.dir"
    if not folder.is_dir():
        yield problem("run_dir", f"{folder} is a file", advice)
        return
    disk = shutil.disk_usage(folder)
    free = disk.free / _GIB
    file = unique_temporary(folder / "titan_doctor")
    try:
        yield from _measure(file, shown, free)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{shown} is full: {error.strerror} while writing {WRITTEN_MIB} MiB, {free:.2f} GiB free"
            yield problem("run_dir", what, "make room, or --run-dir /path/with/space", free_gib=round(free, 2))
        else:
            yield problem("run_dir", f"{shown} cannot be written: {error.strerror or error}", advice)
    finally:
        file.unlink(missing_ok=True)


def _measure(file: Path, shown: str, free: float) -> Iterator[Finding]:
    block = os.urandom(_MIB)  # what compresses would measure something else
    with file.open("w+b", buffering=0) as opened:
        began, local = time.perf_counter(), time.time()
        for _ in range(WRITTEN_MIB):
            if opened.write(block) < len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(opened.fileno())
        written = WRITTEN_MIB / (time.perf_counter() - began)
        skew = os.fstat(opened.fileno()).st_mtime - time.time()
        skew = skew if skew > 0 else min(0.0, os.fstat(opened.fileno()).st_mtime - local)
        if hasattr(os, "posix_fadvise"):  # or the page cache would answer
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened.seek(0)
        began = time.perf_counter()
        while chunk := opened.read(_MIB):
            if chunk != block:
                yield problem("run_dir", f"{shown}: what is read is not what was written", "have the disk looked at")
                return
        read = WRITTEN_MIB / (time.perf_counter() - began)
        yield from _find_locks(opened.fileno())
    speed = f"{WRITTEN_MIB} MiB written and synced at {written:,.0f} MiB/s, read at {read:,.0f} MiB/s"
    values = {"write_mib_per_second": round(written, 1), "read_mib_per_second": round(read, 1)}
    values["free_gib"] = round(free, 2)
    what = f"{shown}: {speed}; {free:.1f} GiB free"
    if free < _LITTLE_GIB:
        advice = "a checkpoint takes 12 bytes a parameter; checkpoint.keep_latest of them stay"
        yield note("run_dir", what, advice, **values)
    elif written < _SLOW_MIB_PER_SECOND:
        yield note("run_dir", what, "checkpoint=async writes while training goes on", **values)
    else:
        yield ok("run_dir", what, **values)
    if abs(skew) > _SKEW_SECONDS:
        what = f"the file server's clock differs from this machine's by {skew:+.0f} s"
        yield note("clock", what, "timedatectl   on both; dates of files and logs do not agree", skew_seconds=skew)
    elif time.time() < Path(__file__).stat().st_mtime - 86400:
        yield problem(
            "clock", "this machine's clock is before the day that titan was installed", "timedatectl set-time"
        )
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), skew_seconds=round(skew, 3))


def _find_locks(descriptor: int) -> Iterator[Finding]:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        what = f"this file system has no locks ({error.strerror}), so nothing keeps two runs out of one directory"
        yield note("locks", what, "mount it with locks (NFS: without nolock), or give every run a run.dir of its own")
    else:
        yield ok("locks", "this file system has them, so two runs cannot share a directory")
