"""Decode graphs: which sizes are captured, how steps are padded into them, and when they are captured again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel import EngineDead, SamplingParams
from polyaccel.backend.graph import GraphKey
from polyaccel.backend.null.backend import NullBackend
from polyaccel.backend.sampling import SampleOutput
from polyaccel.backend.step import DeviceState, StepInput, TokenClass
from polyaccel.engine.graphs import GraphCache, pad_decode, rank_bucket, row_buckets
from tests.support.tiny_model import TinyModel, random_prompts

PROMPTS = random_prompts(5, seed=41)
SPARE = 99


def decode(rows: int) -> StepInput:
    """A decode step of sequences with 10 tokens and two blocks each."""
    return StepInput(
        token_class=TokenClass.DECODE,
        token_ids=np.arange(5, 5 + rows),
        positions=np.full(rows, 9),
        query_starts=np.arange(rows + 1, dtype=np.int32),
        context_lengths=np.full(rows, 10, dtype=np.int32),
        block_tables=np.arange(2 * rows, dtype=np.int32).reshape(rows, 2),
        kv_slots=np.arange(rows),
        request_slots=np.arange(rows, dtype=np.int32),
        logits_rows=np.arange(rows, dtype=np.int32),
        sample_slots=np.arange(rows, dtype=np.int32),
        uniforms=np.full(rows, 0.5, dtype=np.float32),
    )


@given(st.integers(1, 600))
def test_row_sizes_rise_to_the_largest_batch_and_waste_less_than_half(most: int) -> None:
    sizes = row_buckets(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert len(sizes) <= 6 + most // 16 + 1
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(rows, 16)


@given(st.integers(0, 2000))
def test_rank_rows_are_covered_by_a_power_of_two(rank_rows: int) -> None:
    bucket = rank_bucket(rank_rows)
    assert bucket >= rank_rows
    if rank_rows == 0:
        assert bucket == 0
    else:
        assert bucket & (bucket - 1) == 0
        assert bucket == 8 or bucket < 2 * rank_rows


@given(st.integers(1, 8), st.integers(0, 8))
def test_padding_rows_store_nothing_and_sample_into_the_spare_slot(rows: int, missing: int) -> None:
    inputs = decode(rows)
    padded = pad_decode(inputs, rows + missing, SPARE)
    assert padded.tokens == padded.sequences == rows + missing
    assert padded.query_starts.tolist() == list(range(rows + missing + 1))
    assert padded.logits_rows.tolist() == list(range(rows + missing))
    assert padded.kv_slots[rows:].tolist() == [-1] * missing
    assert padded.sample_slots[rows:].tolist() == padded.request_slots[rows:].tolist() == [SPARE] * missing
    assert padded.context_lengths[rows:].tolist() == [0] * missing
    for name in ("token_ids", "positions", "context_lengths", "block_tables", "kv_slots", "sample_slots", "uniforms"):
        before, after = getattr(inputs, name), getattr(padded, name)
        assert after[:rows].tolist() == before.tolist()
        assert (after.dtype, after.shape[1:]) == (before.dtype, before.shape[1:])


class Capturing(NullBackend):
    """Counts captures and what is still open; refuses the row counts in ``refused``."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.captured: list[GraphKey] = []
        self.open = 0
        self._refused = refused

    def capture(self, key: GraphKey, fn: Any, step: Any) -> Any:
        if key.rows in self._refused:
            raise RuntimeError(f"no graph of {key.rows} rows")
        self.captured.append(key)
        self.open += 1
        graph = super().capture(key, fn, step)
        original: Callable[[], None] = graph.close

        def close() -> None:
            self.open -= 1
            original()

        graph.close = close  # type: ignore[method-assign]
        return graph


def cache_of(backend: NullBackend, most: int = 8) -> GraphCache:
    from polyaccel.backend.sampling import SamplingSpec

    device = backend.devices()[0]
    sampling = backend.allocate_sampling(SamplingSpec(request_slots=SPARE + 1, vocabulary=50), device)

    def forward(step: Any) -> SampleOutput:
        return SampleOutput(ids=torch.zeros(step.input.tokens, dtype=torch.int64))

    return GraphCache(backend, device, DeviceState(sampling=sampling), forward, max_rows=most)


def test_a_graph_is_captured_once_for_each_size_and_rank_bucket() -> None:
    backend = Capturing()
    cache = cache_of(backend)
    for rows, rank_rows in ((3, 0), (4, 0), (3, 5), (4, 8), (3, 9), (1, 0), (7, 0)):
        output = cache.run(decode(rows), rank_rows, SPARE)
        assert output.ids.shape == (rows,)
    keys = [(4, 0), (4, 8), (4, 16), (1, 0), (8, 0)]
    assert [(key.rows, key.rank_rows) for key in backend.captured] == keys
    assert (cache.captures, cache.replays, backend.open) == (5, 7, 5)
    cache.clear()
    assert backend.open == 0
    cache.run(decode(3), 0, SPARE)
    assert cache.captures == 6


def test_only_decode_steps_up_to_the_largest_size_are_taken() -> None:
    from dataclasses import replace

    cache = cache_of(Capturing(), most=4)
    assert cache.accepts(decode(4))
    assert not cache.accepts(decode(5))
    assert not cache.accepts(replace(decode(2), token_class=TokenClass.MIXED))


def test_a_capture_that_fails_ends_the_engine_instead_of_running_without(tiny: TinyModel) -> None:
    backend = Capturing(refused=(4,))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with tiny.open(backend=backend) as llm:
        llm.generate(PROMPTS[:2], params)
        with pytest.raises(EngineDead, match="no graph of 4 rows"):
            llm.generate(PROMPTS[:3], params)


def test_loading_and_swapping_adapters_captures_nothing_again(tiny: TinyModel) -> None:
    backend = Capturing()
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    # All of one rank, so that they take the same rank rows in turn.
    with tiny.open(backend=backend, adapter_slots=1, adapter_rank_rows=8) as llm:
        llm.adapters.load("plain", tiny.adapter("plain").folder)
        llm.generate(PROMPTS[0], params, adapter="plain")
        llm.generate(PROMPTS[0], params)
        captured = list(backend.captured)
        for name in ("subset", "ends", "rslora"):
            llm.adapters.load(name, tiny.adapter(name).folder)
        for name in ("subset", "ends", "rslora", "plain"):
            llm.generate(PROMPTS[0], params, adapter=name)
        assert backend.captured == captured
        graphs = llm.explain().ranks[0]["graphs"]
        assert graphs == {"captures": len(captured), "replays": graphs["replays"]}  # type: ignore[index]
    assert backend.open == 0, "closing the engine frees them"


def test_without_graphs_nothing_is_captured(tiny: TinyModel) -> None:
    backend = Capturing()
    with tiny.open(backend=backend, graphs=False) as llm:
        llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        assert llm.explain().ranks[0]["graphs"] is None
    assert backend.captured == []
