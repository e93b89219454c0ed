"""Every kind of mistake between ranks is found by the check that is named for it, and right backends pass them all."""

from __future__ import annotations

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.multi.ranks import RankPool
from polyaccel_conformance.multi.registry import RANKED_SETS, lockstep_checks
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.multi.cases import ranked_case, reduce_case
from tests.conformance.multi.subjects import subject

WITHHELD = 1.0
LINEAR = {"dims__tokens": 5, "dims__k": 16, "dims__n": 9}
MODULE = {"structure__module": "k_proj", "structure__ranks": "uneven"}

CAUGHT: list[tuple[str, str, Case]] = [
    ("times_world", "comm.collectives", reduce_case(3)),
    ("skips_last", "comm.collectives", reduce_case(3)),
    ("narrow", "comm.collectives", reduce_case(2)),
    ("narrow", "values.bound", reduce_case(3, data="normal", dims__rows=33, dims__width=31)),
    ("differing", "comm.collectives", reduce_case(4, data="positive")),
    ("no_barrier", "comm.barrier", ranked_case("barrier", 2, skew=(0, 100))),
    ("previous", "comm.back_to_back", reduce_case(2, structure__scenario="back_to_back")),
    ("mixing", "comm.interleaved", reduce_case(2, structure__scenario="interleaved")),
    ("wrong_group", "comm.subgroups", reduce_case(4, structure__scenario="subgroups")),
    ("silent_timeout", "comm.timeout", reduce_case(2, structure__scenario="withheld")),
    ("silent_failure", "comm.failure_on_one_rank", reduce_case(2, structure__scenario="failing")),
    ("bias_everywhere", "values.exact", ranked_case("row_parallel_linear", 2, structure__bias=True, **LINEAR)),
    ("full_delta", "values.exact", ranked_case("row_parallel_linear", 2, structure__adapters="each", **LINEAR)),
    ("full_delta", "lora.tp_delta_equal", ranked_case("sgmv", 2, **{**MODULE, "structure__module": "o_proj"})),
    ("padded_scale", "lora.tp_delta_equal", ranked_case("sgmv", 2, **MODULE)),
    ("further_collective", "comm.trace", ranked_case("row_parallel_linear", 2, structure__adapters="one", **LINEAR)),
    (
        "hidden_copy",
        "comm.row_parallel_operands",
        ranked_case("row_parallel_linear", 2, structure__operand="x", **LINEAR),
    ),
    ("full_weights", "comm.memory", ranked_case("row_parallel_linear", 2, structure__even=True)),
    ("full_weights", "comm.memory", ranked_case("sgmv", 2, structure__even=True)),
]
# Found by this check and by none of the others that were asked.
ALONE = {
    "differing",
    "no_barrier",
    "mixing",
    "silent_timeout",
    "silent_failure",
    "padded_scale",
    "further_collective",
    "hidden_copy",
    "full_weights",
    "wrong_group",
}


@pytest.mark.parametrize(("mutant", "check", "case"), CAUGHT, ids=[f"{m}-{c}" for m, c, _ in CAUGHT])
def test_a_mistake_is_found_by_its_check(server: ForkServer, mutant: str, check: str, case: Case) -> None:
    with RankPool(subject(mutant), case.ranks, server=server, withheld=WITHHELD) as pool:
        result = pool.run(case)
    found = {failure.check for failure in result.failures}
    assert check in found, result.failures
    if mutant in ALONE:
        assert found == {check}, result.failures


@pytest.mark.parametrize("case", {case.key: case for _, _, case in CAUGHT}.values(), ids=lambda c: c.operator)
def test_what_finds_mistakes_finds_none_in_a_right_backend(
    server: ForkServer, case: Case, pools: dict[int, RankPool]
) -> None:
    result = pools[case.ranks].run(case)
    assert result.passed, result.failures
    assert result.checks


@pytest.fixture(scope="module")
def pools(server: ForkServer):  # type: ignore[no-untyped-def]
    """Pools of right ranks by size of the world."""
    found = {world: RankPool(subject("composites"), world, server=server, withheld=WITHHELD) for world in (2, 3, 4)}
    yield found
    for pool in found.values():
        pool.close()


@pytest.mark.parametrize("name", ["cpu", "composites", "folded"])
def test_every_check_of_ranks_has_a_control_that_fails_on_the_same_device(server: ForkServer, name: str) -> None:
    with RankPool(subject(name), 2, server=server, withheld=WITHHELD) as pool:
        controls = {check: pool.control(check) for check in lockstep_checks() if check.startswith(("comm.", "lora."))}
    assert set(controls.values()) == {"failed as it must"}, controls


@pytest.mark.parametrize(("name", "world"), [("cpu", 2), ("folded", 3), ("composites", 4)])
def test_right_backends_pass_cases_of_every_operator(server: ForkServer, name: str, world: int) -> None:
    failures = {}
    with RankPool(subject(name), world, server=server, withheld=WITHHELD) as pool:
        for operator, problems in RANKED_SETS.items():
            axes = problems.axes()
            for index in range(3):
                # Axes have coprime-looking lengths; a stride of its own each gives many pairs in few cases.
                chosen = {
                    path.replace(".", "__"): values[(index * (place + 2) + place) % len(values)]
                    for place, (path, values) in enumerate(axes.items())
                }
                result = pool.run(ranked_case(operator, world, index, **chosen))
                failures |= {(operator, index): result.failures} if not result.passed else {}
    assert not failures


@pytest.mark.parametrize("operator", ["row_parallel_linear", "row_parallel_add_norm"])
def test_a_step_without_tokens_is_a_case_where_rank_rows_ride(server: ForkServer, operator: str) -> None:
    case = ranked_case(operator, 2, dims__tokens=0, structure__adapters="one")
    with RankPool(subject("folded"), 2, server=server) as pool:
        assert pool.run(case).passed
