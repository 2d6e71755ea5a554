"""The model against independent implementations of it."""
