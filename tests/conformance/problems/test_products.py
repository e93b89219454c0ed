"""Problems of products, adapters and stations: right backends pass, planted bugs fail, exact data are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Backend, Step, TableBackend, Weight, load
from polyaccel.backend.composite import lora
from polyaccel.backend.step import AdapterRows
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.adapters import HostAdapters, arrange, draw_adapters, module_ranks
from polyaccel_conformance.problems.dequantize import DequantizeProblem
from polyaccel_conformance.problems.embedding import EmbeddingProblem
from polyaccel_conformance.problems.linear import LinearProblem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.problems.sgmv import LoraProblem, SgmvProblem
from polyaccel_conformance.problems.stations import StationProblem
from polyaccel_conformance.problems.weights import FORMS, HostWeight, shares
from polyaccel_conformance.trial import Trial
from polyaccel_conformance.words import Source
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems

OPERATORS = (
    *("linear", "embedding", "sgmv", "sgmv_shrink", "sgmv_expand", "dequantize"),
    *("column_linear", "qkv_rope_cache", "gate_up_act", "row_parallel_linear", "row_parallel_add_norm"),
)
BACKENDS: Mapping[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}


def failures(bench: Bench, found: Iterator[Problem]) -> list[str]:
    """What the checks of values say about each problem."""
    wrong: list[str] = []
    for problem in found:
        trial = Trial(bench, problem)
        for check in VALUE_CHECKS.values():
            if check.applies(problem.case, problem):
                failure = check.run(trial)
                wrong += [] if failure is None else [f"{problem.case}: {failure.message}"]
        trial.close()
    return wrong


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_right_backends_pass(operator: str, backend: str, count: int) -> None:
    assert failures(Bench(BACKENDS[backend]()), problems(PROBLEM_SETS[operator], count, seed=41)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_and_the_longest_sums_pass(backend: str) -> None:
    def large() -> Iterator[Problem]:
        for operator, step in (("linear", 1), ("sgmv", 17)):
            found = PROBLEM_SETS[operator]
            first = {path: values[0] for path, values in found.axes().items()}
            for index, axes in enumerate(found.large()[::step]):
                mended = found.mend({**first, **axes})
                assert mended is not None
                yield found.problem(Case.of(operator, mended, index))

    assert failures(Bench(BACKENDS[backend]()), large()) == []


# -- planted bugs ------------------------------------------------------------------------------------------------------


def _without_mix(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: str) -> torch.Tensor:
    rows = step.input.adapters.get(row_set, AdapterRows())  # type: ignore[call-overload]
    saved = rows.weights.copy()
    rows.weights[:] = 1
    try:
        return lora.sgmv(y, x, weight, step, row_set)  # type: ignore[arg-type]
    finally:
        rows.weights[:] = saved


def _other_row_set(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: str) -> torch.Tensor:
    return lora.sgmv(y, x, weight, step, "tokens")


def _by_slot(rank_of: Callable[[int], int], slot_of: Callable[[int, int], int]) -> Callable[..., torch.Tensor]:
    """sgmv with another number of rank rows, or another slot, than is right."""

    def wrong(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: str) -> torch.Tensor:
        store, spec, total = step.state.adapters, weight.spec, y.float()
        if store is None:
            return y
        rows = step.input.rows(row_set)  # type: ignore[arg-type]
        for row, slot, mix in zip(rows.rows.tolist(), rows.slots.tolist(), rows.weights.tolist(), strict=True):
            for i in range(len(spec.slices)):
                matrices = store.read(spec.site, i, slot_of(slot, store.slots))
                if matrices is not None:
                    rank = rank_of(matrices.a.shape[0])
                    h = mix * (matrices.a[:rank].float() @ x[row].float())
                    total[row, spec.starts[i] : spec.starts[i + 1]] += matrices.b[:, :rank].float() @ h
        return y.copy_(total)

    return wrong


BUGS: Mapping[str, Callable[..., torch.Tensor]] = {
    "the mix weight is left out": _without_mix,
    "rows of the tokens where those of the logits are meant": _other_row_set,
    "the last rank row is dropped": _by_slot(lambda rank: rank - 1, lambda slot, slots: slot),
    "ranks are cut to multiples of 16": _by_slot(lambda rank: rank - rank % 16, lambda slot, slots: slot),
    "the neighbouring slot": _by_slot(lambda rank: rank, lambda slot, slots: (slot + 1) % slots),
    "the last slot is that before": _by_slot(lambda rank: rank, lambda slot, slots: min(slot, slots - 2)),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("data", ["normal", "integers", "cancelling"])
def test_planted_bugs_fail(bug: str, data: str) -> None:
    bench = Bench(TableBackend("cpu", {"sgmv": BUGS[bug]}))
    assert failures(bench, problems(PROBLEM_SETS["sgmv"], 40, seed=3, data=(data,))) != []


def test_the_loop_of_the_planted_bugs_is_right_without_one() -> None:
    bench = Bench(TableBackend("cpu", {"sgmv": _by_slot(lambda rank: rank, lambda slot, slots: slot)}))
    assert failures(bench, problems(PROBLEM_SETS["sgmv"], 30, seed=3)) == []


# -- data --------------------------------------------------------------------------------------------------------------


@given(operator=st.sampled_from(OPERATORS), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_mending_twice_is_mending_once(operator: str, seed: int) -> None:
    found, source = PROBLEM_SETS[operator], Source(seed)
    axes: dict[str, Choice] = {
        path: values[int(source.integers(path, (1,), 0, len(values) - 1)[0])] for path, values in found.axes().items()
    }
    once = found.mend(dict(axes))
    assert once is not None
    assert found.mend(dict(once)) == once


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_problem_is_the_same_every_time(operator: str) -> None:
    first, second = (list(problems(PROBLEM_SETS[operator], 5, seed=8)) for _ in range(2))
    assert [p.digests() for p in first] == [p.digests() for p in second]
    assert all(first[0].digests().values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("data", ["integers", "cancelling"])
def test_h_of_exact_data_is_held_by_every_permitted_format(dtype: str, data: str) -> None:
    for problem in problems(PROBLEM_SETS["sgmv"], 30, seed=2, dtype=(dtype,), data=(data,)):
        assert isinstance(problem, SgmvProblem)
        x = problem.operands["x"].values.astype(np.float64)
        for adapter in problem.adapters.oracle().values():
            for module in adapter:
                if module is not None:
                    assert np.abs(x @ module.a.T).max(initial=0) <= 256


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 33, 300])
def test_float32_operands_of_exact_products_have_more_than_eleven_bits(form: str, k: int) -> None:
    axes = {"dtype": ("float32",), "data": ("integers",), "dims__tokens": (33,), "dims__k": (k,)}
    (problem,) = problems(PROBLEM_SETS["linear"], 1, seed=2, structure__weight=(form,), **axes)
    assert isinstance(problem, LinearProblem)
    x, w = problem.operands["x"].values.astype(np.float64), problem.weight.matrix.values.astype(np.float64)
    assert (np.abs(x) > 2**11).any()
    assert (np.abs(x) @ np.abs(w).T).max() < 2**24


@pytest.mark.parametrize("operator", ["column_linear", "qkv_rope_cache", "gate_up_act", "row_parallel_add_norm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_exact_stations_need_no_rounding_between_parts(operator: str, dtype: str) -> None:
    found = problems(
        PROBLEM_SETS[operator],
        30,
        seed=2,
        dtype=(dtype,),
        data=("integers", "cancelling"),
        structure__segments=("each",),
    )
    for problem in found:
        assert isinstance(problem, StationProblem)
        projection = problem.projection()
        base = problem.values("x") @ projection.weight.T
        base = base if projection.bias is None else base + projection.bias
        assert np.array_equal(problem.format.round(base), base)


def test_the_kind_overflow_has_results_on_both_sides_of_the_largest_number() -> None:
    infinite = finite = 0
    for problem in problems(
        PROBLEM_SETS["linear"], 20, seed=4, dtype=("float16",), data=("overflow",), dims__tokens=(7,), dims__n=(7,)
    ):
        (expected,) = problem.expected().values()
        rounded = expected.format.round(expected.value)  # type: ignore[union-attr]
        infinite, finite = infinite + int(np.isinf(rounded).sum()), finite + int(np.isfinite(rounded).sum())
    assert infinite > 20
    assert finite > 20


def test_dequantize_covers_every_code_with_every_zero() -> None:
    axes = {"dims__n": (64,), "dims__k": (257,), "structure__weight": ("int4/g16",), "data": ("grid",)}
    (problem,) = problems(PROBLEM_SETS["dequantize"], 1, seed=1, **axes)
    assert isinstance(problem, DequantizeProblem)
    form = problem.weight.quantised
    assert form is not None
    group = np.arange(257) // form.group_size
    pairs = set(zip(form.codes.values.reshape(-1), form.zeros.values[:, group].reshape(-1), strict=True))
    assert len(pairs) == 256


def test_sampled_tokens_are_looked_up() -> None:
    axes = {"structure__ids": ("sampled",), "dims__tokens": (7,), "structure__segments": ("none",)}
    for problem in problems(PROBLEM_SETS["embedding"], 3, seed=1, **axes):
        assert isinstance(problem, EmbeddingProblem)
        prepared = problem.prepare(Bench(TableBackend("cpu", {})))
        step = prepared.arguments["step"]
        assert isinstance(step, Step)
        assert (step.input.token_ids < 0).all()
        assert np.array_equal(step.tensor("token_ids").numpy(), problem.ids)


# -- adapters in slots, and cut over ranks -----------------------------------------------------------------------------


def _arranged(ranks: tuple[tuple[int, ...], ...], slices: tuple[int, ...], k: int, seed: int) -> HostAdapters:
    source = Source(seed)
    return arrange(source, draw_adapters(source, "float32", "integers", ranks, slices, k))


@given(
    pattern=st.sampled_from(["pair", "equal", "mixed", "per_slice", "consecutive"]),
    rank=st.integers(1, 512),
    slices=st.integers(1, 3),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_ranges_do_not_overlap_and_the_last_slot_is_used(pattern: str, rank: int, slices: int, seed: int) -> None:
    found = _arranged(module_ranks(pattern, rank, slices), (2,) * slices, 3, seed)
    used = np.zeros(found.rank_rows, dtype=np.int64)
    for slot, where in found.ranges.items():
        held = found.adapters.get(slot) or found.discarded[slot]
        assert where.rank_rows >= max((m.rank for m in held if m is not None), default=0)
        used[where.first_rank_row : where.first_rank_row + where.rank_rows] += 1
    assert used.max() == 1
    assert used.min() == 0
    assert found.slots - 1 in found.adapters
    assert len(found.adapters) == found.slots - 2


@given(n=st.integers(0, 50), world_size=st.integers(1, 8))
def test_shares_are_even_and_complete(n: int, world_size: int) -> None:
    found = shares(n, world_size)
    sizes = [end - begin for begin, end in found]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    assert [begin for begin, _ in found[1:]] == [end for _, end in found[:-1]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_of_ranks_add_up_to_the_whole(world_size: int) -> None:
    (problem,) = problems(
        PROBLEM_SETS["sgmv"], 1, seed=9, dtype=("float32",), data=("integers",), dims__k=(16,), dims__n=(17,)
    )
    assert isinstance(problem, LoraProblem)
    source = Source(1)
    matrix = Operand(source.integers("w", (17, 16), -9, 9).astype(np.float64), "float32")
    bias = Operand(source.integers("b", (17,), -9, 9).astype(np.float64), "float32")
    whole = HostWeight(matrix=matrix, slices=problem.weight.slices, bias=bias)
    x = source.integers("x", (4, 16), -9, 9).astype(np.float64)
    y = x @ matrix.values.astype(np.float64).T + bias.values.astype(np.float64)
    columns = shares(16, world_size)
    rows = [shares(n, world_size) for n in whole.slices]
    summed, joined = np.zeros_like(y), [[] for _ in whole.slices]
    for rank, (begin, end) in enumerate(columns):
        part = whole.input_columns(begin, end, bias=rank == 0)
        summed += x[:, begin:end] @ part.matrix.values.astype(np.float64).T
        summed += 0 if part.bias is None else part.bias.values.astype(np.float64)
        cut = whole.output_rows([own[rank] for own in rows])
        product = x @ cut.matrix.values.astype(np.float64).T + cut.bias.values.astype(np.float64)  # type: ignore[union-attr]
        for i, (a, b) in enumerate(zip(cut.starts[:-1], cut.starts[1:], strict=True)):
            joined[i].append(product[:, a:b])
    assert np.array_equal(summed, y)
    assert np.array_equal(np.concatenate([part for parts in joined for part in parts], axis=1), y)
    for slot, adapter in problem.adapters.adapters.items():
        for i, module in enumerate(adapter):
            if module is not None:
                a = [problem.adapters.input_columns(*c).adapters[slot][i].a.values for c in columns]  # type: ignore[union-attr]
                b = [
                    problem.adapters.output_rows([own[rank] for own in rows]).adapters[slot][i].b.values  # type: ignore[union-attr]
                    for rank in range(world_size)
                ]
                assert np.array_equal(np.concatenate(a, axis=1), module.a.values)
                assert np.array_equal(np.concatenate(b, axis=0), module.b.values)
