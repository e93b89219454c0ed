"""Whole-model equality: log-probabilities within what rounding explains, in every setting of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from polyaccel.backend import load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.covering import covering
from polyaccel_conformance.models.engines import Workshop
from polyaccel_conformance.models.equality import MIXES, Settings, equality
from polyaccel_conformance.models.families import ADAPTERS, FAMILIES
from polyaccel_conformance.models.planted_layers import LOGITS, PLANTED_LAYERS
from polyaccel_conformance.models.questions import MODEL_CHECKS, QUESTIONS, WORLDS
from polyaccel_conformance.models.reference import Reference, Request
from polyaccel_conformance.models.rounding import rounding
from polyaccel_conformance.models.variations import BASE, tokens
from polyaccel_conformance.subject import Subject

PLAIN = Settings(graphs=False, overlap=False, crowd="crowded", adapters="none", prefix_cache=False)


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with Workshop() as made:
        yield made


@pytest.mark.parametrize("name", ["model.float32", "model.ranks"])
def test_every_setting_is_an_axis_and_each_pair_of_settings_is_in_the_fixed_list(name: str) -> None:
    (question,) = [question for question in QUESTIONS if question.operator == name]
    axes = question.axes()
    assert {path.removeprefix("attributes.") for path in axes} >= {
        "family",
        "adapters",
        "graphs",
        "overlap",
        "crowd",
        "prefix_cache",
    }
    adapters = {"none", "loaded"} if name == "model.ranks" else {"none", "one", "many"}
    assert set(axes["attributes.adapters"]) == adapters
    assert ("attributes.world" in axes) == (name == "model.ranks")
    found = covering(question)
    assert not found.unreachable
    for path, values in axes.items():
        assert {case.axes()[path] for case in found.cases} == set(values)
    assert WORLDS == (2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_itself_is_within_rounding_of_float64(shop: Workshop, family: str) -> None:
    for mixes in MIXES.values():
        known = shop.rounding(family, mixes)
        answers = shop.reference(family, mixes)
        for prompt, answer, exact, tolerance in zip(
            shop.prompts(family), answers, known.exact, known.tolerance, strict=True
        ):
            error = np.abs(np.array(answer.logprobs) - exact[len(prompt) - 1 :])
            assert (error <= tolerance[len(prompt) - 1 :]).all()
            # Float32 keeps five digits; whoever loses more of them is found.
            assert tolerance.max() < 0.02


@pytest.mark.parametrize("adapters", ["none", "one", "many"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_cpu_backend_is_equal(shop: Workshop, adapters: str, prefix_cache: bool) -> None:
    chosen = replace(PLAIN, adapters=adapters, prefix_cache=prefix_cache)
    assert equality(shop, "qwen3", lambda: load("cpu"), chosen).wrong is None


def test_narrow_logits_are_found_that_tokens_and_layers_do_not_show(shop: Workshop) -> None:
    shop.rounding("llama", BASE)
    with PLANTED_LAYERS[LOGITS]():
        assert tokens(shop, "llama", lambda: load("cpu")).wrong is None
        found = equality(shop, "llama", lambda: load("cpu"), PLAIN)
    assert found.wrong is not None
    assert "rounding explains a difference of" in found.wrong


def test_its_control_fails_as_it_must() -> None:
    bench = Bench(load("cpu"), subject=Subject(name="cpu"))
    assert MODEL_CHECKS["model.float32"].control(bench) == "failed as it must"


def test_exact_log_probabilities_are_those_of_a_distribution() -> None:
    """Two tokens after the same beginning: the sum over all of them is 1."""
    family = replace(FAMILIES["llama"], vocabulary=7, layers=2)
    model = Reference(family, dict(enumerate(ADAPTERS.values())))
    requests = [Request(ids=np.array([1, 2, last]), queries=1, mix={}) for last in range(7)]
    found = rounding(model, requests)
    assert np.isclose(sum(np.exp(exact[-1]) for exact in found.exact), 1.0, rtol=1e-12)
    assert all((tolerance > 0).all() for tolerance in found.tolerance)


def test_a_seed_gives_the_same_tolerance() -> None:
    model = Reference(FAMILIES["llama"], {})
    requests = [Request(ids=np.arange(6), queries=1, mix={})]
    first, again, other = (rounding(model, requests, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.tolerance[0], again.tolerance[0])
    assert not np.array_equal(first.tolerance[0], other.tolerance[0])
    assert np.array_equal(first.exact[0], other.exact[0])
