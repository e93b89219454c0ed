"""What a replay repeats is what was called: shape, stride, offset, dtype."""

from __future__ import annotations

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_npu.journal import Journal, describe, load, operator_name, rebuild


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    steps=st.integers(1, 3),
    offset=st.integers(0, 5),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int64, torch.bool]),
)
def test_a_tensor_is_rebuilt_with_its_layout(shape: list[int], steps: int, offset: int, dtype: torch.dtype) -> None:
    stride, extent = [], steps
    for size in reversed(shape):
        stride.insert(0, extent)
        extent *= max(size, 1)
    given_ = torch.zeros(offset + extent + 1, dtype=dtype).as_strided(shape, stride, offset)
    found = rebuild(json.loads(json.dumps(describe(given_))), torch.device("cpu"))
    assert (found.shape, found.stride(), found.dtype) == (given_.shape, given_.stride(), dtype)
    assert found.storage_offset() == offset


def test_calls_survive_the_way_to_another_process() -> None:
    journal = Journal()
    x = torch.ones(2, 3)
    journal.note("matmul", torch.ops.aten.mm, (x, x.t()), {})
    journal.note("sample", lambda: None, (x,), {})
    (call,) = load(journal.dump())
    assert (call.kernel, call.operator) == ("matmul", "aten.mm")
    args, kwargs = json.loads(call.arguments)
    assert kwargs == {}
    assert [a["stride"] for a in args] == [[3, 1], [1, 3]]


def test_only_the_latest_calls_are_kept() -> None:
    journal = Journal(kept=2)
    for number in range(5):
        journal.note(str(number), torch.ops.aten.relu, (torch.ones(1),), {})
    assert [call.kernel for call in journal.calls] == ["3", "4"]
    journal.clear()
    assert not journal.calls


def test_operators_are_named_as_torch_names_them() -> None:
    assert operator_name(torch.ops.aten.addmm) == operator_name(torch.ops.aten.addmm.default) == "aten.addmm"
    assert operator_name(torch.mm) == ""
