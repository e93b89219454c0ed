from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVSpec
from tests.backend.composite.cases import Draw
from tests.backend.cpu.machine import Machine


def _spec(kv_heads: int = 2, head_dim: int = 3, blocks: int = 5, block_size: int = 4) -> KVSpec:
    return KVSpec(
        layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32, blocks=blocks, block_size=block_size
    )


@given(
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    block_size=st.sampled_from([1, 4, 32]),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_and_nothing_else_changes(
    kv_heads: int, head_dim: int, block_size: int, tokens: int, seed: int
) -> None:
    draw = Draw(seed)
    spec = _spec(kv_heads, head_dim, 12, block_size)
    cache = Machine().cache(spec)
    slots = torch.from_numpy(draw.generator.permutation(12 * block_size)[:tokens].astype("int64"))
    dropped = torch.from_numpy(draw.generator.random(tokens) < 0.3)
    k, v = draw.tensor(tokens, kv_heads, head_dim), draw.tensor(tokens, kv_heads, head_dim)
    cache.write(1, torch.where(dropped, -1, slots), k, v)
    found_k, found_v = cache.read(1, slots)
    assert torch.equal(found_k, torch.where(dropped[:, None, None], 0.0, k))
    assert torch.equal(found_v, torch.where(dropped[:, None, None], 0.0, v))
    everywhere = torch.arange(12 * block_size)
    assert int(cache.read(1, everywhere)[0].count_nonzero()) == int((~dropped).sum()) * kv_heads * head_dim
    assert not cache.read(0, everywhere)[1].any()


def test_blocks_are_copied_in_all_layers_as_they_were_before() -> None:
    draw, cache = Draw(3), Machine().cache(_spec())
    slots = torch.arange(20)
    for layer in range(2):
        cache.write(layer, slots, draw.tensor(20, 2, 3), draw.tensor(20, 2, 3))
    before = [torch.cat(cache.read(layer, slots)) for layer in range(2)]
    cache.copy_blocks([0, 1], [1, 4])
    for layer in range(2):
        old, new = before[layer].view(2, 5, 4, 2, 3), torch.cat(cache.read(layer, slots)).view(2, 5, 4, 2, 3)
        assert torch.equal(new, old[:, [0, 0, 2, 3, 1]])


def test_a_block_that_does_not_exist_is_refused() -> None:
    cache = Machine().cache(_spec())
    with pytest.raises(OperatorError, match="block 5 of 5"):
        cache.copy_blocks([5], [0])
    with pytest.raises(OperatorError, match="2 sources for 1"):
        cache.copy_blocks([0, 1], [0])
