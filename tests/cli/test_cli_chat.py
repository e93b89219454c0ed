"""``polyaccel chat`` with piped input: turns, commands, adapters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from polyaccel import LLM, SamplingParams
from polyaccel.cli.chat import HELP
from tests.cli.console import ENGINE, Outcome, lines, run
from tests.support.tiny_model import TinyModel

PARAMS = SamplingParams(max_tokens=8, temperature=0.0)
Mix = dict[str, float] | None


def chat(tiny: TinyModel, *typed: str, options: Sequence[object] = ()) -> Outcome:
    adapters = [
        text for name in ("plain", "rslora") for text in ("--load-adapter", f"{name}={tiny.adapter(name).folder}")
    ]
    return run("chat", tiny.folder, *ENGINE, *adapters, "--max-tokens", 8, *options, stdin=lines(typed))


def answers(llm: LLM, turns: Sequence[tuple[str, Mix]], system: str | None = None) -> list[str]:
    """What a conversation's turns, each with its adapters, are answered with."""
    messages: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    texts = []
    for content, mix in turns:
        messages.append({"role": "user", "content": content})
        (completion,) = llm.chat(messages, PARAMS, adapter=mix)
        messages.append({"role": "assistant", "content": completion.text})
        texts.append(completion.text)
    return texts


def check(outcome: Outcome, texts: Sequence[str], err: str = "") -> None:
    assert (outcome.code, outcome.out, outcome.err) == (0, lines(texts), err)


def test_a_turn_is_answered_with_the_turns_before_it(tiny: TinyModel, llm: LLM) -> None:
    expected = answers(llm, [("the thing", None), ("the thing", None)])
    assert expected[0] != expected[1]
    check(chat(tiny, "the thing", "the thing"), expected)


def test_reset_forgets_the_turns_but_not_the_system_message(tiny: TinyModel, llm: LLM) -> None:
    (expected,) = answers(llm, [("the thing", None)], system="in the")
    assert [expected] != answers(llm, [("the thing", None)])
    check(chat(tiny, "the thing", "/reset", "the thing", options=("--system", "in the")), [expected, expected])


def test_quit_ends_before_the_rest_is_read(tiny: TinyModel, llm: LLM) -> None:
    check(chat(tiny, "the thing", "/quit", "and another"), answers(llm, [("the thing", None)]))


def test_the_end_of_input_ends_the_chat(tiny: TinyModel) -> None:
    check(chat(tiny), [])


def test_blank_lines_are_no_turns(tiny: TinyModel, llm: LLM) -> None:
    check(chat(tiny, "", "  the thing  ", "   "), answers(llm, [("the thing", None)]))


def test_an_adapter_is_switched_within_a_conversation(tiny: TinyModel, llm: LLM) -> None:
    mix = {"plain": 0.5, "rslora": 0.5}
    turns: list[tuple[str, Mix]] = [("the", None), ("the", {"plain": 1.0}), ("the", mix), ("the", None)]
    typed = ("the", "/adapter plain", "the", "/adapter plain=0.5,rslora=0.5", "the", "/adapter none", "the")
    check(chat(tiny, *typed), answers(llm, turns))


def test_the_first_adapter_may_be_an_option(tiny: TinyModel, llm: LLM) -> None:
    expected = answers(llm, [("the", {"rslora": 1.0})])
    assert expected != answers(llm, [("the", None)])
    check(chat(tiny, "the", options=("--adapter", "rslora")), expected)


def test_an_adapter_that_is_not_loaded_costs_one_turn_which_is_forgotten(tiny: TinyModel, llm: LLM) -> None:
    outcome = chat(tiny, "/adapter parrot", "lost", "/adapter none", "the thing")
    assert (outcome.code, outcome.out) == (0, lines(answers(llm, [("the thing", None)])))
    assert outcome.err == "AdapterNotFound: adapter 'parrot' is not loaded; loaded are: 'plain', 'rslora'\n"


def test_a_mix_that_cannot_be_read_leaves_the_adapter_as_it_was(tiny: TinyModel, llm: LLM) -> None:
    outcome = chat(tiny, "/adapter plain", "/adapter plain=much", "the")
    assert (outcome.code, outcome.out) == (0, lines(answers(llm, [("the", {"plain": 1.0})])))
    assert outcome.err == "--adapter 'plain=much': the weight of 'plain' is not a number: 'much'\n"


@pytest.mark.parametrize("command", ["/help", "/adapter", "/quit now", "/"])
def test_an_unknown_command_prints_the_help(tiny: TinyModel, command: str) -> None:
    check(chat(tiny, command), [HELP])


def test_a_question_that_is_too_long_is_refused_and_forgotten(tiny: TinyModel, llm: LLM) -> None:
    outcome = chat(tiny, "x" * 2000, "the thing")
    assert (outcome.code, outcome.out) == (0, lines(answers(llm, [("the thing", None)])))
    assert outcome.err.startswith("RequestTooLong: ")
    assert outcome.err.count("\n") == 1
