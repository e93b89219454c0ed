"""Whole-model equality in float32, however the engine is set: tokens, and log-probabilities within rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from polyaccel_conformance.case import Case
from polyaccel_conformance.models.answers import Agreement, Answer, Mix, agree, ask, ask_alone
from polyaccel_conformance.models.engines import GREEDY, Workshop
from polyaccel_conformance.models.rounding import Rounding
from polyaccel_conformance.models.variations import BASE, MANY, ONE, Open

MIXES: Mapping[str, tuple[Mix, ...]] = MappingProxyType({"none": BASE, "one": ONE, "many": MANY})
# Opening an engine of several processes costs seconds: where adapters are loaded at all, it is asked both.
ASKED: Mapping[str, tuple[str, ...]] = MappingProxyType({"none": ("none",), "loaded": ("one", "many")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an engine is set and asked: ``crowd`` alone or crowded, ``adapters`` none, one, many, or loaded (one, then
    many), ``world`` ranks."""

    graphs: bool
    overlap: bool
    crowd: str
    adapters: str
    prefix_cache: bool
    world: int = 1

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of :data:`MIXES`, one after the other."""
        return ASKED.get(self.adapters, (self.adapters,))

    @classmethod
    def of(cls, case: Case) -> Self:
        """From a case's attributes."""
        named = case.attributes
        world = named.get("world", 1)
        assert isinstance(world, int)
        return cls(
            graphs=bool(named["graphs"]),
            overlap=bool(named["overlap"]),
            crowd=str(named["crowd"]),
            adapters=str(named["adapters"]),
            prefix_cache=bool(named["prefix_cache"]),
            world=world,
        )


def equality(shop: Workshop, family: str, subject: Open, chosen: Settings) -> Agreement:
    """The engine's answers against the reference's, and its log-probabilities against the exact ones."""
    prompts = shop.prompts(family)
    options: dict[str, object] = {
        "graphs": chosen.graphs,
        "overlap": chosen.overlap,
        "prefix_caching": chosen.prefix_cache,
        "adapters": None if chosen.adapters == "none" else shop.adapters(family),
    }
    if chosen.world > 1:
        options["tensor_parallel_size"] = chosen.world
    references = {name: shop.reference(family, MIXES[name]) for name in chosen.asked}
    # With the cache on, the second time most of each prompt is found there.
    asked = [name for name in chosen.asked for _ in range(1 + chosen.prefix_cache)]
    with shop.open(family, subject(), **options) as llm:
        for name in asked:
            mixes, reference = MIXES[name], references[name]
            if chosen.crowd == "alone":
                got = ask_alone(llm, prompts, mixes, [GREEDY] * len(prompts))
            else:
                got = ask(llm, prompts, mixes, GREEDY)
            found = agree(reference, got)
            if found.wrong is None:
                found = _within(shop.rounding(family, mixes), prompts, reference, got, found)
            if found.wrong is not None:
                break
    return found


def _within(
    known: Rounding,
    prompts: Sequence[Sequence[int]],
    reference: Sequence[Answer],
    got: Sequence[Answer],
    found: Agreement,
) -> Agreement:
    """Log-probabilities, up to the first different token of each answer."""
    for number, (prompt, ours, theirs) in enumerate(zip(prompts, reference, got, strict=True)):
        first = len(prompt) - 1
        for place, (token, other, logprob) in enumerate(zip(ours.tokens, theirs.tokens, theirs.logprobs, strict=True)):
            if token != other:
                break
            exact, tolerance = known.exact[number][first + place], known.tolerance[number][first + place]
            # Also for NaN.
            if not abs(logprob - exact) <= tolerance:
                wrong = (
                    f"prompt {number}, token {place}: its log-probability is {logprob:.7g} instead of {exact:.7g}; "
                    f"rounding explains a difference of {tolerance:.2g}"
                )
                return Agreement(wrong=wrong, deviation=found.deviation, decided=found.decided, where=(number, place))
    return found
