"""Rows with programs of their own, shared adapters or not: these kernels give what the tiles give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda.test_units import Store, step

pytest.importorskip("triton", reason="run tox -e triton")


@st.composite
def tables(draw: Any) -> tuple[dict[str, torch.Tensor], int, int]:
    """A decode step's units, its rows and its rank rows; any mix of shared, lone, mixed and plain rows."""
    from polyaccel_cuda.units import RankRows, units_of

    tokens = draw(st.integers(1, 24))
    ranks = draw(st.lists(st.sampled_from([1, 3, 8, 16, 33]), min_size=1, max_size=10))
    triple = st.tuples(st.integers(0, tokens - 1), st.integers(0, len(ranks) - 1), st.sampled_from([1.0, 0.5, -2.0]))
    inputs = step(tokens, draw(st.lists(triple, min_size=1, max_size=30)))
    where = RankRows(inputs, Store(ranks))  # type: ignore[arg-type]
    found = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in units_of(inputs, "tokens", where).items()}
    return found, tokens, max(sum(ranks), where.covered)


def both(made: dict[str, torch.Tensor], tokens: int, b: torch.Tensor, run: Callable[[Any], torch.Tensor]) -> None:
    from polyaccel_cuda.kernels.rows import Units

    tiles, streamed = (run(Units(b=b, rows=16, most=tokens, streamed=own, **made)) for own in (False, True))
    torch.testing.assert_close(streamed, tiles, rtol=1e-5, atol=1e-4)


@given(tables(), st.integers(0, 2**20), st.sampled_from([5, 48, 300]))
def test_the_activation_of_a_row_by_itself_is_that_of_rows_in_a_tile(
    made: tuple[dict[str, torch.Tensor], int, int], seed: int, n: int
) -> None:
    from polyaccel_cuda.kernels import activation

    (found, tokens, rank_rows), draw = made, torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * n + 2 * rank_rows, generator=draw)
    b = torch.randn(rank_rows, 2 * n, generator=draw)
    both(found, tokens, b, lambda units: activation.silu_and_mul(x, n, x[:, 2 * n :], units))


@given(tables(), st.integers(0, 2**20), st.booleans(), st.sampled_from([(0, 40), (0, 300, 301), (0, 16, 16, 50)]))
def test_the_expand_of_a_row_by_itself_is_that_of_rows_in_a_tile(
    made: tuple[dict[str, torch.Tensor], int, int], seed: int, residual: bool, starts: tuple[int, ...]
) -> None:
    from polyaccel_cuda.kernels import expand

    (found, tokens, rank_rows), draw = made, torch.Generator().manual_seed(seed)
    n = starts[-1]
    y = torch.randn(tokens, n + (len(starts) - 1) * rank_rows, generator=draw)
    b = torch.randn(rank_rows, n, generator=draw)
    added = torch.randn(tokens, n, generator=draw) if residual else None
    both(found, tokens, b, lambda units: expand.expand(y, y[:, n:], starts, units, added))


@given(tables(), st.integers(0, 2**20), st.booleans(), st.sampled_from([(8, 8), (12, 8), (8, 4)]))
def test_the_rotation_of_a_row_by_itself_is_that_of_rows_in_a_tile(
    made: tuple[dict[str, torch.Tensor], int, int], seed: int, normed: bool, sizes: tuple[int, int]
) -> None:
    from polyaccel.backend import RopeTable
    from polyaccel_cuda.kernels import rope

    (found, tokens, rank_rows), draw = made, torch.Generator().manual_seed(seed)
    (head_dim, turned), heads = sizes, (2, 1)
    n = (heads[0] + 2 * heads[1]) * head_dim
    y = torch.randn(tokens, n + 3 * rank_rows, generator=draw)
    b = torch.randn(rank_rows, n, generator=draw)
    angles = torch.rand(tokens + 3, turned // 2, generator=draw)
    table = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=turned)
    weight = torch.rand(head_dim, generator=draw) if normed else None
    positions = torch.randint(0, tokens + 3, (tokens,), generator=draw)

    def run(units: Any) -> torch.Tensor:
        keys, values = torch.zeros(2, 2, 1, 16, head_dim).unbind()
        queries = rope.rope_cache(
            y[:, :n],
            (*heads, head_dim),
            table,
            (weight, weight, 1e-5),
            (keys, values),
            torch.arange(tokens),
            positions,
            y[:, n:],
            units,
        )
        return torch.cat([part.flatten() for part in (queries, keys, values)])

    both(found, tokens, b, run)
