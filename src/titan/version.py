"""The version, where every part of titan can read it, also from a source tree that is not installed."""

__version__ = "0.1.0"
