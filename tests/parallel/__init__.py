"""Layouts against one process."""
