"""An engine on two GPUs against one: the same tokens with and without graphs and adapters; and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyaccel
from polyaccel.backend.errors import EngineDead
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
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (home / "model" / "config.json").write_text(json.dumps(config))
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
    return polyaccel.LLM(
        folder / "model",
        backend="cuda",
        executor="process",
        tensor_parallel_size=ranks,
        graphs=graphs,
        dtype="float32",
        policy="strict",
        max_model_len=512,
        max_num_seqs=8,
        memory_fraction=0.2,
        adapter_slots=8,
        adapter_rank_rows=320,
        trace_collectives=ranks > 1,
        **({"timeout": 60.0} | options),
    )


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
