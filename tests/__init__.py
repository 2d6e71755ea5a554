"""Tests of titan."""
