"""The CUDA backend with its Triton kernels interpreted on the CPU: for TRITON_INTERPRET=1."""
