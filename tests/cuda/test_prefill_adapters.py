"""A prefill's adapters in tiles, and its rank rows segment by segment, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import TokenClass
from tests.cuda.test_units import Store, step

pytest.importorskip("triton", reason="run tox -e triton")

RANKS = (0, 1, 3, 8, 16, 17, 33, 64, 70, 200, 512)
WEIGHTS = (1.0, 0.5, -2.0)


@contextmanager
def large_steps(folded: int) -> Iterator[None]:
    """Every step counts as one of many tokens; above ``folded`` rank rows it is segmented."""
    from polyaccel_cuda import units
    from polyaccel_cuda.kernels import tiling

    with mock.patch.object(units, "gathers", return_value=False), mock.patch.object(tiling, "FOLDED_RANK_ROWS", folded):
        yield


@dataclass(frozen=True)
class Drawn:
    """A prefill step: its tables, and what they mean."""

    tables: dict[str, torch.Tensor]
    tokens: int
    triples: list[tuple[int, int, float]]
    first: list[int]
    rank: list[int]
    covered: int
    segmented: bool
    seed: int

    @property
    def rank_rows(self) -> int:
        return sum(self.rank)

    def units(self, b: torch.Tensor) -> Any:
        from polyaccel_cuda.kernels.rows import Units

        most = len(self.tables["more"]) - 1
        largest = max(1, int(self.tables["rank"].max()))
        mixed = int(self.tables["more"][-1]) > most
        return Units(b=b, rows=64, most=most, streamed=False, largest=largest, mixed=mixed, **self.tables)

    def random(self, *shape: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=draw, dtype=torch.float64).float()

    def delta(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Float64, ``[T, n]``; ``a: [rank rows * slices, k]``, slices innermost."""
        slices, added = len(starts) - 1, torch.zeros(self.tokens, starts[-1], dtype=torch.float64)
        for row, slot, weight in self.triples:
            rows = range(self.first[slot], self.first[slot] + self.rank[slot])
            for i in range(slices):
                h = a[[r * slices + i for r in rows]].double() @ x[row].double()
                columns = slice(starts[i], starts[i + 1])
                added[row, columns] += weight * (h @ b[rows.start : rows.stop, columns].double())
        return added


@st.composite
def prefills(draw: Any) -> Drawn:
    """Contiguous segments, plain rows among them, empty slots, and rows with several adapters."""
    from polyaccel_cuda.units import RankRows, units_of

    ranks = draw(st.lists(st.sampled_from(RANKS), min_size=1, max_size=5))
    choices = st.tuples(st.integers(0, 70), st.lists(st.integers(0, len(ranks) - 1), max_size=3, unique=True))
    segments = draw(st.lists(choices, min_size=1, max_size=4))
    triples, row = [], 0
    for length, slots in segments:
        weights = [draw(st.sampled_from(WEIGHTS)) for _ in slots]
        triples += [
            (row + i, slot, w) for i in range(length) for slot, w in zip(slots, weights, strict=True) if ranks[slot]
        ]
        row += length
    tokens = max(row, 1)
    inputs = step(tokens, triples, TokenClass.MIXED)
    with large_steps(draw(st.sampled_from([0, 10**6]))):
        where = RankRows(inputs, Store(ranks))  # type: ignore[arg-type]
        tables = units_of(inputs, "tokens", where)
    return Drawn(
        tables={name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tables.items()},
        tokens=tokens,
        triples=triples,
        first=where.first.tolist(),
        rank=where.rank.tolist(),
        covered=where.covered,
        segmented=where.segmented,
        seed=draw(st.integers(0, 2**20)),
    )


def rank_rows_of(drawn: Drawn, x: torch.Tensor, a: torch.Tensor, slices: int, units: Any) -> torch.Tensor:
    from polyaccel_cuda.kernels.shrink import shrink

    if drawn.segmented:
        return shrink(x, a, slices, drawn.covered, units)
    return x @ a[: drawn.covered * slices].T


def close(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> None:
    error = float((found.double() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= 2e-6 * scale, f"off by {error}, scale {scale}"


def scale_of(*tensors: torch.Tensor) -> float:
    return 1.0 + sum(float(t.abs().max()) if t.numel() else 0.0 for t in tensors)


@settings(max_examples=15)
@given(prefills(), st.sampled_from([(0, 40), (0, 20, 36, 37), (0, 33, 66)]), st.booleans(), st.sampled_from([16, 70]))
def test_the_expand_of_tiles_adds_what_float64_adds(
    drawn: Drawn, starts: tuple[int, ...], residual: bool, k: int
) -> None:
    from polyaccel_cuda.kernels.expand import expand

    n, slices = starts[-1], len(starts) - 1
    x, a = drawn.random(drawn.tokens, k), drawn.random(drawn.rank_rows * slices + 1, k)[:-1] / k
    y, b = drawn.random(drawn.tokens, n + 3), drawn.random(drawn.rank_rows + 1, n)[:-1]
    units = drawn.units(b)
    h = rank_rows_of(drawn, x, a, slices, units)
    added = drawn.random(drawn.tokens, n) if residual else None
    wanted = y[:, :n].double() + drawn.delta(x, a, b, starts)
    if added is not None:
        wanted += added.double()
    close(expand(y, h, starts, units, added), wanted, scale_of(wanted) * 4)


@settings(max_examples=15)
@given(prefills(), st.sampled_from([5, 48, 150]), st.booleans(), st.sampled_from([16, 32, 64]), st.booleans())
def test_the_activation_of_tiles_is_float64_s(drawn: Drawn, n: int, woven: bool, rows: int, across: bool) -> None:
    from polyaccel_cuda.kernels import tiling
    from polyaccel_cuda.kernels.activation import silu_and_mul

    k = 32
    x, a = drawn.random(drawn.tokens, k), drawn.random(2 * drawn.rank_rows + 1, k)[:-1] / k
    y, b = drawn.random(drawn.tokens, 2 * n), drawn.random(drawn.rank_rows + 1, 2 * n)[:-1]
    units = drawn.units(b)
    h = rank_rows_of(drawn, x, a, 2, units)
    both = y.double() + drawn.delta(x, a, b, (0, n, 2 * n))
    wanted = torch.nn.functional.silu(both[:, :n]) * both[:, n:]
    tile = tiling.Tile(rows=rows, columns=64, warps=4, across=across, woven=woven)
    with mock.patch.object(tiling, "ACTIVATION", tile):
        found = silu_and_mul(y, n, h, units)
    close(found, wanted, scale_of(both) ** 2 * 4)


@settings(max_examples=15)
@given(
    prefills(),
    st.integers(1, 3),
    st.sampled_from([1, 40, 300]),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 4]),
    st.sampled_from([16, 64]),
)
def test_a_segmented_shrink_gives_each_row_its_own_rank_rows(
    drawn: Drawn, slices: int, k: int, rows: int, most: int, columns: int
) -> None:
    from polyaccel_cuda.kernels import tiling
    from polyaccel_cuda.kernels.shrink import shrink

    if not drawn.segmented:
        return
    x, a = drawn.random(drawn.tokens, k), drawn.random(drawn.rank_rows * slices + 1, k)[:-1]
    units = drawn.units(a)
    share = tiling.Share(rows=rows, columns=columns, k=16, warps=4, stages=1, programs=10**6, most=most)
    h = shrink(x, a, slices, drawn.covered, units, share)
    assert h.shape == (drawn.tokens, drawn.covered * slices)
    wanted: dict[int, list[int]] = {}
    for row, slot, _ in sorted(drawn.triples):
        if drawn.rank[slot]:
            low, high = (at * slices for at in (drawn.first[slot], drawn.first[slot] + drawn.rank[slot]))
            wanted.setdefault(row, []).extend(range(low, high))
    for row, columns_of in wanted.items():
        right = a[columns_of].double() @ x[row].double()
        close(h[row, : len(columns_of)], right, 1.0 + 4 * k)


@given(prefills())
def test_a_row_s_rank_rows_do_not_overlap(drawn: Drawn) -> None:
    if not drawn.segmented:
        return
    place, rank, more = (drawn.tables[name].tolist() for name in ("place", "rank", "more"))
    for unit in range(len(more) - 1):
        taken = [r for i in (unit, *range(more[unit], more[unit + 1])) for r in range(place[i], place[i] + rank[i])]
        assert len(taken) == len(set(taken))
        assert max(taken, default=-1) < drawn.covered


def test_few_rank_rows_are_part_of_the_base_product() -> None:
    from polyaccel_cuda.kernels import tiling
    from polyaccel_cuda.units import RankRows

    inputs = step(80, [(i, 0, 1.0) for i in range(80)], TokenClass.MIXED)
    with mock.patch.object(tiling, "FOLDED_RANK_ROWS", 96):
        for rank, segmented in ((16, False), (96, False), (97, True), (512, True)):
            assert RankRows(inputs, Store([rank])).segmented is segmented  # type: ignore[arg-type]


def test_a_step_that_a_graph_may_hold_is_never_segmented() -> None:
    from polyaccel_cuda.units import RankRows

    inputs = step(80, [(i, 0, 1.0) for i in range(80)], TokenClass.DECODE)
    assert not RankRows(inputs, Store([512])).segmented  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "operator", ["sgmv", "column_linear", "qkv_rope_cache", "gate_up_act", "row_parallel_add_norm"]
)
def test_an_operator_of_a_segmented_prefill_computes_what_the_oracle_says(operator: str, apart: bool) -> None:
    from polyaccel_conformance.bench import Bench
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS
    from polyaccel_conformance.trial import Trial
    from polyaccel_cuda import step as steps
    from polyaccel_cuda.kernels import tiling
    from tests.backends.interpreted.backend import InterpretedBackend
    from tests.cuda.test_operators import cases

    bench, compared = Bench(InterpretedBackend()), 0
    with (
        large_steps(0),
        mock.patch.object(steps, "gathers", return_value=False),
        mock.patch.object(tiling, "QKV_EXPANDS_APART", apart),
    ):
        for case in cases(operator):
            problem = PROBLEM_SETS[operator].problem(case)
            trial = Trial(bench, problem)
            for name in ("values.exact", "values.bound"):
                check = CHECKS.get(name)
                if check is not None and check.applies(case, problem):
                    failure = check.run(trial)
                    assert failure is None, f"{case}: {failure}"
                    compared += 1
    assert compared
