"""Required cells: what a table expands to, and how cells are put into words."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend.levels import LEVELS, Span
from polyaccel_conformance.case import Case
from polyaccel_conformance.levels.cell import Cell, cells, index, restriction, summary
from polyaccel_conformance.levels.coverage import covered
from polyaccel_conformance.levels.evidence import required


def ranks_of(found: tuple[Cell, ...]) -> set[object]:
    return {cell.value for cell in found if cell.axis == "ranks"}


def test_lora_asks_for_every_rank_from_1_to_512_in_two_dtypes() -> None:
    found = [cell for cell in cells(LEVELS["L3"], "bfloat16") if cell.axis == "facts.rank"]
    assert {(cell.dtype, cell.value) for cell in found} == {
        (dtype, rank) for dtype in ("float32", "bfloat16") for rank in range(1, 513)
    }


def test_linear_asks_for_sizes_from_the_empty_one_to_16384_without_a_gap() -> None:
    for axis, low in (("dims.tokens", 0), ("dims.k", 0), ("dims.n", 1)):
        spans = [c.value for c in cells(LEVELS["L1"], "float16") if c.axis == axis and c.dtype == "float32"]
        held = sorted(number for span in spans if isinstance(span, Span) for number in range(span.low, span.high + 1))
        assert held == list(range(low, 16_385))


def test_linear_asks_for_every_layout_that_its_specification_accepts() -> None:
    found = {c.value for c in cells(LEVELS["L1"], "float16") if c.axis == "layouts.x"}
    assert found == {"contiguous", "row_padded", "offset"}


def test_several_devices_ask_for_every_world_size_up_to_the_one_that_took_part() -> None:
    assert ranks_of(cells(LEVELS["L6"], "bfloat16", 4)) == {2, 3, 4}
    assert ranks_of(cells(LEVELS["L6"], "bfloat16", 1)) == set()


def test_cells_of_several_devices_are_not_covered_by_a_case_of_one_rank() -> None:
    wanted = index(c for c in required(2) if c.operator == "row_parallel_linear" and c.needs)
    alone = Case.of("row_parallel_linear", {"dims.tokens": 1})
    assert not list(covered(alone, wanted))
    assert list(covered(alone.with_(ranks=2), wanted))


def test_a_flag_is_not_taken_for_the_number_one() -> None:
    wanted = Cell(operator="linear", dtype="float32", axis="structure.bias", value=True)
    assert not list(covered(Case.of("linear", {"structure.bias": 1}), index([wanted])))
    assert list(covered(Case.of("linear", {"structure.bias": True}), index([wanted])))


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(1, 40), min_size=1))
def test_a_summary_names_exactly_the_values_it_was_given(values: set[int]) -> None:
    text = summary(Cell(operator="sgmv", dtype="float32", axis="facts.rank", value=v) for v in values)
    head, _, listed = text.partition(" rank ")
    assert head == "sgmv float32"
    named: set[int] = set()
    for part in listed.split(", "):
        low, _, high = part.partition("..")
        named |= set(range(int(low), int(high or low) + 1))
    assert named == values


def test_spans_side_by_side_are_one_range_in_words() -> None:
    spans = [Span(2, 15), Span(16, 16), Span(17, 63)]
    assert summary(Cell(operator="linear", axis="dims.k", value=s) for s in spans) == "linear k 2..63"


def test_a_restriction_names_an_operator_of_which_all_is_refused_once_and_otherwise_where_it_is_refused() -> None:
    asked = [cell for cell in cells(LEVELS["L2"], "bfloat16") if cell.operator == "paged_attention"]
    single = [cell for cell in asked if cell.dtype == "float32"]
    assert restriction(single, asked) == "paged_attention float32"
    some = [cell for cell in asked if cell.dtype == "bfloat16" and cell.axis in ("", "dims.group")]
    assert restriction([*single, *some], asked) == "paged_attention float32; paged_attention bfloat16 group 1..8"
    # Of what has no axis there is nothing more to say.
    assert restriction(some[:1], asked) == "paged_attention bfloat16"
    assert restriction([], asked) == ""
