"""Tests of titan.plan."""
