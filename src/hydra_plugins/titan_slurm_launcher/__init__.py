"""Hydra's door to titan's SLURM launcher: `hydra/launcher=titan_slurm`, which `cluster=slurm` chooses by itself."""
