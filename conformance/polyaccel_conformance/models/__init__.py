"""Whole models on a backend: layers against the oracle, tokens against the reference. The only part that imports the
engine."""
