"""``sample`` in kernels: the suite's cases in several blocks, and what holds between rows and batches."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import DeviceState, SamplingRow, SamplingSpec, StepInput, TokenClass

pytest.importorskip("triton", reason="run tox -e triton")

CASES, SEED, LARGEST = 20, 20261122, 300


def test_rows_of_several_blocks_give_what_the_oracle_says() -> None:
    from polyaccel_conformance.bench import Bench
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS
    from polyaccel_conformance.schedule import fixed
    from polyaccel_conformance.trial import Trial
    from polyaccel_cuda.kernels import sample as kernels
    from tests.backends.interpreted.backend import InterpretedBackend

    listed = [item.case for item in fixed(PROBLEM_SETS["sample"])]
    suited = [case for case in listed if case.dims["vocabulary"] <= LARGEST and case.dims["rows"]]
    bench, compared = Bench(InterpretedBackend()), 0
    with mock.patch.object(kernels, "BLOCK", 32), mock.patch.object(kernels, "ADJUSTED_BLOCK", 32):
        for case in random.Random(SEED).sample(suited, min(CASES, len(suited))):
            problem = PROBLEM_SETS["sample"].problem(case)
            trial = Trial(bench, problem)
            for name in ("values.exact", "values.bound"):
                check = CHECKS.get(name)
                if check is not None and check.applies(case, problem):
                    failure = check.run(trial)
                    assert failure is None, f"{case}: {failure}"
                    compared += 1
    assert compared >= CASES // 2


def test_steps_that_torch_serves_execute_what_the_entry_declares() -> None:
    """On a GPU a row of 32,000 scores with top-p ran undeclared operators: no small case comes that way."""
    from polyaccel_conformance.bench import Bench
    from polyaccel_conformance.checks.registry import CHECKS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS
    from polyaccel_conformance.schedule import fixed
    from polyaccel_conformance.trial import Trial
    from polyaccel_cuda import sampling
    from tests.backends.interpreted.backend import InterpretedBackend

    bench, check, served = Bench(InterpretedBackend()), CHECKS["evidence.native"], 0
    torch_form = mock.Mock(side_effect=sampling.sampling.sample)
    suited = [item.case for item in fixed(PROBLEM_SETS["sample"]) if item.case.dims["vocabulary"] <= LARGEST]
    with (
        mock.patch.object(sampling, "SEARCHED_COLUMNS", 0),
        mock.patch.object(sampling.sampling, "sample", torch_form),
    ):
        for case in suited:
            before, trial = torch_form.call_count, Trial(bench, PROBLEM_SETS["sample"].problem(case))
            found = check.run(trial)
            if torch_form.call_count > before:
                assert found is None, f"{case}: {found}"
                served += 1
    assert served > len(suited) // 3


class Sampler:
    """Requests in slots of one state, sampled together or alone."""

    def __init__(self, rows: list[SamplingRow], vocabulary: int) -> None:
        from tests.backends.interpreted.backend import InterpretedBackend

        self.backend = InterpretedBackend()
        self.device = self.backend.devices()[0]
        spec = SamplingSpec(request_slots=len(rows), vocabulary=vocabulary)
        self.state = self.backend.allocate_sampling(spec, self.device)
        for slot, row in enumerate(rows):
            self.state.write(slot, row)

    def __call__(self, logits: torch.Tensor, uniforms: np.ndarray, slots: list[int], *, fused: bool = True) -> Any:
        from polyaccel_cuda import sampling

        rows = np.arange(len(slots))
        inputs = StepInput(
            token_class=TokenClass.DECODE,
            token_ids=rows,
            positions=rows,
            query_starts=np.arange(len(slots) + 1, dtype=np.int32),
            context_lengths=np.ones(len(slots), np.int32),
            block_tables=np.zeros((len(slots), 1), np.int32),
            kv_slots=rows,
            request_slots=np.array(slots, np.int32),
            logits_rows=rows.astype(np.int32),
            sample_slots=np.array(slots, np.int32),
            uniforms=uniforms[slots].astype(np.float32),
        )
        step = self.backend.begin_step(inputs, DeviceState(sampling=self.state), self.device)
        with mock.patch.object(sampling, "FUSED", fused):
            fn = self.backend.table()["sample"][0].fn
            return fn(logits[slots], self.state, step)


@st.composite
def batches(draw: Any) -> tuple[list[SamplingRow], torch.Tensor, np.ndarray]:
    vocabulary = draw(st.sampled_from([1, 40, 129]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        ids = np.array(draw(st.lists(st.integers(0, vocabulary - 1), max_size=5)), dtype=np.int64)
        rows.append(
            SamplingRow(
                temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.75])),
                top_k=draw(st.sampled_from([0, 1, 5, 1000])),
                top_p=draw(st.sampled_from([1.0, 0.5, 0.9])),
                min_p=draw(st.sampled_from([0.0, 0.05])),
                repetition_penalty=draw(st.sampled_from([1.0, 1.25])),
                logprobs=draw(st.sampled_from([-1, 2])),
                output_ids=ids if len(ids) else None,
            )
        )
    draw_of = np.random.default_rng(draw(st.integers(0, 2**20)))
    logits = draw_of.normal(size=(len(rows), vocabulary)) * draw(st.sampled_from([1.0, 4.0]))
    if draw(st.booleans()):
        logits[draw_of.random(logits.shape) < 0.2] = draw(st.sampled_from([-np.inf, np.nan, np.inf, 2.0]))
    return rows, torch.from_numpy(logits).float(), np.floor(draw_of.random(len(rows)) * 2**24) / 2**24


@settings(max_examples=12)
@given(batches(), st.sampled_from([32, 64]), st.sampled_from([torch.float32, torch.float16]))
def test_a_row_gives_the_same_id_in_any_batch_and_is_recorded(
    drawn: tuple[list[SamplingRow], torch.Tensor, np.ndarray], block: int, dtype: torch.dtype
) -> None:
    from polyaccel_cuda.kernels import sample as kernels

    rows, logits, uniforms = drawn
    logits = logits.to(dtype)
    with mock.patch.object(kernels, "BLOCK", block):
        together = Sampler(rows, logits.shape[1])
        ids = together(logits, uniforms, list(range(len(rows)))).ids
        assert torch.equal(together.state.last_tokens(), ids)
        for slot in range(len(rows)):
            alone = Sampler(rows, logits.shape[1])(logits, uniforms, [slot]).ids
            assert alone.tolist() == [ids[slot].item()]


@settings(max_examples=12)
@given(batches())
def test_what_rounding_cannot_change_is_what_torch_gives(
    drawn: tuple[list[SamplingRow], torch.Tensor, np.ndarray],
) -> None:
    rows, logits, uniforms = drawn
    # Equal masses on few ids: every sum is exact.
    logits = torch.where(logits > 1.0, 3.0, -torch.inf)
    rows = [SamplingRow(temperature=row.temperature, top_k=row.top_k, top_p=0.5, logprobs=row.logprobs) for row in rows]
    slots = list(range(len(rows)))
    ours, torchs = (Sampler(rows, logits.shape[1])(logits, uniforms, slots, fused=fused) for fused in (True, False))
    assert torch.equal(ours.ids, torchs.ids)
    if ours.top_ids is not None:
        assert torch.equal(ours.top_ids, torchs.top_ids)
        torch.testing.assert_close(ours.logprobs, torchs.logprobs)
        torch.testing.assert_close(ours.top_logprobs, torchs.top_logprobs)
