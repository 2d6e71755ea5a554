"""What became of a run, or of a sweep, as one page. Imports no torch."""
