"""Tests of the loop and what is around it."""
