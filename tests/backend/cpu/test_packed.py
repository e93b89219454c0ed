from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.cpu import packed
from polyaccel.backend.cpu.packed import FEW, PANEL, PIECES, InnerProduct, Panels, cuts, pack, packs, sizes
from tests.backend.composite.cases import Draw, f64

pytestmark = pytest.mark.skipif(not packs(torch.float32), reason="this torch multiplies no packed weights")


def _sizes(n: int, k: int) -> tuple[int, ...]:
    found = sizes(n, k, torch.get_num_threads())
    if not found:
        pytest.skip("oneDNN prefers other panels on this machine")
    return found


@given(
    panels=st.integers(1, 8),
    k=st.integers(1, 90),
    rows=st.one_of(st.integers(0, 70), st.integers(250, 700)),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_panels_multiply_any_number_of_rows_within_rounding(
    panels: int, k: int, rows: int, bias: bool, residual: bool, seed: int
) -> None:
    draw, n = Draw(seed), panels * PANEL
    w, x = draw.tensor(n, k), draw.tensor(rows, k)
    b = draw.tensor(n) if bias else None
    added = draw.tensor(rows, n) if residual and rows else None
    # Pieces of 63 are right whatever layout oneDNN prefers: it reorders, and that is only slow.
    matrix = Panels(w, sizes(n, k, torch.get_num_threads()) or (FEW,))
    y = matrix.multiply(x, b) if added is None else matrix.multiply_add(x, b, added)
    exact, size = f64(x) @ f64(w).T, np.abs(f64(x)) @ np.abs(f64(w)).T
    for part in (b, added):
        if part is not None:
            exact, size = exact + f64(part), size + np.abs(f64(part))
    assert y.shape == (rows, n)
    assert y.is_contiguous()
    assert np.all(np.abs(f64(y) - exact) <= (k + 3) * 2.0**-24 * size)


@given(rows=st.integers(1, 3000), allowed=st.sampled_from([(FEW,), (PIECES[0], FEW), (*PIECES, FEW)]))
def test_pieces_cover_all_rows_and_none_has_a_number_that_would_be_reordered(
    rows: int, allowed: tuple[int, ...]
) -> None:
    pieces = cuts(rows, allowed)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == rows
    assert all(0 < stop - start <= FEW or stop - start in allowed for start, stop in pieces)


@pytest.mark.parametrize(("n", "k"), [(3072, 576), (480, 64)])
def test_every_number_of_rows_multiplied_at_once_reads_the_layout_that_was_packed(n: int, k: int) -> None:
    allowed = _sizes(n, k)
    probe = torch.arange(n * k, dtype=torch.float32).remainder_(8191).view(n, k)
    whole = probe.view(n // PANEL, PANEL, k).transpose(1, 2).contiguous()
    for rows in {*range(1, FEW + 1), *allowed}:
        assert packed._begins(packed._panels(probe, rows), whole), rows


def test_panels_give_back_every_bit() -> None:
    values = Draw(1).tensor(PANEL, 5)
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    matrix = Panels(values, (FEW,))
    assert torch.equal(matrix.plain().view(torch.int32), values.view(torch.int32))
    assert matrix.nbytes == values.nbytes


def test_wide_float_matrices_are_packed_in_panels_and_others_for_the_inner_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _sizes(480, 64)
    assert isinstance(pack(torch.ones(480, 64)), Panels)
    assert isinstance(pack(torch.ones(96, 64)), InnerProduct)
    assert isinstance(pack(torch.ones(490, 64)), InnerProduct)
    if packs(torch.bfloat16):
        assert isinstance(pack(torch.ones(480, 64, dtype=torch.bfloat16)), InnerProduct)
    monkeypatch.setattr(packed, "sizes", lambda n, k, threads: ())
    assert isinstance(pack(torch.ones(480, 64)), InnerProduct)


def test_a_machine_whose_choice_changes_with_the_rows_gets_no_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_begins", lambda opaque, panel: False)
    sizes.cache_clear()
    try:
        assert sizes(480, 64, 1) == ()
    finally:
        sizes.cache_clear()
