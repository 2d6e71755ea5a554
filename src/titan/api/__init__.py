"""What stands behind `titan`'s public functions; a notebook's and a program's way to what the commands do."""
