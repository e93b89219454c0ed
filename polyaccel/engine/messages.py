"""What the scheduler sends to its workers and what comes back. Small, picklable, the same for every executor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyaccel.backend.sampling import SamplingRow
from polyaccel.backend.step import StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """One iteration, sent alike to every worker.

    ``begin`` lists request slots whose sampling state starts before the step, ``end`` those that are cleared before it
    (ends first). ``step_id`` counts up by one. Once a step found no room on a rank, steps are skipped on all of them
    until one ``resumes``.
    """

    step_id: int
    inputs: StepInput
    begin: tuple[tuple[int, SamplingRow], ...] = ()
    end: tuple[int, ...] = ()
    resumes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Host arrays for the R rows of logits of one step, in the order of ``inputs.sample_slots``.

    ``no_room``: why the step was not run, where a rank's device had no memory for it, or for one before it; then there
    are no rows.
    """

    step_id: int
    ids: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    no_room: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the workers have room for, the same on every rank (KV blocks: the minimum over ranks).

    ``max_model_len``: positions the model and the KV cache allow for one sequence. ``adapter_slots`` and ``rank_rows``
    are 0 when adapters are switched off.
    """

    kv_blocks: int
    kv_block_size: int
    request_slots: int
    max_model_len: int
    vocabulary: int
    adapter_slots: int
    rank_rows: int
    world_size: int
