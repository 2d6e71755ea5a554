"""What a run would take and how fast it would be, told without a GPU: `python -m titan.plan`."""
