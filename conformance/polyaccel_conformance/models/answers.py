"""Answers of an engine, and when two of them agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyaccel import LLM, Completion, SamplingParams

TOP = 2
POWER = 0.9
"""Share of tokens that must be decided by more than the deviation, or the comparison shows nothing."""

Mix = str | dict[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Greedy tokens of one prompt, the log-probability of each, and by how much it beat the next best."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


def greedy(new_tokens: int, stop: Sequence[int] = ()) -> SamplingParams:
    """Always the best token; ``stop``: ids that end an answer."""
    return SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=TOP, stop_token_ids=list(stop)
    )


def seeded(new_tokens: int, seed: int) -> SamplingParams:
    """A random token, the same for the same seed whatever else runs."""
    return SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, logprobs=TOP, seed=seed)


def ask(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    mixes: Sequence[Mix],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Answer]:
    """All prompts in one call."""
    each = params if isinstance(params, SamplingParams) else list(params)
    done = llm.generate([list(p) for p in prompts], each, adapter=list(mixes))
    return [_answer(c) for c in done]


def ask_alone(
    llm: LLM, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], params: Sequence[SamplingParams]
) -> list[Answer]:
    """One prompt after the other."""
    return [ask(llm, [p], [m], each)[0] for p, m, each in zip(prompts, mixes, params, strict=True)]


def _answer(completion: Completion) -> Answer:
    assert completion.logprobs is not None
    tops = [entry.top for entry in completion.logprobs]
    return Answer(
        tokens=tuple(completion.token_ids),
        logprobs=tuple(entry.logprob for entry in completion.logprobs),
        margins=tuple(top[0][1] - top[1][1] for top in tops),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two sets of answers compare.

    Attributes:
        wrong: None, or what is wrong, in a sentence.
        deviation: largest difference of a token's log-probability, up to the first different token of each answer.
        decided: share of the compared tokens whose margin is more than twice the deviation.
        where: (prompt, token) of the first wrong one.
    """

    wrong: str | None
    deviation: float
    decided: float
    where: tuple[int, int] | None = None


def agree(reference: Sequence[Answer], got: Sequence[Answer], drawn: Sequence[bool] = ()) -> Agreement:
    """Tokens must be equal wherever the reference decided by more than the measured deviation of both candidates.

    A backend that is wrong makes its own deviation large; it is then the power of the comparison that fails. Answers
    that are ``drawn`` at random have no margin: all their tokens must be equal.
    """
    drawn = drawn or [False] * len(reference)
    deviation = 0.0
    for a, b in zip(reference, got, strict=True):
        for ours, theirs, x, y in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=False):
            if ours != theirs:
                break
            difference = abs(x - y)
            # A comparison with NaN is false: it must not look small.
            deviation = max(deviation, difference if difference == difference else float("inf"))
    decided = total = 0
    for number, (a, b, random) in enumerate(zip(reference, got, drawn, strict=True)):
        if random and a.tokens != b.tokens:
            wrong = f"prompt {number}, drawn with a seed, has the tokens {b.tokens} instead of {a.tokens}"
            return Agreement(wrong=wrong, deviation=deviation, decided=0.0, where=(number, 0))
        if random:
            continue
        if len(a.tokens) != len(b.tokens):
            wrong = f"prompt {number} has {len(b.tokens)} tokens instead of {len(a.tokens)}"
            return Agreement(wrong=wrong, deviation=deviation, decided=0.0, where=(number, 0))
        for place, (ours, theirs, margin) in enumerate(zip(a.tokens, b.tokens, a.margins, strict=True)):
            total += 1
            decided += margin > 2 * deviation
            if ours == theirs:
                continue
            if margin > 2 * deviation:
                wrong = (
                    f"prompt {number}, token {place}: {theirs} instead of {ours}, which leads by {margin:.3g} "
                    f"while log-probabilities differ by {deviation:.3g}"
                )
                return Agreement(wrong=wrong, deviation=deviation, decided=0.0, where=(number, place))
            # What follows another token is another text.
            break
    share = decided / total if total else 1.0
    wrong_power = None
    if share < POWER:
        wrong_power = f"log-probabilities differ by {deviation:.3g}; only {share:.0%} of the tokens are decided by more"
    return Agreement(wrong=wrong_power, deviation=deviation, decided=share)
