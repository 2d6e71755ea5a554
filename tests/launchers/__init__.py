"""The files of launchers/, each against something independent of it."""
