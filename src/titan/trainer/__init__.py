"""The training loop: build, step, fit."""
