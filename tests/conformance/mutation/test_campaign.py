"""Mutants of the composites in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.mutation import subject as opened
from polyaccel_conformance.mutation.campaign import Campaign
from polyaccel_conformance.mutation.coverage import Coverage, measure
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import all_edits
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

HEALTHY = Subject(kind="table", path=opened.__file__, name=opened.HEALTHY)
OPERATORS = ("rms_norm", "silu_and_mul", "paged_attention")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [item.case for name in OPERATORS for item in fixed(PROBLEM_SETS[name])[:8]]


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return all_edits()


@pytest.fixture(scope="module")
def coverage(server: ForkServer, cases: list[Case]) -> Coverage:
    return measure(HEALTHY, server, cases)


@pytest.fixture(scope="module")
def campaign(coverage: Coverage, server: ForkServer) -> Iterator[Campaign]:
    found = Campaign(HEALTHY, coverage, server)
    yield found
    found.close()


def of(edits: list[Edit], function: str, before: str, after: str) -> Edit:
    (found,) = (e for e in edits if (e.function, e.before, e.after) == (function, before, after))
    return found


def sick(edit: Edit) -> Subject:
    """What opens the package with this mutant."""
    return Subject(kind="table", path=opened.__file__, name=opened.named(edit, opened.digests()[edit.file]))


def test_only_the_cases_that_execute_the_statement_are_asked(coverage: Coverage, edits: list[Edit]) -> None:
    norm = of(edits, "rms_norm", "s.float()", "s")
    assert {case.operator for case in coverage.of(norm)} == {"rms_norm"}
    assert coverage.of(of(edits, "layer_norm", "x.float()", "x")) == []


def test_a_wrong_value_kills_and_the_process_of_the_next_mutant_is_healthy(
    campaign: Campaign, edits: list[Edit]
) -> None:
    wrong = campaign.run(of(edits, "silu_and_mul", "-1", "-2"))
    assert wrong.killed
    assert wrong.operator == "silu_and_mul"
    # Of several rows of the block tables the first is taken.
    (harmless,) = (
        e for e in edits if (e.before, e.after) == ("1", "2") and '"block_tables")[first : first + 1]' in e.text
    )
    found = campaign.run(harmless)
    assert not found.killed
    assert found.cases > 0


def test_a_case_that_fails_without_the_mutant_is_no_kill(
    edits: list[Edit], coverage: Coverage, server: ForkServer
) -> None:
    wrong = of(edits, "silu_and_mul", "-1", "-2")
    # What is called unchanged here is the mutant itself.
    other = Campaign(sick(wrong), coverage, server)
    try:
        assert not other.run(wrong).killed
    finally:
        other.close()
    assert other.unsound


def test_a_case_that_fails_on_the_unchanged_package_is_not_asked(
    edits: list[Edit], cases: list[Case], server: ForkServer
) -> None:
    wrong = of(edits, "silu_and_mul", "-1", "-2")
    found = measure(sick(wrong), server, cases)
    assert found.failing
    assert all(text.startswith("silu_and_mul") for text in found.failing)
    assert len(found.of(wrong)) + len(found.failing) == sum(case.operator == "silu_and_mul" for case in cases)


def test_a_mutant_of_an_edited_file_is_refused(edits: list[Edit], server: ForkServer) -> None:
    wrong = of(edits, "silu_and_mul", "-1", "-2")
    with pytest.raises(ConformanceError, match=r"dense\.py has been edited"):
        opened.__getattr__(opened.named(wrong, "0" * 16))()
