"""The engine on a backend that defers everything, folds adapters into weights and replays graphs: the same tokens.

Tiny random models; what is expected are the tokens of plain composites, alone and computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyaccel import LLM, SamplingParams
from polyaccel.backend import Backend, TableBackend
from polyaccel.backend.null.backend import NullBackend
from tests.backends.folded.backend import FoldedBackend
from tests.models import peft_adapters
from tests.models.families import LAYERS, random_reference, save
from tests.support.plugins import PluginHouse

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("llama", "qwen3", "mixtral")
MAX_POSITIONS = 512
LENGTHS = (3, 124, 40, 121, 130, 7)
COUNT = 20
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
Mix = str | dict[str, float] | None
MIXES: tuple[Mix, ...] = (None, "a", "b", {"a": 0.5, "b": -0.75}, None, "b")
Tokens = list[tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A saved model, its two adapters of different ranks, prompts and the expected tokens of each."""

    folder: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: Tokens

    def open(self, backend: Backend | str, **options: Any) -> LLM:
        settings: dict[str, Any] = {"policy": "strict", "max_num_seqs": 8, "kv_cache_bytes": 64 << 20, "threads": 1}
        settings |= {"adapters": self.adapters} | options
        return LLM(self.folder, backend=backend, **settings)

    def block_bytes(self, llm: LLM) -> int:
        heads = llm.engine.model_config
        return 2 * LAYERS * heads.num_kv_heads * heads.head_dim * 128 * 4


def _answers(llm: LLM, prompts: Sequence[list[int]], mixes: Sequence[Mix] = MIXES) -> Tokens:
    return [tuple(done.token_ids) for done in llm.generate(list(prompts), GREEDY, adapter=list(mixes))]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            made[family] = _make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case


def _make(family: str, folder: Path) -> Case:
    reference = random_reference(family)
    # Long enough for sequences of several blocks; nothing else depends on it.
    reference.config.max_position_embeddings = MAX_POSITIONS
    model = save(reference, folder / "model")
    adapters = dict(zip("ab", peft_adapters.make(reference, family, folder), strict=True))
    draw = np.random.default_rng(12)
    prompts = [draw.integers(0, reference.config.vocab_size, length).tolist() for length in LENGTHS]
    case = Case(
        folder=model,
        adapters={name: adapter.folder for name, adapter in adapters.items()},
        prompts=prompts,
        expected=[],
    )
    with case.open(TableBackend("cpu", {}), policy="allow", overlap=False, prefix_caching=False) as llm:
        for prompt, mix in zip(prompts, MIXES, strict=True):
            case.expected.extend(_answers(llm, [prompt], [mix]))
        base = [_answers(llm, [prompt], [None])[0] for prompt in prompts]
    adapted = [mix is not None for mix in MIXES]
    assert [got != plain for got, plain in zip(case.expected, base, strict=True)] == adapted, "adapters must matter"
    return case


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"graphs": False}, id="eager"),
        pytest.param({"graphs": False, "overlap": False}, id="eager, no overlap"),
        pytest.param({}, id="graphs"),
        pytest.param({"overlap": False}, id="graphs, no overlap"),
        pytest.param({"max_batched_tokens": 24}, id="chunked prefill"),
        pytest.param({"max_batched_tokens": 9, "overlap": False, "graphs": False}, id="small chunks, plain"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_answers_as_the_composites_do(
    cases: Callable[[str], Case], family: str, options: dict[str, Any]
) -> None:
    case = cases(family)
    with case.open(FoldedBackend(), **options) as llm:
        assert _answers(llm, case.prompts) == case.expected
        # The second time prefixes come from the cache.
        assert _answers(llm, case.prompts) == case.expected
        explanation = llm.explain()
        assert explanation.composites() == {}
        assert not [kernel for kernel in explanation.ledger if "composite" in kernel]
        graphs = explanation.ranks[0]["graphs"]
        if options.get("graphs", True):
            assert isinstance(graphs, dict)
            assert graphs["replays"] > graphs["captures"] > 0
        else:
            assert graphs is None


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_preempted_requests_answer_the_same(cases: Callable[[str], Case], graphs: bool) -> None:
    case = cases("llama")
    with case.open(FoldedBackend()) as llm:
        block = case.block_bytes(llm)
    with case.open(FoldedBackend(), kv_cache_bytes=4 * block, prefix_caching=False, graphs=graphs) as llm:
        assert llm.engine.executor.capacity.kv_blocks == 4
        assert _answers(llm, case.prompts) == case.expected
        assert llm.engine.loop.stats().preemptions > 0


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(plugin_house: PluginHouse, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which worker processes find the backend."""
    monkeypatch.syspath_prepend(plugin_house.site("folded"))
    return "folded"


@pytest.mark.parametrize(("family", "ranks"), [("llama", 2), ("llama", 3), ("qwen3", 3), ("mixtral", 2)])
def test_ranks_answer_as_one_and_adapters_bring_no_collective(
    cases: Callable[[str], Case], installed: str, family: str, ranks: int
) -> None:
    case = cases(family)
    options = {"tensor_parallel_size": ranks, "trace_collectives": True, "timeout": 120.0, "prefix_caching": False}
    with case.open(installed, adapters={}, **options) as llm:
        base = _answers(llm, case.prompts, [None] * len(MIXES))
        without = _collectives(llm)
        for name, folder in case.adapters.items():
            llm.adapters.load(name, folder)
        assert _answers(llm, case.prompts) == case.expected
        with_adapters = _collectives(llm)
        assert _answers(llm, case.prompts, [None] * len(MIXES)) == base
        plan = llm.explain().ranks[0]["plan"]
    assert [base[i] for i, mix in enumerate(MIXES) if mix is None] == [
        tokens for tokens, mix in zip(case.expected, MIXES, strict=True) if mix is None
    ]
    assert len(with_adapters) == ranks
    for trace, plain in zip(with_adapters, without, strict=True):
        assert [kind for kind, _ in trace] == [kind for kind, _ in plain]
        assert {kind for kind, _ in trace} == {"all_reduce", "all_gather"}
    assert isinstance(plan, dict)
    assert plan["sites"]["layers.0.o"]["decode+adapters"]["detail"] == "ride"
    _assert_rows_ride(case, family, without[0], with_adapters[0])


def test_a_worker_process_of_its_own_answers_the_same_with_graphs(cases: Callable[[str], Case], installed: str) -> None:
    case = cases("llama")
    with case.open(installed, executor="process", trace_collectives=True, timeout=120.0) as llm:
        assert _answers(llm, case.prompts) == case.expected
        graphs = llm.explain().ranks[0]["graphs"]
        assert isinstance(graphs, dict)
        assert graphs["replays"] > 0
        assert _collectives(llm) == [[]]


def _collectives(llm: LLM) -> list[list[tuple[str, int]]]:
    return llm.engine.loop.call(llm.engine.executor.collectives)


def _assert_rows_ride(case: Case, family: str, plain: list[tuple[str, int]], adapted: list[tuple[str, int]]) -> None:
    """Each step's row-parallel sums are longer by the rank rows that the step covers, all others are not."""
    per_step = 2 + 2 * LAYERS
    assert len(plain) % per_step == 0
    riding = [0, *[1, int(family != "mixtral")] * LAYERS, 0]
    covered: dict[int, None] = {}
    for start in range(0, len(plain), per_step):
        step = zip(plain[start : start + per_step], adapted[start : start + per_step], riding, strict=True)
        extra = {bool(rides): after - before for (_, before), (_, after), rides in step}
        assert extra[False] == 0
        covered[extra[True]] = None
    assert max(covered) > 0
    assert all(carried % 4 == 0 for carried in covered)


# -- graphs ------------------------------------------------------------------------------------------------------------


def _captures(llm: LLM) -> int:
    graphs = llm.explain().ranks[0]["graphs"]
    assert isinstance(graphs, dict)
    captures = graphs["captures"]
    assert isinstance(captures, int)
    return captures


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_graphs_serve_more_fewer_and_other_adapters_and_padding_rows(cases: Callable[[str], Case], order: str) -> None:
    case = cases("llama")
    every = list(zip(case.prompts, MIXES, case.expected, strict=True))
    adapters = {name: case.adapters[name] for name in order}
    with case.open(FoldedBackend(), adapters=adapters) as llm:
        # Loaded second, "a" has the last rank rows: a graph captured for "b" alone has to cover them.
        for chosen in (every[5:], every[1:2], every, every[1:4], every[:1], every[3:], every[::2], every):
            prompts, mixes, expected = zip(*chosen, strict=True)
            assert _answers(llm, prompts, mixes) == list(expected)
        assert _captures(llm) < len(every) * 2


def test_swapping_adapters_recaptures_nothing(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    rows = [i for i, mix in enumerate(MIXES) if mix == "b"]
    prompts, expected = [case.prompts[i] for i in rows], [case.expected[i] for i in rows]
    with case.open(FoldedBackend(), adapters={"b": case.adapters["b"]}) as llm:
        assert _answers(llm, prompts, ["b"] * len(rows)) == expected
        captured = _captures(llm)
        for _ in range(2):
            llm.adapters.unload("b")
            llm.adapters.load("other", case.adapters["a"])
            other = _answers(llm, prompts, ["other"] * len(rows))
            assert other != expected
            llm.adapters.unload("other")
            llm.adapters.load("b", case.adapters["b"])
            assert _answers(llm, prompts, ["b"] * len(rows)) == expected
        assert _captures(llm) <= captured + 1, "only the smaller adapter's own bucket may be new"


def test_seeded_samples_logprobs_and_penalties_come_out_of_graphs_as_they_do_without(
    cases: Callable[[str], Case],
) -> None:
    case = cases("llama")
    params = [
        SamplingParams(max_tokens=COUNT, temperature=0.9, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=COUNT, temperature=0.0, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=COUNT, temperature=1.2, top_k=7, top_p=0.8, seed=2, ignore_eos=True),
        SamplingParams(max_tokens=COUNT, temperature=0.0, repetition_penalty=1.4, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0.7, min_p=0.1, seed=3, logprobs=0, ignore_eos=True),
        SamplingParams(max_tokens=COUNT, temperature=0.5, logit_bias={1: -4.0}, seed=4, ignore_eos=True),
    ]
    answers = []
    for options in ({"graphs": False, "overlap": False}, {"overlap": False}, {}):
        with case.open(FoldedBackend(), **options) as llm:
            answers.append(llm.generate(case.prompts, params, adapter=list(MIXES)))
    for other in answers[1:]:
        for first, second in zip(answers[0], other, strict=True):
            assert first.token_ids == second.token_ids
            assert (first.logprobs is None) == (second.logprobs is None)
            for one, two in zip(first.logprobs or (), second.logprobs or (), strict=True):
                assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
    assert answers[0][1].logprobs is not None


# -- weights that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_merged_adapter_answers_as_a_loaded_one_and_comes_out_again(
    cases: Callable[[str], Case], family: str
) -> None:
    case = cases(family)
    name = "b"
    rows = [i for i, mix in enumerate(MIXES) if mix == name]
    prompts, expected = [case.prompts[i] for i in rows], [case.expected[i] for i in rows]
    nobody: list[Mix] = [None] * len(rows)
    with case.open(FoldedBackend()) as llm:
        base = _answers(llm, prompts, nobody)
        llm.adapters.merge(name)
        assert _answers(llm, prompts, nobody) == expected
        llm.adapters.unmerge()
        assert _answers(llm, prompts, nobody) == base
        assert _answers(llm, prompts, [name] * len(rows)) == expected


# -- the null backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [0.0, 0.002])
def test_overlap_changes_no_token_where_results_arrive_late(cases: Callable[[str], Case], latency: float) -> None:
    case = cases("llama")
    params = [
        SamplingParams(max_tokens=4 + 3 * i, temperature=0.0, seed=i, ignore_eos=True) for i in range(len(case.prompts))
    ]
    answers = []
    for overlap in (True, False):
        with case.open(NullBackend(latency=latency), overlap=overlap, max_batched_tokens=64, adapters={}) as llm:
            answers.append([done.token_ids for done in llm.generate(case.prompts, params)])
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0]] == [4 + 3 * i for i in range(len(case.prompts))]


def test_the_null_backend_runs_on_several_ranks(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    params = SamplingParams(max_tokens=6, temperature=0.0, seed=5, ignore_eos=True)
    answers = []
    for ranks in (1, 2):
        with case.open("null", tensor_parallel_size=ranks, trace_collectives=True) as llm:
            answers.append([done.token_ids for done in llm.generate(case.prompts, params, adapter=list(MIXES))])
            traces = _collectives(llm)
    assert answers[0] == answers[1]
    assert [len(trace) > 0 for trace in traces] == [True, True]
