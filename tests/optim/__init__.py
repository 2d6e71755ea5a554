"""The optimizer, its schedule and clipping, against other ways to compute them."""
