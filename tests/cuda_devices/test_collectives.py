"""Every collective on GPUs of their own, in all dtypes, in graphs, and with a rank that stays away."""

from __future__ import annotations

import pytest

from tests.cuda_devices import cases
from tests.cuda_devices.pool import OK, run_cases, several

pytestmark = several
SECONDS = 260.0
NAMES = [case.__name__ for case in cases.ALL]


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    """All cases by the same two ranks, which take seconds to start."""
    return run_cases(2, NAMES, SECONDS)


@pytest.mark.parametrize("name", [*NAMES, "end"])
def test_two_ranks(answers: dict[str, list[str]], name: str) -> None:
    assert answers[name] == [OK, OK], "\n".join(answers[name])
