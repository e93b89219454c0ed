"""``LLM.generate``: prompts, choices, ends, log-probabilities and sampling, compared with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyaccel import LLM, SamplingParams
from tests.engine.reference_sampling import reference_tokens
from tests.support.tiny_model import END_ID, STOP_ID, VOCABULARY, TinyModel, random_prompts, scripted

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts(6)
# Log-probabilities of a float32 model, after a softmax over 272 ids.
LOGPROB_BOUND = 2e-4


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with tiny.open(adapters={name: tiny.adapter(name).folder for name in ("plain", "ends")}) as engine:
        yield engine


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_list_of_prompts_is_answered_in_its_order(llm: LLM, tiny: TinyModel) -> None:
    completions = llm.generate(PROMPTS, GREEDY)
    assert [list(c.token_ids) for c in completions] == [tiny.greedy(prompt, 12) for prompt in PROMPTS]
    assert [c.prompt_tokens for c in completions] == [len(prompt) for prompt in PROMPTS]
    assert {c.finish_reason for c in completions} == {"length"}


def test_the_order_is_that_of_the_prompts_whichever_ends_first(llm: LLM, tiny: TinyModel) -> None:
    lengths = [12, 1, 7, 3, 9, 2]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    seen: list[tuple[int, int]] = []
    completions = llm.generate(PROMPTS, params, progress=lambda done, total: seen.append((done, total)))
    assert [list(c.token_ids) for c in completions] == [
        tiny.greedy(p, n) for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_prompt_of_ids_gives_a_list_of_one_completion(llm: LLM, tiny: TinyModel, kind: type) -> None:
    [completion] = llm.generate(kind(PROMPTS[0]), GREEDY)
    assert list(completion.token_ids) == tiny.greedy(PROMPTS[0], 12)


def test_text_is_tokenised_and_decoded_as_transformers_does(llm: LLM, tiny: TinyModel) -> None:
    text = "the cat and the dog, singing 🐕"
    ids = tiny.tokenizer(text)["input_ids"]
    [single] = llm.generate(text, GREEDY)
    many = llm.generate([text, ids, "an"], GREEDY)
    assert list(single.token_ids) == tiny.greedy(ids, 12)
    assert many[0].token_ids == many[1].token_ids == single.token_ids
    assert single.text == tiny.tokenizer.decode(single.token_ids, skip_special_tokens=True)


def test_no_prompts_give_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_params_and_adapter(llm: LLM, tiny: TinyModel) -> None:
    mixes = [None, "plain", {"ends": 0.5, "plain": -0.25}, "ends"]
    params = tuple(SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (5, 8, 10, 6))
    completions = llm.generate([PROMPTS[1]] * 4, params, adapter=mixes)
    for completion, mix, asked in zip(completions, mixes, params, strict=True):
        assert asked.max_tokens is not None
        assert list(completion.token_ids) == tiny.greedy(PROMPTS[1], asked.max_tokens, mix), mix
    assert [c.adapter for c in completions] == [
        (),
        (("plain", 1.0),),
        (("ends", 0.5), ("plain", -0.25)),
        (("ends", 1.0),),
    ]
    assert len({c.token_ids[:5] for c in completions}) == 4


# -- choices and seeds -------------------------------------------------------------------------------------------------


def test_choices_lie_side_by_side_with_their_index_and_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True, n=3, seed=5)
    completions = llm.generate(PROMPTS[:2], params)
    assert [c.index for c in completions] == [0, 1, 2, 0, 1, 2]
    assert len({c.token_ids for c in completions}) == 6
    assert [c.prompt_tokens for c in completions] == [len(PROMPTS[0])] * 3 + [len(PROMPTS[1])] * 3


def test_a_seed_repeats_the_answer_and_another_one_does_not(llm: LLM) -> None:
    def answers(seed: int) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True, n=2, seed=seed)
        return [c.token_ids for c in llm.generate(PROMPTS[0], params)]

    first = answers(7)
    assert answers(7) == first
    assert set(answers(8)).isdisjoint(first)


def test_requests_without_a_seed_are_seeded_by_the_engine_in_order(tiny: TinyModel) -> None:
    def answers(seed: int) -> list[tuple[int, ...]]:
        with tiny.open(seed=seed) as engine:
            params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
            return [c.token_ids for c in engine.generate([PROMPTS[0], PROMPTS[0]], params)]

    first = answers(3)
    assert first[0] != first[1]
    assert answers(3) == first
    assert answers(4) != first


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.3, seed=2, top_k=5),
        SamplingParams(temperature=1.0, seed=3, top_p=0.6),
        SamplingParams(temperature=2.0, seed=4, min_p=0.2),
        SamplingParams(temperature=1.1, seed=2**64 - 1, top_k=40, top_p=0.9, min_p=0.02),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all"],
)
def test_sampled_tokens_are_the_inverse_cdf_of_transformers_probabilities(
    llm: LLM, tiny: TinyModel, params: SamplingParams
) -> None:
    asked = SamplingParams(
        temperature=params.temperature,
        seed=params.seed,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        max_tokens=12,
        ignore_eos=True,
        n=2,
    )
    for choice, completion in enumerate(llm.generate(PROMPTS[2], asked)):
        assert list(completion.token_ids) == reference_tokens(tiny, PROMPTS[2], asked, 12, choice=choice)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_without_max_tokens_the_answer_goes_on_to_the_end_of_the_context(tiny: TinyModel) -> None:
    with tiny.open(max_model_len=48) as engine:
        [completion] = engine.generate(PROMPTS[0], SamplingParams(temperature=0.0, ignore_eos=True))
    assert len(PROMPTS[0]) + len(completion.token_ids) == 48
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("end", [END_ID, STOP_ID])
def test_every_end_of_sequence_id_ends_the_answer(tiny: TinyModel, end: int) -> None:
    with tiny.open(backend=scripted({1: [40, 41, end, 42]}, 3)) as engine:
        [completion] = engine.generate([1, 2, 3], SamplingParams(temperature=0.0, seed=1, max_tokens=9))
        assert completion.token_ids == (40, 41, end)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.text == tiny.tokenizer.decode([40, 41])
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=9, skip_special_tokens=False)
        [spelled] = engine.generate([1, 2, 3], params)
        assert spelled.text == tiny.tokenizer.decode([40, 41, end])
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True)
        [ignoring] = engine.generate([1, 2, 3], params)
        assert ignoring.token_ids == (40, 41, end, 42)
        assert ignoring.finish_reason == "length"


def test_stop_ids_end_the_answer_and_are_named(llm: LLM, tiny: TinyModel) -> None:
    expected = tiny.greedy(PROMPTS[3], 12)
    place = next(i for i in range(2, 12) if expected[i] not in expected[:i])
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[expected[place], VOCABULARY - 1]
    )
    [completion] = llm.generate(PROMPTS[3], params)
    assert list(completion.token_ids) == expected[: place + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", expected[place])


def test_a_stop_id_that_also_ends_sequences_is_reported_as_the_end(tiny: TinyModel) -> None:
    with tiny.open(backend=scripted({1: [40, END_ID]}, 3)) as engine:
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=9, stop_token_ids=[END_ID])
        [completion] = engine.generate([1, 2, 3], params)
        assert completion.stop_reason is None
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=9, stop_token_ids=[END_ID], ignore_eos=True)
        [asked_for] = engine.generate([1, 2, 3], params)
        assert asked_for.stop_reason == END_ID


def test_before_min_tokens_no_end_can_be_sampled(llm: LLM, tiny: TinyModel) -> None:
    greedy = tiny.greedy(PROMPTS[4], 6)
    stops = list(dict.fromkeys(greedy))
    params = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=4, stop_token_ids=stops)
    [completion] = llm.generate(PROMPTS[4], params)
    expected = reference_tokens(tiny, PROMPTS[4], params, 9, eos=(END_ID, STOP_ID))
    ends = [i for i, token in enumerate(expected) if i >= 4 and token in (*stops, END_ID, STOP_ID)]
    length = ends[0] + 1 if ends else 9
    assert list(completion.token_ids) == expected[:length]
    assert not set(completion.token_ids[:4]) & set(stops)
    [without] = llm.generate(PROMPTS[4], SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=stops))
    assert len(without.token_ids) == 1


# -- stop strings ------------------------------------------------------------------------------------------------------


def _ids(tiny: TinyModel, text: str) -> list[int]:
    ids: list[int] = tiny.tokenizer(text)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("text", "stops", "include", "expected", "stop"),
    [
        ("sing the song and stop", ["song"], False, "sing the ", "song"),
        ("sing the song and stop", ["song"], True, "sing the song", "song"),
        ("sing the song and stop", ["ng t", "the"], False, "si", "ng t"),
        ("aXbYc", ["Yc", "bY"], False, "aX", "bY"),
        ("one and and then", ["and the"], False, "one and ", "and the"),
        ("all of it", ["nowhere"], False, "all of it", None),
        ("held back to the en", ["end"], False, "held back to the en", None),
        ("smile 😀 end", ["😀"], False, "smile ", "😀"),
    ],
)
def test_stop_strings_match_across_tokens_and_cut_the_text(
    tiny: TinyModel, text: str, stops: list[str], include: bool, expected: str, stop: str | None
) -> None:
    ids = _ids(tiny, text)
    with tiny.open(backend=scripted({1: ids}, 3)) as engine:
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=60, stop=stops, include_stop_str_in_output=include)
        [completion] = engine.generate([1, 2, 3], params)
        deltas = list(engine.stream([1, 2, 3], params))
    assert completion.text == expected
    assert "".join(delta.text for delta in deltas) == expected
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == tuple([*ids, END_ID][: len(completion.token_ids)])
    if stop is not None:
        decoded = tiny.tokenizer.decode(completion.token_ids)
        assert stop in decoded, "the tokens end with the one that completed the stop string"
        assert stop not in tiny.tokenizer.decode(completion.token_ids[:-1])


def test_a_stop_string_ends_its_own_choice_only(tiny: TinyModel) -> None:
    outputs = {1: _ids(tiny, "sing and sing and sing"), 2: _ids(tiny, "dance and dance")}
    with tiny.open(backend=scripted(outputs, 3)) as engine:
        params = [
            SamplingParams(temperature=0.0, seed=seed, max_tokens=40, stop="ing", logprobs=None) for seed in (1, 2)
        ]
        first, second = engine.generate([[1, 2, 3]] * 2, params)
        assert (first.text, second.text) == ("s", "dance and dance")
        assert engine.health().running == 0


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [None, "plain"])
def test_logprobs_are_those_of_transformers(llm: LLM, tiny: TinyModel, mix: str | None) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=4)
    [completion] = llm.generate(PROMPTS[0], params, adapter=mix)
    expected = tiny.logprobs(PROMPTS[0], completion.token_ids, mix)
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    for entry, row in zip(completion.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=LOGPROB_BOUND)
        values, ids = row.topk(4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=LOGPROB_BOUND)


def test_logprobs_of_a_sampled_token_are_before_temperature(llm: LLM, tiny: TinyModel) -> None:
    params = SamplingParams(temperature=1.8, seed=9, top_k=3, max_tokens=8, ignore_eos=True, logprobs=0, n=2)
    for completion in llm.generate(PROMPTS[1], params):
        expected = tiny.logprobs(PROMPTS[1], completion.token_ids)
        assert completion.logprobs is not None
        for place, entry in enumerate(completion.logprobs):
            assert entry.top == ()
            assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=LOGPROB_BOUND)


def test_without_being_asked_for_there_are_no_logprobs(llm: LLM) -> None:
    params = [GREEDY, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)]
    without, with_them = llm.generate([PROMPTS[0]] * 2, params)
    assert without.logprobs is None
    assert with_them.logprobs is not None
    assert without.token_ids == with_them.token_ids


# -- penalties and bias ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 0.6, "presence_penalty": -0.5, "frequency_penalty": 1.2},
        {"logit_bias": {7: 4.0, 200: -100.0}},
        {"allowed_token_ids": [3, 4, 5, 60, 61]},
        {"logit_bias": {4: -3.0}, "allowed_token_ids": [3, 4, 5], "frequency_penalty": 0.3},
    ],
    ids=["repetition", "presence", "frequency", "all penalties", "bias", "allowed", "bias and allowed"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_bias_and_masks_follow_the_written_rules(
    llm: LLM, tiny: TinyModel, options: dict[str, object], temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=21, max_tokens=16, ignore_eos=True, **options)  # type: ignore[arg-type]
    plain = SamplingParams(temperature=temperature, seed=21, max_tokens=16, ignore_eos=True)
    # A neighbour without them shares the batch and must not notice.
    completion, neighbour = llm.generate([PROMPTS[5]] * 2, [params, plain])
    assert list(completion.token_ids) == reference_tokens(tiny, PROMPTS[5], params, 16)
    assert list(neighbour.token_ids) == reference_tokens(tiny, PROMPTS[5], plain, 16)
    assert completion.token_ids != neighbour.token_ids


# -- what comes with a completion --------------------------------------------------------------------------------------


def test_timings_add_up_and_cached_tokens_are_counted(tiny: TinyModel) -> None:
    prompt = random_prompts(1, seed=3, low=50, high=50)[0]
    with tiny.open() as engine:
        [first] = engine.generate(prompt, GREEDY)
        [second] = engine.generate(prompt, GREEDY)
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert first.token_ids == second.token_ids
    timing = first.timing
    assert timing.first_token == pytest.approx(timing.queue + timing.prefill)
    assert timing.prefill > 0
    assert timing.decode > 0


def test_a_model_without_a_tokenizer_answers_ids_with_ids(tiny: TinyModel, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny.folder / name, tmp_path)
    with LLM(tmp_path, backend=scripted({0: [40, 41]}, 3), kv_cache_bytes=1 << 20, max_num_seqs=4) as engine:
        [completion] = engine.generate([1, 2, 3], SamplingParams(temperature=0.0, seed=0, max_tokens=2))
        assert (completion.token_ids, completion.text) == ((40, 41), "")


def test_explain_names_every_site_and_what_was_launched(llm: LLM) -> None:
    llm.generate(PROMPTS[0], GREEDY)
    explanation = llm.explain()
    assert explanation.backend == "table"
    assert "layers.0.qkv" in str(explanation)
    assert explanation.ledger
    assert "rank(s)" in explanation.summary()
