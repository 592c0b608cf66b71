"""The runs and tables of the paper, and of what goes beyond it: `python notebooks/paper --help`."""
