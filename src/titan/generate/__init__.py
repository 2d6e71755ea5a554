"""Text from a trained model: `python -m titan.generate`."""
