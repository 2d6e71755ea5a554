"""titan: composable 4D-parallel Llama training in native PyTorch.

Importing this package imports neither torch nor hydra, so that commands which only compose a config stay fast.
"""

__version__ = "0.1.0"
