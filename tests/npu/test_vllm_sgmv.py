"""vllm-ascend's kernels for adapters: asked for by name, called within their limits alone, and right there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel import LLM, SamplingParams
from polyaccel.backend import Entry, Query, Slice, Step, TokenClass, Weight, WeightSpec
from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.step import AdapterRows, DeviceState
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.chip import chip_of
from polyaccel_npu.vllm_sgmv import EVIDENCE, NAME, RANKS, refusals
from tests.npu.stand_in import CALLS, register
from tests.npu.test_found import packed, step_of
from tests.npu.tiny import write, write_adapter

LEDGER = ("npu.vllm_sgmv_shrink", "npu.vllm_sgmv_expand")
GROUPED = "npu.grouped_matmul"


@pytest.fixture(autouse=True)
def kernels() -> None:
    register()
    CALLS.clear()


@dataclass
class Bench:
    """A weight with adapters on a backend, and a step that names them."""

    backend: NpuBackend
    weight: Weight
    step: Step

    @classmethod
    def of(
        cls,
        widths: list[int],
        k: int,
        ranks: list[int],
        adapters: AdapterRows,
        tokens: int,
        *,
        dtype: torch.dtype = torch.float16,
        sgmv: str = NAME,
        before: int = 0,
        less: int = 0,
    ) -> Bench:
        """``before``: rank rows before the first adapter's. ``less``: how much lower than its room each rank is."""
        backend = NpuBackend(sgmv=sgmv)
        device = backend.devices()[0]
        slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
        rank_rows = sum(ranks) + before
        spec = WeightSpec(site="s", slices=slices, k=k, dtype=dtype, rank_rows=rank_rows)
        weight = backend.allocate_weight(spec, device)
        weight.seal()
        store = backend.allocate_adapters({"s": weight}, rank_rows=rank_rows, slots=len(ranks), device=device)
        first = before
        for slot, rank in enumerate(ranks):
            where = SlotRange(slot=slot, first_rank_row=first, rank_rows=rank)
            store.write(where, packed("s", widths, k, rank - less, slot))
            first += rank
        inputs = replace(step_of(adapters.rows, adapters.slots, tokens), adapters={"tokens": adapters})
        return cls(backend, weight, backend.begin_step(inputs, DeviceState(adapters=store), device))

    def sgmv(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        device = self.backend.devices()[0]
        fn = self.backend.table()["sgmv"][0].fn
        found: Any = fn(device.upload(y), device.upload(x), self.weight, self.step)
        result: torch.Tensor = found.cpu()
        return result

    @property
    def launched(self) -> set[str]:
        return set(self.backend.ledger.counts())


def triples(rows: list[int], slots: list[int], weights: list[float] | None = None) -> AdapterRows:
    given_ = np.array(weights or [1.0] * len(rows), dtype=np.float32)
    return AdapterRows.build(np.array(rows, dtype=np.int32), np.array(slots, dtype=np.int32), given_)


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    ranks=st.lists(st.sampled_from([8, 8, 16, 16, 32, 64, 5]), min_size=1, max_size=4),
    widths=st.lists(st.sampled_from([16, 32, 48, 64, 80, 24]), min_size=1, max_size=3),
    k=st.sampled_from([16, 32, 80, 96, 72]),
    owners=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    before=st.sampled_from([0, 3, 8]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_the_kernels_do_what_grouped_matmul_does_and_nothing_beyond_their_limits(
    ranks: list[int], widths: list[int], k: int, owners: list[int], dtype: torch.dtype, before: int, seed: int
) -> None:
    CALLS.clear()
    owners = [owner if owner < len(ranks) else -1 for owner in owners]
    rows = sorted((row for row, owner in enumerate(owners) if owner >= 0), key=lambda row: (owners[row], row))
    adapters = triples(rows, [owners[row] for row in rows])
    x, y = drawn(len(owners), k, dtype, seed), drawn(len(owners), sum(widths), dtype, seed + 1)
    results = {}
    for sgmv in (NAME, "grouped"):
        bench = Bench.of(widths, k, ranks, adapters, len(owners), dtype=dtype, sgmv=sgmv, before=before)
        results[sgmv] = bench.sgmv(x, y), bench.launched
    (found, launched), (wanted, plain) = results[NAME], results["grouped"]
    used = {ranks[owners[row]] for row in rows}
    taken = bool(used) and all(r in RANKS and k > r for r in used) and k % 16 == 0
    taken = taken and all(n % 16 == 0 and n >= max(used) for n in widths)
    assert (set(LEDGER) <= launched) == taken
    assert (GROUPED in launched) == (bool(used) and not taken)
    assert not plain & set(LEDGER)
    assert (CALLS["shrink"] == CALLS["expand"] > 0) == taken
    unit, largest = torch.finfo(dtype).eps, max(used, default=0)
    assert torch.allclose(found.float(), wanted.float(), rtol=4 * unit, atol=8 * unit * (1 + largest**0.5))
    untouched = [row for row, owner in enumerate(owners) if owner < 0]
    assert torch.equal(found[untouched], y[untouched])


ONE = triples([0, 1, 2], [0, 0, 0])


def launched(adapters: AdapterRows = ONE, *, ranks: list[int] | None = None, **options: Any) -> set[str]:
    """What an ordinary call of three rows launches, whose result is that of grouped matmul."""
    results = []
    for sgmv in (NAME, "grouped"):
        bench = Bench.of([32, 32], 64, ranks or [8, 8], adapters, 3, sgmv=sgmv, **options)
        results.append((bench.sgmv(drawn(3, 64, torch.float16, 1), drawn(3, 64, torch.float16, 2)), bench.launched))
    assert torch.allclose(results[0][0].float(), results[1][0].float(), rtol=4e-3, atol=2e-2)
    return results[0][1]


def test_an_ordinary_call_is_two_kernels_a_slice_and_no_grouped_product() -> None:
    found = launched()
    assert set(LEDGER) <= found
    assert GROUPED not in found
    assert CALLS == {"shrink": 2, "expand": 2}


@pytest.mark.parametrize(
    ("adapters", "options"),
    [
        (triples([0, 1, 0], [0, 0, 1]), {}),
        (triples([0, 1, 2], [0, 0, 0], [1.0, 0.5, 1.0]), {}),
        (ONE, {"less": 2}),
        (triples([0, 1, 2], [0, 0, 1]), {"ranks": [8, 12]}),
    ],
    ids=["two adapters of a row", "a weight", "a rank below its room", "a rank between"],
)
def test_what_depends_on_the_step_goes_to_grouped_matmul_whole(adapters: AdapterRows, options: Any) -> None:
    found = launched(adapters, **options)
    assert GROUPED in found
    assert not found & set(LEDGER)
    assert not CALLS


def test_an_infinity_in_x_reaches_no_slice_that_the_adapter_does_not_touch() -> None:
    """0 times an infinity is NaN: matrices of zeros are no substitute for a slice that is left alone."""
    bench = Bench.of([32, 32], 64, [8], ONE, 3)
    store = bench.step.state.adapters  # type: ignore[attr-defined]
    whole = packed("s", [32, 32], 64, 8, 0)
    entries: tuple[PackedEntry, ...] = whole.entries[:1]
    where = SlotRange(slot=0, first_rank_row=0, rank_rows=8)
    store.write(where, PackedAdapter(buffer=whole.buffer, entries=entries, max_rank=8))
    x, y = drawn(3, 64, torch.float16, 1), drawn(3, 64, torch.float16, 2)
    x[1, 5] = torch.inf
    found = bench.sgmv(x, y)
    assert CALLS == {"shrink": 1, "expand": 1}
    assert torch.equal(found[:, 32:], y[:, 32:])
    assert not torch.isfinite(found[1, :32]).any()


@pytest.mark.parametrize("layout", ["transposed", "rows", "offset"])
def test_strided_operands_never_reach_an_address_that_is_read_densely(layout: str) -> None:
    for strided in ("x", "y"):
        bench = Bench.of([32, 32], 64, [8], ONE, 3)
        device = bench.backend.devices()[0].torch_device
        x, y = drawn(3, 64, torch.float16, 1), drawn(3, 64, torch.float16, 2)
        wanted = bench.sgmv(x, y)
        operands = {"x": x.to(device), "y": y.to(device)}
        plain = operands[strided]
        if layout == "transposed":
            operands[strided] = plain.t().contiguous().t()
        elif layout == "rows":
            operands[strided] = torch.cat((plain, plain), 1)[:, :64]
        else:
            flat = torch.cat((plain.new_zeros(4), plain.flatten()))
            operands[strided] = flat[4:].view(3, 64)
        result = bench.backend.table()["sgmv"][0].fn(operands["y"], operands["x"], bench.weight, bench.step)
        assert result is operands["y"]
        assert torch.allclose(operands["y"].cpu().float(), wanted.float(), rtol=4e-3, atol=2e-2), strided


class Copies(TorchDispatchMode):
    """Operators that were called with a tensor of the host or made one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in (*args, result)):
            self.names.append(str(func))
        return result


def test_what_the_kernels_need_is_on_the_card_since_the_step_began() -> None:
    bench = Bench.of([32, 32], 64, [8, 16], triples([0, 1, 2], [0, 0, 1]), 4)
    device = bench.backend.devices()[0]
    x, y = (device.upload(drawn(4, 64, torch.float16, seed)) for seed in (1, 2))
    with Copies() as seen:
        bench.backend.table()["sgmv"][0].fn(y, x, bench.weight, bench.step)
    assert CALLS == {"shrink": 4, "expand": 4}
    assert seen.names == []
    with Copies() as seen:
        device.upload(torch.ones(2))
    assert seen.names != []


STATIC = {"dtype": "float16", "largest_rank": 16, "k": 64, "slices": (32, 48)}


def query(operator: str = "sgmv", adapters: bool = True, **static: Any) -> Query:
    return Query(
        site="s", operator=operator, token_class=TokenClass.MIXED, adapters=adapters, static=STATIC | static, ranges={}
    )


@pytest.mark.parametrize(
    ("static", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32; vllm-ascend's sgmv takes float16 and bfloat16"),
        ({"largest_rank": 12}, "rank 12; vllm-ascend's sgmv takes 8, 16, 32, 64"),
        ({"k": 72}, "k 72; vllm-ascend's sgmv takes multiples of 16 above the rank, 16"),
        ({"k": 16}, "k 16; vllm-ascend's sgmv takes multiples of 16 above the rank, 16"),
        ({"slices": (32, 40)}, "a slice of 40; vllm-ascend's sgmv takes multiples of 16 from the rank, 16, on"),
        ({"slices": (16, 32), "largest_rank": 32}, "a slice of 16; vllm-ascend's sgmv takes multiples of 16 from the "
         "rank, 32, on"),
    ],
)  # fmt: skip
def test_each_limit_that_is_known_at_load_is_a_reason_of_its_own(static: dict[str, Any], reason: str) -> None:
    assert refusals(query(), chip_of("Ascend910B3")) == []
    assert refusals(query(**static), chip_of("Ascend910B3")) == [reason]
    assert refusals(query("column_linear", adapters=False, **static), chip_of("Ascend910B3")) == []


def test_chips_without_the_kernels_are_a_reason() -> None:
    assert refusals(query(), chip_of("Ascend910_9392")) == []
    (reason,) = refusals(query(), chip_of("Ascend310P3"))
    assert reason == "chip 310P; vllm-ascend builds sgmv for A2 and A3"


def test_they_are_not_used_unless_asked_for_although_they_are_there() -> None:
    backend = NpuBackend()
    assert not any("_C_ascend" in name for entries in backend.table().values() for e in entries for name in e.evidence)
    bench = Bench.of([32, 32], 64, [8], ONE, 3, sgmv="grouped")
    bench.sgmv(drawn(3, 64, torch.float16, 1), drawn(3, 64, torch.float16, 2))
    assert not CALLS


def test_every_station_with_adapters_has_an_entry_with_them_before_the_one_without() -> None:
    table = NpuBackend(sgmv=NAME).table()
    for name, count in {"sgmv": 2, "column_linear": 2, "gate_up_act": 2, "row_parallel_add_norm": 4}.items():
        entries: list[Entry] = list(table[name])
        assert [set(EVIDENCE) <= set(entry.evidence) for entry in entries] == [True, False] * (count // 2)
        assert [entry.name for entry in entries[::2]] == [entry.name for entry in entries[1::2]]


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"sgmv='triton'; it is one of grouped, vllm-ascend"):
        NpuBackend(sgmv="triton")


MISSING = """
from polyaccel.backend import BackendUnavailable
from polyaccel_npu.backend import NpuBackend
backend = NpuBackend(sgmv="vllm-ascend")
try:
    backend.devices()
except BackendUnavailable as error:
    print(error)
"""


def test_asked_for_and_missing_they_are_an_error_that_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING], env=dict(os.environ), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith(
        "sgmv='vllm-ascend' was asked for, and torch.ops._C_ascend has no sgmv_shrink and sgmv_expand"
    )
    assert "install vllm-ascend with its kernels, or leave sgmv at 'grouped'" in said


def test_a_model_answers_alike_with_both(tmp_path: Path) -> None:
    model, adapter = write(tmp_path / "model"), write_adapter(tmp_path / "adapter", 8)
    answers, params = {}, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    for sgmv in (NAME, "grouped"):
        CALLS.clear()
        options: Any = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_bytes": 16 << 20, "graphs": False}
        backend = NpuBackend(sgmv=sgmv)
        with LLM(model, backend=backend, dtype="float16", adapters={"own": adapter}, **options) as llm:
            done = llm.generate([[5, 9, 3], [7] * 20, [5, 9, 3]], params, adapter=["own", None, None])
            answers[sgmv] = [list(one.token_ids) for one in done]
            said = str(llm.explain())
        assert bool(CALLS) == (sgmv == NAME)
        assert ("adapters by vllm-ascend's sgmv" in said) == (sgmv == NAME)
    assert answers[NAME] == answers["grouped"]
    assert answers[NAME][0] != answers[NAME][2], "the adapter changes nothing"
