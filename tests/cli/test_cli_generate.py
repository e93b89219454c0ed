"""``polyaccel generate``: the texts, JSON, chats, standard input and adapters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polyaccel import LLM, SamplingParams
from tests.cli.console import ENGINE, lines, printed
from tests.support.tiny_model import END_ID, STOP_ID, TinyModel

PROMPTS = ("the thing", "and another thing in the")
TOKENS = 8
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0.0)


def generate(tiny: TinyModel, *arguments: object, stdin: str = "") -> str:
    return printed("generate", tiny.folder, *arguments, *ENGINE, "--max-tokens", TOKENS, stdin=stdin)


def loading(tiny: TinyModel, *names: str) -> list[object]:
    return [text for name in names for text in ("--load-adapter", f"{name}={tiny.adapter(name).folder}")]


def until_end(tokens: list[int]) -> list[int]:
    """The tokens up to the first that ends an answer, with it."""
    ends = [index for index, token in enumerate(tokens) if token in (END_ID, STOP_ID)]
    return tokens[: ends[0] + 1] if ends else tokens


def test_generate_prints_the_text_of_each_answer(tiny: TinyModel, llm: LLM) -> None:
    expected = llm.generate(list(PROMPTS), PARAMS)
    assert generate(tiny, *PROMPTS) == lines([completion.text for completion in expected])


def test_generate_json_prints_one_object_a_line_with_the_tokens_of_transformers(tiny: TinyModel, llm: LLM) -> None:
    rows = [json.loads(line) for line in generate(tiny, *PROMPTS, "--json").splitlines()]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    for row in rows:
        ids = tiny.tokenizer.encode(row["prompt"])
        assert row["prompt_tokens"] == len(ids)
        assert row["token_ids"] == until_end(tiny.greedy(ids, TOKENS))
        assert row["finish_reason"] == ("length" if len(row["token_ids"]) == TOKENS else "stop")
        assert row["adapter"] == []
        assert set(row["timing"]) == {"queue", "prefill", "first_token", "decode"}
    assert [row["text"] for row in rows] == [completion.text for completion in llm.generate(list(PROMPTS), PARAMS)]


def test_generate_chat_puts_each_prompt_through_the_chat_template(tiny: TinyModel, llm: LLM) -> None:
    expected = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], PARAMS)
    rows = [json.loads(line) for line in generate(tiny, *PROMPTS, "--chat", "--json").splitlines()]
    assert [row["token_ids"] for row in rows] == [list(completion.token_ids) for completion in expected]
    for row in rows:
        templated = tiny.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        assert row["prompt_tokens"] == len(tiny.tokenizer.encode(templated, add_special_tokens=False))


def test_a_dash_is_a_prompt_from_standard_input(tiny: TinyModel) -> None:
    text = "the first line\nand the second: caf\u00e9"
    (first, second) = (json.loads(line) for line in generate(tiny, "-", "thing", "--json", stdin=text).splitlines())
    assert first["prompt"] == text
    assert first["token_ids"] == until_end(tiny.greedy(tiny.tokenizer.encode(text), TOKENS))
    assert second["prompt"] == "thing"


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("plain", {"plain": 1.0}),
        ("plain=0.25", {"plain": 0.25}),
        ("plain=0.5,rslora=-1.5", {"plain": 0.5, "rslora": -1.5}),
    ],
)
def test_an_adapter_or_a_mix_answers(tiny: TinyModel, text: str, mix: dict[str, float]) -> None:
    output = generate(tiny, PROMPTS[0], "--json", "--adapter", text, *loading(tiny, "plain", "rslora"))
    row: dict[str, Any] = json.loads(output)
    ids = tiny.tokenizer.encode(PROMPTS[0])
    assert row["token_ids"] == until_end(tiny.greedy(ids, TOKENS, mix))
    assert row["token_ids"] != until_end(tiny.greedy(ids, TOKENS))
    assert dict(row["adapter"]) == mix


def test_a_loaded_adapter_that_is_not_asked_for_changes_nothing(tiny: TinyModel) -> None:
    assert generate(tiny, PROMPTS[0], *loading(tiny, "plain")) == generate(tiny, PROMPTS[0])


def test_sampling_options_reach_the_engine(tiny: TinyModel, llm: LLM) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, seed=7)
    options = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 40, "--min-p", 0.01, "--seed", 7)
    assert generate(tiny, PROMPTS[0], *options) == lines([llm.generate(PROMPTS[0], params)[0].text])


def test_a_stop_text_ends_the_answer(tiny: TinyModel, llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[0], PARAMS)
    stop = free.text[1]
    row = json.loads(generate(tiny, PROMPTS[0], "--json", "--stop", stop, "--stop", "never written"))
    assert row["text"] == free.text[: free.text.index(stop)]
    assert (row["finish_reason"], row["stop_reason"]) == ("stop", stop)


def test_engine_switches_change_no_answer(tiny: TinyModel) -> None:
    switches = ("--no-overlap", "--no-graphs", "--no-prefix-caching", "--no-progress", "--max-batched-tokens", 4)
    assert generate(tiny, *PROMPTS, *switches, "--max-num-seqs", 2) == generate(tiny, *PROMPTS)


def test_two_ranks_answer_as_one(tiny: TinyModel) -> None:
    assert generate(tiny, *PROMPTS, "--tensor-parallel-size", 2) == generate(tiny, *PROMPTS)


def test_the_null_backend_answers_without_computing(tiny: TinyModel) -> None:
    row = json.loads(
        printed("generate", tiny.folder, "the", "--backend", "null", "--policy", "allow", "--max-tokens", 3, "--json")
    )
    assert 1 <= len(row["token_ids"]) <= 3


@pytest.mark.model
def test_the_real_model_knows_the_capital_of_france(smollm2_path: object) -> None:
    options = ("--backend", "cpu", "--chat", "--max-tokens", 24, "--kv-cache-bytes", 100_000_000)
    assert "Paris" in printed("generate", smollm2_path, "What is the capital of France?", *options)
