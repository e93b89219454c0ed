"""A mutant's unit tests in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polyaccel_conformance.mutation.install import all_edits, digests
from polyaccel_conformance.mutation.subject import HEALTHY, named
from polyaccel_conformance.mutation.unit import first_failure, unit_tests_of
from polyaccel_conformance.workers.process import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer(preload=("pytest",))
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ("sampling", "sampling_state", "lora", "lora_operands", "moebius")
    for name in names:
        (tmp_path / f"test_{name}.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("sampling.py", ["test_sampling"]),
        ("sampling_state.py", ["test_sampling_state"]),
        ("lora.py", ["test_lora", "test_lora_operands"]),
        ("moe.py", []),
    ],
)
def test_a_file_has_the_tests_of_its_own_name(folder: Path, file: str, expected: list[str]) -> None:
    assert [Path(path).stem for path in unit_tests_of(file, folder)] == expected


def test_only_a_process_with_the_mutant_fails(tmp_path: Path, server: ForkServer) -> None:
    (edit,) = (e for e in all_edits() if (e.function, e.before, e.after) == ("silu_and_mul", "-1", "-2"))
    test = tmp_path / "test_dense.py"
    test.write_text(
        "import torch\n"
        "from polyaccel.backend.composite.dense import silu_and_mul\n\n\n"
        "def test_silu():\n"
        "    assert silu_and_mul(torch.ones(4, 6)).shape == (4, 3)\n"
    )
    name = named(edit, digests()[edit.file])
    assert first_failure(name, [str(test)], server) == "unit test test_dense.py::test_silu"
    assert first_failure(HEALTHY, [str(test)], server) == ""
    assert first_failure(name, [], server) == ""


def test_tests_that_end_their_process_are_a_kill(tmp_path: Path, server: ForkServer) -> None:
    test = tmp_path / "test_dense.py"
    test.write_text("import os\n\n\ndef test_it():\n    os._exit(3)\n")
    assert first_failure(HEALTHY, [str(test)], server) == "unit test crash"
