"""Third-party distributions, installed from wheels, answer with the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.plugins import ROOT, PluginHouse, environment, python

ANSWER = """
import json, sys
import polyaccel
model, backend = sys.argv[1:]
params = polyaccel.SamplingParams(max_tokens=8, temperature=0.0)
with polyaccel.LLM(model, backend=backend, policy="allow", max_model_len=256, max_num_seqs=2, threads=1) as llm:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = llm.chat(question, params)[0].text
    explanation = llm.explain()
    print(json.dumps({
        "text": text,
        "composites": explanation.composites(),
        "ledger": explanation.ledger,
        "plan": explanation.to_dict()["ranks"][0]["plan"]["sites"],
    }))
"""


@pytest.mark.model
def test_the_example_answers_with_one_operator_of_its_own_and_says_why_the_rest_is_composite(
    plugin_house: PluginHouse, tmp_path: Path, smollm2_path: Path
) -> None:
    variables = environment(plugin_house.site("example_backend"), cache=tmp_path)
    report = json.loads(python(ANSWER, variables, str(smollm2_path), "example"))
    assert "Paris" in report["text"]
    assert "silu_and_mul" not in report["composites"]
    for operator in ("rms_norm", "paged_attention", "write_kv_cache", "rotary_embedding", "sample", "sgmv"):
        assert report["composites"][operator] == [f"backend 'example' has no {operator}"]
    parts = {part["operator"]: part for part in report["plan"]["layers.0.gate_up"]["decode"]["parts"]}
    assert (parts["silu_and_mul"]["kind"], parts["silu_and_mul"]["implementation"]) == (
        "native",
        "example.silu_and_mul",
    )
    assert report["ledger"]["example.silu_and_mul"] >= 30
    assert "composite.silu_and_mul" not in report["ledger"]
    assert report["ledger"]["composite.paged_attention"] >= 30


@pytest.mark.model
def test_a_plugin_written_against_api_1_0_still_answers(
    plugin_house: PluginHouse, tmp_path: Path, smollm2_path: Path
) -> None:
    variables = environment(plugin_house.site("frozen_1_0"), cache=tmp_path)
    report = json.loads(python(ANSWER, variables, str(smollm2_path), "frozen"))
    assert "Paris" in report["text"]
    base, adapted = (report["plan"]["layers.0.gate_up"][key] for key in ("decode", "decode+adapters"))
    assert (base["kind"], base["implementation"]) == ("fused", "frozen.gate_up_act")
    assert adapted["kind"] == "parts"
    assert adapted["reasons"] == ["frozen.gate_up_act: adapters of rank 1 are not fused"]
    norm = report["plan"]["embedding.norm"]["mixed"]
    assert (norm["implementation"], norm["reasons"]) == (
        "frozen.rms_norm",
        ["frozen.rms_norm_small: hidden 576 exceeds 64"],
    )
    assert report["ledger"]["frozen.linear"] > 0
    assert "composite.linear" not in report["ledger"]


def test_the_example_is_as_short_as_the_documentation_says() -> None:
    lines = (
        (ROOT / "tests/plugins/example_backend/polyaccel_example_backend.py").read_text(encoding="utf-8").splitlines()
    )
    assert len(lines) < 60
