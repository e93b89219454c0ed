"""Reading and writing by index, the paged cache, sorting, reductions and the elementwise table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators.environment import CHIP_310P
from polyaccel_cannsim.operators.refusal import INNER, INVALID, NULL_POINTER, NotSimulated, Refusal
from tests.cannsim_operators.operands import FLOATS, TABLE, check, close, draw, environment, exact, refused, run

SCATTER = "aclnnScatterPaKvCache"


def cache_call(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    mode: str | None,
) -> tuple[Any, ...]:
    return (key, keys, slots, value, values, None, None, None, mode, "None", (1, 1), (0, 0))


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(0, 6), st.sampled_from([1, 3]), st.sampled_from([16, 48]), st.sampled_from([4, 16])),
    blocks=st.integers(2, 4),
    nz=st.booleans(),
    kind=st.sampled_from([torch.int32, torch.int64]),
)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(
    seed: int, shape: tuple[int, int, int, int], blocks: int, nz: bool, kind: torch.dtype
) -> None:
    tokens, heads, width, block = shape
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(blocks * block, generator=generator)[:tokens]
    key, value = draw(seed, tokens, heads, width, dtype=torch.float16), draw(seed, tokens, heads, 2 * width).half()

    def cache(inside: int) -> torch.Tensor:
        form = (blocks, heads * inside // 16, block, 16) if nz else (blocks, block, heads, inside)
        return torch.full(form, 7.0, dtype=torch.float16)

    keys, values = cache(width), cache(2 * width)
    run(SCATTER, *cache_call(key, value, keys, values, slots.to(kind), "PA_NZ" if nz else "Norm"))
    for source, found in ((key, keys), (value, values)):
        flat = found.permute(0, 2, 1, 3).reshape(blocks * block, -1) if nz else found.reshape(blocks * block, -1)
        wanted = torch.full_like(flat, 7.0)
        wanted[slots] = source.reshape(tokens, flat.shape[1])
        assert torch.equal(flat, wanted)


ROWS, CACHE = torch.ones(2, 3, 16).half(), torch.ones(4, 8, 3, 16).half()
SLOTS = torch.tensor([1, 2])


def test_the_cache_call_that_the_refusals_start_from_is_legal() -> None:
    check(SCATTER, *cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, "Norm"))
    check(SCATTER, *cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (cache_call(torch.ones(3, 2, 16).half().transpose(0, 1), ROWS, CACHE, CACHE, SLOTS, "Norm"), "non-contiguous"),
        (cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, "PA_NZ"), "in PA_NZ"),
        (cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, "ND"), "cacheMode"),
        (cache_call(ROWS, ROWS.bfloat16(), CACHE, CACHE, SLOTS, "Norm"), "same dtype"),
        (cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS.float(), "Norm"), "dtype support list"),
        (cache_call(ROWS, ROWS, CACHE, CACHE, torch.tensor([1]), "Norm"), "one value for each"),
        (cache_call(ROWS, ROWS[:, :2].contiguous(), CACHE, CACHE, SLOTS, "Norm"), "first two axes"),
        (cache_call(ROWS, ROWS, CACHE[:, :, :2].contiguous(), CACHE, SLOTS, "Norm"), "heads and width"),
        (cache_call(ROWS, ROWS, CACHE, CACHE[:2], SLOTS, "Norm"), "equal blocks"),
        (cache_call(ROWS, ROWS, CACHE.flatten(2), CACHE, SLOTS, "Norm"), "dimensions"),
    ],
)
def test_the_simulator_refuses_what_the_page_of_the_paged_cache_forbids(arguments: tuple[Any, ...], words: str) -> None:
    refused(INVALID, words, SCATTER, *arguments)


@pytest.mark.parametrize(
    ("slots", "words"), [([1, 1], "must not repeat"), ([1, 32], "must lie in"), ([-1, 1], "must lie in")]
)
def test_duplicate_and_wild_slots_are_caught_on_the_device(slots: list[int], words: str) -> None:
    compute = check(SCATTER, *cache_call(ROWS, ROWS, CACHE.clone(), CACHE.clone(), torch.tensor(slots), "Norm"))
    with pytest.raises(Refusal, match=words) as caught:
        compute()
    assert caught.value.code == INNER


def test_compressed_caches_are_refused_by_name() -> None:
    arguments = list(cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, "Norm"))
    arguments[7] = torch.ones(2).int()
    with pytest.raises(NotSimulated, match="seq_lens"):
        check(SCATTER, *arguments)


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)),
    width=st.integers(1, 2),
    count=st.integers(1, 4),
)
def test_scatter_nd_update_writes_rows_of_any_depth(
    seed: int, shape: tuple[int, int, int], width: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = draw(seed, *shape).transpose(0, 2).contiguous().transpose(0, 2)
    depth = int(np.prod(shape[:width]))
    chosen = torch.randperm(depth, generator=generator)[:count]
    indices = torch.stack(torch.unravel_index(chosen, shape[:width]), 1)
    updates = draw(seed + 1, len(chosen), *shape[width:])
    wanted = target.clone()
    for row, update in zip(indices.tolist(), updates, strict=True):
        wanted[tuple(row)] = update
    run("aclnnScatterNdUpdate", target, indices, updates)
    assert torch.equal(target, wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4, 3).int(), torch.ones(2, 1).long(), torch.ones(2, 3).int()), "dtype support list"),
        ((torch.ones(4, 3), torch.ones(2).long(), torch.ones(2, 3)), "dimensions"),
        ((torch.ones(4, 3), torch.ones(2, 3).long(), torch.ones(2)), "last axis of indices"),
        ((torch.ones(4, 3), torch.ones(2, 1).long(), torch.ones(2, 4)), "Expected updates"),
        ((torch.ones(4, 3), torch.ones(2, 1).long(), torch.ones(2, 3).half()), "same dtype"),
    ],
)
def test_the_simulator_refuses_what_the_page_of_scatter_nd_update_forbids(
    arguments: tuple[Any, ...], words: str
) -> None:
    refused(INVALID, words, "aclnnScatterNdUpdate", *arguments)


@pytest.mark.parametrize("index", [[4], [-1]])
@pytest.mark.parametrize("name", ["aclnnEmbedding", "aclnnIndexSelect"])
def test_an_index_out_of_range_is_caught_on_the_device(name: str, index: list[int]) -> None:
    table, chosen, out = torch.ones(4, 3), torch.tensor(index), torch.ones(1, 3)
    compute = check(name, *((table, chosen, out) if name == "aclnnEmbedding" else (table, 0, chosen, out)))
    with pytest.raises(Refusal, match="outside"):
        compute()


@given(seed=st.integers(0, 2**16), shape=st.tuples(st.integers(1, 5), st.integers(1, 6)), count=st.integers(1, 5))
def test_gathers_and_puts_agree_with_torch(seed: int, shape: tuple[int, int], count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = draw(seed, *shape, dtype=torch.float16)
    rows = torch.randint(shape[0], (count,), generator=generator)
    columns = torch.randint(shape[1], (count,), generator=generator)
    out = torch.empty(count, shape[1], dtype=torch.float16)
    for name, arguments in (
        ("aclnnEmbedding", (x, rows)),
        ("aclnnIndexSelect", (x, 0, rows)),
        ("aclnnIndex", (x, (rows,))),
    ):
        run(name, *arguments, out.zero_())
        assert torch.equal(out, x[rows])
    nothing = torch.empty(0, dtype=torch.float16)
    across = torch.empty(shape[0], count, dtype=torch.float16)
    run("aclnnIndex", x, (nothing, columns), across)
    assert torch.equal(across, x[:, columns])
    run("aclnnGather", x, 1, columns.expand(shape[0], count), across)
    assert torch.equal(across, x[:, columns])
    added, values = x.clone(), draw(seed + 1, count, dtype=torch.float16)
    run("aclnnIndexPutImpl", added, (rows, columns), values, True, False)
    wanted = x.double()
    wanted.index_put_((rows, columns), values.double(), accumulate=True)
    close(added, exact(wanted), abs(exact(x)) + float(values.abs().sum()))
    summed = torch.empty_like(x)
    run("aclnnIndexAdd", x, 0, rows, out, 2.0, summed)
    close(summed, exact(x.double().index_add(0, rows, out.double(), alpha=2.0)), float(out.abs().sum()) * 2 + 1)


@given(
    seed=st.integers(0, 2**16), shape=st.tuples(st.integers(1, 4), st.integers(1, 12)), dtype=st.sampled_from(FLOATS)
)
def test_sorting_sampling_and_sums_match_numpy(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (draw(seed, *shape) * 2).round().to(dtype)  # many ties
    k = (seed % shape[1]) + 1
    values, indices = torch.empty(shape[0], k, dtype=dtype), torch.empty(shape[0], k, dtype=torch.int64)
    run("aclnnTopk", x, k, -1, True, True, values, indices)
    order = np.argsort(-exact(x), axis=-1, kind="stable")[:, :k]
    assert (indices.numpy() == order).all()
    assert (exact(values) == np.take_along_axis(exact(x), order, -1)).all()
    out, places = torch.empty_like(x), torch.empty(shape, dtype=torch.int64)
    run("aclnnSort", x, True, 1, False, out, places)
    assert (places.numpy() == np.argsort(exact(x), axis=-1, kind="stable")).all()
    first = torch.empty(shape[0], dtype=torch.int64)
    run("aclnnArgMax", x, 1, False, first)
    assert (first.numpy() == exact(x).argmax(-1)).all()
    weights = np.exp(exact(x) - exact(x).max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    run("aclnnSoftmax", x, -1, out)
    close(out, weights, weights, terms=shape[1] + 16)
    run("aclnnLogSoftmax", x, -1, out)
    close(out, np.log(weights), 20.0, terms=shape[1])
    run("aclnnCumsum", x, 1, dtype, out)
    close(out, np.cumsum(exact(x), -1), abs(exact(x)).sum(-1, keepdims=True), terms=shape[1])
    total = torch.empty(shape[0], dtype=dtype)
    run("aclnnReduceSum", x, (1,), False, dtype, total)
    close(total, exact(x).sum(-1), abs(exact(x)).sum(-1), terms=shape[1])


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 4), columns=st.integers(1, 5), dtype=st.sampled_from(FLOATS))
def test_arithmetic_broadcasts_and_rounds_once(seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    a, b = draw(seed, columns, rows, dtype=dtype).t(), draw(seed + 1, columns, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    left, right = exact(a), exact(b)
    for name, arguments, wanted in (
        ("aclnnAdd", (b, 2), left + 2 * right),
        ("aclnnSub", (b, 2), left - 2 * right),
        ("aclnnMul", (b,), left * right),
        ("aclnnDiv", (b,), left / right),
        ("aclnnAdds", (1.5, 1), left + 1.5),
        ("aclnnMuls", (1.5,), left * 1.5),
        ("aclnnRsubs", (1.5, 1), 1.5 - left),
    ):
        run(name, a, *arguments, out)
        close(out, wanted, abs(left) + 2 * abs(right) + 1.5 + abs(wanted))
    kept = a.clone()
    run("aclnnInplaceAdd", kept, b, 1)
    run("aclnnAdd", a, b, 1, out)
    assert torch.equal(kept, out)
    smaller = torch.empty(rows, columns, dtype=torch.bool)
    run("aclnnLtTensor", a, b, smaller)
    assert (smaller.numpy() == (left < right)).all()
    run("aclnnSWhere", smaller, a, b, out)
    assert (exact(out) == np.where(left < right, left, right)).all()


def test_broken_shapes_and_nulls_of_the_elementwise_table_are_refused() -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 4)
    refused(INVALID, "can not be broadcast", "aclnnAdd", x, y, 1, x)
    refused(INVALID, "Expected out", "aclnnMul", x, x, y)
    refused(NULL_POINTER, "other", "aclnnAdd", x, None, 1, x)
    refused(INVALID, "dtype support list", "aclnnSigmoid", x.int(), x)
    refused(INVALID, "out of range", "aclnnTopk", x, 4, -1, True, True, y, y.long())
    refused(INVALID, "can not be joined", "aclnnCat", (x, y), 0, x)
    refused(INVALID, "data type of out", "aclnnCast", x, torch.float16, x)


def test_no_operator_is_described_twice_and_each_cites_a_document() -> None:
    from polyaccel_cannsim.operators import OPERATORS

    assert len(TABLE) == len(OPERATORS) > 100
    assert all(row.document.startswith(("hicann/", "Ascend/")) and row.serves for row in OPERATORS)


def test_the_simulator_refuses_the_paged_cache_on_310p() -> None:
    call = cache_call(ROWS, ROWS, CACHE, CACHE, SLOTS, "Norm")
    refused(INVALID, "not supported on this chip", SCATTER, *call, env=environment(chip=CHIP_310P))
