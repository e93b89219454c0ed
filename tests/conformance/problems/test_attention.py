"""The problems of attention: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polyaccel.backend import KVCache, TableBackend
from polyaccel.backend.composite import attention
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.problems.attention import DenseAttentionProblems, PagedAttentionProblems, causal
from tests.conformance.drawn import problems, verdict

Wrong = Callable[..., torch.Tensor]
paged = attention.paged_attention


def wider_by_one(q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None) -> torch.Tensor:
    return paged(q, kv, layer, step, scale, None if window is None else window + 1)


def narrower_by_one(
    q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None
) -> torch.Tensor:
    return paged(q, kv, layer, step, scale, None if window is None else max(window - 1, 1))


def groups_by_remainder(
    q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None
) -> torch.Tensor:
    heads, kv_heads = q.shape[1], kv.spec.kv_heads
    order = torch.arange(heads).view(-1, kv_heads).T.flatten()
    out = paged(q[:, order], kv, layer, step, scale, window)
    return out[:, torch.argsort(order)]


def scale_squared(
    q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None
) -> torch.Tensor:
    return paged(q, kv, layer, step, scale * scale, window)


def other_layer(q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None) -> torch.Tensor:
    return paged(q, kv, (layer + 1) % kv.spec.layers, step, scale, window)


class OtherCache:
    """A cache whose slots are read in a wrong way."""

    def __init__(self, kv: KVCache, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.spec, self._kv, self._move = kv.spec, kv, move

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kv.read(layer, self._move(slots))


def table_ignored(
    q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None
) -> torch.Tensor:
    size = kv.spec.block_size
    return paged(q, OtherCache(kv, lambda s: s % size), layer, step, scale, window)  # type: ignore[arg-type]


CAUGHT: tuple[tuple[Wrong, dict[str, tuple[Choice, ...]]], ...] = (
    (wider_by_one, {"attributes__window": (2, 16), "dims__context": (33, 65)}),
    (narrower_by_one, {"attributes__window": (2, 16), "dims__context": (33, 65)}),
    (groups_by_remainder, {"dims__kv_heads": (2, 3), "dims__group": (2, 4), "dims__context": (33,)}),
    (other_layer, {"dims__context": (33,)}),
    (table_ignored, {"dims__context": (33, 65), "structure__blocks": ("permuted",), "attributes__window": (None,)}),
)


@pytest.mark.parametrize("data", ["selection", "normal"])
@pytest.mark.parametrize(("wrong", "where"), CAUGHT, ids=[wrong.__name__ for wrong, _ in CAUGHT])
def test_a_wrong_paged_attention_fails(wrong: Wrong, where: dict[str, tuple[Choice, ...]], data: str) -> None:
    bench = Bench(TableBackend("cpu", {"paged_attention": wrong}))
    common = {"dims__sequences": (2, 3), "dims__head_dim": (64,), "structure__phase": ("chunked", "decode", "mixed")}
    common["dims__group"] = (4,)
    drawn = problems(PagedAttentionProblems(), 6, 7, data=(data,), **{**common, **where})
    assert all(verdict(bench, p) for p in drawn)


def test_another_scale_fails_on_random_data() -> None:
    bench = Bench(TableBackend("cpu", {"paged_attention": scale_squared}))
    where = {"dims__sequences": (2,), "dims__context": (33,), "attributes__scale": (0.125, 0.3)}
    assert all(verdict(bench, p) for p in problems(PagedAttentionProblems(), 4, 7, data=("normal",), **where))


@pytest.mark.parametrize("unread", ["nan", "inf", "huge"])
def test_reading_a_slot_beyond_the_context_fails(unread: str) -> None:
    def wrong(q: torch.Tensor, kv: KVCache, layer: int, step: Any, scale: float, window: int | None) -> torch.Tensor:
        out = paged(q, kv, layer, step, scale, window)
        size, last = kv.spec.block_size, step.input.context_lengths - 1
        table = step.input.block_tables[np.arange(len(last)), last // size].astype(np.int64)
        beyond = torch.from_numpy(table * size + np.minimum(last % size + 1, size - 1))
        read = kv.read(layer, beyond)[1].to(q.dtype)
        return out + (0 if unread != "huge" else 1e-3) * read.repeat_interleave(q.shape[1] // read.shape[1], 1)

    bench = Bench(TableBackend("cpu", {"paged_attention": wrong}))
    where = {"dims__sequences": (1,), "dims__context": (17,), "structure__phase": ("decode",), "data": ("normal",)}
    drawn = problems(
        PagedAttentionProblems(), 3, 7, structure__unread=(unread,), structure__blocks=("permuted",), **where
    )
    assert all(verdict(bench, p) for p in drawn)


@pytest.mark.parametrize("data", ["selection", "normal"])
def test_a_dense_attention_that_looks_ahead_or_across_segments_fails(data: str) -> None:
    def ahead(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], scale: float, causal: bool
    ) -> object:
        return attention.dense_attention(q, k, v, starts, scale, False)

    def across(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], scale: float, causal: bool
    ) -> object:
        return attention.dense_attention(q, k, v, [0, q.shape[0]], scale, causal)

    where = {"dims__tokens": (33,), "dims__head_dim": (64,), "attributes__causal": (True,), "data": (data,)}
    for wrong, starts in ((ahead, "one"), (across, "several")):
        bench = Bench(TableBackend("cpu", {"dense_attention": wrong}))
        drawn = problems(DenseAttentionProblems(), 4, 7, attributes__starts=(starts,), **where)
        assert all(verdict(bench, p) for p in drawn)


def test_the_mask_is_that_of_the_contract() -> None:
    seen = causal(2, 5, 3)
    assert seen.astype(int).tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
