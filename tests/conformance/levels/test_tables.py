"""The contract's required tables agree with its vocabulary and with what the suite can draw and ask."""

from __future__ import annotations

import pytest

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel.backend.levels import LEVELS
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.levels.cell import index
from polyaccel_conformance.levels.coverage import covered
from polyaccel_conformance.levels.evidence import required
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed


def test_levels_are_named_and_built_in_order() -> None:
    assert list(LEVELS) == [f"L{i}" for i in range(8)]
    for name, level in LEVELS.items():
        assert level.name == name
        assert all(below < name for below in level.builds_on)


def test_every_operator_of_a_table_is_in_the_contract() -> None:
    named = {operator for level in LEVELS.values() for operator in level.operators}
    assert named <= set(OPERATORS) | set(STATIONS)


def test_every_operator_of_the_contract_belongs_to_a_level() -> None:
    named = {operator for level in LEVELS.values() for operator in level.operators}
    assert (set(OPERATORS) | set(STATIONS)) - named == set()


def test_every_check_that_a_level_names_exists() -> None:
    named = {check for level in LEVELS.values() for check in level.checks}
    assert named - set(CHECKS) == set()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_fixed_lists_leave_no_required_cell_empty(ranks: int) -> None:
    wanted = dict.fromkeys(
        cell
        for cell in required(ranks)
        if bool(cell.needs) is (ranks > 1) and (cell.axis != "ranks" or cell.value == ranks)
    )
    table = index(wanted)
    sets = PROBLEM_SETS if ranks == 1 else RANKED_SETS
    for problems in sets.values():
        for item in fixed(problems, ranks=ranks):
            for cell in covered(item.case, table):
                wanted.pop(cell, None)
    assert [str(cell) for cell in wanted] == []
