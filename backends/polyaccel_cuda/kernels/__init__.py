"""Triton kernels. Each file holds one kernel and the function that launches it on the current device and stream.

Row offsets are 64-bit. Loops over what a step decides (context, adapters of a row) have their bounds in device memory,
so that a captured launch is right for every step of its shape.
"""
