"""Layers fed the reference's input: healthy backends stay within the bound, and bugs that tokens hide are found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from polyaccel.backend import Backend, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.covering import covering
from polyaccel_conformance.models.chain import visible
from polyaccel_conformance.models.families import ADAPTERS, FAMILIES
from polyaccel_conformance.models.layers import LAYER_CHECKS, MIXES, NAME, PHASES, LayersProblem, LayersProblems
from polyaccel_conformance.models.planted_layers import LOGITS, PLANTED_LAYERS
from polyaccel_conformance.models.questions import workshop
from polyaccel_conformance.models.reference import Reference, Request
from polyaccel_conformance.models.variations import BASE, tokens
from polyaccel_conformance.multi.ranks import RankPool
from polyaccel_conformance.schedule import OfRanks
from polyaccel_conformance.simulated import SimulatedBackend
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.multi.subjects import subject

CHECK = LAYER_CHECKS[NAME]
CASES = covering(LayersProblems()).cases


def case(seed: int = 0, **axes: Choice) -> Case:
    """A small one, with some axes changed."""
    values: dict[str, Choice] = {
        "attributes.family": "qwen3",
        "structure.phase": "decode",
        "structure.adapters": "none",
        **{name.replace("__", "."): value for name, value in axes.items()},
    }
    return Case.of(NAME, values, seed)


def run(backend: Backend, asked: Case) -> CaseResult:
    return run_case(Bench(backend), LayersProblem(asked), [CHECK])


BACKENDS = {
    "cpu": lambda: load("cpu"),
    "composites": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
    "simulated": SimulatedBackend,
}


@pytest.mark.parametrize("name", BACKENDS)
def test_right_backends_stay_within_the_bound_at_every_station(name: str) -> None:
    backend = BACKENDS[name]()
    for asked in CASES:
        result = run(backend, asked)
        assert result.passed, result.failures
        stations = 10 if asked.attributes["family"] == "mixtral" else 8
        # The experts chosen are compared, but have no tolerance of which a share could be used.
        assert len(result.headroom) >= stations * 4
        assert max(result.headroom.values()) <= 1


def test_the_list_holds_every_family_phase_adapter_and_dtype() -> None:
    assert {str(c.attributes["family"]) for c in CASES} == set(FAMILIES)
    assert {str(c.structure["phase"]) for c in CASES} == set(PHASES)
    assert {str(c.structure["adapters"]) for c in CASES} == set(MIXES)
    assert {c.dtype for c in CASES} == {"float32", "bfloat16", "float16"}


def test_right_backends_use_a_good_part_of_the_bound() -> None:
    """A bound that nothing comes near finds nothing."""
    worst = [max(run(load("cpu"), case(dtype=dtype)).headroom.values()) for dtype in ("float32", "bfloat16")]
    assert worst[0] > 0.1
    assert worst[1] > 0.5


@pytest.mark.parametrize("name", [name for name in PLANTED_LAYERS if name != LOGITS])
def test_a_bug_in_one_layer_is_found_and_named(name: str) -> None:
    layer = 1 if "window" in name else 2
    with PLANTED_LAYERS[name]():
        (failure,) = run(load("cpu"), case()).failures
    assert failure.message.startswith(f"layers.{layer}."), failure.message


ALONE = ("engine.layer_residual_narrow", "engine.layer_rope_shifted", "engine.layer_other_eps")


@pytest.mark.parametrize("name", ALONE)
def test_tokens_do_not_show_it(name: str) -> None:
    bench = Bench(load("cpu"), subject=Subject(name="cpu"))
    shop = workshop(bench)
    shop.reference("qwen3", BASE)
    with PLANTED_LAYERS[name]():
        assert tokens(shop, "qwen3", lambda: load("cpu")).wrong is None


def test_its_control_fails_as_it_must() -> None:
    assert CHECK.control(Bench(load("cpu"))) == "failed as it must"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize(("name", "world"), [("cpu", 2), ("folded", 3), ("composites", 4)])
def test_right_backends_stay_within_the_bound_on_ranks(server: ForkServer, name: str, world: int) -> None:
    with RankPool(subject(name), world, server=server) as pool:
        for asked in covering(OfRanks(LayersProblems(), world)).cases:
            result = pool.run(asked)
            assert result.passed, result.failures
            assert {NAME, "comm.trace", "comm.collectives"} <= set(result.checks)


def test_a_delta_that_every_rank_adds_is_found_in_the_first_sum(server: ForkServer) -> None:
    with RankPool(subject("full_delta"), 2, server=server, checks=(NAME,)) as pool:
        result = pool.run(case(ranks=2, structure__adapters="one", attributes__family="llama"))
    assert [failure.message.partition(": ")[2].partition(":")[0] for failure in result.failures] == ["layers.0.o"]


def test_ranks_that_send_more_than_two_sums_a_layer_are_found(server: ForkServer) -> None:
    with RankPool(subject("further_collective"), 2, server=server) as pool:
        result = pool.run(case(ranks=2, structure__adapters="one", attributes__family="llama"))
    assert {failure.check for failure in result.failures} == {"comm.trace"}


def test_more_ranks_than_query_heads_are_no_case() -> None:
    mixtral: dict[str, Choice] = {"attributes.family": "mixtral", "ranks": 5}
    assert LayersProblems().mend(mixtral) is None
    assert LayersProblems().mend({"attributes.family": "llama", "ranks": 5}) is not None


@pytest.mark.parametrize("phase", PHASES)
def test_phases_are_what_they_are_called(phase: str) -> None:
    problem = LayersProblem(case(structure__phase=phase))
    older = [request.older for request in problem.requests]
    queries = [request.queries for request in problem.requests]
    assert len(problem.requests[0].ids) > 2 * 20
    if phase == "prefill":
        assert older == [0] * len(older)
    elif phase == "decode":
        assert queries == [1] * len(queries)
        assert all(older)
    else:
        assert queries[0] == 1
        assert older[-1] == 0
        assert queries[-1] > 1


def test_what_a_layer_is_fed_does_not_depend_on_how_the_tokens_are_split_into_steps() -> None:
    """The reference's own prefill and decode agree."""
    family = FAMILIES["qwen3"]
    model = Reference(family, dict(enumerate(ADAPTERS.values())))
    ids = np.arange(30) % family.vocabulary
    whole = model.inputs([Request(ids=ids, queries=30, mix={0: 1.0})])
    last = model.inputs([Request(ids=ids, queries=1, mix={0: 1.0})])
    for one, other in zip(whole, last, strict=True):
        assert np.array_equal(one.x[-1:], other.x)
        assert np.array_equal(one.residual[-1:], other.residual)
    assert [len(given.older[0][0]) for given in last] == [29] * family.layers


def test_a_window_counts_the_token_itself() -> None:
    assert visible(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert visible(1, 3, None).all()
