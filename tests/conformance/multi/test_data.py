"""Data and bounds of cases with several ranks, without any process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.checks.comm import COMM_CHECKS
from polyaccel_conformance.compare import excess
from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.multi.problem import RankedProblem, cut, digits, radix, summed
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.oracle.bounded import Bounded, Expected, Floats, finish
from polyaccel_conformance.problems.collectives import AllReduceProblem
from polyaccel_conformance.problems.sharded import RowParallelProblem, ShardedProblem
from polyaccel_conformance.problems.sharded_sum import EmbeddingProblem, MoeExpertsProblem
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.words import Source
from tests.conformance.multi.cases import ranked_case, reduce_case

DTYPES = tuple(FORMATS)


def contributions(dtype: str, world: int, seed: int = 0) -> list[Floats]:
    """The digits of every rank."""
    case = reduce_case(world, dtype=dtype).with_seed(seed)
    problem = AllReduceProblem(case)
    return [digits(problem, "x", (8, 8), rank).astype(np.float64) for rank in range(world)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_sums_of_digits_are_exact_in_every_order(dtype: str, world: int) -> None:
    parts, keep = contributions(dtype, world), FORMATS[dtype]
    whole = sum(parts)
    for order in itertools.islice(itertools.permutations(range(world)), 24):
        total = np.zeros_like(parts[0])
        for rank in order:
            assert np.array_equal(keep.round(parts[rank]), parts[rank])
            total = keep.round(total + parts[rank])
        assert np.array_equal(total, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_a_sum_of_digits_names_its_contributors(dtype: str, world: int) -> None:
    """However often each rank is counted, from none to twice, no other choice gives the same sum."""
    parts = contributions(dtype, world)
    base = radix(dtype, world)
    counts = (
        itertools.product((0, 1, 2), repeat=world)
        if base > 2 and world < 8
        else [[int(rank != lost) for rank in range(world)] for lost in range(world)]
    )
    right = [1] * world
    for count in counts:
        if list(count) != right:
            other = sum(n * part for n, part in zip(count, parts, strict=True))
            assert np.all(other != sum(parts)), count


def sequential(parts: Sequence[Floats], keep: Format) -> Floats:
    total = parts[0]
    for part in parts[1:]:
        total = keep.round(total + part)
    return total


def backwards(parts: Sequence[Floats], keep: Format) -> Floats:
    return sequential(parts[::-1], keep)


def tree(parts: Sequence[Floats], keep: Format) -> Floats:
    level = list(parts)
    while len(level) > 1:
        level = [
            keep.round(level[i] + level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)
        ]
    return level[0]


def wide(parts: Sequence[Floats], keep: Format) -> Floats:
    return keep.round(sequential(parts, FORMATS["float32"]))


def ring(parts: Sequence[Floats], keep: Format) -> Floats:
    """Every element starts on another rank."""
    world, out = len(parts), np.zeros_like(parts[0])
    for start in range(world):
        turned = [parts[(start + i) % world].reshape(-1)[start::world] for i in range(world)]
        out.reshape(-1)[start::world] = sequential(turned, keep)
    return out


FORMS = (sequential, backwards, tree, wide, ring)


@pytest.mark.parametrize("form", FORMS)
@given(
    world=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(("normal", "wide", "positive")),
    seed=st.integers(0, 2**32),
)
def test_no_legitimate_sum_over_ranks_exceeds_the_bound(
    form: Callable[[Sequence[Floats], Format], Floats], world: int, dtype: str, kind: str, seed: int
) -> None:
    problem = AllReduceProblem(
        reduce_case(world, dtype=dtype, data=kind, dims__rows=16, dims__width=16).with_seed(seed)
    )
    expected = problem.expected()["y"]
    assert isinstance(expected, Expected)
    assert excess(expected, form(problem.parts, FORMATS[dtype])).max() <= 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_float32_sum_in_any_narrower_format_exceeds_the_bound(world: int) -> None:
    """The bound is also tight: the worst right sum comes near it, a sum one class lower is far beyond it."""
    problem = AllReduceProblem(reduce_case(world, data="normal", dims__rows=64, dims__width=64))
    expected = problem.expected()["y"]
    assert isinstance(expected, Expected)
    assert excess(expected, sequential(problem.parts, FORMATS["float32"])).max() >= 0.1
    for narrow in ("float16", "bfloat16"):
        rounded = [FORMATS[narrow].round(part) for part in problem.parts]
        assert excess(expected, sequential(rounded, FORMATS[narrow])).max() > 100


@pytest.mark.parametrize("form", ["add", "ride"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(world=st.integers(2, 8), seed=st.integers(0, 2**32), kind=st.sampled_from(("normal", "outliers", "digits")))
def test_both_forms_of_an_adapter_in_a_row_parallel_layer_stay_within_the_bound(
    form: str, dtype: str, world: int, seed: int, kind: str
) -> None:
    case = ranked_case(
        "row_parallel_linear",
        world,
        seed,
        dtype=dtype,
        data=kind,
        dims__tokens=5,
        dims__k=33,
        dims__n=17,
        structure__adapters="mixes",
        structure__ranks="mixed",
        structure__bias=True,
    )
    problem = RowParallelProblem(case)
    keep, triples = FORMATS[dtype], problem._triples
    products, rows = [], []
    for rank in range(world):
        share = problem.share(rank)
        x = problem.rows_of_x(rank).values.astype(np.float64)
        bias = problem.weight.bias_of(share)
        products.append(keep.round(x @ problem.weight.matrix_of(share).T + (0 if bias is None else bias)))
        rows.append(
            {slot: x @ a.T for slot, (module,) in problem.adapters_of(rank).items() if module for a in [module.a]}
        )

    def expand(h: dict[int, Floats]) -> Floats:
        delta = np.zeros((problem.tokens, problem.n))
        for row, slot, mix in zip(triples.rows, triples.slots, triples.mix, strict=True):
            module = problem.adapters[slot][0]
            assert module is not None
            delta[row] += mix * (h[slot][row] @ module.b.T)
        return delta

    if form == "add":
        got = sequential([keep.round(y + expand(h)) for y, h in zip(products, rows, strict=True)], keep)
    else:
        total = {slot: sequential([keep.round(h[slot]) for h in rows], keep) for slot in rows[0]}
        got = keep.round(sequential(products, keep) + (expand(total) if total else 0))
    expected = problem.expected()["y"]
    assert isinstance(expected, Expected)
    assert excess(expected, got).max(initial=0.0) <= 1


def axes_of(operator: str, world: int) -> st.SearchStrategy[dict[str, Choice]]:
    """Any combination of the values of an operator's axes."""
    axes = RANKED_SETS[operator].axes()
    return st.fixed_dictionaries({**{p: st.sampled_from(v) for p, v in axes.items()}, "ranks": st.just(world)})


@pytest.mark.parametrize("operator", sorted(set(RANKED_SETS) - {"model.layers"}))
@given(data=st.data(), world=st.integers(2, 4), seed=st.integers(0, 1000))
def test_every_combination_of_axes_is_a_case_that_all_ranks_see_alike(
    operator: str, data: st.DataObject, world: int, seed: int
) -> None:
    problems = RANKED_SETS[operator]
    mended = problems.mend(data.draw(axes_of(operator, world)))
    assert mended is not None
    assert problems.mend(dict(mended)) == mended
    case = Case.of(operator, mended, seed)
    assert Case.from_json(case.to_json()) == case
    problem = problems.problem(case)
    assert isinstance(problem, RankedProblem)
    views = [problem.on_rank(rank) for rank in range(world)]
    assert all(view.rank == rank for rank, view in enumerate(views))
    for view in views:
        expected = view.expected()
        assert set(view.replicated) <= set(expected)


def inputs_of(problem: RankedProblem, rank: int) -> bytes:
    """Everything that one rank computes with: tensors, and its part of the weights."""
    view = problem.on_rank(rank)
    parts = [operand.values for operand in view.operands.values()]
    if isinstance(view, ShardedProblem):
        parts.append(view.weight.matrix_of(view.share(rank)))
        parts += [module.b for adapter in view.adapters_of(rank).values() for module in adapter if module is not None]
    elif isinstance(view, EmbeddingProblem):
        parts.append(view.table.matrix_of(view.share(rank)))
    elif isinstance(view, MoeExpertsProblem):
        parts += [weight.matrix.values for weight in view.weights_of(rank)]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


@pytest.mark.parametrize("operator", sorted(set(RANKED_SETS) - {"barrier", "model.layers"}))
@pytest.mark.parametrize("kind", ["digits", "normal"])
def test_inputs_differ_from_rank_to_rank(operator: str, kind: str) -> None:
    sizes = {"rows": 8, "width": 5, "tokens": 4, "k": 17, "n": 17, "hidden": 8, "intermediate": 16, "experts": 8}
    known = {f"dims__{name}": size for name, size in sizes.items() if f"dims.{name}" in RANKED_SETS[operator].axes()}
    problem = RANKED_SETS[operator].problem(ranked_case(operator, 4, data=kind, **known))
    assert isinstance(problem, RankedProblem)
    found = [inputs_of(problem, rank) for rank in range(4)]
    assert all(len(one) > 0 for one in found)
    assert len(set(found)) == 4


@pytest.mark.parametrize("operator", sorted(set(RANKED_SETS) - {"barrier", "model.layers"}))
def test_every_operator_with_weights_is_asked_for_its_share_of_their_bytes(operator: str) -> None:
    problems = RANKED_SETS[operator]
    if RANKED_SETS[operator].problem(ranked_case(operator, 2)).spec.group == "ranks":
        assert "structure.even" not in problems.axes()
        return
    cases = [item.case for item in fixed(problems, ranks=2)]
    asked = [problem for c in cases if (problem := problems.problem(c)).evenly_cut]  # type: ignore[attr-defined]
    assert asked
    assert all(COMM_CHECKS["comm.memory"].applies(problem.case, problem) for problem in asked)


@pytest.mark.parametrize("operator", ["all_reduce", "all_gather", "reduce_scatter", "broadcast"])
def test_what_ranks_send_differs_from_rank_to_rank(operator: str) -> None:
    for kind in ("digits", "normal"):
        problem = RANKED_SETS[operator].problem(ranked_case(operator, 4, data=kind, dims__rows=4, dims__width=5))
        assert isinstance(problem, RankedProblem)
        sent = [problem.on_rank(rank).operands["x"].values for rank in range(4)]
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(sent, 2))


@given(n=st.integers(0, 300), world=st.integers(1, 9))
def test_a_cut_is_whole_ordered_and_even(n: int, world: int) -> None:
    parts = [cut(n, world, rank) for rank in range(world)]
    assert parts[0][0] == 0
    assert parts[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    sizes = [end - begin for begin, end in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_sum_carries_what_its_parts_bring() -> None:
    x = Source(0).normal("x", (4,))
    parts = [Bounded(x, np.full(4, 0.5)), Bounded(x, np.full(4, 0.25))]
    total = summed(parts, FORMATS["float32"], last=True)
    assert np.array_equal(total.bound, np.full(4, 0.75))
    assert finish(total, FORMATS["float32"]).tolerance.min() > 0.75
