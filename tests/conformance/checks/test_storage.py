"""Questions about storage: healthy backends answer them, each planted fault is found, every control fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from polyaccel.backend import Backend, TableBackend, load
from polyaccel.backend.composite.adapter_store import TensorAdapterStore
from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.composite.sampling_state import TensorSamplingState
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.checks.device_sets import DEVICE_QUESTIONS, DEVICE_SETS
from polyaccel_conformance.checks.generator import chi_square
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems

SUBJECTS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
STORAGE = ("storage.weight", "storage.adapters", "storage.kv", "storage.sampling")
SLOW = ("sample.generator", "cache.identity")


def results(backend: Backend, name: str, count: int, seed: int) -> list[CaseResult]:
    bench = Bench(backend)
    return [run_case(bench, p, [DEVICE_QUESTIONS[name]]) for p in problems(DEVICE_SETS[name], count, seed)]


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", STORAGE)
def test_healthy_backends_answer_every_question(name: str, subject: str) -> None:
    found = results(SUBJECTS[subject](), name, 30, 61)
    assert [r.failures for r in found if r.failures] == []
    assert all(r.checks == (name,) for r in found)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", DEVICE_SETS)
def test_every_control_fails_as_it_must(name: str, subject: str) -> None:
    assert DEVICE_QUESTIONS[name].control(Bench(SUBJECTS[subject]())) == "failed as it must"


@pytest.mark.parametrize("name", DEVICE_SETS)
def test_a_case_is_its_json_and_mending_twice_changes_nothing_more(name: str) -> None:
    for problem in problems(DEVICE_SETS[name], 60, 62):
        axes = {path: problem.case.axes()[path] for path in DEVICE_SETS[name].axes()}
        assert DEVICE_SETS[name].mend(dict(axes)) == axes
        assert Case.from_json(problem.case.to_json()) == problem.case


def caught(name: str, count: int = 40) -> bool:
    return any(not r.passed for r in results(TableBackend("cpu", {}), name, count, 63))


def test_a_write_that_ignores_its_column_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TensorWeight.write

    def write(
        self: TensorWeight, index: int, source: torch.Tensor, *, row: int = 0, col: int = 0, expert: int | None = None
    ) -> None:
        right(self, index, source, row=row, col=0 if col + source.shape[1] <= self.spec.k else col, expert=expert)

    monkeypatch.setattr(TensorWeight, "write", write)
    assert caught("storage.weight")


def test_a_weight_that_can_be_written_while_sealed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorWeight, "_check_open", lambda self: None)
    assert caught("storage.weight", 5)


def test_a_weight_that_is_cut_off_instead_of_refused_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyaccel.backend.composite.weight.check_write", lambda *arguments: None)
    assert caught("storage.weight", 5)


def test_a_stale_tail_of_a_larger_adapter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: tensor if tensor.dim() == 2 else zero(tensor))
    right = TensorAdapterStore.read

    def padded(self: TensorAdapterStore, site: str, index: int, slot: int, expert: int | None = None) -> object:
        """A kernel that multiplies by all of the slot's rank rows."""
        where, found = self._ranges[slot], right(self, site, index, slot, expert)
        if found is None or where is None:
            return found
        a, b = self.sites[site].rows(index, expert, where.first_rank_row, where.rank_rows)
        return type(found)(a=a, b=b.T)

    monkeypatch.setattr(TensorAdapterStore, "read", padded)
    assert caught("storage.adapters", 10)


def test_a_refused_adapter_that_stays_in_its_slot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TensorAdapterStore.clear
    calls: list[int] = []

    def lazy(self: TensorAdapterStore, slot: int) -> None:
        calls.append(slot)

    monkeypatch.setattr(TensorAdapterStore, "clear", lazy)
    monkeypatch.setattr(TensorAdapterStore, "_check_range", lambda self, where: None)
    assert caught("storage.adapters", 5)
    assert calls
    assert right is not lazy


def test_dropped_tokens_that_are_stored_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TensorKVCache.write

    def write(self: TensorKVCache, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        right(self, layer, slots.clamp(min=0), k, v)

    monkeypatch.setattr(TensorKVCache, "write", write)
    assert caught("storage.kv")


def test_blocks_copied_in_the_first_layer_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: TensorKVCache, sources: Sequence[int], destinations: Sequence[int]) -> None:
        self._by_block()[0][:, list(destinations)] = self._by_block()[0][:, list(sources)]

    monkeypatch.setattr(TensorKVCache, "copy_blocks", copy)
    assert caught("storage.kv")


@pytest.mark.parametrize("method", ["_write_bias", "_write_allowed"])
def test_what_a_former_request_left_behind_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., None] = getattr(TensorSamplingState, method)

    def sticky(self: TensorSamplingState, slot: int, row: object) -> None:
        asked = row.bias_ids if method == "_write_bias" else (row.allowed, row.forbidden_ids)  # type: ignore[attr-defined]
        if asked is not None and asked != (None, None):
            right(self, slot, row)

    monkeypatch.setattr(TensorSamplingState, method, sticky)
    assert caught("storage.sampling")


def test_the_chi_square_tail_is_that_of_the_tables() -> None:
    """Abramowitz and Stegun, table 26.8: 18.467 at 4 degrees of freedom leaves 0.001, 9.488 leaves 0.05."""
    shares = np.full(5, 0.2)
    for statistic, tail in ((18.467, 0.001), (9.488, 0.05)):
        off = np.sqrt(statistic * 1e8 / 2)
        counts = np.array([1e8 + off, 1e8 - off, 1e8, 1e8, 1e8]).astype(np.int64)
        assert chi_square(counts, shares) == pytest.approx(tail, rel=1e-3)


def test_the_generator_of_the_core_is_uniform_by_position_seed_and_choice() -> None:
    found = results(TableBackend("cpu", {}), "sample.generator", 3, 64)
    assert [r.failures for r in found if r.failures] == []


@pytest.mark.parametrize("change", DEVICE_SETS["cache.identity"].axes()["structure.change"])
def test_changed_content_is_never_answered_from_a_cache(change: str) -> None:
    case = Case.of("cache.identity", {"dtype": "float32", "structure.change": change}, 65)
    problem = DEVICE_SETS["cache.identity"].problem(case)
    assert run_case(Bench(load("cpu")), problem, [DEVICE_QUESTIONS["cache.identity"]]).failures == ()


def test_a_prefix_cache_that_is_keyed_by_tokens_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyaccel.engine.adapter_manager import AdapterManager

    monkeypatch.setattr(AdapterManager, "cache_key", lambda self, mix: ())
    case = Case.of("cache.identity", {"dtype": "float32", "structure.change": "mixed"}, 66)
    problem = DEVICE_SETS["cache.identity"].problem(case)
    [failure] = run_case(Bench(load("cpu")), problem, [DEVICE_QUESTIONS["cache.identity"]]).failures
    assert failure.check == "cache.identity"
