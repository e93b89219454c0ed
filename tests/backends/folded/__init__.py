"""A backend in plain torch that does what a GPU will do; the engine's tests run on it.

W and the adapters' A lie in one opaque, transposed, padded buffer, so that one product gives y and every slot's h; rank
rows ride on the row-parallel sum; stations are fused; KV blocks have 128 tokens in another axis order; metadata comes
from ``begin_step`` alone; nothing runs before somebody waits; decode is captured into graphs. Memory that nobody has
written holds NaN.
"""
