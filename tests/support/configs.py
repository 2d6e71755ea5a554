"""Configs as `titan.config.load.compose` makes them, many in the time of a few: for tests of what is done with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from titan.config import load
from titan.config.schema import TitanConfig


@functools.cache
def _composer() -> load.Composer:
    return load.Composer()


def compose(overrides: Sequence[str] = ()) -> TitanConfig:
    """Compose titan's groups, without a folder of one's own.

    Raises:
        ConfigError: As `load.compose` does.
    """
    try:
        return load.to_typed(_composer()(overrides))
    except load.COMPOSITION_ERRORS:
        return load.compose(overrides)
