"""What is granted: a pure function of the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend.levels import DEVICES, LEVELS
from polyaccel_conformance.levels.cell import Cell
from polyaccel_conformance.levels.evidence import required
from polyaccel_conformance.levels.grant import Asked, Evidence, LevelResult, Tally, Verdict, grant
from polyaccel_conformance.multi.identity import RankIdentity

RANKS = 3
CELLS = required(RANKS)
CHECKS = sorted({check for level in LEVELS.values() for check in level.checks})
OPERATORS = frozenset(operator for level in LEVELS.values() for operator in level.operators)


def identity(world_size: int, rank: int) -> RankIdentity:
    """A rank with a device of its own."""
    return RankIdentity(
        rank=rank,
        world_size=world_size,
        pid=10 * world_size + rank,
        host="here",
        backend="vendor",
        version="polyaccel-vendor 1.0",
        device="Vendor One",
        device_index=rank,
        device_id=f"vendor {rank}",
        transport="vccl",
        torch_version="2.13.0",
    )


def good() -> Evidence:
    """Everything ran and passed, natively, on three ranks."""
    return Evidence(
        tallies=dict.fromkeys(CELLS, Tally(passed=1)),
        checks=dict.fromkeys(CHECKS, Asked.PASSED),
        native=OPERATORS,
        devices=RANKS,
        ranks=RANKS,
        identities=tuple(identity(world, rank) for world in range(2, RANKS + 1) for rank in range(world)),
    )


def by_name(evidence: Evidence, *, require_native: bool = False) -> Mapping[str, LevelResult]:
    return {result.level.name: result for result in grant(evidence, require_native=require_native)}


def with_tally(evidence: Evidence, cell: Cell, tally: Tally | None) -> Evidence:
    tallies = dict(evidence.tallies)
    if tally is None:
        del tallies[cell]
    else:
        tallies[cell] = tally
    return replace(evidence, tallies=tallies)


def test_all_levels_are_granted_where_everything_passed() -> None:
    assert {result.verdict for result in grant(good())} == {Verdict.GRANTED}


def test_nothing_is_granted_without_evidence() -> None:
    assert not any(result.earned for result in grant(Evidence()))


def test_a_partial_run_grants_nothing() -> None:
    assert not any(result.earned for result in grant(replace(good(), complete=False)))


def levels_of(cell: Cell) -> set[str]:
    return {name for name, level in LEVELS.items() if cell in _cells_of(name)}


def _cells_of(name: str) -> set[Cell]:
    from polyaccel_conformance.levels.cell import HALVES, cells

    return {cell for half in HALVES for cell in cells(LEVELS[name], half, RANKS)}


def both_halves(cell: Cell) -> list[Cell]:
    """The cell in either 16-bit type: one alone would be passed over for the other."""
    if cell.dtype in ("bfloat16", "float16"):
        return [replace(cell, dtype="bfloat16"), replace(cell, dtype="float16")]
    return [cell]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CELLS))
def test_one_empty_required_cell_denies_every_level_that_asks_for_it(cell: Cell) -> None:
    evidence = good()
    for missing in both_halves(cell):
        evidence = with_tally(evidence, missing, None)
    found = by_name(evidence)
    assert {name for name in levels_of(cell) if found[name].earned} == set()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CELLS))
def test_one_refused_required_cell_restricts_the_level_and_is_in_its_title(cell: Cell) -> None:
    evidence = good()
    for refused in both_halves(cell):
        evidence = with_tally(evidence, refused, Tally(passed=3, refused=1))
    found = by_name(evidence)
    for name in levels_of(cell):
        assert found[name].verdict is Verdict.RESTRICTED
        assert found[name].title.startswith(f"{name} restricted: {cell.operator}")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CELLS))
def test_one_failed_required_cell_denies_the_level_however_many_cases_passed(cell: Cell) -> None:
    evidence = good()
    for failed in both_halves(cell):
        evidence = with_tally(evidence, failed, Tally(passed=1000, failed=1))
    found = by_name(evidence)
    assert {name for name in levels_of(cell) if found[name].earned} == set()


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(CELLS), max_size=5), st.sampled_from(CELLS))
def test_another_failure_never_earns_a_level(few: set[Cell], one_more: Cell) -> None:
    evidence = good()
    for cell in few:
        evidence = with_tally(evidence, cell, Tally(failed=1))
    before = {result.level.name for result in grant(evidence) if result.earned}
    after = {result.level.name for result in grant(with_tally(evidence, one_more, Tally(failed=1))) if result.earned}
    assert after <= before


def test_a_16_bit_type_that_fails_is_passed_over_for_the_other_which_the_title_names() -> None:
    evidence = good()
    for cell in CELLS:
        if cell.dtype == "bfloat16":
            evidence = with_tally(evidence, cell, Tally(failed=1))
    assert by_name(evidence)["L1"].verdict is Verdict.GRANTED
    assert "float16" in by_name(evidence)["L1"].title


@pytest.mark.parametrize("check", CHECKS)
def test_a_named_check_must_be_asked_and_conclusive(check: str) -> None:
    names = [name for name, level in LEVELS.items() if check in level.checks]
    missing = {name: state for name, state in good().checks.items() if name != check}
    for checks in (missing, {**missing, check: Asked.INCONCLUSIVE}, {**missing, check: Asked.FAILED}):
        found = by_name(replace(good(), checks=checks))
        assert not any(found[name].earned for name in names)


def test_an_inconclusive_check_denies_the_levels_whose_operators_were_asked_it() -> None:
    checks = {**good().checks, "memory.writes": Asked.INCONCLUSIVE}
    found = by_name(replace(good(), checks=checks, asked={"sgmv": frozenset({"memory.writes"})}))
    assert not found["L3"].earned
    assert found["L1"].earned


def test_a_check_that_the_machine_cannot_exercise_is_listed_and_denies_nothing() -> None:
    checks = {**good().checks, "device.wrong_current": Asked.NOT_EXERCISED}
    level = by_name(replace(good(), checks=checks))["L0"]
    assert level.verdict is Verdict.GRANTED
    assert level.not_exercised == ("check device.wrong_current",)


def test_several_ranks_on_one_device_are_named_in_the_title() -> None:
    shared = tuple(replace(each, device="cpu", device_id="cpu") for each in good().identities)
    found = by_name(replace(good(), identities=shared))["L6"]
    assert found.verdict is Verdict.GRANTED
    assert found.name == "L6 several devices (3 ranks sharing 1 device: cpu; float32, bfloat16)"
    assert found.title.startswith(f"{found.name}: ")


def test_simulated_devices_are_named_in_every_title() -> None:
    simulated = tuple(replace(each, simulated=True) for each in good().identities)
    found = by_name(replace(good(), identities=simulated, simulated=True))
    assert found["L6"].name.startswith("L6 several devices (3 simulated devices; ")
    assert found["L0"].name == "L0 device (simulated device)"


def test_a_device_a_rank_needs_no_word() -> None:
    assert by_name(good())["L6"].name == "L6 several devices (float32, bfloat16)"


def test_ranks_of_which_nothing_is_known_earn_nothing() -> None:
    found = by_name(replace(good(), identities=good().identities[1:]))["L6"]
    assert found.verdict is Verdict.NOT_GRANTED
    assert found.reasons == ("world 2: its ranks did not all say who they were",)


def test_ranks_in_one_process_earn_nothing() -> None:
    found = by_name(replace(good(), identities=tuple(replace(each, pid=7) for each in good().identities)))["L6"]
    assert found.verdict is Verdict.NOT_GRANTED
    assert all("not processes of their own" in reason for reason in found.reasons)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_world_of_one_never_earns_the_level_of_several_devices(devices: int) -> None:
    found = by_name(replace(good(), ranks=1, devices=devices))
    assert found["L6"].verdict is Verdict.NOT_EXERCISED
    assert not found["L6"].earned


def test_a_missing_world_size_denies_it() -> None:
    evidence = good()
    for cell in CELLS:
        if cell.needs == DEVICES and cell.axis == "ranks" and cell.value == 2:
            evidence = with_tally(evidence, cell, None)
    assert by_name(evidence)["L6"].verdict is Verdict.NOT_GRANTED


def test_graphs_that_the_backend_refuses_are_not_claimed() -> None:
    level = by_name(replace(good(), graphs="no graphs here"))["L7"]
    assert level.verdict is Verdict.NOT_CLAIMED
    assert level.reasons == ("no graphs here",)


def test_a_level_falls_with_the_level_that_it_builds_on() -> None:
    found = by_name(replace(good(), failures={"linear": 1}))
    assert [name for name, result in found.items() if result.earned] == ["L0"]


def test_composites_are_counted_and_deny_the_level_only_where_native_is_required() -> None:
    evidence = replace(good(), native=OPERATORS - {"gelu"}, composite=frozenset({"gelu"}))
    level = by_name(evidence)["L2"]
    assert level.verdict is Verdict.GRANTED
    assert level.composite == ("gelu",)
    assert f"{len(level.native)} native, 1 composite" in level.title
    assert not by_name(evidence, require_native=True)["L2"].earned


def test_waived_failures_are_counted_in_the_title() -> None:
    level = by_name(replace(good(), waived={"linear": 2}))["L1"]
    assert level.earned
    assert level.title.endswith(", 2 failing cases waived")


def test_a_declaration_below_the_floor_restricts_the_level_and_is_in_its_title() -> None:
    declared = {"linear": ("accumulator bfloat16",)}
    found = by_name(replace(good(), restrictions=declared))
    assert found["L1"].verdict is Verdict.RESTRICTED
    assert "restricted: linear accumulator bfloat16;" in found["L1"].title
    assert found["L7"].verdict is Verdict.GRANTED
