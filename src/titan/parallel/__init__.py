"""Everything that makes a single-device model run on a mesh. `apply` states the order."""
