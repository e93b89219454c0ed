"""Sampling by the written rules, in float64 on transformers' logits: what a request must answer when it is alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyaccel import SamplingParams
from polyaccel.engine.philox import uniforms
from tests.support.tiny_model import TinyModel


def reference_tokens(
    tiny: TinyModel,
    prompt: Sequence[int],
    params: SamplingParams,
    count: int,
    *,
    eos: Sequence[int] = (),
    choice: int = 0,
) -> list[int]:
    """``count`` tokens; end-of-sequence and stop ids do not end them, but are forbidden before ``min_tokens``."""
    output: list[int] = []
    with torch.no_grad():
        for index in range(count):
            ids = torch.tensor([[*prompt, *output]])
            logits = tiny.reference(ids, use_cache=False).logits[0, -1].double().numpy()
            scores = adjusted(
                logits, prompt, output, params, (*eos, *params.stop_ids) if index < params.min_tokens else ()
            )
            seed = np.array(params.seed or 0, dtype=np.uint64)
            place = np.array(len(prompt) + index)
            output.append(choose(scores, params, float(uniforms(seed, np.array(choice), place))))
    return output


def adjusted(
    logits: np.ndarray, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, forbidden: Sequence[int]
) -> np.ndarray:
    """Penalties, bias and masks, in this order."""
    scores = logits.copy()
    seen = np.unique(np.array([*prompt, *output], dtype=np.int64))
    penalty = params.repetition_penalty
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    counts = np.bincount(np.array(output, dtype=np.int64), minlength=len(scores))
    scores -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    for token, value in (params.logit_bias or {}).items():
        scores[token] += value
    if params.allowed_token_ids is not None:
        mask = np.full(len(scores), -np.inf)
        mask[list(params.allowed_token_ids)] = 0.0
        scores += mask
    scores[list(forbidden)] = -np.inf
    return scores


def choose(scores: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """Argmax at temperature 0; else temperature, top-k, top-p, min-p, and the inverse CDF in ascending id."""
    if params.temperature == 0.0:
        return int(scores.argmax())
    mass = np.exp((scores - scores.max()) / params.temperature)
    order = np.argsort(-scores, kind="stable")
    if params.top_k:
        mass[order[params.top_k :]] = 0.0
    if params.top_p < 1.0:
        before = np.cumsum(mass[order]) - mass[order]
        mass[order[before >= params.top_p * mass.sum()]] = 0.0
    mass[mass < params.min_p * mass.max()] = 0.0
    cumulative = np.cumsum(mass)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
