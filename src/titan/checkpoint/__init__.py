"""Saving a run and going on with it."""

from titan.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
