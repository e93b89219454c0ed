"""Bugs planted in the CUDA backend: those that Triton's interpreter shows are found here, the others on GPUs by
``python -m tests.cuda_devices.mutants.hunt``."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="run tox -e triton")

from tests.cuda_devices.mutants.catalogue import MUTANTS, PACKAGE
from tests.cuda_devices.mutants.hunt import caught, hunt
from tests.support.planted import misplaced

FEW = ("expand.rank_of_16", "step.stale_metadata")
"""Those that every run hunts; each takes a process that imports Triton."""
CASES = 40
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run tox -e triton")


def test_each_edit_fits_the_sources_as_they_are() -> None:
    wrong = {mutant.name: misplaced(PACKAGE, mutant.edits) for mutant in MUTANTS.values()}
    assert {name: found for name, found in wrong.items() if found} == {}


@interpreted
@pytest.mark.parametrize("name", FEW)
def test_a_planted_bug_is_found_and_healthy_sources_pass_through_the_same_wrapper(name: str) -> None:
    found, by = hunt(MUTANTS[name], most=CASES)
    assert caught(found), f"{MUTANTS[name].what} {by}: {found or 'nothing found'}"
    assert hunt(MUTANTS[name], planted=False, most=CASES)[0] == ""
