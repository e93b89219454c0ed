"""``sample``: from logits to ids, deterministic given each row's uniform.

Every operation works on rows alone and every sum along a row is a running sum, whose rounding does not depend on how
many rows there are: a row's id is the same in any batch. Sums are float32 (the running sum may be wider inside).

NaN counts as minus infinity and plus infinity as the largest number. Where all of a row is masked or minus infinity the
id is the lowest one that the mask allows, or 0.
"""

from __future__ import annotations

import torch

from polyaccel.backend.composite.sampling_state import PARAMETERS, StepNeeds, TensorSamplingState
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.sampling import SampleOutput, SamplingState
from polyaccel.backend.step import Step

LOWEST = torch.finfo(torch.float32).min
HIGHEST = torch.finfo(torch.float32).max


def sample(logits: torch.Tensor, state: SamplingState, step: Step) -> SampleOutput:
    """Sample ``logits: [R, vocabulary]`` for the request slots ``sample_slots`` at the step's ``uniforms``.

    A step whose rows are all plain greedy costs one argmax. Updates counts and last tokens of the request slots.

    Raises:
        OperatorError: another state class, or logits of another shape.
    """
    if not isinstance(state, TensorSamplingState):
        raise OperatorError("sample", f"the plain-torch form takes TensorSamplingState, not {type(state).__name__}")
    slots = step.input.sample_slots
    if logits.shape != (len(slots), state.spec.vocabulary):
        raise OperatorError.describe("sample", f"expected [{len(slots)}, {state.spec.vocabulary}]", {"logits": logits})
    rows = step.tensor("sample_slots").to(torch.int64)
    needs = state.needs(slots)
    # The lowest finite number stands for minus infinity, so that a masked id, truly infinite, is below it.
    scores = logits.float().nan_to_num(nan=LOWEST, posinf=HIGHEST, neginf=LOWEST)
    parameters = state.parameters.index_select(0, rows)
    if needs.penalties or needs.bias or needs.mask:
        scores = _adjust(scores, state, parameters, rows, needs)
    ids = scores.argmax(-1)
    if needs.sampling:
        ids = torch.where(_column(parameters, "temperature") == 0.0, ids, _draw(scores, ids, parameters, step, needs))
    state.advance(slots, rows, ids, needs)
    if not needs.logprobs:
        return SampleOutput(ids=ids)
    return _with_logprobs(scores, ids, state.spec.max_top_logprobs)


def _column(parameters: torch.Tensor, name: str) -> torch.Tensor:
    return parameters[:, PARAMETERS.index(name)]


def _adjust(
    scores: torch.Tensor, state: TensorSamplingState, parameters: torch.Tensor, rows: torch.Tensor, needs: StepNeeds
) -> torch.Tensor:
    """Penalties, bias and mask; each leaves rows with neutral values exactly as they are."""
    lowest = scores <= LOWEST
    if needs.penalties and state.output_counts is not None and state.prompt_mask is not None:
        counts = state.output_counts.index_select(0, rows)
        produced = counts > 0
        penalty = _column(parameters, "repetition_penalty").unsqueeze(1)
        seen = (produced | state.prompt_mask.index_select(0, rows)) & (penalty != 1.0)
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        # The counts of rows without penalties are left over from other requests: their penalties of 0 cancel them.
        scores = scores - _column(parameters, "presence_penalty").unsqueeze(1) * produced.float()
        scores = scores - _column(parameters, "frequency_penalty").unsqueeze(1) * counts.float()
    if needs.bias and state.bias is not None:
        scores = scores + state.bias.index_select(0, rows)
    # What stands for minus infinity stays so whatever a penalty or a bias made of it.
    scores = torch.where(lowest, LOWEST, scores.clamp(LOWEST, HIGHEST))
    if needs.mask and state.allowed is not None:
        scores = torch.where(state.allowed.index_select(0, rows), scores, -torch.inf)
    return scores


def _draw(
    scores: torch.Tensor, greedy: torch.Tensor, parameters: torch.Tensor, step: Step, needs: StepNeeds
) -> torch.Tensor:
    """Inverse CDF over the ids that the filters keep, in ascending id."""
    top = scores.amax(-1, keepdim=True).clamp(min=LOWEST)
    temperature = _column(parameters, "temperature").unsqueeze(1)
    # Relative to the largest, which makes its mass exactly 1. Rows of temperature 0 are not used.
    mass = torch.exp((scores - top) / torch.where(temperature == 0.0, 1.0, temperature))
    mass = torch.where(scores > LOWEST, mass, 0.0)
    if needs.ordering:
        mass = torch.where(_kept(scores, mass, parameters), mass, 0.0)
    if needs.min_p:
        mass = torch.where(mass >= _column(parameters, "min_p").unsqueeze(1), mass, 0.0)
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1:]
    target = step.tensor("uniforms").unsqueeze(1) * total
    drawn = (cumulative <= target).sum(-1)
    # Where u was rounded up to 1, or a running sum made in parallel is not quite monotone, the last id with any mass.
    last = torch.where(mass > 0, _ids_like(mass), 0).amax(-1)
    drawn = torch.minimum(drawn, last)
    return torch.where(total.squeeze(1) > 0, drawn, greedy)


def _kept(scores: torch.Tensor, mass: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Which ids pass top-k and then top-p, bool ``[R, vocabulary]``; among equals the lower id is the larger one."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
    place = _ids_like(scores)
    top_k = _column(parameters, "top_k").unsqueeze(1)
    falling = mass.gather(-1, order)
    inside = (top_k <= 0) | (place < top_k)
    falling = torch.where(inside, falling, 0.0)
    cumulative = falling.cumsum(-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    top_p = _column(parameters, "top_p").unsqueeze(1)
    inside = inside & ((top_p >= 1.0) | (before < top_p * cumulative[:, -1:]) | (place == 0))
    return torch.zeros_like(inside).scatter_(-1, order, inside)


def _with_logprobs(scores: torch.Tensor, ids: torch.Tensor, columns: int) -> SampleOutput:
    top = scores.amax(-1, keepdim=True).clamp(min=LOWEST)
    finite = scores > LOWEST
    mass = torch.where(finite, torch.exp(scores - top), 0.0).cumsum(-1)[:, -1:]
    logprobs = torch.where(finite, scores - top - mass.log(), -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1][:, :columns]
    missing = columns - order.shape[1]
    top_logprobs = logprobs.gather(-1, order)
    if missing:
        order = torch.nn.functional.pad(order, (0, missing), value=-1)
        top_logprobs = torch.nn.functional.pad(top_logprobs, (0, missing), value=-torch.inf)
    return SampleOutput(
        ids=ids,
        logprobs=logprobs.gather(-1, ids.unsqueeze(1)).squeeze(1),
        top_ids=order,
        top_logprobs=top_logprobs,
    )


def _ids_like(scores: torch.Tensor) -> torch.Tensor:
    return torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device)
