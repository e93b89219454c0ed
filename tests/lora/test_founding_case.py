"""The founding case: at every world size, rank and alpha the shards of an adapter add up to the whole adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry
from polyaccel.lora.adapter_file import AdapterFile
from polyaccel.lora.match import match_adapter
from polyaccel.lora.pack import pack_adapter
from polyaccel.parallel.cut import head_cut
from tests.lora.folders import (
    COLUMN,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PREFIX,
    ROW,
    SITES,
    SIZES,
    llama_targets,
    module_name,
    random_matrices,
    write_folder,
)

RANKS = (1, 3, 4, 7, 8, 16, 24, 33, 64, 128)
ALPHAS = (8, 16, 32)
WORLDS = (1, 2, 3, 4)


def load(folder: Path, world: int, rank: int, staging: torch.Tensor | None = None) -> PackedAdapter:
    matched = match_adapter(AdapterFile.open(folder), llama_targets(world, rank))
    return pack_adapter(matched.pairs, dtype=torch.float32, staging=staging)


def entry(packed: PackedAdapter, leaf: str) -> PackedEntry:
    site, index = SITES[leaf]
    (found,) = [e for e in packed.entries if (e.site, e.slice) == (f"layers.0.{site}", index)]
    return found


def delta(packed: PackedAdapter, leaf: str) -> torch.Tensor:
    found = entry(packed, leaf)
    return packed.b(found) @ packed.a(found)


def joined(leaf: str, world: int, parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Shards put together in rank order; of copied KV heads the copies are compared and one is taken."""
    if leaf not in ("k_proj", "v_proj"):
        return torch.cat(parts, dim)
    heads: dict[int, torch.Tensor] = {}
    for rank, part in enumerate(parts):
        first, last = head_cut(HEADS, KV_HEADS, world, rank).kv_heads
        for index, head in enumerate(range(first, last)):
            rows = part.narrow(dim, index * HEAD_DIM, HEAD_DIM)
            assert torch.equal(heads.setdefault(head, rows), rows), f"copies of KV head {head} differ"
    return torch.cat([heads[head] for head in range(KV_HEADS)], dim)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("lora_rank", RANKS)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "normal"])
def test_shards_of_every_world_size_give_the_whole_delta(
    tmp_path: Path, lora_rank: int, alpha: int, integers: bool
) -> None:
    tensors = random_matrices(lora_rank, seed=1000 * lora_rank + alpha, integers=integers)
    folder = write_folder(tmp_path / "adapter", tensors, r=lora_rank, lora_alpha=alpha)
    exact = integers and alpha / lora_rank == 2.0 ** round(torch.tensor(alpha / lora_rank).log2().item())
    worlds = {world: [load(folder, world, rank) for rank in range(world)] for world in WORLDS}
    whole = worlds[1][0]
    x = {
        width: torch.randint(-2, 3, (4, width), generator=torch.Generator().manual_seed(width)).float()
        for width in {in_features for _, in_features in SIZES.values()}
    }
    for leaf, (_, in_features) in SIZES.items():
        stem = PREFIX + module_name(0, leaf)
        true_delta = (tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()) * (
            alpha / lora_rank
        )
        one = delta(whole, leaf)
        if exact:
            assert torch.equal(one.double(), true_delta)
        else:
            torch.testing.assert_close(one.double(), true_delta, rtol=1e-5, atol=1e-4 * lora_rank)
        for world, packs in worlds.items():
            if leaf in COLUMN:
                assert all(torch.equal(p.a(entry(p, leaf)), whole.a(entry(whole, leaf))) for p in packs)
                b = joined(leaf, world, [p.b(entry(p, leaf)) for p in packs], 0)
                assert torch.equal(b, whole.b(entry(whole, leaf))), (leaf, world)
                together = joined(leaf, world, [delta(p, leaf) for p in packs], 0)
            else:
                assert all(torch.equal(p.b(entry(p, leaf)), whole.b(entry(whole, leaf))) for p in packs)
                a = torch.cat([p.a(entry(p, leaf)) for p in packs], 1)
                assert torch.equal(a, whole.a(entry(whole, leaf))), (leaf, world)
                together = torch.cat([delta(p, leaf) for p in packs], 1)
            if exact:
                assert torch.equal(together, one), (leaf, world)
            else:
                torch.testing.assert_close(together, one, rtol=1e-5, atol=1e-5 * lora_rank)
            if leaf in ROW:
                starts = [0]
                for p in packs:
                    starts.append(starts[-1] + entry(p, leaf).a_shape[1])
                partial = [
                    x[in_features][:, start:stop] @ p.a(entry(p, leaf)).T @ p.b(entry(p, leaf)).T
                    for p, start, stop in zip(packs, starts, starts[1:], strict=False)
                ]
                summed = torch.stack(partial).sum(0)
                if exact:
                    assert torch.equal(summed, x[in_features] @ one.T), (leaf, world)
                else:
                    torch.testing.assert_close(summed, x[in_features] @ one.T, rtol=1e-4, atol=1e-3 * lora_rank)


@pytest.mark.parametrize("world", WORLDS)
def test_vocabulary_shards_of_embedding_and_lm_head_give_the_whole(tmp_path: Path, world: int) -> None:
    folder = write_folder(tmp_path / "adapter", random_matrices(7, seed=7), r=7, lora_alpha=16)
    whole = load(folder, 1, 0)
    packs = [load(folder, world, rank) for rank in range(world)]

    def at(packed: PackedAdapter, site: str) -> PackedEntry:
        return next(e for e in packed.entries if e.site == site)

    a = torch.cat([p.a(at(p, "embed")) for p in packs], 1)
    assert torch.equal(a, whole.a(at(whole, "embed")))
    b = torch.cat([p.b(at(p, "lm_head")) for p in packs], 0)
    assert torch.equal(b, whole.b(at(whole, "lm_head")))
    assert all(torch.equal(p.b(at(p, "embed")), whole.b(at(whole, "embed"))) for p in packs)
    assert {e.kind for p in packs for e in p.entries if e.site == "embed"} == {"embedding"}


@pytest.mark.parametrize("lora_rank", RANKS)
def test_an_adapter_loaded_twice_gives_identical_packs(tmp_path: Path, lora_rank: int) -> None:
    folder = write_folder(tmp_path / "adapter", random_matrices(lora_rank, seed=lora_rank), r=lora_rank, lora_alpha=16)
    for world in WORLDS:
        for rank in range(world):
            first = load(folder, world, rank)
            dirty = torch.full((first.buffer.numel() + 99,), float("nan"))
            second = load(folder, world, rank, staging=dirty)
            assert second.buffer.data_ptr() == dirty.data_ptr()
            assert first.entries == second.entries
            assert torch.equal(first.buffer, second.buffer)


def test_every_module_keeps_the_scale_of_its_true_rank_whatever_the_world(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "adapter", random_matrices(8, seed=1), r=8, lora_alpha=16)
    for world in WORLDS:
        matched = match_adapter(AdapterFile.open(folder), llama_targets(world, 0))
        assert len(matched.pairs) == 9
        assert {pair.numbers.scale for _, pair in matched.pairs} == {2.0}
        assert {pair.numbers.true_rank for _, pair in matched.pairs} == {8}
