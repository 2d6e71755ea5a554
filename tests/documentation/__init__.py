"""The documentation: what it shows runs, what it names is there, and what it repeats is generated."""
