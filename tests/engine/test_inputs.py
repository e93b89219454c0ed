"""Bad input gives a typed error that says what is wrong, and no other request loses anything by it."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from polyaccel import (
    LLM,
    AdapterError,
    AdapterIncompatible,
    AdapterNotFound,
    BackendUnavailable,
    ConfigurationError,
    ModelLoadError,
    ModelNotFound,
    PolyaccelError,
    RequestRejected,
    RequestTooLong,
    SamplingParams,
)
from polyaccel.backend import TableBackend
from tests.support.tiny_model import BLOCK_BYTES, END_ID, VOCABULARY, TinyModel, random_prompts, scripted

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = random_prompts(1)[0]


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as engine:
        yield engine


@pytest.fixture
def bystander(llm: LLM, tiny: TinyModel) -> Iterator[LLM]:
    """The engine while it answers somebody else, whose answer must come out right."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    stream = llm.stream(PROMPT, params, adapter="plain")
    first = next(stream)
    yield llm
    output = [*first.token_ids, *(token for delta in stream for token in delta.token_ids)]
    assert output == tiny.greedy(PROMPT, 60, "plain")
    health = llm.health()
    assert (health.status, health.running, health.waiting) == ("ok", 0, 0)
    assert health.free_kv_blocks == health.kv_blocks


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([[]], RequestRejected, "empty"),
        ([""], RequestRejected, "empty"),
        ([[1, VOCABULARY]], RequestRejected, f"token id {VOCABULARY} .*outside the vocabulary of {VOCABULARY}"),
        ([[-1]], RequestRejected, "token id -1"),
        ([[2**70]], RequestRejected, "outside the vocabulary"),
        ([[1, True]], RequestRejected, "token ids"),
        ([[1, 2.0]], RequestRejected, "token ids"),
        ([["a", "b"]], RequestRejected, "token ids"),
        ([None], RequestRejected, "NoneType"),
        (b"bytes", RequestRejected, "bytes"),
        ([b"bytes"], RequestRejected, "bytes"),
        (7, RequestRejected, "int"),
        (np.array([1, 2]), RequestRejected, "ndarray"),
        ({"prompt": "x"}, RequestRejected, "dict"),
        (["\ud800"], RequestRejected, "surrogate"),
        ([[1] * 506], RequestTooLong, "506 tokens and max_tokens=8 make 514, and a sequence may hold 512"),
        ([[1] * 5000], RequestTooLong, "5000 tokens"),
    ],
    ids=lambda value: f"{value!r:.24}" if not isinstance(value, type) else value.__name__,
)
def test_a_prompt_that_cannot_be_answered_is_rejected(
    bystander: LLM, prompt: Any, error: type[PolyaccelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        bystander.generate(prompt, GREEDY)


def test_one_bad_prompt_in_a_list_means_that_none_is_started(llm: LLM, tiny: TinyModel) -> None:
    steps = llm.engine.loop.stats().steps
    for bad in ([1, VOCABULARY], [], [1] * 5000):
        with pytest.raises(RequestRejected):
            llm.generate([PROMPT, PROMPT, bad, PROMPT], GREEDY)
    with pytest.raises(AdapterNotFound, match="'nobody' is not loaded; loaded are: 'plain'"):
        llm.generate([PROMPT] * 3, GREEDY, adapter=["plain", None, "nobody"])
    stats = llm.engine.loop.stats()
    assert (stats.steps, stats.running, stats.waiting) == (steps, 0, 0)
    [completion] = llm.generate(PROMPT, GREEDY, adapter="plain")
    assert list(completion.token_ids) == tiny.greedy(PROMPT, 8, "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": {"temperature": 0}}, "SamplingParams, not dict"),
        ({"params": [GREEDY]}, "params has 1 entries for 2 prompts"),
        ({"params": [GREEDY] * 3}, "params has 3 entries for 2 prompts"),
        ({"params": (GREEDY,)}, "params has 1 entries for 2 prompts"),
        ({"adapter": ["plain"]}, "adapter has 1 entries for 2 prompts"),
        ({"adapter": 3}, "adapter must be a name"),
        ({"adapter": {"plain": float("nan")}}, "finite"),
        ({"adapter": {"plain": "much"}}, "number"),
        ({"adapter": ""}, "non-empty"),
        ({"params": SamplingParams(stop_token_ids=[VOCABULARY])}, "stop_token_ids has id 272"),
        ({"params": SamplingParams(logit_bias={VOCABULARY: 1.0})}, "logit_bias has id 272"),
        ({"params": SamplingParams(allowed_token_ids=[VOCABULARY])}, "allowed_token_ids has id 272"),
    ],
    ids=lambda value: f"{value!r:.50}",
)
def test_params_and_adapters_that_mean_nothing_are_rejected(
    bystander: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestRejected, match=message):
        bystander.generate([PROMPT, PROMPT], **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("n", 0),
        ("seed", -1),
        ("logprobs", 21),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("logit_bias", {1: 101.0}),
        ("stop", ""),
    ],
)
def test_sampling_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestRejected, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_more_adapters_than_slots_or_rank_rows_in_one_request_are_rejected(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ("plain", "subset", "ends")}
    with tiny.open(adapter_slots=2, adapter_rank_rows=12, adapters=folders) as engine:
        with pytest.raises(RequestRejected, match="adapter_slots=2"):
            engine.generate(PROMPT, GREEDY, adapter={"plain": 1.0, "subset": 1.0, "ends": 1.0})
        with pytest.raises(RequestRejected, match="ranks summing to 13"):
            engine.generate(PROMPT, GREEDY, adapter={"plain": 1.0, "ends": 1.0})
        [completion] = engine.generate(PROMPT, GREEDY, adapter={"plain": 1.0, "subset": 1.0})
        assert list(completion.token_ids) == tiny.greedy(PROMPT, 8, {"plain": 1.0, "subset": 1.0})


def test_without_adapter_slots_adapters_are_refused_with_the_option_to_change(tiny: TinyModel) -> None:
    with tiny.open(adapter_slots=0) as engine:
        with pytest.raises(ConfigurationError, match="adapter_slots"):
            engine.generate(PROMPT, GREEDY, adapter="plain")
        with pytest.raises(ConfigurationError, match="adapter_slots"):
            engine.adapters.load("plain", tiny.adapter("plain").folder)
        assert engine.adapters.list() == []
        [completion] = engine.generate(PROMPT, GREEDY)
        assert list(completion.token_ids) == tiny.greedy(PROMPT, 8)


def test_without_a_tokenizer_text_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny.folder / name, tmp_path)
    with LLM(tmp_path, backend=scripted({}, 1), kv_cache_bytes=1 << 20, max_num_seqs=2) as engine:
        with pytest.raises(RequestRejected, match="no tokenizer; pass token ids"):
            engine.generate("text")
        with pytest.raises(RequestRejected, match="stop strings"):
            engine.generate([1, 2], SamplingParams(stop="x"))
        with pytest.raises(RequestRejected, match="no chat template"):
            engine.chat([{"role": "user", "content": "x"}])


# -- adapters ----------------------------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def _rewrite_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
        header[names[1]]["shape"] = header[names[0]]["shape"]

    _rewrite_header(folder, change)


def _huge_shape(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        next(value for name, value in header.items() if name != "__metadata__")["shape"] = [2**40, 2**40]

    _rewrite_header(folder, change)


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")


def _config_is_no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def _other_model(folder: Path) -> None:
    _tensors(
        folder,
        lambda tensors: tensors.update(
            {n: torch.randn(2 * t.shape[0], t.shape[1]) for n, t in tensors.items() if "lora_B" in n}
        ),
    )


def _not_finite(folder: Path) -> None:
    _tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "cut in its header": _cut_header,
    "huge header": _huge_header,
    "overlapping tensors": _overlap,
    "huge shape": _huge_shape,
    "pickle": _pickle,
    "broken config": _config_is_no_json,
    "another model": _other_model,
    "not finite": _not_finite,
    "DoRA": lambda folder: _config(folder, use_dora=True),
    "modules_to_save": lambda folder: _config(folder, modules_to_save=["lm_head"]),
    "rank of another file": lambda folder: _config(folder, r=9),
    "not LoRA": lambda folder: _config(folder, peft_type="IA3"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_adapter_is_refused_while_others_are_served(
    bystander: LLM, tiny: TinyModel, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny.adapter("plain").folder, folder)
    HOSTILE[kind](folder)
    with pytest.raises(AdapterError) as caught:
        bystander.adapters.load("bad", folder)
    assert isinstance(caught.value, (AdapterIncompatible, AdapterNotFound))
    assert str(folder) in str(caught.value) or "tensor" in str(caught.value)
    assert "bad" not in bystander.adapters
    with pytest.raises(AdapterNotFound):
        bystander.generate(PROMPT, adapter="bad")


def test_an_adapter_folder_that_does_not_exist_is_not_found(bystander: LLM, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="nowhere"):
        bystander.adapters.load("x", tmp_path / "nowhere")
    with pytest.raises(AdapterNotFound, match="'x' is not loaded"):
        bystander.adapters.unload("x")
    with pytest.raises(AdapterError, match="'plain' is loaded already"):
        bystander.adapters.load("plain", bystander.adapters.list()[0].path)
    for name in ("", None, 3):
        with pytest.raises(AdapterError, match="non-empty string"):
            bystander.adapters.load(name, tmp_path)  # type: ignore[arg-type]


# -- starting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tensor_parallel_size": 10, "backend": "cpu"}, ConfigurationError, "10 exceeds the model's 9 query heads"),
        ({"tensor_parallel_size": 0}, ConfigurationError, "tensor_parallel_size=0"),
        ({"expert_parallel_size": 2}, ConfigurationError, "expert_parallel_size=2"),
        ({"tensor_parallel_size": 2}, ConfigurationError, "instance runs inline with one rank"),
        ({"executor": "process"}, ConfigurationError, "instance runs inline with one rank"),
        ({"executor": "inline", "tensor_parallel_size": 2}, ConfigurationError, "executor='inline' runs one rank"),
        ({"executor": "thread"}, ConfigurationError, "executor='thread'"),
        ({"dtype": "int8"}, ConfigurationError, "dtype='int8'"),
        ({"policy": "hope"}, ConfigurationError, "policy='hope'"),
        ({"max_num_seqs": 0}, ConfigurationError, "max_num_seqs=0"),
        ({"max_batched_tokens": 0}, ConfigurationError, "max_batched_tokens=0"),
        ({"max_model_len": 0}, ConfigurationError, "max_model_len=0"),
        ({"memory_fraction": 1.1}, ConfigurationError, "memory_fraction=1.1"),
        ({"timeout": 0}, ConfigurationError, "timeout=0"),
        ({"layer_devices": [0]}, ConfigurationError, "layer_devices"),
        ({"layer_devices": [0, 5]}, ConfigurationError, "layer_devices"),
        ({"kv_cache_bytes": 10}, PolyaccelError, "kv_cache_bytes"),
        ({"backend": "abacus"}, BackendUnavailable, "abacus"),
        ({"adapters": {"x": "/nowhere"}}, AdapterNotFound, "/nowhere"),
    ],
    ids=lambda value: f"{value!r:.40}" if isinstance(value, dict) else "",
)
def test_an_engine_that_cannot_start_says_which_option_to_change(
    tiny: TinyModel, options: dict[str, Any], error: type[PolyaccelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.open(**options)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_model_folder_is_refused(tiny: TinyModel, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    (folder / missing).unlink()
    with pytest.raises((ModelLoadError, ModelNotFound), match=str(folder)):
        LLM(folder, backend=TableBackend("cpu", {}), policy="allow")


def test_a_model_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing"):
        LLM(tmp_path / "nothing", backend=TableBackend("cpu", {}))


# -- crowds ------------------------------------------------------------------------------------------------------------


def test_ten_thousand_queued_requests_are_all_answered_from_a_small_cache(tiny: TinyModel) -> None:
    outputs = {seed: [seed % 256, (seed // 256) % 256, 7] for seed in range(10_000)}
    with tiny.open(backend=scripted(outputs, 20), kv_cache_bytes=30 * BLOCK_BYTES, max_num_seqs=32) as engine:
        params = [SamplingParams(temperature=0.0, seed=seed, max_tokens=16) for seed in range(10_000)]
        prompts = [[seed % 250, *range(19)] for seed in range(10_000)]
        completions = engine.generate(prompts, params)
        assert [list(c.token_ids) for c in completions] == [[*outputs[seed], END_ID] for seed in range(10_000)]
        health = engine.health()
        assert health.free_kv_blocks == health.kv_blocks == 30


def test_a_request_that_never_fits_the_cache_is_refused_at_once(tiny: TinyModel) -> None:
    with tiny.open(kv_cache_bytes=4 * BLOCK_BYTES) as engine:
        with pytest.raises(RequestTooLong, match="a sequence may hold 64"):
            engine.generate([1] * 60, GREEDY)
        [completion] = engine.generate([1] * 56, GREEDY)
        assert len(completion.token_ids) == 8


def test_a_storm_of_aborts_frees_everything_and_spares_the_others(tiny: TinyModel) -> None:
    prompts = random_prompts(40, seed=9)
    generator = random.Random(4)
    with tiny.open(kv_cache_bytes=40 * BLOCK_BYTES, max_batched_tokens=64) as engine:
        engine.adapters.load("plain", tiny.adapter("plain").folder)
        kept, doomed = [], []
        for i in range(300):
            prompt, adapter = prompts[i % 40], "plain" if i % 3 == 0 else None
            if i % 30 == 0:
                params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
                kept.append((prompt, adapter, engine.stream(prompt, params, adapter=adapter)))
            n = generator.choice([1, 1, 3])
            params = SamplingParams(temperature=1.0, seed=i, n=n, max_tokens=80, ignore_eos=True)
            doomed.append(engine.stream(prompt, params, adapter=adapter))
            if i % 20 == 0:
                next(doomed[0], None)
            if i % 3 == 0:
                doomed.pop(generator.randrange(len(doomed))).close()
        for stream in doomed:
            stream.close()
        for prompt, adapter, stream in kept:
            assert [t for delta in stream for t in delta.token_ids] == tiny.greedy(prompt, 12, adapter)
        deadline = time.monotonic() + 20
        while engine.health().running and time.monotonic() < deadline:
            time.sleep(0.005)
        health = engine.health()
        assert (health.running, health.waiting, health.free_kv_blocks) == (0, 0, health.kv_blocks)
        engine.adapters.unload("plain")
