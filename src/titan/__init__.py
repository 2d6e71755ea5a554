"""titan: composable 4D-parallel Llama training in native PyTorch.

Importing this package imports neither torch nor hydra, so that commands which only compose a config stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan.config.schema import TitanConfig

__version__ = "0.1.0"
__all__ = ["__version__", "compose"]


def compose(*overrides: str, config_dir: str | None = None) -> TitanConfig:
    """Compose a config as `python -m titan.train` would, in a notebook or a program; starts nothing.

    Args:
        overrides: What would be typed behind the command, such as "model=llama3_8b".
        config_dir: A folder of one's own groups, beside titan's.

    Returns:
        Typed dataclasses. What the command would fill in from the machine, -1 or null, is as it was written.

    Raises:
        ConfigError: If an override names an unknown group, option or key, or a value of the wrong type.
    """
    from titan.config.load import compose as load

    return load(overrides, config_dir)
