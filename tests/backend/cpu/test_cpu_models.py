"""Every family on the CPU backend's own stations: logits of transformers and PEFT, nothing outside an operator call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.cpu.backend import CpuBackend
from tests.models.families import FAMILIES, build, open_saved, reference_logits
from tests.models.peft_adapters import make, mixed, write_all
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import Mix, StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

ONE_EACH: dict[int, Mix] = {0: ((0, 1.0),), 2: ((1, 1.0),)}
WEIGHTS = (0.75, -0.5)
MIXED: dict[int, Mix] = {0: tuple(enumerate(WEIGHTS)), 2: ((0, 1.0),)}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_chunks_and_decode_give_the_logits_of_transformers(tmp_path: Path, family: str, world: int) -> None:
    reference, checkpoint = open_saved(family, tmp_path)
    tokens = random_tokens(reference.config.vocab_size)

    def rank(comm: ThreadCommunicator) -> dict[int, torch.Tensor]:
        model = build(checkpoint, rank=comm.rank, world_size=world, backend=CpuBackend())
        return drive(StepDriver(model, comm), tokens)

    for logits in run_ranks(world, rank):
        for number, ids in tokens.items():
            assert_close(logits[number], reference_logits(reference, ids), f"{family}, sequence {number}")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_gets_its_own_adapters_as_if_merged(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    tokens = random_tokens(reference.config.vocab_size)
    both = mixed(reference, adapters, WEIGHTS)
    first, second = (adapter.merged for adapter in adapters)
    cases = (("one each", ONE_EACH, (first, reference, second)), ("mixed", MIXED, (both, reference, first)))
    for name, mixes, models in cases:
        rank_rows = sum(adapter.rank for adapter in adapters)
        model = build(checkpoint, rank_rows=rank_rows, backend=CpuBackend())
        driver = StepDriver(model, SingleRank(), slots=len(adapters))
        write_all(driver, adapters)
        results = drive(driver, tokens, mixes)
        for number, merged in enumerate(models):
            expected = reference_logits(merged, tokens[number])
            assert_close(results[number], expected, f"{family}, {name}, sequence {number}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ledger_names_native_kernels_only(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    backend = CpuBackend()
    model = build(checkpoint, backend=backend)
    drive(StepDriver(model, SingleRank()), random_tokens(model.vocabulary))
    counts = backend.ledger.counts()
    assert counts
    assert all(kernel.startswith("cpu.") for kernel in counts)
    assert backend.ledger.composites() == {}
