"""The steps that a model is driven through, and what its logits are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tests.support.driver import Mix, StepDriver

# Tokens of sequences 0, 1, 2 in each step: whole prefill beside a first chunk; a chunk beside decode and an entering
# sequence; pure decode, which the plan keeps apart, of all and of some; decode beside a last chunk.
STEPS: tuple[Mapping[int, int], ...] = (
    {0: 11, 1: 5},
    {1: 6, 0: 1, 2: 3},
    {0: 1, 1: 1, 2: 1},
    {2: 1, 0: 1},
    {1: 1, 2: 4, 0: 1},
)
LENGTHS = {number: sum(step.get(number, 0) for step in STEPS) for number in (0, 1, 2)}

# Both sides compute in float32, but add in other orders (paged and tiled attention, sums over ranks) and with other
# angles (float64 here, float32 there). Sums of up to 100 products differ by some 1e-6 relative to their largest term,
# and a few layers amplify that by some ten; a wrong head, row, position or scale changes the first digit.
RELATIVE = 5e-5


def random_tokens(vocabulary: int, seed: int = 7) -> dict[int, list[int]]:
    """Tokens of each sequence, the same for every model of a vocabulary."""
    generator = np.random.default_rng(seed)
    return {number: generator.integers(0, vocabulary, length).tolist() for number, length in LENGTHS.items()}


def drive(
    driver: StepDriver, tokens: Mapping[int, list[int]], mixes: Mapping[int, Mix] | None = None
) -> dict[int, torch.Tensor]:
    """Run all steps; the logits ``[tokens, vocabulary]`` of each sequence."""
    done = dict.fromkeys(tokens, 0)
    parts: dict[int, list[torch.Tensor]] = {number: [] for number in tokens}
    for step in STEPS:
        chunks = {number: tokens[number][done[number] : done[number] + count] for number, count in step.items()}
        logits = driver.step(chunks, mixes=mixes).clone()
        for (number, count), rows in zip(step.items(), torch.split(logits, list(step.values())), strict=True):
            parts[number].append(rows)
            done[number] += count
    return {number: torch.cat(rows) for number, rows in parts.items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal within float32 rounding, relative to the largest logit."""
    bound = RELATIVE * float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} and {list(expected.shape)}"
    assert difference <= bound, f"{what}: differs by {difference:.3g}, allowed is {bound:.3g}"
