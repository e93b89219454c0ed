"""The suite's fixed cases against the CUDA backend of a folder, until a check fails.

``python -m tests.cuda_devices.mutants.on_gpu FOLDER OPERATOR,... CHECK,... [MOST]`` prints the line of
:func:`tests.support.planted_cases.first_failure`. Without a GPU kernels run in Triton's interpreter.
"""

from __future__ import annotations

import sys

import torch

import polyaccel_cuda
from polyaccel.backend import Backend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from tests.support.planted_cases import MOST, first_failure, is_from

DTYPES = ("float32", "float16")
"""Of a case that the interpreter runs: it multiplies bfloat16 as integers."""


def opened() -> Backend:
    if torch.cuda.is_available():
        from polyaccel_cuda.backend import CudaBackend

        return CudaBackend()
    from tests.backends.interpreted.backend import InterpretedBackend

    return InterpretedBackend()


def asks(case: Case) -> bool:
    return torch.cuda.is_available() or case.axes()["dtype"] in DTYPES


def main(folder: str, operators: str, checks: str, most: str = str(MOST)) -> None:
    is_from(polyaccel_cuda, folder)
    print(first_failure(Bench(opened()), operators, checks, int(most), asks))


if __name__ == "__main__":
    main(*sys.argv[1:])
