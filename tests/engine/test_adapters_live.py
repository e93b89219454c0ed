"""``llm.adapters`` while requests run: loading, swapping, unloading, mixing; every answer is PEFT's."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyaccel import LLM, AdapterError, AdapterIncompatible, AdapterNotFound, SamplingParams
from tests.support.tiny_model import ADAPTERS, LAYERS, TinyModel, make_adapter, random_prompts

PROMPTS = random_prompts(4, seed=2)
COUNT = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
LOGPROB_BOUND = 2e-4


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with tiny.open(adapters={name: tiny.adapter(name).folder for name in ADAPTERS}) as engine:
        yield engine


def tokens(llm: LLM, prompt: list[int], adapter: str | dict[str, float] | None) -> list[int]:
    return list(llm.generate(prompt, GREEDY, adapter=adapter)[0].token_ids)


def resident(llm: LLM) -> set[str]:
    return {info.name for info in llm.adapters.list() if info.resident}


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def changed_copy(folder: Path, target: Path, factor: float) -> Path:
    """The adapter with every B scaled."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    file = target / "adapter_model.safetensors"
    scaled = {n: t * factor if "lora_B" in n or "embedding_B" in n else t for n, t in load_file(file).items()}
    save_file(scaled, file)
    return target


# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_tokens_and_logprobs_with_an_adapter_are_those_of_transformers_with_peft(
    llm: LLM, tiny: TinyModel, kind: str
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, logprobs=20)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params, adapter=kind), strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt, COUNT, kind)
        assert list(completion.token_ids) != tiny.greedy(prompt, COUNT)
        expected = tiny.logprobs(prompt, completion.token_ids, kind)
        assert completion.logprobs is not None
        for entry, row in zip(completion.logprobs, expected, strict=True):
            ids = [token for token, _ in entry.top]
            assert [value for _, value in entry.top] == pytest.approx(row[ids].tolist(), abs=LOGPROB_BOUND)


def test_all_adapters_are_answered_in_one_batch(llm: LLM, tiny: TinyModel) -> None:
    names: list[str | dict[str, float] | None] = [None, *ADAPTERS]
    completions = llm.generate([PROMPTS[1]] * len(names), GREEDY, adapter=names)
    for name, completion in zip(names, completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(PROMPTS[1], COUNT, name), name


@pytest.mark.parametrize(
    "mix",
    [
        {"plain": 0.5},
        {"plain": 1.0, "rslora": 1.0},
        {"ends": -0.75, "subset": 2.0, "patterns": 0.25},
        {"all": 0.0},
        {"all": 0.5, "ends": 0.5, "rslora": -0.5, "plain": 0.125},
    ],
    ids=str,
)
def test_a_mix_is_the_sum_of_weighted_deltas(llm: LLM, tiny: TinyModel, mix: dict[str, float]) -> None:
    for prompt in PROMPTS[:2]:
        assert tokens(llm, prompt, mix) == tiny.greedy(prompt, COUNT, mix)


def test_a_mix_at_weight_zero_is_the_base_model(llm: LLM, tiny: TinyModel) -> None:
    assert tokens(llm, PROMPTS[0], {"plain": 0.0, "all": 0.0}) == tiny.greedy(PROMPTS[0], COUNT)


# -- receipts and refusals ---------------------------------------------------------------------------------------------


def test_the_receipt_says_what_was_applied_where_and_how(llm: LLM, tiny: TinyModel) -> None:
    receipt = llm.adapters.receipt("patterns")
    assert {entry.applied for entry in receipt.entries} == {True}
    assert len(receipt.applied) == 7 * LAYERS
    by_module = {entry.module: entry.numbers for entry in receipt.applied}
    numbers = by_module["model.layers.1.self_attn.o_proj"]
    assert numbers is not None
    assert (numbers.alpha, numbers.true_rank, numbers.scale) == (8.0, 24, pytest.approx(8 / 24))
    numbers = by_module["model.layers.0.self_attn.v_proj"]
    assert numbers is not None
    assert (numbers.alpha, numbers.true_rank, numbers.scale) == (32.0, 16, 2.0)
    numbers = llm.adapters.receipt("rslora").applied[0].numbers
    assert numbers is not None
    assert numbers.scale == pytest.approx(8 / 7**0.5)
    assert receipt.max_rank == tiny.adapter("patterns").rank
    assert set(receipt.implementations) == {entry.site for entry in receipt.applied}
    assert receipt.file_bytes > 0
    assert receipt.packed_bytes > 0
    assert receipt.seconds.total >= receipt.seconds.copy
    assert receipt.path == str(tiny.adapter("patterns").folder)
    assert "14 modules applied, 0 dropped" in str(receipt)
    assert len(llm.adapters.receipt("subset").applied) == 2
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        llm.adapters.receipt("nobody")


def test_an_adapter_without_effect_is_an_error_unless_allowed(llm: LLM, tiny: TinyModel, tmp_path: Path) -> None:
    folder = changed_copy(tiny.adapter("plain").folder, tmp_path / "zero", 0.0)
    with pytest.raises(AdapterIncompatible, match="no effect"):
        llm.adapters.load("zero", folder)
    receipt = llm.adapters.load("zero", folder, allow_no_effect=True)
    assert all("zero" in entry.reason for entry in receipt.applied)
    assert tokens(llm, PROMPTS[0], "zero") == tiny.greedy(PROMPTS[0], COUNT)
    llm.adapters.unload("zero")


def test_unmatched_tensors_are_an_error_unless_allowed(llm: LLM, tiny: TinyModel, tmp_path: Path) -> None:
    folder = changed_copy(tiny.adapter("plain").folder, tmp_path / "stray", 1.0)
    file = folder / "adapter_model.safetensors"
    stray = {
        name.replace("layers.0", "layers.7"): tensor for name, tensor in load_file(file).items() if ".0.mlp.up" in name
    }
    save_file({**load_file(file), **stray}, file)
    with pytest.raises(AdapterIncompatible, match=r"layers\.7\.mlp\.up_proj"):
        llm.adapters.load("stray", folder)
    receipt = llm.adapters.load("stray", folder, allow_unmatched=True)
    assert [entry.module for entry in receipt.dropped] == ["model.layers.7.mlp.up_proj"]
    assert tokens(llm, PROMPTS[0], "stray") == tiny.greedy(PROMPTS[0], COUNT, "plain")
    llm.adapters.unload("stray")


def test_an_adapter_that_never_fits_says_which_option_to_raise(tiny: TinyModel) -> None:
    with tiny.open(adapter_rank_rows=16) as engine:
        with pytest.raises(AdapterError, match=r"33.*adapter_rank_rows=16"):
            engine.adapters.load("all", tiny.adapter("all").folder)
        assert engine.adapters.list() == []
        engine.adapters.load("plain", tiny.adapter("plain").folder)
        assert tokens(engine, PROMPTS[0], "plain") == tiny.greedy(PROMPTS[0], COUNT, "plain")


# -- loading and unloading while serving -------------------------------------------------------------------------------


def test_everything_works_while_another_thread_generates(tiny: TinyModel) -> None:
    failures: list[str] = []
    rounds = [0]
    stop = threading.Event()
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as engine:

        def generate() -> None:
            while not stop.is_set():
                answers = engine.generate(PROMPTS, GREEDY, adapter=["plain", None, {"plain": -1.0}, "plain"])
                for prompt, answer, mix in zip(
                    PROMPTS, answers, ["plain", None, {"plain": -1.0}, "plain"], strict=True
                ):
                    if list(answer.token_ids) != tiny.greedy(prompt, COUNT, mix):
                        failures.append(f"{mix}: {answer.token_ids}")
                rounds[0] += 1

        # Reference answers are worked out beforehand, so that the threads race over the engine only.
        for prompt, mix in zip(PROMPTS, ["plain", None, {"plain": -1.0}, "plain"], strict=True):
            tiny.greedy(prompt, COUNT, mix)
        thread = threading.Thread(target=generate)
        thread.start()
        for _ in range(3):
            for name in ("rslora", "all", "subset"):
                engine.adapters.load(name, tiny.adapter(name).folder)
                engine.adapters.pin(name)
                assert tokens(engine, PROMPTS[0], name) == tiny.greedy(PROMPTS[0], COUNT, name)
                assert [i.pinned for i in engine.adapters.list() if i.name == name] == [True]
                engine.adapters.unpin(name)
                assert name in engine.adapters
                engine.adapters.unload(name)
                assert name not in engine.adapters
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
        assert list(engine.adapters) == ["plain"]
    assert failures == []
    assert rounds[0] > 0


def test_unloading_lets_running_requests_finish_and_refuses_new_ones(tiny: TinyModel) -> None:
    prompt = PROMPTS[0]
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as engine:
        stream = engine.stream(prompt, ENDLESS, adapter={"plain": 1.0})
        output = list(next(stream).token_ids)
        thread = threading.Thread(target=engine.adapters.unload, args=("plain",))
        thread.start()

        def refused() -> bool:
            try:
                engine.stream(prompt, GREEDY, adapter="plain").close()
            except AdapterNotFound as error:
                return "being unloaded" in str(error)
            return False

        assert wait_until(refused)
        assert thread.is_alive()
        assert [info.users for info in engine.adapters.list()] == [1]
        for delta in stream:
            output += delta.token_ids
            if len(output) == COUNT:
                break
        assert thread.is_alive(), "the request is still running"
        stream.close()
        thread.join(20)
        assert not thread.is_alive()
        assert engine.adapters.list() == []
        assert output == tiny.greedy(prompt, COUNT, "plain")
        with pytest.raises(AdapterNotFound, match="loaded are: none"):
            engine.generate(prompt, GREEDY, adapter="plain")


def test_a_name_loaded_again_means_its_new_content(tiny: TinyModel, tmp_path: Path) -> None:
    folder = changed_copy(tiny.adapter("plain").folder, tmp_path / "named", 1.0)
    prompt = random_prompts(1, seed=8, low=64, high=64)[0]
    with tiny.open() as engine:

        def answer(adapter: str | dict[str, float] | None) -> tuple[list[int], int]:
            [completion] = engine.generate(prompt, GREEDY, adapter=adapter)
            return list(completion.token_ids), completion.cached_tokens

        first = engine.adapters.load("named", folder)
        # Each of these has keys and values of its own, which only its own repetition may reuse.
        for mix in (None, "named", {"named": 0.5}):
            expected = tiny.greedy(prompt, COUNT, {"plain": 0.5} if isinstance(mix, dict) else "plain" if mix else None)
            assert answer(mix) == (expected, 0)
            assert answer(mix) == (expected, 48)
        engine.adapters.unload("named")
        changed_copy(tiny.adapter("plain").folder, folder, -1.0)
        second = engine.adapters.load("named", folder)
        assert second.generation > first.generation
        expected = tiny.greedy(prompt, COUNT, {"plain": -1.0})
        assert answer("named") == (expected, 0)
        assert answer("named") == (expected, 48)
        assert answer(None) == (tiny.greedy(prompt, COUNT), 48)


# -- more adapters than slots ------------------------------------------------------------------------------------------


def test_more_adapters_than_slots_are_swapped_in_on_demand(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ADAPTERS}
    with tiny.open(adapter_slots=2, adapter_rank_rows=64, adapters=folders) as engine:
        assert len(engine.adapters.list()) == len(ADAPTERS)
        assert len(resident(engine)) == 2
        names = [*ADAPTERS] * 3
        prompts = [PROMPTS[i % 4] for i in range(len(names))]
        for name, prompt, completion in zip(
            names, prompts, engine.generate(prompts, GREEDY, adapter=names), strict=True
        ):
            assert list(completion.token_ids) == tiny.greedy(prompt, COUNT, name), name
        mix = {"plain": 1.0, "subset": -1.0}
        assert tokens(engine, PROMPTS[0], mix) == tiny.greedy(PROMPTS[0], COUNT, mix)
        assert resident(engine) == {"plain", "subset"}
        assert [info.users for info in engine.adapters.list()] == [0] * len(ADAPTERS)


def test_rank_rows_are_shared_by_rank_not_by_count(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ADAPTERS}
    with tiny.open(adapter_slots=8, adapter_rank_rows=40, adapters=folders) as engine:
        for name in [*ADAPTERS, *reversed(ADAPTERS)]:
            assert tokens(engine, PROMPTS[0], name) == tiny.greedy(PROMPTS[0], COUNT, name)
            ranks = sum(info.rank for info in engine.adapters.list() if info.resident)
            assert name in resident(engine)
            assert ranks <= 40


def test_the_least_recently_used_adapter_makes_room_and_pinned_ones_never(tiny: TinyModel) -> None:
    with tiny.open(adapter_slots=2) as engine:
        for name in ("plain", "subset"):
            engine.adapters.load(name, tiny.adapter(name).folder)
        tokens(engine, PROMPTS[0], "plain")
        engine.adapters.load("ends", tiny.adapter("ends").folder)
        assert resident(engine) == {"plain", "ends"}
        engine.adapters.pin("plain")
        for name in ("subset", "ends", "subset"):
            assert tokens(engine, PROMPTS[0], name) == tiny.greedy(PROMPTS[0], COUNT, name)
            assert resident(engine) == {"plain", name}
        with pytest.raises(AdapterError, match="not resident"):
            engine.adapters.pin("ends")
        engine.adapters.unpin("plain")
        tokens(engine, PROMPTS[0], "ends")
        assert resident(engine) == {"subset", "ends"}


def test_loading_waits_for_a_slot_and_gives_up_in_time(tiny: TinyModel) -> None:
    with tiny.open(adapter_slots=1, adapters={"plain": tiny.adapter("plain").folder}) as engine:
        stream = engine.stream(PROMPTS[0], ENDLESS, adapter="plain")
        next(stream)
        with pytest.raises(AdapterError, match=r"no room for adapter 'ends' within 0\.05 s"):
            engine.adapters.load("ends", tiny.adapter("ends").folder, timeout=0.05)
        assert "ends" not in engine.adapters
        thread = threading.Thread(target=engine.adapters.load, args=("ends", tiny.adapter("ends").folder))
        thread.start()
        stream.close()
        thread.join(20)
        assert resident(engine) == {"ends"}
        assert tokens(engine, PROMPTS[0], "ends") == tiny.greedy(PROMPTS[0], COUNT, "ends")


def test_a_request_waits_while_others_hold_the_slots(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ("plain", "ends")}
    with tiny.open(adapter_slots=1, adapters=folders) as engine:
        holder = engine.stream(PROMPTS[0], ENDLESS, adapter="plain")
        next(holder)
        waiting = engine.stream(PROMPTS[1], GREEDY, adapter="ends")
        assert tokens(engine, PROMPTS[2], None) == tiny.greedy(PROMPTS[2], COUNT), "others are not held up"
        holder.close()
        assert [t for delta in waiting for t in delta.token_ids] == tiny.greedy(PROMPTS[1], COUNT, "ends")


def test_an_adapter_whose_folder_is_gone_fails_its_requests_only(tiny: TinyModel, tmp_path: Path) -> None:
    folder = changed_copy(tiny.adapter("plain").folder, tmp_path / "gone", 1.0)
    with tiny.open(adapter_slots=1) as engine:
        engine.adapters.load("gone", folder)
        engine.adapters.load("ends", tiny.adapter("ends").folder)
        shutil.rmtree(folder)
        other = engine.stream(PROMPTS[1], GREEDY, adapter="ends")
        with pytest.raises(AdapterNotFound, match="gone"):
            engine.generate(PROMPTS[0], GREEDY, adapter="gone")
        assert [t for delta in other for t in delta.token_ids] == tiny.greedy(PROMPTS[1], COUNT, "ends")
        changed_copy(tiny.adapter("plain").folder, folder, 1.0)
        assert tokens(engine, PROMPTS[0], "gone") == tiny.greedy(PROMPTS[0], COUNT, "plain")
        engine.adapters.unload("gone")
        assert list(engine.adapters) == ["ends"]


def test_unloading_an_adapter_that_is_being_swapped_in_leaves_nothing_behind(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ("plain", "ends")}
    with tiny.open(adapter_slots=1, adapters=folders) as engine:
        holder = engine.stream(PROMPTS[0], ENDLESS, adapter="ends")
        next(holder)
        waiting = engine.stream(PROMPTS[0], GREEDY, adapter="plain")
        prepared = engine.engine.executor._prepared  # type: ignore[attr-defined]
        assert wait_until(lambda: len(prepared) == 1)
        waiting.close()
        engine.adapters.unload("plain")
        assert prepared == {}
        holder.close()


def test_many_loads_of_many_names_reuse_the_same_slots(tiny: TinyModel, tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    made = [make_adapter(tiny.reference, config, tmp_path / str(i), 50 + i, scale=2.0) for i in range(3)]
    with tiny.open(adapter_slots=3, adapter_rank_rows=6) as engine:
        bytes_before = None
        for i in range(12):
            engine.adapters.load(f"a{i}", made[i % 3].folder)
            [completion] = engine.generate(PROMPTS[0], GREEDY, adapter=f"a{i}")
            ids = list(PROMPTS[0])
            with torch.no_grad():
                for token in completion.token_ids:
                    assert int(made[i % 3].merged(torch.tensor([ids])).logits[0, -1].argmax()) == token
                    ids.append(token)
            assert bytes_before in (None, engine.explain().ranks[0]["weight_bytes"])
            bytes_before = engine.explain().ranks[0]["weight_bytes"]
        for i in range(12):
            engine.adapters.unload(f"a{i}")
        assert engine.adapters.list() == []


def test_what_an_adapter_config_says_reaches_the_receipt(llm: LLM, tiny: TinyModel) -> None:
    for name in ADAPTERS:
        config = json.loads((tiny.adapter(name).folder / "adapter_config.json").read_text())
        [info] = [info for info in llm.adapters.list() if info.name == name]
        assert info.rank == tiny.adapter(name).rank >= config["r"]
        assert (info.merged, info.pinned, info.users) == (False, False, 0)
        assert info.generation == llm.adapters.receipt(name).generation
