"""The same operands for every operator on any torch device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.device import TorchDevice
from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.sampling import SamplingRow, SamplingSpec
from polyaccel.backend.step import DeviceState
from polyaccel.backend.table import TableBackend
from polyaccel.backend.weight import Quantisation
from tests.backend.composite.cases import CPU, Draw, Module, pack, spec_of, step_input

SPECS = {
    "embed": spec_of("embed", [11], 8, rank_rows=8, lookup=True),
    "qkv": spec_of("qkv", [8, 4, 4], 8, rank_rows=8, bias=True),
    "gate_up": spec_of("gate_up", [6, 6], 8, rank_rows=8, experts=3),
    "packed": spec_of("packed", [6, 6], 8, rank_rows=8, experts=3, quantisation=Quantisation(group_size=4)),
    "down": spec_of("down", [8], 6, rank_rows=8, experts=3),
}
MODULES = [Module("embed", 0, 2), Module("qkv", 1, 3), Module("down", 0, 2, 1), Module("gate_up", 1, 2, 0)]
TOKENS = 6


def weights_on(backend: TableBackend, device: TorchDevice) -> dict[str, Any]:
    draw = Draw(1)
    weights = {}
    for name, spec in SPECS.items():
        weights[name] = weight = backend.allocate_weight(spec, device)
        for expert in (None,) if spec.experts is None else range(spec.experts):
            for i, part in enumerate(spec.slices):
                if spec.quantisation is None:
                    weight.write(i, draw.tensor(part.n, spec.k), expert=expert)
                    continue
                codes = torch.from_numpy(draw.generator.integers(0, 16, (part.n, spec.k)).astype(np.uint8))
                zeros = torch.full((part.n, 2), 8, dtype=torch.uint8)
                weight.write_quantised(i, codes, zeros, draw.tensor(part.n, 2).half(), expert=expert)
        weight.seal()
    return weights


def operands_on(device: TorchDevice, *, adapted: bool) -> dict[str, dict[str, Any]]:
    """Arguments by operator, in an order in which they may be called; ``quantised moe_experts`` is a second call."""
    backend, draw = TableBackend(device, {}), Draw(2)
    weights = weights_on(backend, device)
    store = backend.allocate_adapters(weights, rank_rows=8, slots=3, device=device)
    on_host = {name: TensorWeight(spec, CPU) for name, spec in SPECS.items()}
    store.write(SlotRange(slot=1, first_rank_row=2, rank_rows=4), pack(on_host, MODULES, Draw(3)))
    kv_spec = KVSpec(layers=1, kv_heads=1, head_dim=4, dtype=torch.float32, blocks=9, block_size=4)
    cache = backend.allocate_kv(kv_spec, device)
    sampling = backend.allocate_sampling(SamplingSpec(request_slots=4, vocabulary=11), device)
    prompt = np.array([1, 2])
    sampling.write(0, SamplingRow(top_p=0.8, top_k=5, min_p=0.1, logprobs=2, repetition_penalty=1.2, prompt_ids=prompt))
    sampling.write(
        1,
        SamplingRow(
            temperature=0.0,
            bias_ids=np.array([1]),
            bias_values=np.array([1.0], dtype=np.float32),
            allowed=np.arange(11) != 4,
            forbidden_ids=np.array([3]),
            forbidden_until=1,
        ),
    )
    triples = [(0, 1, 1.0), (2, 1, 0.5), (3, 1, 1.0), (1, 2, 1.0)] if adapted else []
    inputs = step_input(
        [(1, 6), (4, 5), (1, 1)],
        token_ids=[-1, 3, 4, 5, 6, -2],
        positions=[5, 1, 2, 3, 4, 0],
        block_tables=np.arange(6, dtype=np.int32).reshape(3, 2),
        kv_slots=[5, 9, 10, 11, 12, -1],
        logits_rows=[0, 4, 5],
        sample_slots=[0, 1, 2],
        uniforms=[0.6, 0.0, 0.0],
        adapters={"tokens": triples, "logits": triples[:1]},
    )
    step = backend.begin_step(inputs, DeviceState(kv=cache, adapters=store, sampling=sampling), device)

    def values(*shape: int) -> torch.Tensor:
        return draw.tensor(*shape).to(device.torch_device)

    x, q, k, v = values(TOKENS, 8), values(TOKENS, 2, 4), values(TOKENS, 1, 4), values(TOKENS, 1, 4)
    h = Draw(4).tensor(len(triples), 3, 3).to(device.torch_device)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1], [2, 0]], dtype=torch.int32).to(device.torch_device)
    rope = RopeTable(cos=values(9, 2), sin=values(9, 2), rotary_dim=4, style="interleaved")
    routed = {"x": x, "down": weights["down"], "ids": ids, "weights": values(TOKENS, 2), "step": step, "act": "silu"}
    rows, ranks = {"weight": weights["qkv"], "step": step, "row_set": "tokens"}, {"x": values(3), "comm": SingleRank()}
    return {
        "embedding": {"weight": weights["embed"], "step": step, "vocabulary_start": 2},
        "rms_norm": {"x": x, "weight": values(8), "eps": 1e-5, "residual": values(TOKENS, 8)},
        "layer_norm": {"x": x, "weight": values(8), "bias": values(8), "eps": 1e-5},
        "rotary_embedding": {"q": q, "k": k, "rope": rope, "step": step},
        "silu_and_mul": {"x": x},
        "gelu": {"x": x, "approximate": "tanh"},
        "select_rows": {"x": x, "step": step},
        "write_kv_cache": {"k": k, "v": v, "kv": cache, "layer": 0, "step": step},
        "paged_attention": {"q": q, "kv": cache, "layer": 0, "step": step, "scale": 0.5, "window": 3},
        "dense_attention": {"q": q, "k": k, "v": v, "starts": [0, 2, 6], "scale": 1.0, "causal": True},
        "sgmv": {"y": values(TOKENS, 16), "x": x, **rows},
        "sgmv_shrink": {"x": x, **rows},
        "sgmv_expand": {"y": values(TOKENS, 16), "h": h, **rows},
        "moe_route": {
            "logits": values(TOKENS, 8),
            "top_k": 2,
            "scoring": "sigmoid",
            "renormalise": True,
            "bias": values(8),
            "groups": 4,
            "topk_groups": 2,
            "scale": 1.0,
        },
        "moe_experts": {**routed, "gate_up": weights["gate_up"]},
        "quantised moe_experts": {**routed, "gate_up": weights["packed"]},
        "sample": {"logits": values(3, 11), "state": sampling, "step": step},
        "all_reduce": ranks,
        "all_gather": {**ranks, "dim": 0},
        "reduce_scatter": ranks,
        "all_to_all": {**ranks, "send_rows": [3], "receive_rows": [3]},
        "broadcast": {**ranks, "source": 0},
        "barrier": {"comm": ranks["comm"]},
    }


def results_on(device: TorchDevice, *, adapted: bool) -> dict[str, list[torch.Tensor]]:
    """The tensors that every composite returns there, by operator."""
    composites = TableBackend(device, {}).composites()
    calls = operands_on(device, adapted=adapted)
    results = {name: tensors_of(composites[name.split()[-1]](**arguments)) for name, arguments in calls.items()}
    for name in composites:
        assert name in results, f"operands_on has no call of {name}"
    return results


def tensors_of(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple):
        return [t for part in result for t in tensors_of(part)]
    fields = ("ids", "logprobs", "top_ids", "top_logprobs")
    return [t for f in fields if isinstance(t := getattr(result, f, None), torch.Tensor)]
