"""The config: schema, groups, checks."""
