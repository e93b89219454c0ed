"""Backends with planted bugs: what proves that the suite would have found them."""
