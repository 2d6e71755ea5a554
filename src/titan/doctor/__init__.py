"""What would go wrong on this machine, and what to do about it: `python -m titan.doctor`."""
