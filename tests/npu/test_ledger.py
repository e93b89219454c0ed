"""What one prefill and one decode step of SmolLM2 ask of CANN, call by call: a golden list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from polyaccel import LLM, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.slow]

LAYERS = 30
TORCH_NPU: Mapping[str, int] = {
    "aclnnEmbedding": 1,
    "aclnnRmsNorm": 1,  # before the first layer; all others take the residual along
    "aclnnAddRmsNorm": 2 * LAYERS,
    "aclnnMm": 6 * LAYERS + 1,  # q, k, v, o, gate and up, down; lm_head
    "aclnnRotaryPositionEmbedding": 2 * LAYERS,
    "aclnnScatterPaKvCache": LAYERS,
    "aclnnFusedInferAttentionScoreV3": LAYERS,
    "aclnnSwiGlu": LAYERS,
}
ALLOWED: Mapping[str, int] = {
    "aclnnInplaceCopy": 4 * LAYERS + 2,  # q and k to float32 for the rotation and back; token metadata, logits
    "aclnnAdds": 1,  # ids to rows of the padded table
    "aclnnClamp": 1,  # ids of other ranks to its rows of zeros
    "aclnnCat": 2,  # cos and sin for both halves, once a step
    "aclnnIndexSelect": 3,  # cos, sin and the sampling parameters of the step's rows
    "aclnnArgMax": 1,
    "aten::nan_to_num": 1,  # sampling: NaN counts as minus infinity; torch_npu has it as one operator
    "aten::index_copy_": 1,  # the sampled ids to their request slots
}
SELECTED_ROWS: Mapping[str, int] = {"aclnnIndexSelect": 1}
"""Prefill alone: the rows whose logits are wanted."""


@pytest.fixture
def ledger() -> Any:
    simulated = pytest.importorskip("polyaccel_cannsim", reason="aclnn calls are listed by the simulator alone")
    try:
        return simulated.current().ledger
    except RuntimeError:
        pytest.skip("a card keeps no list of aclnn calls")


@pytest.fixture
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(
        smollm2_path,
        backend="npu",
        dtype="float16",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        graphs=False,
        overlap=False,
        prefix_caching=False,
        executor="inline",
    ) as opened:
        yield opened


def test_every_part_of_a_layer_is_an_operator_of_torch_npu(llm: LLM, ledger: Any) -> None:
    def calls(tokens: int) -> Counter[str]:
        ledger.reset()
        llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
        return Counter(ledger.counts())

    calls(2)
    prefill, both, more = calls(1), calls(2), calls(3)
    golden = Counter({**TORCH_NPU, **ALLOWED})
    assert prefill == golden + Counter(SELECTED_ROWS)
    assert both - prefill == golden
    assert more - both == golden, "the second decode step differs from the first"


def test_a_prefill_over_two_cards_sums_each_row_parallel_layer_inside_its_product(smollm2_path: Path) -> None:
    with LLM(
        smollm2_path,
        backend="npu",
        dtype="float16",
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        graphs=False,
        overlap=False,
        policy="strict",
    ) as llm:
        llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        found = llm.explain()
    assert len(found.ranks) == 2
    assert found.composites() == {}
    for rank in found.ranks:
        launches = rank["ledger"]
        assert isinstance(launches, dict)
        assert launches["npu.mm_all_reduce_base"] == 2 * LAYERS, "each row-parallel layer of the prefill, no decode"
        assert launches["npu.hccl_all_reduce"] == 2 * LAYERS + 2, "those of the decode step, and two embeddings"
        assert not [name for name in launches if name.startswith(("copy.", "composite.", "nested_composite."))]
