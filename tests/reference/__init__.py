"""Other people's implementations, brought into the form that titan can be compared with."""
