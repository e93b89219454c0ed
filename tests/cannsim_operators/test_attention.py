"""Attention operators against a float64 reference written per query, and the documented limits."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators import attention_decode
from polyaccel_cannsim.operators.environment import CHIP_310P, CHIP_A3
from polyaccel_cannsim.operators.operator import Launch
from polyaccel_cannsim.operators.refusal import INNER, INVALID, TILING, NotSimulated, Refusal
from tests.cannsim_operators.operands import HALVES, Array, check, close, draw, environment, exact, refused, run

FUSED = "aclnnFusedInferAttentionScoreV3"
INCRE = "aclnnIncreFlashAttentionV4"
PROMPT = "aclnnPromptFlashAttentionV3"
FAR = 2147483647
CAUSAL = torch.ones(2048, 2048).triu(1).bool()


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, **given: Any
) -> tuple[Any, ...]:
    """Arguments of aclnnFusedInferAttentionScoreV3 in C's order."""
    call: dict[str, Any] = {
        "mask": None,
        "actual": None,
        "actual_keys": None,
        "table": None,
        "heads": 1,
        "scale": 1.0,
        "before": FAR,
        "after": FAR,
        "layout": "BSH",
        "key_heads": 0,
        "sparse": 0,
        "precise": 0,
        "block_size": 0,
        "lse": None,
        "shift": None,
    }
    assert given.keys() <= call.keys()
    c = call | given
    return (
        *(query, (key,), (value,), c["shift"], c["mask"], c["actual"], c["actual_keys"], *([None] * 7), c["table"]),
        *([None] * 8),
        *(None, *([None] * 3), c["heads"], c["scale"], c["before"], c["after"], c["layout"], c["key_heads"]),
        *(c["sparse"], c["precise"], c["block_size"], 0, c["lse"] is not None, 0, 0, out, c["lse"]),
    )


def reference(q: Array, k: Array, v: Array, scale: float, visible: Array) -> tuple[Array, Array]:
    """One sequence. q [Q, N, D], k and v [K, KVN, D], visible [Q, K]; returns [Q, N, D] and |weights| @ |v|."""
    group = q.shape[1] // k.shape[1]
    out, size = np.zeros(q.shape[:2] + v.shape[2:]), np.zeros(q.shape[:2] + v.shape[2:])
    for i in range(q.shape[0]):
        for n in range(q.shape[1]):
            seen = visible[i].astype(bool)
            if not seen.any():
                continue
            scores = k[seen, n // group] @ q[i, n] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[i, n] = weights @ v[seen, n // group]
            size[i, n] = weights @ abs(v[seen, n // group])
    return out, size


def visible(queries: int, keys: int, mode: int, before: int = FAR, after: int = FAR) -> Array:
    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    if mode == 2:
        return np.asarray(j <= i)
    if mode == 3:
        return np.asarray(j <= i + keys - queries)
    if mode == 4:
        return np.asarray((j >= i + keys - queries - before) & (j <= i + keys - queries + after))
    return np.ones((queries, keys))


def paged(rows: list[torch.Tensor], block: int, heads_first: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with the rows [len, heads, D] of each sequence in shuffled blocks, the rest NaN; and its block table."""
    needed = [-(-len(one) // block) for one in rows]
    total, widest = sum(needed) + 2, max(needed) + 1
    heads, width = rows[0].shape[1:]
    cache = torch.full((total, block, heads, width), float("nan"), dtype=rows[0].dtype)
    free = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(rows), widest), -1, dtype=torch.int32)
    for s, one in enumerate(rows):
        for b in range(needed[s]):
            table[s, b] = free[0]
            part = one[b * block : (b + 1) * block]
            cache[free.pop(0), : len(part)] = part
    stored = cache.transpose(1, 2).contiguous() if heads_first else cache.reshape(total, block, heads * width)
    return stored, table


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 140)), min_size=1, max_size=3)


@given(
    seed=st.integers(0, 2**16),
    lengths=LENGTHS,
    group=st.sampled_from([(1, 1), (3, 3), (4, 2), (9, 3)]),
    mode=st.sampled_from([2, 3, 4]),
    before=st.integers(0, 150),
    layout=st.sampled_from(["BSH", "BSND", "BNSD", "TND"]),
    heads_first=st.booleans(),
    dtype=st.sampled_from(HALVES),
)
def test_paged_attention_of_chunks_matches_float64(
    seed: int,
    lengths: list[tuple[int, int]],
    group: tuple[int, int],
    mode: int,
    before: int,
    layout: str,
    heads_first: bool,
    dtype: torch.dtype,
) -> None:
    heads, key_heads = group
    width = 128 if layout == "TND" else 64
    heads_first = heads_first and layout in ("BNSD", "TND")
    chunk = [q for q, _ in lengths]
    total = [q + past for q, past in lengths]
    keys = [draw(seed + i, n, key_heads, width, dtype=dtype) for i, n in enumerate(total)]
    values = [draw(seed + 20 + i, n, key_heads, width, dtype=dtype) for i, n in enumerate(total)]
    queries = [draw(seed + 40 + i, q, heads, width, dtype=dtype) for i, q in enumerate(chunk)]
    key, table = paged(keys, 128, heads_first, seed)
    value, _ = paged(values, 128, heads_first, seed)
    span = max(max(chunk), 2)  # at Q_S = 1 the mode has no effect
    if layout == "TND":
        query = torch.cat(queries)
        actual = tuple(int(n) for n in np.cumsum(chunk))
    else:
        query = torch.full((len(chunk), span, heads, width), float("nan"), dtype=dtype)
        for i, q in enumerate(queries):
            query[i, : len(q)] = q
        actual = tuple(chunk)
        if layout == "BSH":
            query = query.reshape(len(chunk), span, heads * width)
        elif layout == "BNSD":
            query = query.transpose(1, 2).contiguous()
    out = torch.full_like(query, 7.0)
    scale = width**-0.5
    call = fused(
        *(query, key, value, out),
        mask=CAUSAL,
        actual=actual,
        actual_keys=tuple(total),
        table=table,
        heads=heads,
        key_heads=key_heads,
        scale=scale,
        layout=layout,
        sparse=mode,
        before=before,
        after=0,
        block_size=128,
    )
    run(FUSED, *call)
    if layout == "TND":
        found = list(out.split(chunk))
    else:
        whole = out.transpose(1, 2) if layout == "BNSD" else out.view(len(chunk), span, heads, width)
        found = [whole[i, :q] for i, q in enumerate(chunk)]
        for i, q in enumerate(chunk):
            assert bool((whole[i, q:] == 7).all()), "rows past the length are not written"
    for i, one in enumerate(found):
        seen = visible(chunk[i], total[i], mode, before, 0)
        wanted, size = reference(exact(queries[i]), exact(keys[i]), exact(values[i]), scale, seen)
        close(one, wanted, size * 8, terms=total[i] + width)


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    layout=st.sampled_from(["BSH", "BSND", "BNSD"]),
    name=st.sampled_from([FUSED, INCRE]),
    padded=st.sampled_from([0, 2, 99]),
    stale=st.booleans(),
)
def test_decode_reads_the_keys_of_the_block_table_whatever_the_sparse_mode(
    seed: int, lengths: list[int], layout: str, name: str, padded: int, stale: bool
) -> None:
    """One sequence after the other, those of like lengths at once, or all at once; past a length the table may name
    no block or another's."""
    heads, key_heads, width, batch = 4, 2, 32, len(lengths)
    keys = [draw(seed + i, n, key_heads, width, dtype=torch.float16) for i, n in enumerate(lengths)]
    values = [draw(seed + 9 + i, n, key_heads, width, dtype=torch.float16) for i, n in enumerate(lengths)]
    query = draw(seed + 30, batch, heads, width, dtype=torch.float16)
    key, table = paged(keys, 16, False, seed)
    value, _ = paged(values, 16, False, seed)
    if stale:
        table[table < 0] = key.shape[0] - 1
    shape = {"BSH": (batch, 1, heads * width), "BSND": (batch, 1, heads, width), "BNSD": (batch, heads, 1, width)}[
        layout
    ]
    given_query, out = query.reshape(shape), torch.empty(shape, dtype=torch.float16)
    lse = torch.empty(batch, heads, 1, 1) if name == FUSED else None
    with patch.object(attention_decode, "_PADDED", padded):
        if name == FUSED:
            options: dict[str, Any] = {"heads": heads, "key_heads": key_heads, "layout": layout, "sparse": 3}
            options |= {"table": table, "actual_keys": tuple(lengths), "block_size": 16, "lse": lse, "scale": 0.25}
            run(name, *fused(given_query, key, value, out, **options))
        else:
            head = (given_query, (key,), (value,), None, None, tuple(lengths), *([None] * 7), table, None)
            run(name, *head, heads, 0.25, layout, key_heads, 16, 1, out)
    for i, n in enumerate(lengths):
        if lse is not None:
            scores = exact(query[i]).reshape(key_heads, 2, width) @ exact(keys[i]).transpose(1, 2, 0) * 0.25
            sums = np.log(np.exp(scores).sum(-1)).reshape(heads)
            np.testing.assert_allclose(exact(lse[i, :, 0, 0]), sums, rtol=1e-5, atol=1e-5)
        wanted, size = reference(exact(query[i : i + 1]), exact(keys[i]), exact(values[i]), 0.25, np.ones((1, n)))
        close(out.view(batch, heads, width)[i : i + 1], wanted, size * 8, terms=n + width)


@given(
    seed=st.integers(0, 2**16),
    spans=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 9)),
    layout=st.sampled_from(["BSH", "BSND", "BNSD", "BNSD_BSND"]),
    masked=st.booleans(),
    name=st.sampled_from([FUSED, PROMPT]),
)
def test_dense_prompts_with_a_full_mask_match_float64_and_return_the_log_sum(
    seed: int, spans: tuple[int, int, int], layout: str, masked: bool, name: str
) -> None:
    batch, rows, columns = spans
    heads, key_heads, width = 4, 2, 16
    query = draw(seed, batch, rows, heads, width, dtype=torch.float16)
    key = draw(seed + 1, batch, columns, key_heads, width, dtype=torch.float16)
    value = draw(seed + 2, batch, columns, key_heads, width, dtype=torch.float16)
    mask = torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3 if masked else None

    def arranged(x: torch.Tensor) -> torch.Tensor:
        if layout == "BSH":
            return x.flatten(2)
        return x.transpose(1, 2).contiguous() if layout.startswith("BNSD") else x

    q, k, v = arranged(query), arranged(key), arranged(value)
    out = torch.empty(batch, rows, heads, width, dtype=torch.float16) if layout == "BNSD_BSND" else torch.empty_like(q)
    lse = torch.empty(batch, heads, rows, 1)
    if name == FUSED:
        options: dict[str, Any] = {"heads": heads, "key_heads": key_heads, "layout": layout, "scale": 0.5, "lse": lse}
        run(name, *fused(q, k, v, out, mask=mask, precise=2, **options))
    else:
        run(name, q, k, v, None, mask, None, None, *([None] * 5), heads, 0.5, FAR, FAR, layout, key_heads, 0, 1, out)
    whole = out.transpose(1, 2) if layout == "BNSD" else out.view(batch, rows, heads, width)
    for i in range(batch):
        seen = np.ones((rows, columns)) if mask is None else 1 - exact(mask[i])
        wanted, size = reference(exact(query[i]), exact(key[i]), exact(value[i]), 0.5, seen)
        close(whole[i], wanted, size * 8, terms=columns + width)
    if name == FUSED and mask is None:
        scores = np.einsum("bqnd,bknd->bnqk", exact(query), exact(key).repeat(2, axis=2)) * 0.5
        np.testing.assert_allclose(exact(lse)[..., 0], np.log(np.exp(scores).sum(-1)), rtol=1e-5, atol=1e-5)


def base(**changes: Any) -> tuple[Any, ...]:
    """A legal paged prefill: 2 sequences of 3 and 2 tokens, 4 heads of 64 on 2, blocks of 128."""
    options: dict[str, Any] = {
        "query": torch.ones(2, 3, 256, dtype=torch.float16),
        "key": torch.ones(4, 128, 128, dtype=torch.float16),
        "value": None,
        "out": torch.ones(2, 3, 256, dtype=torch.float16),
        "mask": CAUSAL,
        "actual": (3, 2),
        "actual_keys": (130, 2),
        "table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "heads": 4,
        "key_heads": 2,
        "sparse": 3,
        "block_size": 128,
    }
    options |= changes
    key = options.pop("key")
    value = options.pop("value")
    return fused(options.pop("query"), key, key if value is None else value, options.pop("out"), **options)


def test_the_call_that_the_refusals_start_from_is_legal() -> None:
    check(FUSED, *base())
    check(FUSED, *base(), env=environment(chip=CHIP_A3))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"query": torch.ones(2, 256, 3, dtype=torch.float16).transpose(1, 2)}, INVALID, "non-contiguous"),
        ({"key": torch.ones(4, 128, 256, dtype=torch.float16)[..., ::2]}, INVALID, "non-contiguous"),
        ({"query": torch.ones(2, 3, 256)}, INVALID, "dtype support list"),
        ({"key": torch.ones(4, 128, 128, dtype=torch.bfloat16)}, INVALID, "same dtype"),
        ({"layout": "BSD"}, INVALID, "inputLayout"),
        ({"heads": 3}, INVALID, "multiple"),
        ({"heads": 256, "key_heads": 2}, INVALID, "at most 64"),
        ({"key_heads": 3}, INVALID, "multiple"),
        ({"actual": (4, 2)}, INVALID, r"\[0, 3\]"),
        ({"actual_keys": None}, TILING, "must be given with a blockTable"),
        ({"actual_keys": (300, 2)}, INVALID, r"\[0, 256\]"),
        ({"actual_keys": (256, 256), "key": torch.ones(3, 128, 128, dtype=torch.float16)}, TILING, "need 4"),
        ({"table": torch.zeros(2, 2, dtype=torch.int64)}, INVALID, "dtype support list"),
        ({"table": torch.zeros(3, 2, dtype=torch.int32)}, TILING, "blockTable"),
        ({"table": torch.zeros(4, dtype=torch.int32)}, INVALID, "dimensions"),
        ({"block_size": 64, "key": torch.ones(8, 64, 128, dtype=torch.float16)}, TILING, "128, 256, 384 or 512"),
        ({"block_size": 640, "key": torch.ones(4, 640, 128, dtype=torch.float16)}, TILING, "128, 256, 384 or 512"),
        ({"block_size": 0}, TILING, "128, 256, 384 or 512"),
        ({"key": torch.ones(4, 2, 128, 64, dtype=torch.float16)}, TILING, "only caches"),
        ({"sparse": 5}, INVALID, "only 0 to 4"),
        ({"mask": None}, INVALID, "attenMask must be given"),
        ({"mask": CAUSAL[:1024, :1024].contiguous()}, INVALID, "2048"),
        ({"sparse": 1, "mask": CAUSAL[:3, :130].contiguous()}, INVALID, "must cover"),
        ({"mask": CAUSAL.float()}, INVALID, "dtype support list"),
        ({"precise": 4}, INVALID, "innerPrecise"),
        ({"out": torch.ones(2, 3, 128, dtype=torch.float16)}, INVALID, "attentionOut"),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, dict) else None,
)
def test_the_simulator_refuses_what_the_page_of_fused_infer_attention_forbids(
    changes: dict[str, Any], code: int, words: str
) -> None:
    refused(code, words, FUSED, *base(**changes))


def test_the_simulator_refuses_head_widths_that_are_no_multiple_of_16() -> None:
    narrow = torch.ones(2, 3, 4 * 24, dtype=torch.float16)
    key = torch.ones(4, 128, 2 * 24, dtype=torch.float16)
    refused(TILING, "multiple of 16", FUSED, *base(query=narrow, key=key, out=narrow))


def test_the_simulator_refuses_cache_rows_of_more_than_65535() -> None:
    query = torch.ones(1, 3, 256 * 512, dtype=torch.float16)
    key = torch.ones(1, 128, 128 * 512, dtype=torch.float16)
    refused(
        *(TILING, "65535", FUSED),
        *base(
            query=query,
            key=key,
            out=query,
            heads=256,
            key_heads=128,
            actual=None,
            actual_keys=(2,),
            table=CAUSAL[:1, :1].int(),
        ),
    )


def tnd(**changes: Any) -> tuple[Any, ...]:
    rows = torch.ones(5, 4, 128, dtype=torch.float16)
    options: dict[str, Any] = {
        "query": rows,
        "key": torch.ones(4, 128, 2 * 128, dtype=torch.float16),
        "out": rows,
        "layout": "TND",
        "actual": (3, 5),
    }
    return base(**(options | changes))


def test_tnd_is_legal_with_width_128_and_running_totals() -> None:
    check(FUSED, *tnd())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actual": (3, 2)}, "running totals"),
        ({"actual": (3, 6)}, "running totals"),
        ({"actual": None}, "must be given"),
        ({"block_size": 24, "key": torch.ones(8, 24, 256, dtype=torch.float16)}, "multiple of 16"),
        ({"sparse": 0}, "only without attenMask"),
    ],
)
def test_the_simulator_refuses_what_the_page_forbids_in_tnd(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        check(FUSED, *tnd(**changes))


def test_the_simulator_refuses_width_64_in_tnd() -> None:
    rows = torch.ones(5, 4, 64, dtype=torch.float16)
    key = torch.ones(4, 128, 128, dtype=torch.float16)
    refused(TILING, "128 or 192", FUSED, *tnd(query=rows, out=rows, key=key))


def test_a_mask_that_is_not_causal_is_caught_on_the_device() -> None:
    compute = check(FUSED, *base(mask=~CAUSAL))
    with pytest.raises(Refusal, match="above it"):
        compute()


def test_a_block_that_the_cache_lacks_is_caught_on_the_device() -> None:
    compute = check(FUSED, *base(table=torch.tensor([[0, 9], [2, 3]], dtype=torch.int32)))
    with pytest.raises(Refusal, match="blockTable names blocks") as caught:
        compute()
    assert caught.value.code == INNER


@pytest.mark.parametrize("block", [-1, 4])
def test_a_decode_step_that_needs_a_block_that_the_cache_lacks_is_caught_on_the_device(block: int) -> None:
    query = torch.ones(2, 1, 256, dtype=torch.float16)
    table = torch.tensor([[0, block], [2, 3]], dtype=torch.int32)
    step = {"query": query, "out": query.clone(), "mask": None, "sparse": 0, "actual": None, "table": table}
    check(FUSED, *base(**step, actual_keys=(128, 130)))()
    compute = check(FUSED, *base(**step, actual_keys=(129, 130)))
    with pytest.raises(Refusal, match=rf"blockTable names blocks \[0, {block}\]"):
        compute()


@pytest.mark.parametrize("layout", ["BSH", "BSND"])
def test_sequences_of_one_token_in_a_longer_query_are_no_decode_step(layout: str) -> None:
    """All were computed at once, as if each had only its first token, and rows past the length were written."""
    shape = (2, 3, 256) if layout == "BSH" else (2, 3, 4, 64)
    query = draw(1, 2, 3, 256, dtype=torch.float16)
    key, value = (draw(seed, 4, 128, 128, dtype=torch.float16) for seed in (2, 3))
    out = torch.full(shape, 7.0, dtype=torch.float16)
    options: dict[str, Any] = {"mask": None, "sparse": 0, "actual": (1, 1), "actual_keys": (130, 2), "layout": layout}
    run(FUSED, *base(query=query.view(shape), key=key, value=value, out=out, scale=0.125, **options))
    whole = out.view(2, 3, 4, 64)
    assert bool((whole[:, 1:] == 7).all())
    for i, (blocks, n) in enumerate((((0, 1), 130), ((2, 3), 2))):
        k, v = (exact(x[list(blocks)].reshape(256, 2, 64)[:n]) for x in (key, value))
        wanted, size = reference(exact(query.view(2, 3, 4, 64)[i, :1]), k, v, 0.125, np.ones((1, n)))
        close(whole[i, :1], wanted, size * 8, terms=n + 64)


def test_what_is_not_simulated_says_so_by_name() -> None:
    call = list(base())
    call[3] = torch.ones(2, 4, 3, 130, dtype=torch.float16)
    with pytest.raises(NotSimulated, match="pseShift"):
        check(FUSED, *call)
    with pytest.raises(NotSimulated, match="layout TND_NTD"):
        check(FUSED, *base(layout="TND_NTD"))


def test_the_simulator_refuses_fused_infer_attention_on_310p() -> None:
    refused(INVALID, "not supported on this chip", FUSED, *base(), env=environment(chip=CHIP_310P))


def test_the_simulator_refuses_bfloat16_attention_on_310p_and_incremental_attention_on_a3() -> None:
    query = torch.ones(1, 1, 64, dtype=torch.bfloat16)
    head = (query, (query,), (query,), None, None, None, *([None] * 9), 1, 1.0, "BSH", 0, 0, 1, query)
    refused(INVALID, "dtype support list", INCRE, *head, env=environment(chip=CHIP_310P))
    refused(INVALID, "not supported on this chip", INCRE, *head, env=environment(chip=CHIP_A3))
    check(INCRE, *head)


@pytest.mark.parametrize("changes", [{"actual": (2,)}, {"sparse": 3}, {"before": 4}])
def test_the_simulator_refuses_lengths_and_sparse_modes_of_prompt_attention_on_310p(changes: dict[str, Any]) -> None:
    query = torch.ones(1, 3, 64, dtype=torch.float16)

    def call(actual: Any = None, sparse: int = 0, before: int = FAR) -> tuple[Any, ...]:
        tail = (*([None] * 5), 1, 1.0, before, 0, "BSH", 0, sparse, 0, query)
        return (query, query, query, None, None, actual, None, *tail)

    env = environment(chip=CHIP_310P)
    check(PROMPT, *call(), env=env)
    refused(INVALID, "not supported on this chip", PROMPT, *call(**changes), env=env)


def test_no_attention_operator_defers_a_check_to_its_second_stage() -> None:
    assert not isinstance(check(FUSED, *base()), Launch)
