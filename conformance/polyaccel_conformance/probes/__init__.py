"""Planted problems of each operator, from whose results its arithmetic is read."""
