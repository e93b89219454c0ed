"""Descriptors against torch's own answers."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.descriptor import DTYPES, INT4, AclTensor, bytes_at

CODES = {dtype: code for code, dtype in DTYPES.items()}
_PLAIN = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of random bytes and a view of it: cut, stepped, permuted, expanded."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(_PLAIN))
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    base = (
        torch.randint(0, 2, (*shape, 2), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        .to(dtype)[..., 0]
        .contiguous()
    )
    view = base
    for axis in range(view.dim()):
        if view.shape[axis] > 1 and rng.random() < 0.5:
            view = view.narrow(axis, 1, view.shape[axis] - 1)
        if rng.random() < 0.3:
            view = view[(slice(None),) * axis + (slice(None, None, 2),)]
    if view.dim() > 1 and rng.random() < 0.5:
        view = view.transpose(rng.randrange(view.dim()), rng.randrange(view.dim()))
    if rng.random() < 0.3:
        view = view.unsqueeze(0).expand(3, *view.shape)
    return base, view


def described(base: torch.Tensor, view: torch.Tensor) -> AclTensor:
    address = base.untyped_storage().data_ptr()
    return AclTensor(address, CODES[view.dtype], tuple(view.shape), view.stride(), int(view.storage_offset()))


@given(views())
def test_a_descriptor_reads_what_the_tensor_holds(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, view = pair
    assert torch.equal(described(base, view).tensor(), view)


@given(views())
def test_contiguity_is_torchs(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, view = pair
    if view.numel():
        assert described(base, view).contiguous == view.is_contiguous()


@given(st.lists(st.integers(2, 5), min_size=2, max_size=4))
def test_a_transposed_contiguous_tensor_is_seen_as_that_and_nothing_else_is(shape: list[int]) -> None:
    base = torch.zeros(shape)
    assert not described(base, base).transposed
    assert described(base, base.transpose(-1, -2)).transposed
    assert not described(base, base[..., ::2].transpose(-1, -2)).transposed


def test_what_is_written_through_a_view_is_written_to_the_memory() -> None:
    base = torch.zeros(4, 6)
    described(base, base[1:, ::2]).tensor().fill_(7)
    assert torch.equal(base[1:, ::2], torch.full((3, 3), 7.0))
    assert base.sum() == 63


def test_an_empty_view_has_a_shape_and_needs_no_memory() -> None:
    assert bytes_at(0, torch.float16, (0, 3), (3, 1)).shape == (0, 3)
    assert AclTensor(0, 1, (0, 3), (3, 1)).extent == 0


def test_the_extent_counts_offset_stride_and_half_bytes() -> None:
    assert AclTensor(0, 0, (2, 3), (10, 2), 5).extent == (5 + 10 + 4 + 1) * 4
    assert AclTensor(0, INT4, (3,), (1,)).extent == 2
