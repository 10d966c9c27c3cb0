"""The command line and all that is shown in a terminal."""
