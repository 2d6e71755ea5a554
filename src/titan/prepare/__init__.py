"""Tokenise once, and look into what was tokenised: `python -m titan.prepare`."""
