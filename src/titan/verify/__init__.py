"""The commands that prove: `python -m titan.verify parity`, `python -m titan.verify resume`."""
