"""The values that storage is described with: packed adapters, cache sizes, what a request asks of sampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from polyaccel.backend import KVSpec, PackedAdapter, PackedEntry, SamplingRow


def test_a_packed_adapters_matrices_are_views_of_its_buffer() -> None:
    entry = PackedEntry(
        site="s", slice=0, expert=None, kind="linear", rank=2, a_offset=1, a_shape=(2, 3), b_offset=8, b_shape=(4, 2)
    )
    packed = PackedAdapter(buffer=torch.arange(16.0), entries=(entry,), max_rank=2)
    assert packed.a(entry).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert packed.b(entry).tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    packed.a(entry).fill_(-1.0)
    assert packed.buffer[:8].tolist() == [0, -1, -1, -1, -1, -1, -1, 7]


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_block_holds_keys_and_values_of_all_layers(dtype: torch.dtype, itemsize: int) -> None:
    spec = KVSpec(layers=3, kv_heads=2, head_dim=8, dtype=dtype, blocks=10, block_size=16)
    assert spec.bytes_per_block() == 2 * 3 * 2 * 8 * 16 * itemsize


PLAIN = SamplingRow(temperature=0.0)
IDS = np.array([3])


@pytest.mark.parametrize(
    "row",
    [
        replace(PLAIN, repetition_penalty=1.1),
        replace(PLAIN, presence_penalty=-0.5),
        replace(PLAIN, frequency_penalty=0.5),
        replace(PLAIN, bias_ids=IDS, bias_values=np.array([1.0])),
        replace(PLAIN, allowed=np.ones(9, dtype=bool)),
        replace(PLAIN, forbidden_ids=IDS, forbidden_until=2),
    ],
)
def test_what_changes_logits_is_not_plain_greedy(row: SamplingRow) -> None:
    assert not row.keeps_logits
    assert not row.is_plain_greedy


def test_greedy_without_logprobs_is_plain_and_filters_do_not_matter() -> None:
    assert PLAIN.is_plain_greedy
    assert replace(PLAIN, top_k=5, top_p=0.5, min_p=0.1, prompt_ids=IDS).is_plain_greedy
    assert not replace(PLAIN, logprobs=0).is_plain_greedy
    assert not SamplingRow().is_plain_greedy
    assert SamplingRow().keeps_logits
