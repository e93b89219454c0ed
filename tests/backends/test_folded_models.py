"""Every family on the folded backend, with adapters at every world size: transformers' logits, the base's sums."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import Collective, SingleRank
from tests.backends.folded.backend import FoldedBackend
from tests.models.families import FAMILIES, LAYERS, build, open_saved, reference_logits
from tests.models.peft_adapters import make, mixed, write_all
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import Mix, StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = (0.75, -0.5)
MIXES: dict[int, Mix] = {0: tuple(enumerate(WEIGHTS)), 2: ((1, 1.0),)}


class FoldedDriver(StepDriver):
    """Waits for the device after every step: logits are not there before."""

    def step(self, *args: object, **kwargs: object) -> torch.Tensor:
        logits = super().step(*args, **kwargs)  # type: ignore[arg-type]
        for device in self.backend.devices():
            device.synchronize()
        return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_merged_models_at_every_world_size(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    tokens = random_tokens(reference.config.vocab_size)
    both = mixed(reference, adapters, WEIGHTS)
    expected = {n: reference_logits(m, tokens[n]) for n, m in enumerate((both, reference, adapters[1].merged))}
    rank_rows = sum(adapter.rank for adapter in adapters)
    for world in (1, 2, 3):

        def rank(comm: ThreadCommunicator, world: int = world) -> tuple[dict[int, torch.Tensor], dict[str, int]]:
            backend = FoldedBackend()
            own = backend.adopt(comm if world > 1 else SingleRank())
            devices = (backend.device,) * LAYERS
            model = build(
                checkpoint, rank=comm.rank, world_size=world, rank_rows=rank_rows, backend=backend, devices=devices
            )
            driver = FoldedDriver(model, own, slots=len(adapters), policy="strict")
            write_all(driver, adapters)
            return drive(driver, tokens, MIXES), backend.ledger.composites()

        results = run_ranks(world, rank)
        for logits, composites in results:
            assert composites == {}
            for number in expected:
                assert torch.equal(logits[number], results[0][0][number]), "ranks disagree"
        for number, wanted in expected.items():
            assert_close(results[0][0][number], wanted, f"{family}, {world} ranks, sequence {number}")


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_rows_ride_on_the_base_models_sums_and_add_nothing_but_their_bytes(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    rank_rows = sum(adapter.rank for adapter in adapters)
    chunks = {0: [1, 2, 3], 1: [4], 2: [5, 6]}
    tokens = sum(len(chunk) for chunk in chunks.values())

    def rank(comm: ThreadCommunicator, mixes: Mapping[int, Mix]) -> list[Collective]:
        backend = FoldedBackend()
        own = backend.adopt(comm)
        devices = (backend.device,) * LAYERS
        model = build(checkpoint, rank=comm.rank, world_size=2, rank_rows=rank_rows, backend=backend, devices=devices)
        driver = FoldedDriver(model, own, slots=len(adapters))
        write_all(driver, adapters)
        own.trace = []
        driver.step(chunks, mixes=mixes)
        return own.trace

    base, adapted = run_ranks(2, partial(rank, mixes={})), run_ranks(2, partial(rank, mixes=MIXES))
    riding = 1 if family == "mixtral" else 2
    for without, with_rows in zip(base, adapted, strict=True):
        assert [c.kind for c in with_rows] == [c.kind for c in without]
        assert [c.kind for c in without] == ["all_reduce"] * (1 + 2 * LAYERS) + ["all_gather"]
        extra = [b.nbytes - a.nbytes for a, b in zip(without, with_rows, strict=True)]
        carried = tokens * rank_rows * 4
        layer = [carried] * riding + [0] * (2 - riding)
        assert extra == [0, *(layer * LAYERS), 0]
