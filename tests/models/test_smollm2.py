"""The real SmolLM2 from its GGUF file, which transformers reads with its own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from polyaccel.weights.checkpoint import open_checkpoint
from tests.models.families import MAX_POSITIONS, build, reference_logits
from tests.models.scenario import assert_close
from tests.support.driver import StepDriver
from tests.support.thread_comm import ThreadCommunicator, run_ranks

SEED = 3


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers_at_every_world_size(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    tokens = np.random.default_rng(SEED).integers(0, 49_152, MAX_POSITIONS // 2).tolist()

    def rank(comm: ThreadCommunicator) -> torch.Tensor:
        driver = StepDriver(build(checkpoint, rank=comm.rank, world_size=comm.world_size), comm)
        return torch.cat([driver.step({0: part}) for part in (tokens[:20], tokens[20:-1], tokens[-1:])])

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    expected = reference_logits(reference, tokens)
    for world in (1, 2, 3, 4):
        for number, logits in enumerate(run_ranks(world, rank)):
            assert_close(logits, expected, f"seed {SEED}, rank {number} of {world}")
