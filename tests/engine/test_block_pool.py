"""Reference counts, eviction order, and what the prefix cache finds."""

from __future__ import annotations

import numpy as np
import pytest

from polyaccel.engine.block_pool import BlockPool
from polyaccel.engine.prefix_cache import PrefixCache


def test_every_block_is_given_out_once() -> None:
    pool = BlockPool(10, lambda block: None)
    first, second = pool.take(4), pool.take(6)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(10))
    assert (pool.available, pool.used) == (0, 10)
    with pytest.raises(ValueError, match="1 blocks were asked for and 0"):
        pool.take(1)
    pool.release(second)
    assert sorted(pool.take(6).tolist()) == sorted(second.tolist())


def test_cached_blocks_are_evicted_last_and_the_end_of_the_oldest_chain_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(6, evicted.append)
    old, new, plain = pool.take(2), pool.take(2), pool.take(2)
    for block in (*old.tolist(), *new.tolist()):
        pool.mark_cached(block)
    for blocks in (old, new, plain):
        pool.release(blocks)
    assert pool.available == 6
    assert sorted(pool.take(2).tolist()) == sorted(plain.tolist())
    assert evicted == []
    taken = [int(pool.take(1)[0]) for _ in range(4)]
    assert taken == evicted == [*old[::-1].tolist(), *new[::-1].tolist()]


def test_a_shared_block_is_free_only_after_its_last_reference() -> None:
    pool = BlockPool(2, lambda block: None)
    blocks = pool.take(1)
    pool.mark_cached(int(blocks[0]))
    pool.reference(blocks.tolist())
    pool.release(blocks)
    assert pool.available == 1
    pool.release(blocks)
    assert pool.available == 2
    assert pool.unreferenced(blocks.tolist()) == 1
    pool.reference(blocks.tolist())
    assert pool.unreferenced(blocks.tolist()) == 0
    assert pool.available == 1


def filled(cache: PrefixCache, key: object, tokens: np.ndarray) -> list[int]:
    blocks = cache.pool.take(len(tokens) // cache.block_size).tolist()
    digest = cache.lookup(key, tokens[:1])[1]
    for place, block in enumerate(blocks):
        digest = cache.insert(key, digest, tokens[place * cache.block_size : (place + 1) * cache.block_size], block)
    return blocks


def test_the_longest_known_beginning_is_found_but_never_the_last_token() -> None:
    cache = PrefixCache(16, 4)
    tokens = np.arange(12, dtype=np.int32)
    blocks = filled(cache, (), tokens)
    assert cache.lookup((), tokens)[0] == blocks[:2]
    assert cache.lookup((), np.append(tokens, np.int32(0)))[0] == blocks
    changed = tokens.copy()
    changed[5] = 99
    assert cache.lookup((), changed)[0] == blocks[:1]
    assert cache.lookup((), tokens[4:])[0] == [], "the same tokens at another place are another block"
    assert cache.lookup((), tokens[:4])[0] == []


def test_keys_separate_what_adapters_computed() -> None:
    cache = PrefixCache(16, 4)
    tokens = np.arange(9, dtype=np.int32)
    blocks = filled(cache, ((1, 0.5),), tokens)
    assert cache.lookup(((1, 0.5),), tokens)[0] == blocks
    for key in ((), ((1, 1.0),), ((2, 0.5),)):
        assert cache.lookup(key, tokens)[0] == []


def test_a_duplicate_keeps_the_block_first_entered_and_continues_its_chain() -> None:
    cache = PrefixCache(16, 4)
    tokens = np.arange(13, dtype=np.int32)
    first = filled(cache, (), tokens[:8])
    second = filled(cache, (), tokens[:12])
    assert cache.lookup((), tokens)[0] == [*first, second[2]]
    assert len(cache) == 3


def test_an_evicted_block_is_not_found_again() -> None:
    cache = PrefixCache(3, 4)
    tokens = np.arange(9, dtype=np.int32)
    blocks = filled(cache, (), tokens)
    cache.pool.release(np.array(blocks, dtype=np.int32))
    cache.pool.take(2)
    assert cache.lookup((), tokens)[0] == blocks[:1]
    cache.pool.take(1)
    assert cache.lookup((), tokens)[0] == []
    assert len(cache) == 0


def test_after_clear_nothing_is_found_and_running_chains_lead_nowhere() -> None:
    cache = PrefixCache(8, 4)
    tokens = np.arange(17, dtype=np.int32)
    blocks, digest = cache.pool.take(4).tolist(), cache.lookup((), tokens)[1]
    digest = cache.insert((), digest, tokens[:4], blocks[0])
    stale_root = cache.lookup((), tokens[:1])[1]
    cache.clear()
    cache.insert((), digest, tokens[4:8], blocks[1])
    cache.insert((), stale_root, tokens[:4], blocks[2])
    assert cache.lookup((), tokens)[0] == []
    cache.pool.release(np.array(blocks, dtype=np.int32))
    assert cache.pool.available == 8
    assert sorted(cache.pool.take(8).tolist()) == list(range(8))


def test_a_cache_that_is_switched_off_finds_nothing() -> None:
    cache = PrefixCache(8, 4, enabled=False)
    assert cache.lookup((), np.arange(9, dtype=np.int32))[0] == []
