"""One run, one owner: the lock that keeps two runs out of one run directory.

Two runs in one directory would append to the same metrics, prune each other's checkpoints and take turns in saying
what became of them. So rank 0 holds a lock on `<run.dir>/.lock` for as long as it lives.

It is a record lock of the kernel (`fcntl.lockf`) and not a file with a time in it: the kernel gives it back however its
owner ends, so there is never a stale one to judge; processes forked from the owner do not have it; and it works
between machines over NFSv4. What the file says is for people, and means nothing once the lock is free.

NOTE: The kernel also gives it back when its owner closes *any* file descriptor of `.lock`. The owner opens it once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time

from titan.errors import ConfigError, Problem
from titan.launch.environment import slurm_job
from titan.log import logger
from titan.run_directory import RunDirectory, utc_now

PATIENCE_SECONDS = 5.0
"""How long an owner that is about to end (a job put back into the queue, ranks whose launcher was killed) may take."""
_POLL_SECONDS = 0.1
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunInUse(ConfigError):
    """Another run has the run directory; nothing of it was changed."""

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__(
            [
                Problem(
                    f"run.dir = {directory.path} is in use by {read_owner(directory)}",
                    "Two runs would write to the same files.",
                    "run.dir=ANOTHER   for a new run, or wait for that one to end, or end it",
                )
            ]
        )


class RunLock:
    """This process's hold on a run directory, from `acquire` to `release` or its end.

    Args:
        directory: The run's.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._descriptor: int | None = None

    def acquire(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Take the lock, and write into the file who has it.

        Where the file system has no locks, say so and go on.

        Raises:
            RunInUse: If another process has it and keeps it.
            OSError: If the file cannot be opened.
        """
        path = self.directory.lock
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_held = not _try_lock(descriptor, fcntl.LOCK_EX, patience_seconds)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(f"{path}: this file system has no locks ({error.strerror}), so nothing keeps two runs apart")
            return
        if is_held:
            os.close(descriptor)
            raise RunInUse(self.directory)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": slurm_job(), "since": utc_now()}
        with contextlib.suppress(OSError):  # on a full disk nobody is told who it is
            os.ftruncate(descriptor, 0)
            os.write(descriptor, (json.dumps(owner) + "\n").encode())
            os.fsync(descriptor)  # another machine may have to tell a user
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_not_in_use(directory: RunDirectory, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """See that no live run has a directory; changes nothing. Not for a process that holds the lock itself.

    Raises:
        RunInUse: If one has it and keeps it.
    """
    try:
        descriptor = os.open(directory.lock, os.O_RDONLY)
    except OSError:  # no run yet; or a file that rank 0 will complain about
        return
    try:
        # a shared lock, so that two that only ask do not find each other
        if not _try_lock(descriptor, fcntl.LOCK_SH, patience_seconds):
            raise RunInUse(directory)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(descriptor)


def read_owner(directory: RunDirectory) -> str:
    """Say who has the lock, or had it last, in words."""
    try:
        owner = json.loads(directory.lock.read_text())
        job = f"SLURM job {owner['job']}, " if owner["job"] else ""
        return f"{job}process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _try_lock(descriptor: int, kind: int, patience_seconds: float) -> bool:
    """Try to lock until patience ends; returns whether it worked."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _HELD:
                raise
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
