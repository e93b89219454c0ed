"""Graphs and the cost of adapters: healthy code passes, each planted bug is caught by the check of its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polyaccel.backend import Backend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.checks.graph import GRAPH_CHECKS, ModelCheck
from polyaccel_conformance.checks.lora_cost import LORA_COST_CHECKS
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.simulated import broken

CHECKS = {n: c for n, c in {**GRAPH_CHECKS, **LORA_COST_CHECKS}.items() if isinstance(c, ModelCheck)}
SEED = 1


@pytest.mark.parametrize("name", CHECKS)
def test_healthy_code_passes_and_the_control_fails(name: str) -> None:
    bench = Bench(broken.healthy())
    assert CHECKS[name].unavailable(bench) == ""
    assert CHECKS[name].ask(bench, SEED) is None
    assert CHECKS[name].control(bench) == "failed as it must"


@pytest.mark.parametrize("name", GRAPH_CHECKS)
def test_another_backend_with_graphs_passes_and_its_control_fails(name: str) -> None:
    bench = Bench(FoldedBackend())
    assert CHECKS[name].ask(bench, SEED) is None
    assert CHECKS[name].control(bench) == "failed as it must"


@pytest.mark.parametrize(
    ("name", "mutant", "cause"),
    [
        ("graph.replay", broken.metadata_baked_in, "stale or wrong in a graph"),
        ("graph.replay", broken.grid_sized_at_capture, "stale or wrong in a graph"),
        ("graph.replay", broken.ledger_frozen, "launches not in the ledger"),
        ("graph.adapter_cost", broken.captures_after_each_load, "captured again"),
        ("graph.adapter_cost", broken.base_rows_work_for_adapters, "base rows cause adapter work"),
        ("graph.adapter_cost", broken.undeclared_launch, "adapters launch more than declared"),
        ("lora.load_cost", broken.one_copy_a_module, "copies grow with the modules"),
    ],
)
def test_each_planted_bug_is_caught(name: str, mutant: Callable[[], Backend], cause: str) -> None:
    found = CHECKS[name].ask(Bench(mutant()), SEED)
    assert found is not None
    assert (found.check, found.cause) == (name, cause)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("graph.replay", "does not capture graphs"),
        ("graph.adapter_cost", "does not capture graphs"),
        ("lora.load_cost", "offers the harness no activity"),
    ],
)
def test_a_device_that_has_nothing_to_ask_is_not_exercised_with_the_reason(name: str, reason: str) -> None:
    backend: Backend = load("cpu")
    assert reason in CHECKS[name].unavailable(Bench(backend))
