"""Devices, errors, policies and graphs of one process.

What asks nothing of a GPU runs interpreted too (``interpreted``, under ``tox -e triton``'s settings): policies, the
ledger, repeated runs, adapters beyond the budget. The rest needs one or two GPUs and is skipped elsewhere. A wrong
current device and side streams, operator by operator, are the conformance suite's (``device.*``); here it is engines.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyaccel import LLM, SamplingParams
from polyaccel.backend import Backend, OutOfMemory, UnsupportedError
from polyaccel.backend.backend import Implementations
from polyaccel.backend.errors import AdapterError
from tests.cuda_devices import model
from tests.cuda_devices.pool import GPUS, several

pytest.importorskip("triton", reason="run tox -e triton")

one = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and not GPUS
RANKS = (1, 8, 16)
PROMPTS = [[5, 6, 7], [9, 3, 11, 12, 4], [8] * 9]
OFF = "switched off"
Tokens = list[list[int]]


def native() -> Backend:
    """The CUDA backend, on the CPU's memory where there is no GPU."""
    if GPUS:
        from polyaccel_cuda.backend import CudaBackend

        return CudaBackend()
    if not INTERPRETS:
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    from tests.backends.interpreted.backend import InterpretedBackend

    return InterpretedBackend()


def changed(backend: Backend, change: Callable[[dict[str, Any]], None]) -> Backend:
    """The backend with other entries; it is this instance that changes."""
    operators = backend.operators

    def altered() -> Mapping[str, Implementations]:
        found: dict[str, Any] = dict(operators())
        change(found)
        return found

    backend.operators = altered  # type: ignore[method-assign]
    return backend


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("model"), 128, RANKS)


def opened(home: Path, backend: Backend | str | None = None, **options: Any) -> LLM:
    settings: dict[str, Any] = {
        "executor": "inline",
        "dtype": "float32",
        "policy": "strict",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "kv_cache_bytes": 8 << 20,
        "adapter_slots": 3,
        "adapter_rank_rows": 32,
        "prefix_caching": False,
        "graphs": bool(GPUS),
        "adapters": {f"r{rank}": str(home / f"r{rank}") for rank in RANKS},
    }
    return LLM(home / "model", backend=native() if backend is None else backend, **(settings | options))


def greedy(count: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def said(llm: LLM, names: list[str | None] | None = None, count: int = 4) -> Tokens:
    chosen = [None, "r8", "r16"] if names is None else names
    done = llm.generate(PROMPTS[: len(chosen)], greedy(count), adapter=chosen)
    return [list(completion.token_ids) for completion in done]


@pytest.fixture(scope="module")
def wanted(home: Path) -> Tokens:
    """By plain composites on the CPU."""
    with opened(home, "cpu", graphs=False, policy="allow") as llm:
        return said(llm)


# -- policies, ledger, health ------------------------------------------------------------------------------------------


def switch_off(found: dict[str, Any]) -> None:
    found["silu_and_mul"] = replace(found["silu_and_mul"], supports=lambda query: [OFF])
    found["gate_up_act"] = replace(found["gate_up_act"], supports=lambda query: [OFF])


def test_nothing_runs_as_a_composite_and_strict_passes(home: Path, wanted: Tokens) -> None:
    with opened(home) as llm:
        assert said(llm) == wanted
        counts = llm.explain().ledger
        assert not [name for name in counts if name.startswith("composite")], counts
        assert any(name.startswith("cuda.") for name in counts)
        assert llm.health().status == "ok"


def test_a_kernel_switched_off_fails_strict_with_the_reason(home: Path) -> None:
    with pytest.raises(UnsupportedError, match=OFF):
        opened(home, changed(native(), switch_off)).close()


def test_a_kernel_switched_off_runs_right_under_warn_and_is_counted(home: Path, wanted: Tokens) -> None:
    with opened(home, changed(native(), switch_off), policy="warn") as llm:
        assert said(llm) == wanted
        explained = llm.explain()
        assert OFF in str(explained.ranks)
        composites = {name: count for name, count in explained.ledger.items() if "silu_and_mul" in name}
        assert any(name.startswith("composite") for name in composites), explained.ledger


def test_a_composite_inside_a_native_call_degrades_health_within_a_step(home: Path, wanted: Tokens) -> None:
    from polyaccel.backend.composite import operators as composites

    hidden = [False]

    def nested(found: dict[str, Any]) -> None:
        entry = found["rms_norm"]
        inner = backend.composites()["rms_norm"]

        def rms_norm(*args: Any, **kwargs: Any) -> Any:
            return (inner if hidden[0] else entry.fn)(*args, **kwargs)

        found["rms_norm"] = replace(entry, fn=rms_norm)

    assert composites is not None
    backend = changed(native(), nested)
    with opened(home, backend, policy="warn", graphs=False) as llm:
        assert said(llm) == wanted
        assert llm.health().status == "ok"
        hidden[0] = True
        said(llm, count=1)
        health = llm.health()
        assert (health.status, "rms_norm" in health.reason) == ("degraded", True)


# -- the same again ----------------------------------------------------------------------------------------------------


def test_repeated_runs_are_bit_identical(home: Path) -> None:
    with opened(home) as llm:
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3)

        def run() -> list[object]:
            done = llm.generate(PROMPTS, params, adapter=[None, "r8", "r16"])
            return [(list(completion.token_ids), completion.logprobs) for completion in done]

        first = run()
        for _ in range(20 if GPUS else 1):
            assert run() == first


MIXES: list[list[str | None]] = [
    ["r8", None, None],
    ["r8", "r16", "r1"],
    [None, None, None],
    ["r16", "r16", "r16"],
    ["r1", None, "r8"],
]


@pytest.mark.parametrize("first", range(len(MIXES)), ids=["one", "three", "none", "same", "other"])
def test_a_graph_serves_more_fewer_other_and_no_adapters_than_at_capture(home: Path, first: int) -> None:
    """Without a GPU, which has the graphs: the same for the steps alone."""
    if not GPUS and first:
        pytest.skip("needs a CUDA device: without graphs the first step is like any other")
    order = [MIXES[first], *MIXES]
    with opened(home, graphs=False) as llm:
        plain = [said(llm, mix) for mix in order[: None if GPUS else 2]]
    if not GPUS:
        with opened(home, "cpu", graphs=False, policy="allow") as llm:
            assert [said(llm, mix) for mix in order[:2]] == plain
        return
    # Room for two adapters of rank 16 beside the others: nothing is evicted, so steps stay as wide as they are.
    with opened(home, adapter_rank_rows=64) as llm:
        assert [said(llm, mix) for mix in order] == plain
        captures = [report["graphs"]["captures"] for report in llm.explain().ranks]  # type: ignore[index]
        assert min(captures) > 0
        llm.adapters.unload("r8")
        llm.adapters.load("r8", home / "r16")
        assert said(llm, ["r8", "r16", None]) == said(llm, ["r16", "r8", None])
        assert [report["graphs"]["captures"] for report in llm.explain().ranks] == captures  # type: ignore[index]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_adapter_beyond_the_budget_is_refused_while_requests_finish(
    home: Path, wanted: Tokens, tmp_path: Path
) -> None:
    large = model.write(tmp_path, 128, (40,))
    with opened(home) as llm:
        found: list[Tokens] = []
        thread = threading.Thread(target=lambda: found.append(said(llm)))
        thread.start()
        with pytest.raises(AdapterError, match="needs 40 rank rows; raise adapter_rank_rows=32"):
            llm.adapters.load("large", large / "r40")
        thread.join(120)
        assert found == [wanted]


def test_memory_that_a_load_lacks_is_a_typed_error_and_leaves_other_engines_alone(home: Path, wanted: Tokens) -> None:
    if not GPUS:
        pytest.skip("needs a CUDA device: memory of the CPU has no bound")
    with opened(home) as llm:
        assert said(llm) == wanted
        torch.cuda.empty_cache()
        taken, (size, _) = list[torch.Tensor](), torch.cuda.mem_get_info(0)
        # Down to what the allocator itself has left over: a small model would fit there.
        while size >= 512:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda:0"))
            except torch.OutOfMemoryError:
                size //= 2
        with pytest.raises(OutOfMemory, match="bytes asked for"):
            opened(home).close()
        taken.clear()
        assert said(llm) == wanted


def test_a_backend_captures_again_after_all_its_graphs_are_closed(home: Path, wanted: Tokens) -> None:
    if not GPUS:
        pytest.skip("needs a CUDA device: what torch refuses is a capture into a pool that has ended")
    backend = native()
    for _ in range(3):
        with opened(home, backend) as llm:
            assert said(llm) == wanted


def lack_room(found: dict[str, Any]) -> None:
    activate = found["gate_up_act"].fn

    def short(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if x.shape[0] > 3:
            raise torch.OutOfMemoryError(f"{x.shape[0]} rows are too many")
        found_room: torch.Tensor = activate(x, *rest, **options)
        return found_room

    found["gate_up_act"] = replace(found["gate_up_act"], fn=short)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_memory_that_a_step_lacks_costs_smaller_steps_and_no_request(home: Path, wanted: Tokens, graphs: bool) -> None:
    with opened(home, changed(native(), lack_room), graphs=graphs) as llm:
        assert said(llm) == wanted
        assert llm.health().no_room > 0


# -- several devices in one process ------------------------------------------------------------------------------------


@pytest.fixture
def current() -> Iterator[None]:
    before = torch.cuda.current_device()
    yield
    torch.cuda.set_device(before)


def used(device: int) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


@several
@pytest.mark.parametrize(("device", "elsewhere"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_an_engine_leaves_the_current_device_alone(
    home: Path, wanted: Tokens, device: int, elsewhere: int, graphs: bool, current: None
) -> None:
    gc.collect()
    torch.cuda.set_device(elsewhere)
    before, peak = used(elsewhere), torch.cuda.max_memory_allocated(elsewhere)
    with opened(home, layer_devices=[device] * model.LAYERS, graphs=graphs) as llm:
        assert said(llm) == wanted
        stream = torch.cuda.Stream(elsewhere)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            assert said(llm) == wanted
        assert used(device) > 0
    assert torch.cuda.current_device() == elsewhere
    assert (used(elsewhere), torch.cuda.max_memory_allocated(elsewhere)) == (before, peak)


@several
def test_two_engines_on_two_devices_do_not_meet(home: Path, wanted: Tokens) -> None:
    with opened(home, layer_devices=[0] * 3) as first, opened(home, layer_devices=[1] * 3) as second:
        found: dict[int, list[Tokens]] = {0: [], 1: []}

        def ask(number: int, llm: LLM) -> None:
            for _ in range(5):
                found[number].append(said(llm))

        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert found == {0: [wanted] * 5, 1: [wanted] * 5}


@several
@pytest.mark.parametrize("layers", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_layers_on_two_devices_say_the_same(home: Path, wanted: Tokens, layers: tuple[int, ...]) -> None:
    with opened(home, layer_devices=list(layers)) as llm:
        assert said(llm) == wanted
        assert said(llm, [None, None, None]) == said(llm, [None, None, None])


@one
def test_a_request_that_finds_no_memory_fails_alone_or_with_a_typed_error(home: Path, wanted: Tokens) -> None:
    from polyaccel import PolyaccelError

    with opened(home, policy="warn") as llm:
        assert said(llm) == wanted
        free, _ = torch.cuda.mem_get_info(0)
        taken = []
        try:
            while free > 2 << 20:
                taken.append(torch.empty(max(free // 2, 1 << 20), dtype=torch.uint8, device="cuda:0"))
                free, _ = torch.cuda.mem_get_info(0)
        except torch.OutOfMemoryError:
            pass
        error: BaseException | None = None
        try:
            llm.generate([[3] * 100] * 4, greedy(2))
        except PolyaccelError as raised:
            error = raised
        taken.clear()
        torch.cuda.empty_cache()
        print(f"without memory: {error!r}")
        if llm.health().status != "dead":
            assert said(llm) == wanted
        else:
            assert error is not None
