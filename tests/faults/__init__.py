"""Faults injected into real runs, which have to end as if nothing had happened."""
