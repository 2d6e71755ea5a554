"""Starting ranks, and what ends them."""
