"""Adapters of the step give the logits of PEFT's merged model, at every world size and without a further collective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import Collective, SingleRank
from tests.models.families import FAMILIES, CompositeBackend, build, open_saved, reference_logits
from tests.models.peft_adapters import make, mixed, write_all
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import Mix, StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = (0.75, -0.5)
# Sequence 1 uses no adapter, so that every step also has rows without one.
ONE_EACH: dict[int, Mix] = {0: ((0, 1.0),), 2: ((1, 1.0),)}
MIXED: dict[int, Mix] = {0: tuple(enumerate(WEIGHTS)), 2: ((0, 1.0),)}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_gets_its_own_adapters_as_if_merged_at_every_world_size(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    tokens = random_tokens(reference.config.vocab_size)
    both = mixed(reference, adapters, WEIGHTS)
    first, second = (adapter.merged for adapter in adapters)
    expected = {
        "one each": {
            number: reference_logits(m, tokens[number]) for number, m in enumerate((first, reference, second))
        },
        "mixed": {number: reference_logits(m, tokens[number]) for number, m in enumerate((both, reference, first))},
    }
    largest = max(float(logits.abs().max()) for logits in expected["one each"].values())
    for merged in (first, second, both):
        assert (
            reference_logits(merged, tokens[0]) - reference_logits(reference, tokens[0])
        ).abs().max() > 0.02 * largest
    rank_rows = sum(adapter.rank for adapter in adapters)
    for world in (1, 2, 3, 4):
        for equal in (False, True) if world > 1 else (False,):
            for name, mixes in (("one each", ONE_EACH), ("mixed", MIXED)):

                def rank(
                    comm: ThreadCommunicator, world: int = world, equal: bool = equal, mixes: dict[int, Mix] = mixes
                ) -> dict[int, torch.Tensor]:
                    backend = CompositeBackend(equal=equal)
                    model = build(checkpoint, rank=comm.rank, world_size=world, rank_rows=rank_rows, backend=backend)
                    driver = StepDriver(model, comm, slots=len(adapters))
                    write_all(driver, adapters)
                    return drive(driver, tokens, mixes)

                results = run_ranks(world, rank)
                for number, logits in expected[name].items():
                    what = f"{family}, {name}, {world} ranks, equal={equal}, sequence {number}"
                    assert_close(results[0][number], logits, what)
                    assert all(torch.equal(results[0][number], other[number]) for other in results), what


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_add_no_collective_and_no_byte_to_one(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    rank_rows = sum(adapter.rank for adapter in adapters)

    def rank(comm: ThreadCommunicator) -> tuple[list[Collective], list[Collective]]:
        model = build(checkpoint, rank=comm.rank, world_size=2, rank_rows=rank_rows)
        driver = StepDriver(model, comm, slots=len(adapters))
        write_all(driver, adapters)
        base: list[Collective] = []
        adapted: list[Collective] = []
        comm.trace = base
        driver.step({0: [1, 2], 1: [3, 4], 2: [5]})
        comm.trace = adapted
        driver.step({0: [1, 2], 1: [3, 4], 2: [5]}, mixes=ONE_EACH)
        return base, adapted

    for base, adapted in run_ranks(2, rank):
        assert base == adapted
        assert base


def test_emptying_a_slot_brings_the_base_model_back(tmp_path: Path) -> None:
    reference, checkpoint = open_saved("llama", tmp_path / "model")
    adapters = make(reference, "llama", tmp_path)
    tokens = random_tokens(reference.config.vocab_size)
    model = build(checkpoint, rank_rows=sum(adapter.rank for adapter in adapters))
    driver = StepDriver(model, SingleRank(), slots=2)
    write_all(driver, adapters)
    for store in driver.stores().values():
        store.clear(0)
    logits = drive(driver, tokens, {0: ((0, 1.0),)})
    base = drive(StepDriver(build(checkpoint), SingleRank()), tokens)
    assert torch.equal(logits[0], base[0])


def test_every_linear_the_embedding_and_the_head_are_targets(tmp_path: Path) -> None:
    for family in FAMILIES:
        reference, checkpoint = open_saved(family, tmp_path / family)
        modules = {target.module for target in build(checkpoint, load=False).targets()}
        linears = (torch.nn.Linear, torch.nn.Embedding)
        missing = {name for name, module in reference.named_modules() if isinstance(module, linears)} - modules
        assert not missing, family
