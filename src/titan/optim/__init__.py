"""The optimizer, its schedule, and clipping."""
