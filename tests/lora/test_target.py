from __future__ import annotations

import pytest

from polyaccel.backend.errors import ConfigurationError
from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows


def target(rows: Rows, cols: Rows, padded_rows: int = 0, padded_cols: int = 0) -> AdapterTarget:
    return AdapterTarget(
        module="m",
        site="s",
        slice=0,
        in_features=4,
        out_features=6,
        out_rows=rows,
        in_cols=cols,
        padded_rows=padded_rows,
        padded_cols=padded_cols,
    )


@pytest.mark.parametrize(("rows", "cols"), [(Rows.whole(7), Rows.whole(4)), (Rows.whole(6), Rows(((3, 5),)))])
def test_rows_or_columns_beyond_the_module_are_refused(rows: Rows, cols: Rows) -> None:
    with pytest.raises(ConfigurationError, match="6 x 4"):
        target(rows, cols)


def test_a_rank_without_rows_or_columns_holds_nothing() -> None:
    assert target(Rows.whole(6), Rows.whole(4)).is_local
    assert not target(Rows(), Rows.whole(4)).is_local
    assert not target(Rows.whole(6), Rows()).is_local


def test_a_slice_smaller_than_what_it_holds_is_refused() -> None:
    for padded_rows, padded_cols in ((5, 0), (0, 3)):
        with pytest.raises(ConfigurationError, match="holds 6 rows and 4 columns of a slice"):
            target(Rows.whole(6), Rows.whole(4), padded_rows, padded_cols)


def test_a_padded_slice_is_as_wide_and_high_as_its_padding() -> None:
    plain, padded = target(Rows.whole(5), Rows.whole(3)), target(Rows.whole(5), Rows.whole(3), 8, 9)
    assert (plain.a_width, plain.b_height) == (3, 5)
    assert (padded.a_width, padded.b_height) == (9, 8)
