"""Whatever the backend is asked, nothing that it issues breaks a row of the table of constraints, and it is right.

Ranks are processes with a simulated card each. Hypothesis draws a station's shapes, layouts, adapters and
circumstances; all ranks call it as a model does; the witness reads the descriptors of every call that reached CANN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.npu.constraints.case import COLUMN, LAYOUTS, ROW_PARALLEL, StationCase
from tests.npu.constraints.judge import faults
from tests.npu.constraints.pool import Pool, RankFailed
from tests.npu.constraints.violations import OLD_CANN

simulated = os.environ.get("CANNSIM_ACTIVE") == "1"
pytestmark = pytest.mark.skipif(not simulated, reason="descriptors are seen by the simulator alone")

LONG = "POLYACCEL_LONG_TESTS"
LONG_MACHINES = [("910B", 8), ("A3", 4), ("310P", 4)]
SIZES = {"910B": 4, "A3": 2, "310P": 2}
RANKS = st.sampled_from([1, 2, 3, 8, 16, 33, 130])


class Pools:
    """One pool at a time: ranks of several chips would crowd a small machine."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._key: tuple[str, int, str] | None = None
        self._world = 0

    def get(self, chip: str, world: int, cann: str = "") -> Pool:
        size = max(world, SIZES[chip]) if not cann else world
        key = (chip, size, cann)
        if self._pool is None or self._key != key:
            self.close()
            self._pool = Pool(chip, size, {"CANNSIM_CANN": cann} if cann else None)
            self._key, self._world = key, 0
        if self._world != world:
            self._pool.open(world)
            self._world = world
        return self._pool

    def close(self) -> None:
        """End the pool there is, such as one with a rank that failed."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    found = Pools()
    yield found
    found.close()


@st.composite
def cases(draw: st.DrawFn, chip: str = "910B") -> StationCase:
    """A call of any station."""
    station = draw(st.sampled_from([*ROW_PARALLEL, *ROW_PARALLEL, *COLUMN]))
    row_parallel = station in ROW_PARALLEL
    token_class = draw(st.sampled_from(["mixed", "mixed", "decode"]))
    if row_parallel:
        widths: tuple[int, ...] = (draw(st.integers(1, 24)),)
    elif station == "gate_up_act":
        widths = (draw(st.integers(1, 12)),) * 2
    else:
        widths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtypes = ["float16", "bfloat16", "float16", "bfloat16", "float32"] if chip != "310P" else ["float16"]
    return StationCase(
        station=station,
        token_class=token_class,
        dtype=draw(st.sampled_from(dtypes)),
        rows=draw(st.integers(1 if token_class == "decode" else 0, 9)),
        k=draw(st.integers(1, 40)),
        widths=widths,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        adapters=tuple(draw(st.lists(RANKS, max_size=2))),
        second_group=row_parallel and draw(st.sampled_from([False] * 5 + [True])),
        reduce=station != "row_parallel_linear" or draw(st.sampled_from([True] * 4 + [False])),
        seed=draw(st.integers(0, 99)),
    )


def asserted(pools: Pools, chip: str, world: int, case: StationCase) -> None:
    try:
        answers = pools.get(chip, world).call(case)
    except RankFailed:
        # A rank that failed is worth nothing afterwards.
        pools.close()
        raise
    found = [f"rank {rank}: {fault}" for rank, one in enumerate(answers) for fault in faults(chip, world, case, one)]
    assert not found, "\n".join(found)


def swept(pools: Pools, chip: str, world: int, examples: int) -> None:
    """Stations of every kind, and those calls that must not be left to chance."""

    @given(cases(chip))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @example(StationCase("row_parallel_linear", "mixed", "float16", 5, 8, (6,), bias=True, layout="transposed"))
    @example(StationCase("row_parallel_add_norm", "mixed", "float16", 5, 8, (6,), True, "columns", adapters=(4, 9)))
    @example(StationCase("row_parallel_linear", "mixed", "float16", 4, 8, (6,), bias=True, second_group=True))
    @example(StationCase("row_parallel_linear", "decode", "float16", 4, 8, (6,), bias=True, adapters=(3,)))
    @example(StationCase("row_parallel_linear", "mixed", "float16", 0, 8, (6,), bias=True))
    def check(case: StationCase) -> None:
        asserted(pools, chip, world, case)

    check()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_call_on_910b_breaks_a_row(pools: Pools, world: int) -> None:
    swept(pools, "910B", world, 30)


@pytest.mark.parametrize("world", [2, 4])
def test_float32_over_ranks_is_summed_by_hccl_and_stays_float32(pools: Pools, world: int) -> None:
    asserted(pools, "910B", world, StationCase("row_parallel_linear", "mixed", "float32", 4, 8, (6,), bias=True))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_name_every_contributor_in_order(pools: Pools, world: int) -> None:
    assert pools.get("910B", world).collect() == []


@pytest.mark.parametrize("world", [2, 4])
def test_an_adapter_on_merged_columns_narrower_than_its_rank_is_right_at_every_world_size(
    pools: Pools, world: int
) -> None:
    """vllm-ascend issue 16586: q, k and v in one weight, cut over ranks to slices narrower than the adapter's rank."""

    @given(
        station=st.sampled_from(COLUMN),
        token_class=st.sampled_from(["mixed", "decode"]),
        rank=st.sampled_from([16, 32, 64]),
        widths=st.lists(st.integers(1, 15), min_size=2, max_size=3),
        rows=st.integers(3, 7),
        dtype=st.sampled_from(["float16", "bfloat16"]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=8, suppress_health_check=list(HealthCheck))
    def check(station: str, token_class: str, rank: int, widths: list[int], rows: int, dtype: str, seed: int) -> None:
        cut = tuple(widths) if station == "column_linear" else (widths[0],) * 2
        case = StationCase(station, token_class, dtype, rows, 24, cut, adapters=(rank, rank + 1), seed=seed)
        asserted(pools, "910B", world, case)
        for found in pools.get("910B", world).call(case):
            assert found["composites"] == []
            assert found["launches"]["npu.grouped_matmul"] > len(cut), "at least a shrink, and an expand of every slice"

    check()


@pytest.mark.parametrize("rank", [64, 128, 200, 512])
def test_a_large_rank_stays_on_grouped_matmul(pools: Pools, rank: int) -> None:
    """vllm-ascend leaves its kernels at rank 128 and says nothing (issue 3930's punica_npu.py)."""
    case = StationCase("column_linear", "decode", "float16", 3, 16, (8, 4, 4), adapters=(rank,))
    asserted(pools, "910B", 1, case)
    (found,) = pools.get("910B", 1).call(case)
    assert found["composites"] == []
    assert found["launches"]["npu.grouped_matmul"] > 0
    assert not [name for name in found["launches"] if name.startswith("composite.")]


def test_no_call_on_a3_breaks_a_row(pools: Pools) -> None:
    swept(pools, "A3", 2, 30)


def test_no_call_on_310p_breaks_a_row(pools: Pools) -> None:
    swept(pools, "310P", 2, 30)


@pytest.mark.parametrize("rank", [8, 128])
def test_what_310p_lacks_is_said_in_the_plan_and_counted(pools: Pools, rank: int) -> None:
    """The same switch on 310P, where grouped matmul takes no lists: never silent."""
    case = StationCase("column_linear", "mixed", "float16", 3, 16, (8, 4, 4), adapters=(rank,))
    for found in pools.get("310P", 2).call(case):
        assert found["excess"] <= 1.0
        assert "sgmv" in found["composites"]
        assert any("310P" in reason and "grouped matmul" in reason for reason in found["reasons"])
        assert found["launches"]["composite.sgmv"] == 1
        assert "aclnnGroupedMatmulV5" not in found["aclnn"]


def test_bfloat16_on_310p_is_refused_by_name_before_anything_runs(pools: Pools) -> None:
    case = StationCase("row_parallel_linear", "mixed", "bfloat16", 3, 16, (8,))
    with pytest.raises(RankFailed, match="310P has no bfloat16"):
        pools.get("310P", 2).call(case)


def test_float32_products_on_310p_are_refused_for_they_would_be_float16(pools: Pools) -> None:
    case = StationCase("row_parallel_linear", "mixed", "float32", 3, 16, (8,))
    with pytest.raises(RankFailed, match="310P multiplies float32 as float16"):
        pools.get("310P", 2).call(case)


def test_a_cann_without_the_fused_function_is_refused_before_anything_runs(pools: Pools) -> None:
    case = StationCase("row_parallel_linear", "mixed", "float16", 3, 16, (8,))
    with pytest.raises(RankFailed, match=r"BackendUnavailable: CANN is older than 8\.0\.RC2"):
        pools.get("910B", 2, OLD_CANN).call(case)


@pytest.mark.skipif(not os.environ.get(LONG), reason=f"starts eight cards; set {LONG}=1")
@pytest.mark.parametrize(("chip", "world"), LONG_MACHINES)
def test_no_call_of_the_backend_breaks_a_row_on_more_cards(pools: Pools, chip: str, world: int) -> None:
    swept(pools, chip, world, 100)
