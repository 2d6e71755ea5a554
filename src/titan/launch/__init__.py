"""Getting the ranks started. Imports no torch before there is something to start."""
