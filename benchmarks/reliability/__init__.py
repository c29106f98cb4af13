"""Faults brought about on purpose, and what of a run survives them."""
