"""Seeing what happens: progress on a terminal."""
