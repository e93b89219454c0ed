"""The NVIDIA backend: Triton kernels, cuBLAS, CUDA graphs and NCCL.

Adapters cost almost nothing at decode: their A rows lie under the base weight's rows, so that one product gives y and
every slot's h, and the expand rides on the kernel that reads y anyway.
"""
