"""Every family's logits equal transformers', whatever the steps look like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import SingleRank
from polyaccel.models.registry import build_model
from tests.models.families import FAMILIES, build, open_saved, reference_logits
from tests.models.scenario import assert_close, drive, random_tokens
from tests.support.driver import StepDriver


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_chunks_and_decode_give_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path)
    model = build(checkpoint)
    tokens = random_tokens(model.vocabulary)
    logits = drive(StepDriver(model, SingleRank()), tokens)
    for number, ids in tokens.items():
        assert_close(logits[number], reference_logits(reference, ids), f"{family}, sequence {number}")


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_sliding_window_matters_in_this_comparison(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path)
    tokens = random_tokens(build(checkpoint, load=False).vocabulary)[0]
    windowed = reference_logits(reference, tokens)
    reference.config.sliding_window = 1000
    reference.config.layer_types = ["full_attention"] * reference.config.num_hidden_layers
    other = type(reference)(reference.config)
    other.train(False)
    other.load_state_dict(reference.state_dict())
    assert (reference_logits(other, tokens) - windowed).abs().max() > 0.01


def test_only_the_rows_asked_for_have_logits(tmp_path: Path) -> None:
    reference, checkpoint = open_saved("llama", tmp_path)
    model = build(checkpoint)
    driver = StepDriver(model, SingleRank())
    tokens = random_tokens(model.vocabulary)
    logits = driver.step({0: tokens[0], 1: tokens[1]}, last_only=True)
    assert logits.shape == (2, model.vocabulary)
    for row, number in enumerate((0, 1)):
        assert_close(logits[row], reference_logits(reference, tokens[number])[-1], f"sequence {number}")


def test_half_precision_models_answer_in_their_dtype(tmp_path: Path) -> None:
    reference, checkpoint = open_saved("llama", tmp_path)
    model = build_model(replace(build(checkpoint, load=False).options, dtype=torch.bfloat16))
    model.load(checkpoint)
    ids = random_tokens(model.vocabulary)[0]
    logits = StepDriver(model, SingleRank()).step({0: ids})
    expected = reference_logits(reference, ids)
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; some twenty roundings one after the other stay within a twentieth of the largest logit.
    assert float((logits.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())
