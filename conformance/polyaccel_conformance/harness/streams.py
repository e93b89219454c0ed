"""Work on a side stream with operands that arrive late, and the delay that is long enough to tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from polyaccel.backend import Step
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.harness.devices import Instruments, instruments
from polyaccel_conformance.harness.layouts import EXPANDED
from polyaccel_conformance.harness.memory import Guarded, Poison
from polyaccel_conformance.problem import Prepared
from polyaccel_conformance.trial import Output, Setting, Trial

READS = 5
"""Unsynchronised reads in a row that have to see stale data before a delay counts as long enough."""

LONGEST = 2.0**22
"""Units of delay that are tried at most; longer than any launch by far."""


def stale_delay(bench: Bench) -> float | None:
    """The shortest delay, of 1, 2, 4, ... units, after which a deliberate read without synchronisation sees what the
    memory held before, :data:`READS` times in a row. None if no delay does: then nothing can be told here. Measured
    once a bench."""
    if "stale_delay" not in bench.memo:
        tools, delay = instruments(bench), 1.0
        while delay <= LONGEST and not all(_reads_stale(bench, tools, delay) for _ in range(READS)):
            delay *= 2
        bench.memo["stale_delay"] = delay if delay <= LONGEST else None
    found = bench.memo["stale_delay"]
    return found if isinstance(found, float) else None


def _reads_stale(bench: Bench, tools: Instruments, delay: float) -> bool:
    old = bench.upload(torch.zeros(256))
    new = bench.upload(torch.ones(256))
    bench.synchronize()
    side = tools.stream()
    with side.use():
        side.delay(delay)
        # Device to device: a copy from pageable host memory may wait by itself.
        bench.device.copy_(old, new)
    seen = tools.peek(old)
    side.synchronize()
    return bool((seen == 0).all()) and bool((old.to("cpu") == 1).all())


def late_call(trial: Trial, delay: float, *, misplaced: bool = False) -> dict[str, Output]:
    """Call the trial's operator under a side stream, on which its operands (and, with its step, all metadata) arrive
    after a delay. Outputs are read after waiting for that stream alone.

    ``misplaced``: make the call under the default stream instead, deliberately wrong.
    """
    bench = trial.bench
    side = instruments(bench).stream()
    setting = Setting(repeat=-1)
    real = trial.guarded(setting)
    late = {name: _stale_twin(trial, name, buffer.tensor) for name, buffer in real.items()}
    _stale_steps(trial)
    bench.synchronize()
    prepared: Prepared | None = None
    try:
        with side.use():
            side.delay(delay)
            prepared = trial.problem.prepare(bench)
            resolved = trial.resolve(prepared)
            # Preparing may have waited.
            side.delay(delay)
            for name, buffer in real.items():
                target = late[name].tensor
                expanded = trial.problem.case.layout(name) == EXPANDED and target.dim() > 0
                bench.device.copy_(target[:1] if expanded else target, buffer.tensor[:1] if expanded else buffer.tensor)
            tensors = trial.tensors(late, setting)
            if not misplaced:
                result = trial.call(resolved, prepared, tensors)
        if misplaced:
            result = trial.call(resolved, prepared, tensors)
        with side.use():
            side.synchronize()
            outputs = {name: Output(t) for name, t in prepared.collect(result, tensors).items()}
            side.synchronize()
    finally:
        bench.synchronize()
        if prepared is not None:
            prepared.release()
    return outputs


def _stale_steps(trial: Trial) -> None:
    """Where metadata have a place of their own, leave those of another step there, valid as indices."""
    bench = trial.bench
    prepared = trial.problem.prepare(bench)
    try:
        for step in [value for value in prepared.arguments.values() if isinstance(value, Step)]:
            inputs = step.input
            other = replace(
                inputs,
                **{name: np.zeros_like(getattr(inputs, name)) for name in ("token_ids", "positions", "logits_rows")},
                kv_slots=np.full_like(inputs.kv_slots, -1),
                uniforms=np.zeros_like(inputs.uniforms),
                adapters={},
            )
            bench.begin_step(other, step.state)
        bench.synchronize()
    finally:
        prepared.release()


def _stale_twin(trial: Trial, name: str, tensor: torch.Tensor) -> Guarded:
    """A buffer of the same layout that holds NaN, or zeros, which are valid as indices."""
    stale = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.dtype.is_floating_point:
        stale.fill_(torch.nan)
    return Guarded(stale, trial.problem.case.layout(name), Poison.ZERO, trial.bench.upload)
