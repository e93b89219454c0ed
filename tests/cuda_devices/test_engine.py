"""An engine on two GPUs against one: the same tokens with and without graphs and adapters; and how it ends."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyaccel
from polyaccel.backend.errors import EngineDead, OutOfMemory, WorkerError
from tests.cuda_devices.pool import several

pytestmark = several

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS, VOCABULARY = 8, 4, 64, 512, 1408, 3, 1000
RANKS = (1, 8, 16, 32, 64, 128)
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
TOKENS = 24
Answers = list[list[int]]


def config_of(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama without a tokenizer, and an adapter of each rank that changes what it says."""
    from safetensors.torch import save_file

    home = tmp_path_factory.mktemp("two")
    generator = torch.Generator().manual_seed(3)

    def drawn(n: int, k: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(n, k, generator=generator) * scale * k**-0.5

    tensors = {"model.norm.weight": torch.ones(HIDDEN)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = drawn(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{module}.weight": drawn(n, k) for module, (n, k) in LINEARS.items()}
        tensors |= {f"{prefix}{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")}
    (home / "model").mkdir()
    save_file(tensors, home / "model" / "model.safetensors", metadata={"format": "pt"})
    (home / "model" / "config.json").write_text(json.dumps(config_of(VOCABULARY)))
    for rank in RANKS:
        parts = {}
        for layer in range(LAYERS):
            for module, (n, k) in LINEARS.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                parts[f"{name}.lora_A.weight"] = drawn(rank, k)
                parts[f"{name}.lora_B.weight"] = drawn(n, rank, 0.5)
        (home / f"r{rank}").mkdir()
        save_file(parts, home / f"r{rank}" / "adapter_model.safetensors")
        modules = [module.rpartition(".")[2] for module in LINEARS]
        adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
        (home / f"r{rank}" / "adapter_config.json").write_text(json.dumps(adapter))
    return home


def opened(folder: Path, ranks: int, graphs: bool, **options: Any) -> polyaccel.LLM:
    settings: dict[str, Any] = {
        "backend": "cuda",
        "executor": "process",
        "tensor_parallel_size": ranks,
        "graphs": graphs,
        "dtype": "float32",
        "policy": "strict",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "memory_fraction": 0.2,
        "adapter_slots": 8,
        "adapter_rank_rows": 320,
        "trace_collectives": ranks > 1,
        "timeout": 60.0,
    }
    return polyaccel.LLM(folder / "model", **(settings | options))


def answers(llm: polyaccel.LLM, folder: Path) -> dict[str, Answers]:
    """What an engine says without adapters, with each, and with all of them in one batch."""
    generator = np.random.default_rng(1)
    prompts = [generator.integers(3, VOCABULARY, count).tolist() for count in (5, 17, 40, 70, 9, 33, 64)]
    params = polyaccel.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    for rank in RANKS:
        llm.adapters.load(f"r{rank}", folder / f"r{rank}")

    def asked(names: list[str | None]) -> Answers:
        return [list(out.token_ids) for out in llm.generate(prompts[: len(names)], params, adapter=names)]

    found = {"none": asked([None] * 7), "one alone": asked(["r16"])}
    for rank in RANKS:
        found[f"r{rank}"] = asked([f"r{rank}"] * 2)
    found["mixed"] = asked([None, *(f"r{rank}" for rank in RANKS)])
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Answers]:
    with opened(folder, 1, True) as llm:
        found = answers(llm, folder)
    assert all(found["none"][:2] != found[f"r{rank}"] for rank in RANKS), "an adapter changes nothing"
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[polyaccel.LLM, bool]]:
    with opened(folder, 2, request.param) as llm:
        yield llm, request.param


def test_two_gpus_say_what_one_says(pair: tuple[polyaccel.LLM, bool], alone: dict[str, Answers], folder: Path) -> None:
    llm, graphs = pair
    found = answers(llm, folder)
    different = {
        name: [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in zip(found[name], alone[name], strict=True)]
        for name in alone
        if found[name] != alone[name]
    }
    assert not different, f"tokens that differ: {different}"
    for report in llm.explain().ranks:
        print(report["transport"], report["graphs"], report["graph_refusals"], report["ledger"])
        assert report["transport"] == "nccl"
        assert not graphs or report["graphs"]["captures"] > 0  # type: ignore[index]


def test_adapters_need_no_collective_of_their_own(pair: tuple[polyaccel.LLM, bool], alone: object) -> None:
    llm, graphs = pair
    if graphs:
        pytest.skip("what is in a graph is not traced")
    params = polyaccel.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    per_step = ["all_reduce"] * (1 + 2 * LAYERS) + ["all_gather"]
    call: Any = llm.engine.loop.call
    sent = []
    for name in (None, "r32"):
        call(llm.engine.executor.collectives)
        llm.generate([[5, 6, 7]], params, adapter=[name])
        sent.append(call(llm.engine.executor.collectives))
        for trace in sent[-1]:
            kinds = [kind for kind, _ in trace]
            assert kinds
            assert kinds == per_step * (len(kinds) // len(per_step))
    # The rank rows are in the sums after o and down, and nowhere else.
    longer = [after > before for (_, before), (_, after) in zip(sent[0][0], sent[1][0], strict=False)][: len(per_step)]
    assert longer == [False, *[True] * (2 * LAYERS), False]


def test_a_killed_rank_ends_the_engine_with_a_typed_error(folder: Path) -> None:
    before = children()
    llm = opened(folder, 2, True, timeout=20.0)
    try:
        params = polyaccel.SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        llm.generate([[5, 6, 7]], polyaccel.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        workers = [pid for pid in children() if pid not in before]
        assert len(workers) == 2, workers
        begun = time.monotonic()
        os.kill(workers[1], signal.SIGKILL)
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            llm.generate([[5, 6, 7]] * 4, params)
        assert time.monotonic() - begun < 20
    finally:
        llm.close()
    assert children() == before


def test_closing_leaves_no_process_behind(folder: Path) -> None:
    before = children()
    llm = opened(folder, 2, True)
    llm.generate([[5, 6, 7]], polyaccel.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    begun = time.monotonic()
    llm.close()
    print(f"closed in {time.monotonic() - begun:.2f} s")
    assert time.monotonic() - begun < 4.5, "the ranks had to be killed"
    assert children() == before


# -- a GPU that is full ------------------------------------------------------------------------------------------------


@contextmanager
def ballast(leave: int) -> Iterator[None]:
    """Take the memory of the second GPU, but for so many bytes."""
    taken: list[torch.Tensor] = []
    torch.cuda.synchronize(1)
    size = torch.cuda.mem_get_info(1)[0]
    try:
        while size >= 2 << 20:
            size = min(size, torch.cuda.mem_get_info(1)[0] - leave)
            try:
                taken.append(torch.empty(max(size, 0), dtype=torch.uint8, device="cuda:1"))
            except torch.OutOfMemoryError:
                size //= 2
        print(f"{torch.cuda.mem_get_info(1)[0] >> 20} MiB are left on the second GPU")
        yield
    finally:
        taken.clear()
        torch.cuda.empty_cache()


def refused(folder: Path, **options: Any) -> str:
    """What loading says, after checking that nothing is left of it."""
    before = children()
    begun = time.monotonic()
    with pytest.raises(OutOfMemory) as caught:
        opened(folder, 2, True, **options).close()
    print(f"refused after {time.monotonic() - begun:.1f} s: {caught.value}")
    assert children() == before
    assert isinstance(caught.value.__cause__, WorkerError)
    assert caught.value.__cause__.rank == 1
    return str(caught.value)


def test_a_rank_without_room_for_its_weights_is_named(tmp_path: Path) -> None:
    vocabulary = 1 << 22
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, HIDDEN))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{module}.weight": shape for module, shape in LINEARS.items()}
        shapes |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    (tmp_path / "model").mkdir()
    write_zeros(tmp_path / "model" / "model.safetensors", shapes)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_of(vocabulary)))
    with ballast(6 << 30):
        text = refused(tmp_path)
    assert re.match(r"rank 1 of 2 on .* has no room for its weights: .*\d+ bytes asked for, \d+ free", text), text
    assert "more ranks" in text


def test_a_rank_without_room_for_its_cache_is_named(folder: Path) -> None:
    with ballast(6 << 30):
        text = refused(folder, max_num_seqs=4096, max_model_len=1024, kv_cache_bytes=10 << 30)
    assert re.match(r"rank 1 of 2 on .* has no room for a KV cache of \d+ blocks of \d+ bytes: ", text), text
    assert "lower kv_cache_bytes" in text


def test_a_rank_beyond_its_budget_is_named_with_the_figures(folder: Path) -> None:
    from polyaccel_cuda.kv_cache import BLOCK_SIZE

    block = BLOCK_SIZE * LAYERS * 2 * (KV_HEADS // 2) * HEAD_DIM * 4
    # The first GPU has room for several blocks, the second for none.
    fraction = 10 * block / torch.cuda.mem_get_info(0)[0]
    with ballast(6 << 30):
        text = refused(folder, memory_fraction=fraction)
    assert f"no room for a single KV block of {BLOCK_SIZE} tokens on rank 1 of 2" in text
    assert f"a block takes {block}" in text
    assert "raise memory_fraction" in text


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_a_long_prefill_without_room_on_one_gpu_is_done_in_smaller_steps_and_nobody_loses_an_answer(
    folder: Path, graphs: bool
) -> None:
    generator = np.random.default_rng(4)
    prompts = [generator.integers(3, VOCABULARY, 1000).tolist() for _ in range(32)]
    params = polyaccel.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    options = {"max_num_seqs": 32, "max_model_len": 1024, "max_batched_tokens": 1 << 15, "prefix_caching": False}

    def asked(llm: polyaccel.LLM) -> Answers:
        return [list(out.token_ids) for out in llm.generate(prompts, params)]

    with opened(folder, 2, graphs, **options) as llm:
        wanted = asked(llm)
        assert llm.health().no_room == 0
    before = children()
    with opened(folder, 2, graphs, **options) as llm:
        # What a step of any size needs of the libraries is there.
        llm.generate([prompts[0][:50]] * 3, params)
        with ballast(192 << 20):
            begun = time.monotonic()
            found = asked(llm)
            health = llm.health()
            print(f"{health.no_room} steps without room, {time.monotonic() - begun:.1f} s")
            assert health.status == "ok"
            assert health.no_room > 0
            assert found == wanted
            begun = time.monotonic()
            assert asked(llm) == wanted
            print(f"then {time.monotonic() - begun:.1f} s")
        assert asked(llm) == wanted
    assert children() == before


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros, which take no room on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def children() -> list[int]:
    """Living worker processes of this one, in the order in which they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"polyaccel.parallel.worker" in command:
            found.append(int(entry.name))
    return sorted(found)
