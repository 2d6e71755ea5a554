"""titan's Python interface."""
