"""Weights from and to other formats: `python -m titan.convert`."""
