from __future__ import annotations

import pytest

from polyaccel.backend.errors import ConfigurationError
from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows


def target(rows: Rows, cols: Rows) -> AdapterTarget:
    return AdapterTarget(module="m", site="s", slice=0, in_features=4, out_features=6, out_rows=rows, in_cols=cols)


@pytest.mark.parametrize(("rows", "cols"), [(Rows.whole(7), Rows.whole(4)), (Rows.whole(6), Rows(((3, 5),)))])
def test_rows_or_columns_beyond_the_module_are_refused(rows: Rows, cols: Rows) -> None:
    with pytest.raises(ConfigurationError, match="6 x 4"):
        target(rows, cols)


def test_a_rank_without_rows_or_columns_holds_nothing() -> None:
    assert target(Rows.whole(6), Rows.whole(4)).is_local
    assert not target(Rows(), Rows.whole(4)).is_local
    assert not target(Rows.whole(6), Rows()).is_local
