"""Tests of titan.report."""
