from __future__ import annotations

import pytest
import torch

from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVSpec
from tests.backend.composite.cases import CPU, Draw, without_readback

SPEC = KVSpec(layers=2, kv_heads=2, head_dim=3, dtype=torch.bfloat16, blocks=4, block_size=4)


def test_tokens_are_stored_at_their_slots_of_their_layer() -> None:
    cache, draw = TensorKVCache(SPEC, CPU), Draw(0)
    k, v = draw.tensor(3, 2, 3, dtype=torch.bfloat16), draw.tensor(3, 2, 3, dtype=torch.bfloat16)
    slots = torch.tensor([15, 0, 6])
    without_readback(cache.write, 1, slots, k, v)
    read_k, read_v = without_readback(cache.read, 1, slots)
    assert torch.equal(read_k, k)
    assert torch.equal(read_v, v)
    blocks_k, blocks_v = cache.blocks(1)
    assert torch.equal(blocks_k[3, 3], k[0])
    assert torch.equal(blocks_v[3, 3], v[0])
    assert not cache.read(0, torch.arange(16))[0].any()


def test_a_token_at_slot_minus_one_is_stored_nowhere() -> None:
    cache = TensorKVCache(SPEC, CPU)
    k = torch.full((3, 2, 3), torch.nan, dtype=torch.bfloat16)
    k[1] = 1.0
    cache.write(0, torch.tensor([-1, 5, -1]), k, k)
    every, _ = cache.read(0, torch.arange(16))
    assert every[5].eq(1.0).all()
    every[5] = 0.0
    assert torch.equal(every, torch.zeros_like(every))


def test_a_slot_outside_the_cache_is_an_error_not_a_write_elsewhere() -> None:
    cache = TensorKVCache(SPEC, CPU)
    one = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    with pytest.raises(IndexError):
        cache.write(0, torch.tensor([16]), one, one)


def test_a_float32_token_is_rounded_to_the_cache() -> None:
    cache = TensorKVCache(SPEC, CPU)
    k = torch.full((1, 2, 3), 1.0 + 2**-7)
    cache.write(0, torch.tensor([2]), k, k)
    assert torch.equal(cache.read(0, torch.tensor([2]))[0], k.bfloat16())


def test_blocks_are_copied_in_all_layers_as_they_were_before_the_call() -> None:
    cache, draw = TensorKVCache(SPEC, CPU), Draw(1)
    for layer in range(2):
        cache.write(layer, torch.arange(16), *(draw.tensor(16, 2, 3, dtype=torch.bfloat16) for _ in range(2)))
    before = [[t.clone() for t in cache.blocks(layer)] for layer in range(2)]
    cache.copy_blocks([0, 1], [1, 3])
    for layer in range(2):
        for new, old in zip(cache.blocks(layer), before[layer], strict=True):
            assert torch.equal(new, old[[0, 0, 2, 1]])
    cache.copy_blocks([], [])


def test_blocks_that_do_not_exist_are_refused_before_anything_is_copied() -> None:
    cache = TensorKVCache(SPEC, CPU)
    with pytest.raises(OperatorError, match="block 4 of 4"):
        cache.copy_blocks([0], [4])
    with pytest.raises(OperatorError, match="1 sources for 2"):
        cache.copy_blocks([0], [1, 2])


def test_bytes_are_those_of_all_slots_and_the_spare_row() -> None:
    assert TensorKVCache(SPEC, CPU).nbytes == 2 * 2 * 17 * 2 * 3 * 2
