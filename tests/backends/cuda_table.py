"""The CUDA backend as a table of the conformance suite, for machines on which it is not installed."""

from __future__ import annotations

from polyaccel.backend import Backend


def cuda() -> Backend:
    from polyaccel_cuda.backend import CudaBackend

    return CudaBackend()
