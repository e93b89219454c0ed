from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import AdapterIncompatible, ConfigurationError
from polyaccel.lora.adapter_file import AdapterFile, LoraPair
from polyaccel.lora.match import match_adapter
from polyaccel.lora.numbers import RankNumbers
from polyaccel.lora.pack import ALIGNMENT, pack_adapter
from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows
from tests.lora.folders import llama_targets, random_matrices, write_folder

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(a: torch.Tensor, b: torch.Tensor, alpha: float = 16.0) -> LoraPair:
    return LoraPair(
        module="m",
        kind="linear",
        expert=None,
        a=a,
        b=b,
        numbers=RankNumbers.of(alpha=alpha, true_rank=a.shape[0]),
        experts=None,
        tensors=("a", "b"),
    )


def target(in_features: int, out_features: int, rows: Rows | None = None, cols: Rows | None = None) -> AdapterTarget:
    return AdapterTarget(
        module="m",
        site="s",
        slice=0,
        in_features=in_features,
        out_features=out_features,
        out_rows=Rows.whole(out_features) if rows is None else rows,
        in_cols=Rows.whole(in_features) if cols is None else cols,
    )


@st.composite
def cuts(draw: st.DrawFn, n: int) -> Rows:
    edges = sorted(draw(st.sets(st.integers(0, n), max_size=6)))
    return Rows(tuple(zip(edges[::2], edges[1::2], strict=False)))


@given(data=st.data())
def test_shards_are_the_rows_and_columns_of_the_target_scaled_and_rounded_once(data: st.DataObject) -> None:
    rank, k, n = (data.draw(st.integers(1, 20)) for _ in range(3))
    source = data.draw(st.sampled_from(DTYPES))
    dtype = data.draw(st.sampled_from(DTYPES))
    alpha = data.draw(st.sampled_from([1.0, 3.0, 16.0, -5.0]))
    rows, cols = data.draw(cuts(n)), data.draw(cuts(k))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    lora = pair(
        torch.randn(rank, k, generator=generator).to(source),
        torch.randn(n, rank, generator=generator).to(source),
        alpha,
    )
    packed = pack_adapter([(target(k, n, rows, cols), lora)], dtype=dtype)
    if not rows.size or not cols.size:
        assert packed.entries == ()
        assert packed.max_rank == 0
        return
    (entry,) = packed.entries
    assert (entry.rank, entry.a_shape, entry.b_shape) == (rank, (rank, cols.size), (rows.size, rank))
    assert torch.equal(packed.a(entry), cols.take(lora.a, 1).to(dtype))
    scaled = rows.take(lora.b, 0).float() * lora.numbers.scale
    assert torch.equal(packed.b(entry), scaled.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_that_pad_a_slice_are_zero_whatever_the_staging_held(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(12)
    lora = pair(torch.randn(3, 5, generator=generator), torch.randn(7, 3, generator=generator), 5.0)
    padded = replace(target(5, 7, Rows.span(2, 6), Rows.span(1, 4)), padded_rows=6, padded_cols=8)
    staging = torch.full((1000,), float("nan"), dtype=dtype)
    packed = pack_adapter([(padded, lora)], dtype=dtype, staging=staging)
    (entry,) = packed.entries
    assert (entry.a_shape, entry.b_shape) == ((3, 8), (6, 3))
    a, b = packed.a(entry), packed.b(entry)
    assert torch.equal(a[:, :3], lora.a[:, 1:4].to(dtype))
    assert torch.equal(b[:4], (lora.b[2:6] * (5.0 / 3)).to(dtype))
    assert not a[:, 3:].any()
    assert not b[4:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_larger_than_a_tile_are_packed_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    lora = pair(torch.randn(3, 70_001, generator=generator), torch.randn(40_003, 3, generator=generator), 5.0)
    packed = pack_adapter([(target(70_001, 40_003), lora)], dtype=dtype)
    (entry,) = packed.entries
    assert torch.equal(packed.a(entry), lora.a.to(dtype))
    assert torch.equal(packed.b(entry), (lora.b * (5.0 / 3)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora_rank", [1, 7, 24])
def test_shards_are_aligned_disjoint_and_the_gaps_are_zero(tmp_path: Path, dtype: torch.dtype, lora_rank: int) -> None:
    folder = write_folder(tmp_path, random_matrices(lora_rank, seed=5), r=lora_rank)
    packed = pack_adapter(match_adapter(AdapterFile.open(folder), llama_targets(2, 1)).pairs, dtype=dtype)
    covered = torch.zeros(packed.buffer.numel(), dtype=torch.int32)
    for entry in packed.entries:
        for offset, shape in ((entry.a_offset, entry.a_shape), (entry.b_offset, entry.b_shape)):
            assert offset * dtype.itemsize % ALIGNMENT == 0
            covered[offset : offset + shape[0] * shape[1]] += 1
    assert int(covered.max()) == 1
    assert not packed.buffer[covered == 0].any()
    assert packed.buffer.dim() == 1
    assert packed.max_rank == lora_rank


@pytest.mark.parametrize("kind", ["dtype", "bytes"])
def test_a_large_staging_buffer_is_used_and_its_old_bytes_leave_no_trace(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path, random_matrices(8, seed=6))
    pairs = match_adapter(AdapterFile.open(folder), llama_targets()).pairs
    fresh = pack_adapter(pairs, dtype=torch.bfloat16)
    count = fresh.buffer.numel() + 1000
    staging = torch.full((count,), float("nan"), dtype=torch.bfloat16)
    if kind == "bytes":
        staging = staging.view(torch.uint8)
    packed = pack_adapter(pairs, dtype=torch.bfloat16, staging=staging)
    assert packed.buffer.data_ptr() == staging.data_ptr()
    assert packed.entries == fresh.entries
    assert torch.equal(packed.buffer, fresh.buffer)


@pytest.mark.parametrize(
    "staging",
    [torch.zeros(10), torch.zeros(10**6, dtype=torch.float64), torch.zeros(1000, 1000), torch.zeros(10**6)[::2]],
    ids=["small", "other dtype", "two dimensions", "strided"],
)
def test_an_unfit_staging_buffer_is_left_alone(tmp_path: Path, staging: torch.Tensor) -> None:
    folder = write_folder(tmp_path, random_matrices(8, seed=6))
    pairs = match_adapter(AdapterFile.open(folder), llama_targets()).pairs
    packed = pack_adapter(pairs, dtype=torch.float32, staging=staging)
    assert packed.buffer.untyped_storage().data_ptr() != staging.untyped_storage().data_ptr()
    assert not staging.any()


def test_the_file_is_not_written_through_its_views(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, random_matrices(8, seed=9))
    file = AdapterFile.open(folder)
    before = {name: (one.a.clone(), one.b.clone()) for name, one in file.pairs.items()}
    pack_adapter(match_adapter(file, llama_targets()).pairs, dtype=torch.float32)
    for name, (a, b) in before.items():
        assert torch.equal(file.pairs[name].a, a)
        assert torch.equal(file.pairs[name].b, b)


def test_a_scaled_value_that_leaves_the_dtype_is_refused_with_its_module() -> None:
    lora = pair(torch.ones(1, 4), torch.full((4, 1), 60_000.0), 2.0)
    assert pack_adapter([(target(4, 4), lora)], dtype=torch.bfloat16).entries
    with pytest.raises(AdapterIncompatible, match=r"'m': B is not finite in torch.float16 \(scale 2\)"):
        pack_adapter([(target(4, 4), lora)], dtype=torch.float16)


def test_a_dtype_that_is_no_float_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="int8"):
        pack_adapter([], dtype=torch.int8)


def test_packing_nothing_gives_an_empty_buffer() -> None:
    packed = pack_adapter([], dtype=torch.float32)
    assert (packed.buffer.numel(), packed.entries, packed.max_rank) == (0, (), 0)
