"""The suite's fixed cases against the package of a folder, until a check fails.

``python -m tests.npu.mutants.on_card FOLDER OPERATOR,... CHECK,...`` prints one line of JSON: how many cases ran, and
the first failure's check, cause and message, or empty ones.
"""

from __future__ import annotations

import sys

import polyaccel_npu
from polyaccel_conformance.bench import Bench
from polyaccel_npu.backend import NpuBackend
from tests.support.planted_cases import first_failure, is_from


def main(folder: str, operators: str, checks: str) -> None:
    is_from(polyaccel_npu, folder)
    print(first_failure(Bench(NpuBackend()), operators, checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
