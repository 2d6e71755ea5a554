"""titan on a real SLURM cluster of four nodes, which `cluster.sh` makes out of this machine."""
