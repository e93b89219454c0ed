"""A call that equals an accepted one is not read and checked again: what "equals" means, and what is exempt."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.arguments import Arguments
from polyaccel_cannsim.descriptor import ROOM, Decoder
from polyaccel_cannsim.errors import RuleError
from polyaccel_cannsim.operators import OPERATORS
from polyaccel_cannsim.operators.environment import Environment
from polyaccel_cannsim.operators.operator import Compute, Operator
from polyaccel_cannsim.registry import LATER, Rule, parse
from polyaccel_cannsim.simulator import Simulator

TENSOR, INTS = 0x7E501, 0x7E503
Described = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def tensor(described: Described) -> Any:
    """The bytes of an ``aclTensor``: of its type, offset, format, address and card; sizes, strides, storage's sizes."""
    (dtype, offset, layout, address, device), sizes, strides, storage = described
    head = (TENSOR, len(sizes), dtype, offset, layout, len(storage), address, device)
    values = (*sizes, *strides, *storage)
    return ctypes.create_string_buffer(struct.pack(f"{8 + len(values)}q", *head, *values) + bytes(8 * ROOM))


def ints(values: tuple[int, ...]) -> Any:
    return ctypes.create_string_buffer(struct.pack(f"{2 + len(values)}q", INTS, len(values), *values) + bytes(8 * ROOM))


def arguments(words: str, lists_apart: bool = False) -> Arguments:
    rule = Rule("aclnnX", parse("aclnnX", words), print, "a document", cast(Any, None))
    return Arguments(rule.signature, rule.readers, Decoder(), lists_apart)


@st.composite
def tensors(draw: st.DrawFn) -> Described:
    few = st.integers(0, 2)
    axes = draw(st.integers(0, 10))
    sizes, strides = (tuple(draw(st.lists(few, min_size=axes, max_size=axes))) for _ in range(2))
    head = (
        draw(st.sampled_from((0, 1))),
        draw(few),
        draw(st.sampled_from((2, 29))),
        draw(st.integers(1, 3)),
        draw(few),
    )
    return head, sizes, strides, tuple(draw(st.lists(few, max_size=12)))


@given(tensors(), tensors(), st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_keys_are_equal_only_for_equal_descriptors_and_lists(
    one: Described, other: Described, few: list[int], more: list[int]
) -> None:
    read = arguments("tensor ints")
    calls = [(one, tuple(few)), (other, tuple(few)), (one, tuple(more)), (one, tuple(few))]
    held = [(tensor(described), ints(values)) for described, values in calls]
    keys = [read.key([ctypes.addressof(part) for part in pair]) for pair in held]
    for call, key in zip(calls, keys, strict=True):
        assert (key == keys[0]) == (call == calls[0])


@given(st.lists(st.none() | st.lists(st.integers(0, 2), max_size=30), min_size=4, max_size=4), st.integers(0, 1))
def test_lists_taken_apart_are_in_the_key_only_as_missing_or_given(
    given_lists: list[list[int] | None], other: int
) -> None:
    read = arguments("ints int64 ints", lists_apart=True)
    one, two = given_lists[:2], given_lists[2:]
    held = [None if values is None else ints(tuple(values)) for values in (*one, *two)]
    handles = [None if part is None else ctypes.addressof(part) for part in held]
    calls = [[handles[0], 0, handles[1]], [handles[2], other, handles[3]]]
    missing = [[values is None for values in pair] for pair in (one, two)]
    assert (read.key(calls[0]) == read.key(calls[1])) == (missing[0] == missing[1] and not other)
    for call, pair in zip(calls, (one, two), strict=True):
        lists = tuple(None if values is None else tuple(values) for values in pair)
        assert read.lists(call) == lists
        assert read.decoded(call) == (lists[0], call[1], lists[1])
        first = read.without_lists(read.decoded(call))
        assert first == (None if lists[0] is None else LATER, call[1], None if lists[1] is None else LATER)
        assert read.with_lists(first, lists) == read.decoded(call)


@pytest.mark.parametrize("reads", [bool, list, max, len, lambda one: one[0]])
def test_a_rule_cannot_read_a_list_before_its_second_part(reads: Any) -> None:
    def check(environment: Environment, lengths: Any) -> Any:
        return lambda found: reads(lengths)

    row = Operator("aclnnX", "ints", check, "nothing", "a document", lists_apart=True)
    with pytest.raises(TypeError):
        row(cast(Any, None), (1, 2))


def test_a_key_tells_the_zeros_apart_and_a_missing_tensor_from_one() -> None:
    read = arguments("double tensor")
    assert read.key([0.0, None]) != read.key([-0.0, None])
    assert read.key([0.5, None]) == read.key([0.5, None])
    there = tensor(((0, 0, 2, 8, 0), (2,), (1,), (2,)))
    assert read.key([0.5, ctypes.addressof(there)]) != read.key([0.5, None])


def test_what_lies_behind_a_bare_pointer_is_not_compared() -> None:
    assert arguments("tensor string 2*int64").comparable
    assert not arguments("tensor pointer").comparable


def test_a_rule_that_asks_for_communicators_must_say_so() -> None:
    def check(environment: Environment, group: str) -> Compute:
        environment.communicator("aclnnX", group)
        return lambda: None

    machine = SimpleNamespace(settings=SimpleNamespace(soc=SimpleNamespace(chip=SimpleNamespace(value="910B"))))
    known = Environment("910B", cast(Any, SimpleNamespace(find=lambda name: object())))
    for collective in (False, True):
        row = Operator("aclnnX", "string", check, "nothing", "a document", collective=collective)
        (rule,) = row.rules(lambda simulator: known)
        assert rule.pure == (not collective)
        if collective:
            rule.function("group", simulator=machine)
        else:
            with pytest.raises(RuleError, match="not declared collective"):
                rule.function("group", simulator=machine)


def test_the_operators_that_are_checked_at_every_call_are_those_that_communicate() -> None:
    fused = [row for row in OPERATORS if any(word in row.name for word in ("AllReduce", "ReduceScatter", "AllGather"))]
    assert fused
    assert [row.name for row in OPERATORS if row.collective] == [row.name for row in fused]


def test_a_repeated_call_is_read_once_and_computes_on_what_is_there_then(
    cannsim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    decoded = Arguments.decoded
    monkeypatch.setattr(Arguments, "decoded", lambda self, raw: (read.append(0), decoded(self, raw))[1])
    x, y = torch.zeros(3, 5).npu(), torch.full((3, 5), 2.0).npu()  # type: ignore[attr-defined]
    cannsim.ledger.reset()
    read.clear()
    for _ in range(4):
        x.add_(y)
    assert len(read) == 1
    x.add_(y, alpha=3)
    assert len(read) == 2
    assert torch.equal(x.cpu(), torch.full((3, 5), 14.0))
    calls = [call for call in cannsim.ledger if call.name == "aclnnInplaceAdd"]
    assert len(calls) == 5
    assert [call.tensors[0].shape for call in calls] == [(3, 5)] * 5
    assert {call.device for call in calls} == {0}


def test_a_refused_call_is_refused_again_and_an_accepted_one_like_it_does_not_help(cannsim: Simulator) -> None:
    x, good, bad = (torch.ones(shape).npu() for shape in ((2, 8), (8,), (4,)))  # type: ignore[attr-defined]
    norm = torch.ops.npu.npu_rms_norm
    for gamma, legal in ((good, True), (bad, False), (good, True), (bad, False)):
        if legal:
            norm(x, gamma, 1e-5)
        else:
            with pytest.raises(RuntimeError, match="aclnnRmsNorm failed"):
                norm(x, gamma, 1e-5)


class Steps:
    """Decode steps of three sequences: an average over as many values as the sequence is long."""

    def __init__(self) -> None:
        rows = torch.arange(256.0).half().view(2, 128, 1).expand(2, 128, 32)
        self.query = torch.zeros(3, 1, 2, 32).half().npu()  # type: ignore[attr-defined]
        self.cache = torch.cat((rows, rows[:1])).contiguous().npu()  # type: ignore[attr-defined]
        self.table = torch.tensor([[0], [1], [2]], dtype=torch.int32).npu()  # type: ignore[attr-defined]
        self.out = torch.empty_like(self.query)
        self.sums = torch.empty(1).npu()  # type: ignore[attr-defined]

    def __call__(self, lengths: list[int]) -> torch.Tensor:
        torch.ops.npu.npu_fused_infer_attention_score.out(
            *(self.query, self.cache, self.cache),
            actual_seq_lengths_kv=lengths,
            block_table=self.table,
            num_heads=2,
            num_key_value_heads=1,
            input_layout="BSND",
            block_size=128,
            out=[self.out, self.sums],
        )
        return self.out.cpu()[:, 0, 0, 0].float()

    def expected(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([(n - 1) / 2 + (128 if i == 1 else 0) for i, n in enumerate(lengths)]).half().float()


def test_of_a_step_with_new_lengths_only_they_are_read_and_each_step_computes_with_its_own(
    cannsim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    decoded = Arguments.decoded
    step = Steps()
    step([1, 1, 1])
    cannsim.ledger.reset()
    monkeypatch.setattr(Arguments, "decoded", lambda self, raw: (read.append(0), decoded(self, raw))[1])
    lengths = [[5, 100, 31], [6, 101, 32], [6, 101, 32], [128, 1, 33], [5, 100, 31]]
    for one in lengths:
        torch.testing.assert_close(step(one), step.expected(one), rtol=1e-3, atol=0)
    calls = [call for call in cannsim.ledger if call.name == "aclnnFusedInferAttentionScoreV3"]
    assert [call.arguments[6] for call in calls] == [tuple(one) for one in lengths]
    assert not read


@pytest.mark.parametrize("bad", [[5, 129, 3], [5, -1, 3], [5, 5], []])
def test_a_step_whose_lengths_are_newly_illegal_is_refused_although_all_else_is_known(
    cannsim: Simulator, bad: list[int]
) -> None:
    step = Steps()
    step([5, 100, 31])
    cannsim.ledger.reset()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="aclnnFusedInferAttentionScoreV3 failed"):
            step(bad)
        torch.testing.assert_close(step([6, 101, 32]), step.expected([6, 101, 32]), rtol=1e-3, atol=0)
    calls = [call for call in cannsim.ledger if call.name == "aclnnFusedInferAttentionScoreV3"]
    assert [bool(call.refused) for call in calls] == [True, False, True, False]
    assert [call.arguments[6] for call in calls if call.refused] == [tuple(bad)] * 2
