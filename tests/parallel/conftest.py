"""The data that layouts train on, and the one process that they are all compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from titan.trainer.record import Record

from .layouts import make_packed, record_layout
from .matrix import FEW_TOKENS
from .pool import RankPool


@pytest.fixture(scope="session")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens with some structure, as the data of every layout."""
    return make_packed(tmp_path_factory.mktemp("data") / "tokens.bin")


@pytest.fixture(scope="session")
def short_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of few tokens, for `UNEVEN`."""
    return make_packed(tmp_path_factory.mktemp("data") / "few.bin", count=FEW_TOKENS)


@pytest.fixture(scope="session")
def record(pools: Callable[[int], RankPool], packed_file: Path) -> Callable[..., Record]:
    """Train a layout and return its record; the same overrides are trained once."""
    known: dict[tuple[object, ...], Record] = {}

    def run(world_size: int, *overrides: str, data: Path = packed_file) -> Record:
        key = (data, world_size, *overrides)
        if key not in known:
            known[key] = pools(world_size).run(record_layout, world_size, overrides, data)[0]
        return known[key]

    return run
