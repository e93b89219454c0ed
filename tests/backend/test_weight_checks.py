"""What a weight is, and which writes are refused before any memory is touched."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import OperatorError, Quantisation, Slice, WeightSpec
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.weight import check_write

QKV = WeightSpec(
    site="layers.0.qkv",
    slices=(Slice(name="q", n=6), Slice(name="k", n=2), Slice(name="v", n=2)),
    k=8,
    dtype=torch.float32,
)
EXPERTS = WeightSpec(site="experts", slices=(Slice(name="down", n=4),), k=3, dtype=torch.float32, experts=5)


def test_slices_lie_one_after_the_other() -> None:
    assert QKV.n == 10
    assert QKV.starts == (0, 6, 8, 10)


@pytest.mark.parametrize(("slices", "k"), [((), 4), ((Slice(name="q", n=-1),), 4), ((Slice(name="q", n=1),), -4)])
def test_what_is_no_matrix_is_refused_by_site(slices: tuple[Slice, ...], k: int) -> None:
    with pytest.raises(ConfigurationError, match="'odd'"):
        WeightSpec(site="odd", slices=slices, k=k, dtype=torch.float32)


def test_a_rank_may_hold_nothing() -> None:
    assert WeightSpec(site="s", slices=(Slice(name="q", n=0),), k=0, dtype=torch.float32).n == 0


@pytest.mark.parametrize(
    ("spec", "index", "shape", "row", "col", "expert", "reason"),
    [
        (QKV, 3, (1, 1), 0, 0, None, "slice 3 of 3"),
        (QKV, -1, (1, 1), 0, 0, None, "slice -1 of 3"),
        (QKV, 0, (4,), 0, 0, None, "1 dimensions"),
        (QKV, 0, (1, 1, 1), 0, 0, None, "3 dimensions"),
        (QKV, 1, (3, 8), 0, 0, None, r"rows 0:3, columns 0:8 of slice 'k' \[2, 8\]"),
        (QKV, 1, (2, 8), 1, 0, None, "rows 1:3"),
        (QKV, 0, (6, 8), 0, 1, None, "columns 1:9"),
        (QKV, 0, (1, 1), -1, 0, None, "rows -1:0"),
        (QKV, 0, (1, 1), 0, -2, None, "columns -2:-1"),
        (QKV, 0, (1, 1), 0, 0, 0, "expert 0 of None"),
        (EXPERTS, 0, (1, 1), 0, 0, None, "expert None of 5"),
        (EXPERTS, 0, (1, 1), 0, 0, 5, "expert 5 of 5"),
        (EXPERTS, 0, (1, 1), 0, 0, -1, "expert -1 of 5"),
    ],
)
def test_a_write_outside_the_weight_is_refused_with_the_place(
    spec: WeightSpec, index: int, shape: tuple[int, ...], row: int, col: int, expert: int | None, reason: str
) -> None:
    with pytest.raises(OperatorError, match=reason) as caught:
        check_write(spec, index, shape, row, col, expert)
    assert spec.site in str(caught.value)


def test_a_write_up_to_the_edge_is_allowed() -> None:
    check_write(QKV, 0, (6, 8), 0, 0, None)
    check_write(QKV, 2, (1, 3), 1, 5, None)
    check_write(QKV, 2, (0, 0), 2, 8, None)
    check_write(EXPERTS, 0, (4, 3), 0, 0, 4)


def test_a_last_group_may_be_short() -> None:
    assert [Quantisation(group_size=128).groups(k) for k in (0, 1, 128, 129)] == [0, 1, 1, 2]
