"""Experiments, one file each; see the docstring of each for its source and its command."""
