"""Counting cases into cells: refusals, waivers, composites."""

from __future__ import annotations

from dataclasses import replace

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import RESTRICTION, CaseResult, Failure
from polyaccel_conformance.levels.cell import Cell
from polyaccel_conformance.levels.evidence import Machine, empty_cells, gather
from polyaccel_conformance.levels.facts import facts
from polyaccel_conformance.levels.grant import Asked, Tally
from polyaccel_conformance.problems.adapters import CONSECUTIVE
from polyaccel_conformance.results import CheckState

ANY = Cell(operator="gelu", dtype="float32")
FAILURE = Failure(check="values.bound", cause="wrong value", message="wrong")


def result(kind: str, *, operator: str = "gelu", seed: int = 0, failed: bool = False, ran: str = "") -> CaseResult:
    return CaseResult(
        case=Case.of(operator, {"dims.tokens": 1}, seed),
        failures=(FAILURE,) if failed else (),
        checks=("values.bound",),
        implementation=ran,
        kind=kind,
    )


def test_a_composite_is_a_refusal_only_where_the_backend_has_the_operator() -> None:
    only = gather([result("composite")], [], Machine())
    assert only.tallies[ANY] == Tally(passed=1)
    assert only.composite == {"gelu"}
    both = gather([result("native"), result("composite", seed=1)], [], Machine())
    assert both.tallies[ANY] == Tally(passed=1, refused=1)
    assert both.composite == both.native == {"gelu"}


def test_a_composite_beyond_what_a_level_asks_for_is_no_refusal() -> None:
    dims = {"dims.sequences": 1, "dims.context": 16, "dims.group": 1, "dims.kv_heads": 1, "dtype": "float32"}
    cell = Cell(operator="paged_attention", dtype="float32")

    def attention(head_dim: int, kind: str) -> CaseResult:
        case = Case.of("paged_attention", {**dims, "dims.head_dim": head_dim}, head_dim)
        return replace(result(kind), case=case)

    beyond = gather([attention(256, "native"), attention(257, "composite")], [], Machine())
    assert beyond.tallies[cell] == Tally(passed=1)
    within = gather([attention(256, "native"), attention(255, "composite")], [], Machine())
    assert within.tallies[cell] == Tally(passed=1, refused=1)
    failed = gather(
        [attention(256, "native"), replace(attention(257, "composite"), failures=(FAILURE,))], [], Machine()
    )
    assert failed.tallies[cell] == Tally(passed=1, failed=1)


def test_a_failure_that_is_waived_counts_as_passed_and_is_counted_apart() -> None:
    found = gather([result("native", failed=True)], [], Machine(), waived=frozenset({0}))
    assert found.tallies[ANY] == Tally(passed=1)
    assert (found.failures, found.waived) == ({}, {"gelu": 1})
    assert gather([result("native", failed=True)], [], Machine()).tallies[ANY] == Tally(failed=1)


def test_a_station_whose_parts_are_native_is_native() -> None:
    parts = "cpu.linear + composite.sgmv"
    mixed = gather([result("parts", operator="column_linear", ran=parts)], [], Machine())
    assert (mixed.native, mixed.composite) == (set(), {"column_linear"})
    native = gather([result("parts", operator="column_linear", ran="cpu.linear")], [], Machine())
    assert (native.native, native.composite) == ({"column_linear"}, set())


def test_a_check_that_no_case_asked_is_no_evidence_and_an_impossible_control_is() -> None:
    forgotten = CheckState(check="a", verdict="not exercised")
    impossible = CheckState(check="b", verdict="not exercised", control="impossible here")
    assert gather([], [forgotten, impossible], Machine()).checks == {"b": Asked.NOT_EXERCISED}


def test_empty_cells_name_level_and_cell_and_leave_out_what_needs_devices() -> None:
    found = empty_cells(gather([result("native")], [], Machine()), ["gelu", "all_reduce"])
    assert "L2: gelu float32" not in found
    assert "L2: gelu float32 approximate tanh" in found
    assert not any("all_reduce" in line for line in found)


def test_the_facts_of_a_lora_case_follow_from_its_ranks_and_widths() -> None:
    axes = {"dims.tokens": 4, "dims.k": 8, "dims.n": 9, "dims.rank": 5, "structure.ranks": "consecutive"}
    case = Case.of("sgmv", {**axes, "structure.slices": "thin", "structure.segments": "gaps"})
    found = facts(case)
    assert found["facts.rank"] == tuple(range(5, 5 + CONSECUTIVE))
    assert found["facts.mixed_ranks"] is True
    assert found["facts.slice_narrower_than_rank"] is True
    assert found["facts.rows_without_adapter"] is True
    wide = facts(case.with_(structure__slices="one", dims__n=600, structure__segments="each", structure__ranks="equal"))
    assert wide["facts.slice_narrower_than_rank"] is False
    assert wide["facts.rows_without_adapter"] is False
    assert wide["facts.mixed_ranks"] is False


def test_a_declaration_below_the_floor_is_named_and_its_case_counts() -> None:
    lower = Failure(check="numerics.measured", cause=f"{RESTRICTION}accumulator bfloat16", message="declared")
    declared = replace(result("native"), failures=(lower,))
    found = gather([declared, replace(declared, case=declared.case.with_seed(1))], [], Machine())
    assert found.restrictions == {"gelu": ("accumulator bfloat16",)}
    assert (found.failures, found.tallies[ANY]) == ({}, Tally(passed=2))
    both = gather([replace(declared, failures=(lower, FAILURE))], [], Machine())
    assert (both.failures, both.tallies[ANY]) == ({"gelu": 1}, Tally(failed=1))
