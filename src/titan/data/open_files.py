"""Files that are read piece by piece, of which a process keeps few open however many there are.

A mixture has components of a hundred files each, and most systems let a process open a thousand. Descriptors are kept
for the whole process, and the one that has not been used for longest is closed. A process that is forked off goes on
with those of its parent: `pread` says where it reads, and moves nothing that they share.
"""

from __future__ import annotations

import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from titan.errors import DataError

_MOST = 256
_descriptors: OrderedDict[tuple[int, str], int] = OrderedDict()
"""By the number of an `OpenFiles` and the file's name; last what was used last."""
_lock = threading.RLock()
"""Or one thread would close what another reads. Reentrant: an `OpenFiles` may be collected while it is held."""
_numbers = itertools.count()


class OpenFiles:
    """Some files of a folder.

    Args:
        folder: Where they are.
        remedy: What to do if they cannot be read, for the error.
    """

    def __init__(self, folder: Path, remedy: str) -> None:
        self.folder, self.remedy = folder, remedy
        self._number = next(_numbers)
        weakref.finalize(self, _close_all, self._number)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the descriptors behind: another process opens its own."""
        return OpenFiles, (self.folder, self.remedy)

    def read_into(self, name: str, out: np.ndarray, first: int) -> None:
        """Fill `out` with the entries of a file from number `first` on.

        Raises:
            DataError: If the file cannot be read, or ends before.
        """
        view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
        at, done = first * out.itemsize, 0
        try:
            with _lock:
                descriptor = self._descriptor(name)
                while done < out.nbytes:
                    count = os.preadv(descriptor, [view[done:]], at + done)
                    if count == 0:
                        raise DataError(f"{self.folder / name} ends before entry {first + len(out):,}\n  {self.remedy}")
                    done += count
        except OSError as error:
            raise DataError(
                f"{self.folder / name} cannot be read: {error.strerror or error}\n"
                f"  See that the disk is there, and start again. If the file is lost: {self.remedy}"
            ) from error

    def _descriptor(self, name: str) -> int:
        key = self._number, name
        if key in _descriptors:
            _descriptors.move_to_end(key)
            return _descriptors[key]
        while len(_descriptors) >= _most():
            os.close(_descriptors.popitem(last=False)[1])
        descriptor = _descriptors[key] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor


def _most() -> int:
    """Return how many to keep open: a quarter of what the process may, for there are sockets, tensors and logs too."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if limit == resource.RLIM_INFINITY else min(_MOST, max(1, limit // 4))


def _close_all(number: int) -> None:
    with _lock:
        for key in [key for key in _descriptors if key[0] == number]:
            os.close(_descriptors.pop(key))


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it, and is not here


os.register_at_fork(after_in_child=_after_fork)
