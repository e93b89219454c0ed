"""Merging an adapter into the base weights: the outputs are the adapter's, and unmerging leaves no bit behind."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from polyaccel import (
    LLM,
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    PolyaccelError,
    RequestRejected,
    SamplingParams,
)
from polyaccel.backend import TableBackend
from polyaccel.engine.merging import Merger
from polyaccel.engine.runner import Runner
from tests.models import families, peft_adapters
from tests.support.tiny_model import ADAPTERS, LINEARS, TinyModel, make_adapter, random_prompts

PROMPTS = random_prompts(4, seed=12)
COUNT = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)


def tokens(llm: LLM, adapter: str | dict[str, float] | None = None) -> list[list[int]]:
    return [list(completion.token_ids) for completion in llm.generate(PROMPTS, GREEDY, adapter=adapter)]


def expected(tiny: TinyModel, mix: str | Mapping[str, float] | None = None) -> list[list[int]]:
    return [tiny.greedy(prompt, COUNT, mix) for prompt in PROMPTS]


def runner(llm: LLM) -> Runner:
    found = llm.engine.executor._runner  # type: ignore[attr-defined]
    assert isinstance(found, Runner)
    return found


def weights(llm: LLM) -> dict[str, torch.Tensor]:
    """A copy of every base weight."""
    owner = runner(llm)
    return {site: owner.backend.dequantize(weight).clone() for site, weight in owner.model.weights().items()}


def wait_for_pause(llm: LLM) -> None:
    """Until a merge holds back new requests."""
    while not llm.engine.loop._paused:
        time.sleep(0.001)


def changed(llm: LLM, before: dict[str, torch.Tensor]) -> set[str]:
    return {site for site, values in weights(llm).items() if not torch.equal(values, before[site])}


@pytest.mark.parametrize("backend", ["composites", "cpu"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_model_answers_as_with_the_adapter_and_comes_back_bit_for_bit(
    tiny: TinyModel, kind: str, backend: str
) -> None:
    chosen = TableBackend("cpu", {}) if backend == "composites" else backend
    with tiny.open(backend=chosen, executor="inline", adapters={kind: tiny.adapter(kind).folder}) as llm:
        before = weights(llm)
        llm.adapters.merge(kind)
        assert tokens(llm) == expected(tiny, kind)
        assert changed(llm, before) == {entry.site for entry in llm.adapters.receipt(kind).applied}
        assert [info.merged for info in llm.adapters.list()] == [True]
        llm.adapters.unmerge()
        assert changed(llm, before) == set()
        assert tokens(llm) == expected(tiny)
        assert tokens(llm, kind) == expected(tiny, kind), "the adapter itself is as before"


def test_weights_of_merges_add_up_and_other_adapters_go_on_top(tiny: TinyModel) -> None:
    with tiny.open(adapters={name: tiny.adapter(name).folder for name in ("plain", "subset", "ends")}) as llm:
        before = weights(llm)
        llm.adapters.merge("plain", 0.5)
        assert tokens(llm) == expected(tiny, {"plain": 0.5})
        llm.adapters.merge("subset", -1.0)
        assert tokens(llm) == expected(tiny, {"plain": 0.5, "subset": -1.0})
        assert tokens(llm, {"ends": 0.75}) == expected(tiny, {"plain": 0.5, "subset": -1.0, "ends": 0.75})
        llm.adapters.unmerge()
        assert changed(llm, before) == set()
        llm.adapters.merge("plain")
        assert tokens(llm) == expected(tiny, "plain")


def test_requests_before_a_merge_get_the_base_and_those_after_it_the_merged_model(tiny: TinyModel) -> None:
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as llm:
        long = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
        early = [llm.stream(prompt, long) for prompt in PROMPTS]
        next(early[0])
        answers: list[list[list[int]]] = []
        merging = threading.Thread(target=llm.adapters.merge, args=("plain",))
        merging.start()
        wait_for_pause(llm)
        asking = [threading.Thread(target=lambda: answers.append(tokens(llm))) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in (merging, *asking):
            thread.join(30)
        assert answers == [expected(tiny, "plain")] * 2
        for prompt, stream in zip(PROMPTS, early, strict=True):
            completion = list(stream)[-1].completion
            assert completion is not None
            assert list(completion.token_ids) == tiny.greedy(prompt, 120)


def test_cached_prefixes_are_forgotten_when_the_weights_change(tiny: TinyModel) -> None:
    prompt = random_prompts(1, seed=8, low=64, high=64)[0]
    with tiny.open(adapters={name: tiny.adapter(name).folder for name in ("plain", "ends")}) as llm:

        def cached(adapter: str | None = None) -> int:
            return llm.generate(prompt, GREEDY, adapter=adapter)[0].cached_tokens

        for change in (lambda: None, lambda: llm.adapters.merge("plain"), llm.adapters.unmerge):
            change()
            assert [cached(), cached(), cached("ends"), cached("ends")] == [0, 48, 0, 48]


def test_a_merged_adapter_can_neither_be_used_nor_unloaded_nor_merged_again(tiny: TinyModel) -> None:
    with tiny.open(adapters={name: tiny.adapter(name).folder for name in ("plain", "ends")}) as llm:
        llm.adapters.merge("plain")
        with pytest.raises(RequestRejected, match="'plain' is merged"):
            llm.generate(PROMPTS[0], GREEDY, adapter={"plain": 0.5, "ends": 1.0})
        with pytest.raises(AdapterError, match="merged"):
            llm.adapters.unload("plain")
        with pytest.raises(AdapterError, match="merged already"):
            llm.adapters.merge("plain")
        assert tokens(llm, "ends") == expected(tiny, {"plain": 1.0, "ends": 1.0})
        llm.adapters.unmerge()
        assert tokens(llm, "plain") == expected(tiny, "plain")
        llm.adapters.unload("plain")


def test_a_request_that_waited_for_the_merge_of_its_own_adapter_is_refused(tiny: TinyModel) -> None:
    errors: list[BaseException] = []
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as llm:
        stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
        next(stream)
        merging = threading.Thread(target=llm.adapters.merge, args=("plain",))
        merging.start()
        wait_for_pause(llm)

        def ask() -> None:
            try:
                llm.generate(PROMPTS[0], GREEDY, adapter="plain")
            except PolyaccelError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        stream.close()
        merging.join(20)
        asking.join(20)
    assert [type(error) for error in errors] == [RequestRejected]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_a_weight_that_is_no_number_is_refused(tiny: TinyModel, weight: object) -> None:
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as llm:
        before = weights(llm)
        with pytest.raises(RequestRejected, match="'plain'"):
            llm.adapters.merge("plain", weight)  # type: ignore[arg-type]
        assert changed(llm, before) == set()


def test_nothing_to_merge_or_unmerge_is_an_error(tiny: TinyModel) -> None:
    with tiny.open() as llm:
        with pytest.raises(AdapterNotFound, match="'nobody'"):
            llm.adapters.merge("nobody")
        with pytest.raises(AdapterError, match="no adapter is merged"):
            llm.adapters.unmerge()
        assert tokens(llm) == expected(tiny)


def test_a_merge_that_fails_changes_nothing(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny.adapter("plain").folder, folder)
    with tiny.open(adapters={"plain": folder, "ends": tiny.adapter("ends").folder}) as llm:
        pristine = weights(llm)
        llm.adapters.merge("ends")
        before = weights(llm)
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[:1000])
        with pytest.raises(AdapterIncompatible):
            llm.adapters.merge("plain")
        assert changed(llm, before) == set()
        (folder / "adapter_model.safetensors").write_bytes(data)
        # It fails half-way, with some weights written.
        weight = runner(llm).model.weights()["layers.1.o"]
        with monkeypatch.context() as patch:
            patch.setattr(type(weight), "seal", _failing_seal(weight))
            with pytest.raises(MemoryError):
                llm.adapters.merge("plain")
        assert changed(llm, before) == set()
        assert [info.merged for info in llm.adapters.list()] == [False, True]
        assert tokens(llm) == expected(tiny, "ends")
        llm.adapters.merge("plain")
        assert tokens(llm) == expected(tiny, {"plain": 1.0, "ends": 1.0})
        llm.adapters.unmerge()
        assert changed(llm, pristine) == set()


def _failing_seal(victim: object) -> object:
    """``seal`` that fails once, for one weight."""
    original = type(victim).seal  # type: ignore[attr-defined]
    left = [1]

    def seal(self: object) -> None:
        if self is victim and left:
            left.pop()
            raise MemoryError("no room to pack")
        original(self)

    return seal


def test_an_adapter_loaded_with_dropped_tensors_merges_without_them(tiny: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "stray"
    shutil.copytree(tiny.adapter("plain").folder, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {n.replace("layers.0", "layers.9"): t.clone() for n, t in tensors.items() if ".0.mlp.up" in n}, file
    )
    with tiny.open() as llm:
        llm.adapters.load("stray", folder, allow_unmatched=True)
        llm.adapters.merge("stray")
        assert tokens(llm) == expected(tiny, "plain")


def test_a_shared_embedding_is_not_merged_into_but_the_rest_of_such_a_model_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path / "model")
    head = make_adapter(reference, {"r": 4, "target_modules": ["q_proj", "lm_head"]}, tmp_path / "head", 1)
    inner = make_adapter(reference, {"r": 4, "target_modules": list(LINEARS)}, tmp_path / "inner", 2, scale=3.0)
    adapters = {"head": head.folder, "inner": inner.folder}
    with LLM(tmp_path / "model", backend=TableBackend("cpu", {}), policy="allow", adapters=adapters) as llm:
        before = weights(llm)
        with pytest.raises(AdapterError, match="'lm_head' shares its weight"):
            llm.adapters.merge("head")
        assert changed(llm, before) == set()
        llm.adapters.merge("inner")
        [completion] = llm.generate([5, 6, 7], GREEDY)
        ids = [5, 6, 7]
        with torch.no_grad():
            for token in completion.token_ids:
                assert int(inner.merged(torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)
        llm.adapters.unmerge()
        assert changed(llm, before) == set()


def test_adapters_of_experts_are_merged_into_their_experts(tmp_path: Path) -> None:
    reference = families.random_reference("mixtral")
    folder = families.save(reference, tmp_path / "model")
    first, second = peft_adapters.make(reference, "mixtral", tmp_path)
    adapters = {"first": first.folder, "second": second.folder}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(folder, backend=TableBackend("cpu", {}), policy="allow", dtype="float32", adapters=adapters) as llm:
        before = weights(llm)
        for name, merged in (("first", first.merged), ("second", second.merged)):
            llm.adapters.merge(name)
            [completion] = llm.generate([5, 6, 7], params)
            ids = [5, 6, 7]
            for token in completion.token_ids:
                assert int(families.reference_logits(merged, ids)[-1].argmax()) == token, name
                ids.append(token)
            llm.adapters.unmerge()
            assert changed(llm, before) == set()


def test_a_quantised_base_is_refused_with_its_bits(tiny: TinyModel) -> None:
    with tiny.open() as llm:
        model = runner(llm).model
    four_bits = SimpleNamespace(spec=SimpleNamespace(quantisation=SimpleNamespace(bits=4), tied_to=None))
    quantised = SimpleNamespace(targets=model.targets, weights=lambda: dict.fromkeys(model.weights(), four_bits))
    merger = Merger(quantised, TableBackend("cpu", {}))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"quantised.*4 bits.*unmerged"):
        merger.merge(str(tiny.adapter("plain").folder), 1.0)
