"""What one rank does for all: its result, or its error, is every rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from titan.errors import StorageError, TitanError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Act on rank 0 and return its result on every rank; an error there is an error everywhere.

    Args:
        action: What rank 0 does; its result can be pickled.
        group: The ranks; None for all, over the default group.

    Raises:
        StorageError: For an error of the system.
        TitanError: As it is.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except TitanError as error:
            outcome[0] = error
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            outcome[0] = StorageError(f"{error.strerror or error}{where}")
    dist.broadcast_object_list(outcome, group=group)
    if isinstance(outcome[0], TitanError):
        raise outcome[0]
    return cast(T, outcome[0])
