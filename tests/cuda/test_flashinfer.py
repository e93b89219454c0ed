"""FlashInfer's attention: asked for by name, planned as each step begins, called within its limits alone."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="run tox -e triton")

from polyaccel import LLM, SamplingParams
from polyaccel.backend import BackendUnavailable, Entry, Query, TokenClass
from polyaccel.backend.errors import ConfigurationError
from polyaccel_cuda.backend import CudaBackend
from polyaccel_cuda.flashinfer import EVIDENCE, refusals, require
from polyaccel_cuda.flashinfer_plan import MOST_VARIANTS
from polyaccel_cuda.step import CudaStep
from tests.backends.interpreted.backend import InterpretedBackend
from tests.cuda_devices import model
from tests.support import flashinfer_stand_in
from tests.support.flashinfer_stand_in import CALLS
from tests.support.paged_step import PagedStep

DECODE, PREFILL = "cuda.flashinfer_decode", "cuda.flashinfer_prefill"
OWN = ("cuda.decode_attention", "cuda.prefill_attention")
MIXED: dict[str, Any] = {"queries": [1, 1, 5, 3], "contexts": [70, 1, 5, 130]}


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_stand_in.install(monkeypatch)


def of(**given_: Any) -> PagedStep:
    return PagedStep(InterpretedBackend(attention="flashinfer"), **(MIXED | given_))


def launched(case: PagedStep) -> set[str]:
    return {name for name in case.backend.ledger.counts() if name in (DECODE, PREFILL, *OWN)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 9)), min_size=1, max_size=5),
    one=st.integers(0, 5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 7, 16]),
    head_dim=st.sampled_from([64, 128, 256]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.125, 0.3]),
    seed=st.integers(0, 999),
)
def test_any_step_is_planned_as_the_wrappers_want_it(
    lengths: list[tuple[int, int]],
    one: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    """``one``: how many sequences from the first on have one query."""
    CALLS.clear()
    queries = [1 if i < one else count for i, (_, count) in enumerate(lengths)]
    case = of(
        queries=queries,
        contexts=[cached + count for (cached, _), count in zip(lengths, queries, strict=True)],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=scale,
        seed=seed,
    )
    assert case.off(case.attend()) < 2
    runs = next((i for i, count in enumerate(queries) if count > 1), len(queries))
    wanted = {name for name, there in ((DECODE, runs > 0), (PREFILL, runs < len(queries))) if there}
    assert launched(case) == wanted


def test_the_suites_cases_hold_with_the_stand_in() -> None:
    from polyaccel_conformance.bench import Bench
    from tests.support.paged_cases import cases, failures

    bench = Bench(InterpretedBackend(attention="flashinfer"))
    listed = cases("float16", 64, 16)
    assert (
        failures(bench, listed, ("values.exact", "values.bound", "memory.reads", "memory.inputs", "support.pure")) == []
    )
    counts = bench.backend.ledger.counts()
    assert counts[DECODE] > 5
    assert counts[PREFILL] > 5
    assert not set(counts) & set(OWN), counts


def test_a_step_is_planned_once_and_run_once_a_layer() -> None:
    case = of()
    case.begin()
    CALLS.clear()
    step = case.begin()
    assert CALLS == {"decode.plan": 1, "prefill.plan": 1}
    first = case.attend(step)
    assert torch.equal(case.attend(step), first)
    assert +CALLS == {"decode.plan": 1, "prefill.plan": 1, "decode.run": 2, "prefill.run": 2}


def test_constants_of_a_first_call_are_copied_as_its_step_begins() -> None:
    case = of()
    step = case.begin()
    assert CALLS["constants"] == 1
    assert case.backend.ledger.counts()["cuda.flashinfer_first_call"] == 2
    case.attend(step)
    case.attend()
    assert CALLS["constants"] == 1
    assert case.backend.ledger.counts()["cuda.flashinfer_first_call"] == 2


def test_two_attentions_of_a_model_are_both_planned_as_the_step_begins() -> None:
    case = of()
    other = PagedStep(case.backend, **MIXED, heads=8)
    step = case.begin()
    assert (CALLS["decode.plan"], CALLS["prefill.plan"]) == (2, 2)
    CALLS.clear()
    assert case.off(case.attend(step)) < 2
    q = torch.cat((case.q, case.q), 1)
    wide = other.site[step](q, case.kv, 1, step, other.scale, None)
    assert (CALLS["decode.plan"], CALLS["prefill.run"]) == (0, 2)
    assert isinstance(wide, torch.Tensor)
    assert wide.shape == q.shape


def test_tokens_of_no_sequence_give_zeros() -> None:
    from dataclasses import replace

    case = of()
    inputs, extra = case.input, 2
    case.input = replace(
        inputs,
        **{
            name: torch.nn.functional.pad(torch.from_numpy(getattr(inputs, name)), (0, extra)).numpy()
            for name in ("token_ids", "positions")
        },
        kv_slots=torch.nn.functional.pad(torch.from_numpy(inputs.kv_slots), (0, extra), value=-1).numpy(),
    )
    found = case.attend(q=torch.cat((case.q, case.q[:extra])))
    assert launched(case) == {DECODE, PREFILL}
    assert case.off(found[:-extra]) < 2
    assert not found[-extra:].any()


@pytest.mark.parametrize("layout", ["heads first", "one element in", "odd rows", "transposed"])
def test_queries_that_vectors_cannot_be_read_from_are_copied_and_counted(layout: str) -> None:
    case = of()
    rows, heads, dim = case.q.shape
    q = {
        "heads first": lambda: case.q.transpose(0, 1).contiguous().transpose(0, 1),
        "one element in": lambda: torch.cat((case.q.new_zeros(1), case.q.flatten()))[1:].view(rows, heads, dim),
        "odd rows": lambda: torch.cat((case.q.flatten(1), case.q.new_zeros(rows, 3)), 1)[:, :-3].unflatten(
            1, (heads, dim)
        ),
        "transposed": lambda: case.q.transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]()
    assert torch.equal(q, case.q)
    assert case.off(case.attend(q=q)) < 2
    assert launched(case) == {DECODE, PREFILL}
    copies = {name: n for name, n in case.backend.ledger.counts().items() if name.endswith("paged_attention.q")}
    assert sum(copies.values()) == (layout != "heads first")


# -- what is refused ---------------------------------------------------------------------------------------------------

STATIC: dict[str, Any] = {"dtype": "float16", "heads": 8, "kv_heads": 2, "head_dim": 128, "scale": 0.1, "window": None}


def query(longest: int | None = 4096, **static: Any) -> Query:
    return Query(
        site="a",
        operator="paged_attention",
        token_class=TokenClass.MIXED,
        adapters=False,
        static=STATIC | static,
        ranges={} if longest is None else {"context": (1, longest)},
    )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (query(dtype="float32"), "dtype float32; flashinfer takes float16 and bfloat16"),
        (query(head_dim=80), "heads of 80; flashinfer takes 64, 128, 256"),
        (query(heads=34), "17 query heads to a key head; flashinfer's workspace is for 16"),
        (query(window=4095), "a window of 4095, shorter than the longest context, 4096: flashinfer's kernels read what "
         "lies before it"),
        (query(None, window=9), "a window of 9, shorter than any context: flashinfer's kernels read what lies before "
         "it"),
    ],
)  # fmt: skip
def test_each_limit_that_is_known_at_load_is_a_reason_of_its_own(asked: Query, reason: str) -> None:
    assert refusals(asked) == [reason]
    assert refusals(query()) == refusals(query(window=4096)) == refusals(query(dtype="bfloat16", head_dim=64)) == []


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({"dtype": torch.float32}, "dtype float32"),
        ({"head_dim": 80}, "heads of 80"),
        ({"window": 16}, "a window of 16"),
    ],
)
def test_what_is_refused_runs_by_own_kernels_and_the_plan_says_why(given_: dict[str, Any], reason: str) -> None:
    case = of(**given_)
    assert any(reason in text for text in case.reasons), case.reasons
    assert case.off(case.attend()) < 40
    assert launched(case) == set(OWN)
    assert not CALLS


def test_a_window_that_is_longer_than_every_context_is_no_window() -> None:
    case = of(window=130)
    assert case.off(case.attend()) < 2
    assert launched(case) == {DECODE, PREFILL}


def test_a_step_with_a_longer_context_than_the_plan_was_told_keeps_its_window() -> None:
    case = of(window=64, longest=64)
    assert not case.reasons
    assert case.off(case.attend()) < 40
    assert launched(case) == set(OWN)


def test_steps_of_sequences_without_keys_or_queries_go_to_own_kernels_whole() -> None:
    for queries, contexts in (([1, 1], [0, 3]), ([2, 0, 3], [5, 4, 3])):
        case = of(queries=[1], contexts=[3])
        from polyaccel_conformance.problems.steps import Paging, build_step
        from polyaccel_conformance.words import Source

        lengths = [max(pair) for pair in zip(queries, contexts, strict=True)]
        paging = Paging.of(Source(0), queries, lengths, case.backend.kv_block_size())
        inputs = build_step(Source(0), queries, contexts=lengths, paging=paging)
        inputs.context_lengths[:] = contexts
        case.input = inputs
        CALLS.clear()
        step = case.begin()
        found = case.attend(step, torch.zeros(sum(queries), 4, 64, dtype=torch.float16))
        assert found.shape[0] == sum(queries)
        assert not CALLS
        assert launched(case) & set(OWN)


def test_an_attention_that_the_plan_never_asked_for_is_not_planned_inside_a_call() -> None:
    case = of()
    step = case.begin()
    CALLS.clear()
    fn = case.backend.table()["paged_attention"][0].fn
    found = fn(case.q, case.kv, 1, step, 0.3, None)
    assert isinstance(found, torch.Tensor)
    assert launched(case) == set(OWN)
    assert not CALLS


def test_a_step_that_is_captured_runs_own_kernels() -> None:
    case = of(queries=[1, 1], contexts=[70, 3], decode=True)
    step = CudaStep.of("test", case.begin())
    step.captured = True
    assert case.off(case.attend(step)) < 40
    assert launched(case) == {OWN[0]}


def test_decode_steps_are_not_planned_while_graphs_replay_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        holds_memory = True

    case, held = of(queries=[1, 1], contexts=[70, 3], decode=True), Held()
    case.begin()
    assert CALLS["decode.plan"] == 1
    monkeypatch.setattr(case.backend, "_graphs", [held])
    case.begin()
    assert CALLS["decode.plan"] == 1
    mixed = PagedStep(case.backend, **MIXED)
    mixed.begin()
    assert (CALLS["decode.plan"], CALLS["prefill.plan"]) == (2, 1)
    held.holds_memory = False
    case.begin()
    assert CALLS["decode.plan"] == 3


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Marks:
    """Events that remember being waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits += 1


def test_a_wrapper_is_planned_again_only_after_its_step_is_gone_and_its_copy_was_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = of()
    marks: list[Marks] = []

    def record() -> Marks:
        marks.append(Marks())
        return marks[-1]

    monkeypatch.setattr(case.backend.devices()[0], "record", record)
    made: list[object] = []
    wrapper = flashinfer_stand_in.BatchPrefillWithPagedKVCacheWrapper
    plan = wrapper.plan
    monkeypatch.setattr(wrapper, "plan", lambda self, *args, **given_: (made.append(self), plan(self, *args, **given_)))
    first, second = case.begin(), case.begin()
    assert len(marks) == 4
    assert made[0] is not made[1]
    assert not any(mark.waits for mark in marks)
    del first
    gc.collect()
    third = case.begin()
    assert made[2] is made[0]
    assert [mark.waits for mark in marks[:4]] == [1, 1, 0, 0]
    assert case.off(case.attend(third)) < 2
    assert case.off(case.attend(second)) < 2


def test_a_larger_attention_gets_a_larger_workspace_and_the_smaller_one_goes_on() -> None:
    case = of(head_dim=64)
    kept = case.begin()
    other = of(head_dim=256, heads=32)
    larger = PagedStep(case.backend, **MIXED, head_dim=256, heads=32)
    assert larger.off(larger.attend()) < 2
    assert other.off(other.attend()) < 2
    assert case.off(case.attend(kept)) < 2
    del kept
    gc.collect()
    assert case.off(case.attend()) < 2
    assert case.off(case.attend()) < 2
    assert launched(case) == {DECODE, PREFILL}


def test_only_the_latest_attentions_are_planned_for() -> None:
    case = of()
    for i in range(MOST_VARIANTS):
        PagedStep(case.backend, **MIXED, scale=0.2 + i)
    CALLS.clear()
    step = case.begin()
    assert CALLS["prefill.plan"] == MOST_VARIANTS
    case.attend(step)
    assert launched(case) == set(OWN)


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_it_is_not_used_unless_asked_for_although_it_is_there() -> None:
    case = PagedStep(InterpretedBackend(), **MIXED)
    case.attend()
    assert launched(case) == set(OWN)
    assert not CALLS
    (entry,) = case.backend.table()["paged_attention"]
    assert not set(EVIDENCE) & set(entry.evidence)


def test_its_entry_comes_before_the_own_one_and_says_what_graphs_run() -> None:
    entries: list[Entry] = list(InterpretedBackend(attention="flashinfer").table()["paged_attention"])
    assert [set(EVIDENCE) <= set(entry.evidence) for entry in entries] == [True, False]
    assert entries[0].name == entries[1].name
    assert entries[0].detail == "by flashinfer 0.6.4, in captured steps by own kernels"


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"attention='cudnn'; it is one of triton, flashinfer"):
        CudaBackend(attention="cudnn")


def broken(**changes: Any) -> ModuleType:
    found = flashinfer_stand_in.module()
    found.__dict__.update(changes)
    return found


class OfOldPlan(flashinfer_stand_in.BatchPrefillWithPagedKVCacheWrapper):
    def plan(self, qo_indptr: torch.Tensor, *, causal: bool) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "flashinfer is not installed"),
        (broken(__version__="0.4.1"), "flashinfer 0.4.1 is there"),
        (broken(__version__="1.0.0"), "flashinfer 1.0.0 is there"),
        (broken(__version__="main"), "flashinfer main is there"),
        (broken(BatchDecodeWithPagedKVCacheWrapper=None), "flashinfer 0.6.4 has no BatchDecodeWithPagedKVCacheWrapper"),
        (broken(BatchPrefillWithPagedKVCacheWrapper=OfOldPlan), "BatchPrefillWithPagedKVCacheWrapper.plan differs"),
    ],
)
def test_asked_for_and_missing_or_strange_it_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType | None, said: str
) -> None:
    if module is None:
        # An import of None in sys.modules is refused, whether the package is there or not.
        monkeypatch.setitem(sys.modules, "flashinfer", None)
    else:
        monkeypatch.setitem(sys.modules, "flashinfer", module)
    for open_ in (require, CudaBackend(attention="flashinfer").devices):
        with pytest.raises(BackendUnavailable) as caught:
            open_()
        text = str(caught.value)
        assert text.startswith("attention='flashinfer' was asked for, and ")
        assert said in text
        assert text.endswith(
            "install flashinfer-python of a version from 0.5 and below 0.8, or leave attention at 'triton'"
        )


def test_post_releases_are_versions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_stand_in.install(monkeypatch, "0.7.2.post1")
    assert require().version == "0.7.2.post1"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("model"), 128, (8,), "float16", head_dim=64)


def test_a_model_answers_alike_with_both(home: Path) -> None:
    answers, params = {}, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    for attention in ("flashinfer", "triton"):
        CALLS.clear()
        options: Any = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_bytes": 8 << 20, "executor": "inline"}
        backend = InterpretedBackend(attention=attention)
        adapters = {"r8": str(home / "r8")}
        with LLM(
            home / "model", backend=backend, dtype="float16", adapters=adapters, policy="strict", **options
        ) as llm:
            done = llm.generate([[5, 9, 3], [7] * 20, [5, 9, 3]], params, adapter=["r8", None, None])
            answers[attention] = [list(one.token_ids) for one in done]
            said = str(llm.explain())
            counts = llm.explain().ledger
        assert bool(CALLS["decode.run"] and CALLS["prefill.run"]) == (attention == "flashinfer")
        assert ("by flashinfer 0.6.4" in said) == (attention == "flashinfer")
        assert bool(set(OWN) & set(counts)) == (attention == "triton")
    assert answers["flashinfer"] == answers["triton"]
    assert answers["triton"][0] != answers["triton"][2], "the adapter changes nothing"
