"""``sample`` in one kernel, two where penalties, bias or a mask change scores, and one more for log-probabilities."""

from __future__ import annotations

import torch
import triton

from polyaccel.backend import OperatorError, SampleOutput, SamplingState
from polyaccel.backend.composite import sampling
from polyaccel.backend.composite.captured_sampling import CapturedSamplingState
from polyaccel.backend.composite.sampling_state import StepNeeds
from polyaccel_cuda.kernels import sample as kernels
from polyaccel_cuda.step import CudaStep

FUSED = True
"""Whether kernels sample, or torch."""
SEARCHED_COLUMNS = 10_000
"""Torch serves steps with fewer rows than one for each so many columns where there is top-k, top-p or logprobs.

A row's search is one program's, whatever the number of rows; torch sorts, in a time that grows with them. Measured on
an H100, in us for 1 and for 64 rows of 32,000 scores: top-p 169 and 177, by torch 166 and 554; of 128,256 scores 578
and 626, by torch 222 and 1,971.
"""


def sample(logits: torch.Tensor, state: SamplingState, step: CudaStep) -> SampleOutput:
    """Sample ``logits: [R, vocabulary]``, rows dense, as the composite does; updates counts and last tokens.

    Raises:
        OperatorError: another state class, or logits of another shape.
    """
    if not isinstance(state, CapturedSamplingState):
        return sampling.sample(logits, state, step)
    slots, vocabulary = step.input.sample_slots, state.spec.vocabulary
    if logits.shape != (len(slots), vocabulary):
        raise OperatorError.describe("sample", f"expected [{len(slots)}, {vocabulary}]", {"logits": logits})
    needs = state.needs(slots)
    searched = needs.ordering or needs.logprobs
    if not FUSED or (searched and not step.batch_invariant and len(slots) * SEARCHED_COLUMNS < vocabulary):
        return sampling.sample(logits, state, step)
    ids = torch.empty((len(slots),), dtype=torch.int64, device=logits.device)
    if not len(slots):
        return SampleOutput(ids=ids)
    rows, changed = step.tensor("sample_slots"), needs.penalties or needs.bias or needs.mask
    scores = _adjusted(logits, state, rows, needs) if changed else logits
    block = min(kernels.BLOCK, max(16, triton.next_power_of_2(vocabulary)))
    counts = state.output_counts if needs.penalties else None
    kernels.sample_kernel[(len(slots),)](
        scores,
        scores.stride(0),
        vocabulary,
        rows,
        state.parameters,
        step.tensor("uniforms"),
        ids,
        state.last_tokens(),
        ids if counts is None else counts,
        SAMPLING=needs.sampling,
        ORDERING=needs.ordering,
        COUNTS=counts is not None,
        RAW=not changed,
        BITS=kernels.KEY_BITS[scores.dtype],
        BLOCK=block,
        num_warps=kernels.WARPS,
    )
    state.sampled(slots)
    if not needs.logprobs:
        return SampleOutput(ids=ids)
    return _with_logprobs(scores, ids, not changed, state.spec.max_top_logprobs, block)


def _adjusted(logits: torch.Tensor, state: CapturedSamplingState, rows: torch.Tensor, needs: StepNeeds) -> torch.Tensor:
    """``[R, vocabulary]`` float32: penalties, bias and mask applied; minus infinity where masked."""
    count, vocabulary = logits.shape
    scores = torch.empty((count, vocabulary), dtype=torch.float32, device=logits.device)
    counts = state.output_counts if needs.penalties else None
    prompts = state.prompt_mask if needs.penalties else None
    bias = state.bias if needs.bias else None
    allowed = state.allowed if needs.mask else None
    block = min(kernels.ADJUSTED_BLOCK, max(16, triton.next_power_of_2(vocabulary)))
    kernels.adjust_scores_kernel[(count, triton.cdiv(vocabulary, block))](
        logits,
        logits.stride(0),
        scores,
        vocabulary,
        rows,
        state.parameters,
        rows if counts is None else counts,
        rows if prompts is None else prompts.view(torch.uint8),
        scores if bias is None else bias,
        rows if allowed is None else allowed.view(torch.uint8),
        PENALTIES=counts is not None and prompts is not None,
        BIAS=bias is not None,
        MASK=allowed is not None,
        BLOCK=block,
    )
    return scores


def _with_logprobs(scores: torch.Tensor, ids: torch.Tensor, raw: bool, width: int, block: int) -> SampleOutput:
    count, vocabulary = scores.shape
    columns = min(width, vocabulary)
    shifted = torch.empty((count, 1), dtype=torch.float32, device=scores.device)
    masses = torch.empty((count, 1), dtype=torch.float32, device=scores.device)
    top_ids = torch.full((count, width), -1, dtype=torch.int64, device=scores.device)
    top_shifted = torch.full((count, width), -torch.inf, dtype=torch.float32, device=scores.device)
    kernels.top_scores_kernel[(count,)](
        scores,
        scores.stride(0),
        vocabulary,
        ids,
        shifted,
        masses,
        top_ids,
        top_shifted,
        columns,
        width,
        RAW=raw,
        BLOCK=block,
        num_warps=kernels.WARPS,
    )
    # Of a row without candidates there is no mass, and minus infinity stays so.
    logs = masses.clamp(min=torch.finfo(torch.float32).tiny).log()
    return SampleOutput(ids=ids, logprobs=(shifted - logs).squeeze(1), top_ids=top_ids, top_logprobs=top_shifted - logs)
