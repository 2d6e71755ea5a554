"""Single-device model code: no rank, no mesh, no environment."""
