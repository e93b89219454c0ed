"""How a product is cut into parts that are summed beside one another. No GPU: lanes and sums are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="run tox -e triton")

from polyaccel_cuda import overlap
from polyaccel_cuda.kernels import pushed
from polyaccel_cuda.overlap import LEAST_BYTES, MOST_PART_BYTES, TILE_ROWS, bounds, overlapped


@given(st.integers(0, 40_000), st.integers(1, 1 << 18))
def test_parts_cover_all_rows_in_an_even_number_that_fits_the_slots(rows: int, row_bytes: int) -> None:
    starts = bounds(rows, row_bytes)
    assert (starts[0], starts[-1]) == (0, rows)
    if len(starts) == 2:
        # Fewer than two tiles of rows, or tiles so large that an even number of parts would need more of them.
        assert rows * row_bytes < LEAST_BYTES or rows <= TILE_ROWS or TILE_ROWS * row_bytes * 2 > MOST_PART_BYTES
        return
    sizes = [end - begin for begin, end in pairwise(starts)]
    assert len(sizes) % 2 == 0
    assert min(sizes) > 0
    assert max(sizes) * row_bytes <= MOST_PART_BYTES <= pushed.SLOT_BYTES
    assert all(start % TILE_ROWS == 0 for start in starts[:-1])
    assert max(sizes) - min(sizes) < 2 * TILE_ROWS


@pytest.mark.parametrize(("rows", "count"), [(256, 1), (512, 1), (1024, 1), (2048, 2), (4096, 4)])
def test_parts_of_the_shapes_that_were_measured(rows: int, count: int) -> None:
    assert len(bounds(rows, 8192 * 2)) - 1 == count


class Recorder:
    """A lane that says in which order it was used; what runs on it can be held back until the join, as on a device."""

    def __init__(self, late: bool) -> None:
        self.late, self.calls, self.waiting = late, list[str](), list[Callable[[], None]]()

    def follow(self) -> None:
        self.calls.append("follow")

    def run(self, fn: Callable[[], None]) -> None:
        self.calls.append("run")
        if self.late:
            self.waiting.append(fn)
        else:
            fn()

    def join(self) -> None:
        self.calls.append("join")
        while self.waiting:
            self.waiting.pop(0)()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_every_row_is_produced_once_and_then_summed_once_in_order(late: bool) -> None:
    y, starts, lane, order = torch.zeros(10, 3), (0, 4, 6, 10), Recorder(late), list[tuple[str, int]]()

    def produce(begin: int, end: int) -> None:
        order.append(("produce", begin))
        y[begin:end] += 1

    def summed(part: torch.Tensor, index: int) -> None:
        order.append(("sum", index))
        assert (part == 1).all()
        part *= 10

    overlapped(y, starts, produce, summed, lane)
    assert (y == 10).all()
    assert lane.calls == ["follow", "run"] * 3 + ["join"]
    assert [what for what in order if what[0] == "sum"] == [("sum", 0), ("sum", 1), ("sum", 2)]
    assert [what for what in order if what[0] == "produce"] == [("produce", 0), ("produce", 4), ("produce", 6)]
    if late:
        assert order[:3] == [("produce", 0), ("produce", 4), ("produce", 6)]


def test_an_error_of_a_product_still_joins_the_lane() -> None:
    lane = Recorder(late=False)

    def produce(begin: int, end: int) -> None:
        if begin:
            raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        overlapped(torch.zeros(4, 1), (0, 2, 4), produce, lambda part, index: None, lane)
    assert lane.calls == ["follow", "run", "join"]


def test_constants_fit_one_another() -> None:
    assert overlap.PART_BYTES <= overlap.MOST_PART_BYTES <= pushed.SLOT_BYTES
    # Every result that is summed in parts has two of them.
    assert overlap.LEAST_BYTES > overlap.PART_BYTES
