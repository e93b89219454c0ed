"""FlashInfer's kernels on a GPU: right within a step's rounding, by the suite's cases, and token for token."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from polyaccel import LLM, SamplingParams
from tests.cuda_devices import model
from tests.cuda_devices.pool import GPUS
from tests.support.paged_step import PagedStep

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed"),
]

DECODE, PREFILL = "cuda.flashinfer_decode", "cuda.flashinfer_prefill"
OWN = {"cuda.decode_attention", "cuda.prefill_attention"}
COMPILED: tuple[dict[str, Any], ...] = (
    {"dtype": torch.bfloat16, "head_dim": 128},
    {"dtype": torch.float16, "head_dim": 64},
)
"""Each is compiled once, in about a minute, both at the same time."""
LARGEST_ERROR = 6.0
"""Roundings: of weights, of the result, and of what exp2 leaves out, by values of up to 4."""
MIXED: dict[str, Any] = {"queries": [1, 1, 5, 300], "contexts": [700, 1, 5, 1000]}


def of(**given: Any) -> PagedStep:
    from polyaccel_cuda.backend import CudaBackend

    return PagedStep(CudaBackend(attention="flashinfer"), **(MIXED | COMPILED[0] | given))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    with ThreadPoolExecutor(len(COMPILED)) as threads:
        list(threads.map(lambda shape: of(**shape).begin(), COMPILED))


def launched(case: PagedStep) -> set[str]:
    return {name for name in case.backend.ledger.counts() if name in (DECODE, PREFILL, *OWN)}


@pytest.mark.parametrize("shape", COMPILED, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ([129], [129]),
        ([64, 7, 300], [64, 1000, 5000]),
        ([1], [9000]),
        ([1] * 40, [1 + 97 * i for i in range(40)]),
        (MIXED["queries"], MIXED["contexts"]),
        ([5, 1, 1, 80], [5, 64, 65, 4000]),
    ],
    ids=["prefill", "chunks", "one long decode", "decode", "mixed", "decode after prefill"],
)
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (7, 1), (32, 2)], ids=str)
def test_steps_are_right(
    shape: dict[str, Any], queries: Sequence[int], contexts: Sequence[int], heads: tuple[int, int]
) -> None:
    case = of(queries=queries, contexts=contexts, heads=heads[0], kv_heads=heads[1], **shape)
    error = case.off(case.attend())
    print(f"{error:.2f}")
    assert error < LARGEST_ERROR
    assert launched(case) <= {DECODE, PREFILL}
    own = PagedStep(case.backend, **vars_of(case))
    theirs = own.backend.table()["paged_attention"][1].fn(own.q, own.kv, 1, own.begin(), own.scale, None)
    assert isinstance(theirs, torch.Tensor)
    assert own.off(theirs.cpu()) < LARGEST_ERROR


def vars_of(case: PagedStep) -> dict[str, Any]:
    names = ("queries", "contexts", "heads", "kv_heads", "head_dim", "dtype", "scale", "seed")
    return {name: getattr(case, name) for name in names}


def test_windows_are_taken_where_they_cut_nothing_off_and_else_done_by_own_kernels() -> None:
    wide, narrow = of(window=1000), of(window=64)
    assert wide.off(wide.attend()) < LARGEST_ERROR
    assert launched(wide) == {DECODE, PREFILL}
    assert narrow.off(narrow.attend()) < LARGEST_ERROR
    assert launched(narrow) == OWN
    assert any("a window of 64" in reason for reason in narrow.reasons)


@pytest.mark.parametrize("given", [{"dtype": torch.float32}, {"head_dim": 80}], ids=str)
def test_what_is_refused_runs_by_own_kernels(given: dict[str, Any]) -> None:
    case = of(**given)
    case.attend()
    assert launched(case) == OWN
    assert case.reasons


def test_neither_a_step_nor_its_calls_wait_for_the_device() -> None:
    """torch raises where it would; the busy device shows what waits without torch."""
    case = of()
    case.attend()
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(200_000_000)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    done.record()  # type: ignore[no-untyped-call]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = case.begin()
        found = [case.site[step](case.q, case.kv, 1, step, case.scale, None) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not done.query(), "something has waited for the device"  # type: ignore[no-untyped-call]
    for result in found:
        assert isinstance(result, torch.Tensor)
        assert case.off(result.cpu()) < LARGEST_ERROR


def test_steps_that_are_prepared_while_others_run_keep_their_plans_apart() -> None:
    """Each step is gone as soon as it is queued, so that wrappers are planned anew behind a busy device."""
    first = of(seed=1)
    cases = [first]
    for seed in range(2, 12):
        lengths = [1 + 31 * seed, 64, 400 + 53 * seed]
        given = {"queries": [1, 1, 40 + seed], "contexts": lengths, "seed": seed}
        cases.append(PagedStep(first.backend, **(vars_of(first) | given)))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    results = []
    for case in cases:
        step = case.begin()
        results.append(case.site[step](case.q, case.kv, 1, step, case.scale, None))
        del step
    for case, result in zip(cases, results, strict=True):
        assert isinstance(result, torch.Tensor)
        assert case.off(result.cpu()) < LARGEST_ERROR


@pytest.mark.parametrize("shape", COMPILED, ids=["bfloat16", "float16"])
def test_the_suites_cases_hold(shape: dict[str, Any]) -> None:
    from polyaccel_conformance.bench import Bench
    from polyaccel_cuda.backend import CudaBackend
    from tests.support.paged_cases import cases, failures

    bench = Bench(CudaBackend(attention="flashinfer"))
    listed = cases(str(shape["dtype"]).removeprefix("torch."), shape["head_dim"], 24)
    checks = ("values.exact", "values.bound", "memory.reads", "memory.inputs", "evidence.native", "evidence.kernels")
    found = failures(bench, listed, checks)
    print("\n".join(found))
    assert not found, f"{len(found)} failures in {len(listed)} cases"
    counts = bench.backend.ledger.counts()
    assert counts[DECODE] > 5
    assert counts[PREFILL] > 5
    assert not set(counts) & OWN, counts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("model"), 256, (8,), "float16", head_dim=64)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_model_says_the_same_with_both_and_graphs_hold_own_kernels(home: Path, graphs: bool) -> None:
    from polyaccel_cuda.backend import CudaBackend

    answers, counts = {}, {}
    prompts = [[5, 9, 3], [7 + i % 40 for i in range(90)], [5, 9, 3], [11] * 200]
    for attention in ("flashinfer", "triton"):
        with LLM(
            home / "model",
            backend=CudaBackend(attention=attention),
            dtype="float16",
            policy="strict",
            executor="inline",
            max_model_len=512,
            max_num_seqs=8,
            kv_cache_bytes=64 << 20,
            graphs=graphs,
            adapters={"r8": str(home / "r8")},
        ) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
            done = llm.generate(prompts, params, adapter=["r8", None, None, "r8"])
            answers[attention] = [list(one.token_ids) for one in done]
            counts[attention] = dict(llm.explain().ledger)
            said = str(llm.explain())
        assert ("by flashinfer" in said) == (attention == "flashinfer")
        assert ("in captured steps by own kernels" in said) == (attention == "flashinfer")
    theirs = counts["flashinfer"]
    assert theirs[PREFILL] > 0
    assert (DECODE in theirs, "cuda.decode_attention" in theirs) == (not graphs, graphs)
    assert "cuda.prefill_attention" not in theirs
    assert not {DECODE, PREFILL} & set(counts["triton"])
    assert answers["flashinfer"] == answers["triton"]
