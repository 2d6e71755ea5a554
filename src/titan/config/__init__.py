"""The config: typed, inert data. schema → degrees → check → load."""
