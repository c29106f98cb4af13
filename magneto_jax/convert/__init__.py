"""Checkpoints of other libraries, to and from this one's parameters."""
