"""Tests of the trainer: whole runs of one rank, in this process."""
