"""``LLM.chat`` and ``LLM.stream_chat``: prompts by the model's template, as transformers renders them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyaccel import LLM, RequestRejected, SamplingParams
from tests.support.tiny_model import BOS_ID, TinyModel, scripted

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SHORT = [{"role": "user", "content": "the cat"}]
LONG = [
    {"role": "system", "content": "sing and <|im_end|> dance"},
    {"role": "user", "content": "the 日本"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "and?"},
]


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as engine:
        yield engine


def template_ids(tiny: TinyModel, messages: list[dict[str, str]], **variables: object) -> list[int]:
    tokenizer = tiny.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("messages", [SHORT, LONG], ids=["short", "long"])
def test_a_conversation_is_answered_through_the_template(
    llm: LLM, tiny: TinyModel, messages: list[dict[str, str]]
) -> None:
    ids = template_ids(tiny, messages)
    assert ids[0] == BOS_ID
    [completion] = llm.chat(messages, PARAMS)
    assert completion.prompt_tokens == len(ids)
    assert list(completion.token_ids) == tiny.greedy(ids, 8)


def test_several_conversations_come_back_in_order_each_with_its_adapter(llm: LLM, tiny: TinyModel) -> None:
    completions = llm.chat([SHORT, LONG, SHORT], PARAMS, adapter=[None, "plain", {"plain": -0.5}])
    expected = [
        tiny.greedy(template_ids(tiny, SHORT), 8),
        tiny.greedy(template_ids(tiny, LONG), 8, "plain"),
        tiny.greedy(template_ids(tiny, SHORT), 8, {"plain": -0.5}),
    ]
    assert [list(completion.token_ids) for completion in completions] == expected


def test_variables_reach_the_template(llm: LLM, tiny: TinyModel) -> None:
    [completion] = llm.chat(SHORT, PARAMS, suffix="ing")
    assert list(completion.token_ids) == tiny.greedy(template_ids(tiny, SHORT, suffix="ing"), 8)
    assert list(completion.token_ids) != tiny.greedy(template_ids(tiny, SHORT), 8)


def test_tools_reach_the_template(llm: LLM, tiny: TinyModel) -> None:
    tools = [{"type": "function", "function": {"name": "temps", "description": "é", "parameters": {}}}]
    ids = template_ids(tiny, SHORT, tools=tools)
    assert len(ids) > len(template_ids(tiny, SHORT))
    [completion] = llm.chat(SHORT, PARAMS, tools=tools)
    assert list(completion.token_ids) == tiny.greedy(ids, 8)
    deltas = list(llm.stream_chat(SHORT, PARAMS, tools=tools))
    assert [token for delta in deltas for token in delta.token_ids] == tiny.greedy(ids, 8)


def test_a_streamed_conversation_gives_the_same_answer(llm: LLM) -> None:
    [whole] = llm.chat(LONG, PARAMS, adapter="plain")
    deltas = list(llm.stream_chat(LONG, PARAMS, adapter="plain"))
    assert "".join(delta.text for delta in deltas) == whole.text
    completion = deltas[-1].completion
    assert completion is not None
    assert completion.token_ids == whole.token_ids


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [],
        None,
        [[]],
        ["hello"],
        [{"content": "no role"}],
        [SHORT, "hello"],
        [{"role": "user", "content": object()}],
    ],
    ids=repr,
)
def test_what_is_no_conversation_is_rejected(llm: LLM, messages: object) -> None:
    with pytest.raises(RequestRejected):
        llm.chat(messages, PARAMS)  # type: ignore[arg-type]
    assert llm.health().waiting == 0


def test_a_model_without_a_template_says_so(tiny: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny.folder, folder)
    (folder / "chat_template.jinja").unlink()
    with (
        LLM(folder, backend=scripted({}, 1), kv_cache_bytes=1 << 20) as engine,
        pytest.raises(RequestRejected, match="no chat template"),
    ):
        engine.chat(SHORT, PARAMS)
