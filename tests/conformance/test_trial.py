"""What the calls of one case share, and what each of them has to itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from polyaccel.backend import AdapterStore, Device, Weight, WeightSpec
from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.trial import BOTH, LARGE, POISONED, STATE, Output, Setting, Trial

ADAPTED = ("sgmv", "sgmv_shrink", "sgmv_expand", "embedding", "column_linear", "gate_up_act", "qkv_rope_cache")


class _Counting(CpuBackend):
    """Counts the adapter stores that it gave room to."""

    def __init__(self) -> None:
        super().__init__()
        self.stores = 0

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        self.stores += 1
        return super().allocate_adapters(weights, rank_rows=rank_rows, slots=slots, device=device)


def _problem(operator: str) -> Problem:
    problems = PROBLEM_SETS[operator]
    axes = {path: values[0] for path, values in problems.axes().items()} | {"dims.tokens": 7}
    mended = problems.mend(axes)
    assert mended is not None
    return problems.problem(Case.of(operator, mended, 5))


class _Queued(Bench):
    """The host, taken for a device with a queue."""

    torch_device = torch.device("cuda")


@pytest.mark.parametrize("operator", ADAPTED)
@pytest.mark.parametrize(("bench", "stores"), [(Bench, 1), (_Queued, 2)], ids=["host", "device"])
def test_the_first_plain_call_on_a_device_has_its_adapters_to_itself_and_later_ones_share_theirs(
    bench: type[Bench], stores: int, operator: str
) -> None:
    backend = _Counting()
    trial = Trial(bench(backend), _problem(operator))
    trial.ask()
    assert backend.stores == 1
    for setting in (POISONED, LARGE, Setting(repeat=1)):
        trial.ask(setting)
        assert backend.stores == stores
    trial.close()


@pytest.mark.parametrize("operator", ADAPTED)
def test_a_problem_with_another_operand_uses_what_was_placed_and_leaves_it(operator: str) -> None:
    backend = _Counting()
    trial = Trial(Bench(backend), _problem(operator))
    first = trial.ask()
    other = trial.beside(trial.problem.beside())
    again = other.ask()
    other.close()
    assert backend.stores == 1
    assert all(np.array_equal(output.bits, again.outputs[name].bits) for name, output in first.outputs.items())
    assert trial.ask(POISONED).error is None
    trial.close()


@pytest.mark.parametrize("operator", ADAPTED)
def test_a_row_alone_reads_the_adapters_that_were_placed_for_its_batch(operator: str) -> None:
    backend = _Counting()
    bench, problem = Bench(backend), _problem(operator)
    early = problem.alone(problem.apart[0])
    together = Trial(bench, problem).ask()
    late = problem.alone(problem.apart[-1])
    assert early is not None
    assert late is not None
    assert backend.stores == 1
    Trial(bench, late).ask()
    assert backend.stores == 1, "it placed them again"
    Trial(bench, early).ask()
    Trial(Bench(backend), late).ask()
    assert backend.stores == 3, "there was nothing to share, or it was another bench's"
    assert together.error is None


def test_a_token_alone_is_computed_by_the_experts_that_were_placed_for_its_batch() -> None:
    placed: list[str] = []

    class Backend(CpuBackend):
        def allocate_weight(self, spec: WeightSpec, device: Device) -> Weight:
            placed.append(spec.site)
            return super().allocate_weight(spec, device)

    bench, problem = Bench(Backend()), _problem("moe_experts")
    Trial(bench, problem).ask()
    first = list(placed)
    assert len(first) == 2
    alone = problem.alone(problem.apart[-1])
    assert alone is not None
    assert Trial(bench, alone).ask().error is None
    assert placed == first, "they were placed again"
    Trial(Bench(bench.backend), alone).ask()
    assert placed == first + first, "they are another bench's"


def test_what_the_plan_is_asked_is_known_without_placing_anything_again() -> None:
    backend = _Counting()
    trial = Trial(Bench(backend), _problem("sgmv"))
    posed = trial.posed()
    assert backend.stores == 1
    assert posed.inputs is not None
    assert posed.inputs.has_adapters
    query = posed.query("sgmv")
    assert (query.operator, query.adapters, query.static["k"]) == ("sgmv", True, 16)
    assert trial.posed() is posed
    assert backend.stores == 1


def test_an_output_is_not_changed_by_what_is_written_to_its_memory_later() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    output = Output(tensor)
    tensor.zero_()
    assert np.array_equal(output.values, np.arange(6.0).reshape(2, 3))
    assert np.array_equal(output.bits.view(np.float32), output.values)


@pytest.mark.parametrize("operator", ["linear", "qkv_rope_cache", "moe_experts", "sample", "row_parallel_linear"])
@pytest.mark.parametrize("of", sorted({2, 3, 6, STATE, BOTH}))
def test_every_part_of_a_question_has_its_turn_in_an_operators_fixed_list_and_no_case_asks_all(
    operator: str, of: int
) -> None:
    bench, problems = Bench(CpuBackend()), PROBLEM_SETS[operator]
    trials = [Trial(bench, problems.problem(item.case), thorough=False) for item in fixed(problems)]
    for part in range(of):
        asked = sum(trial.asks(part, of) for trial in trials)
        assert len(trials) / of / 2 < asked < len(trials) / of * 2
    assert all(sum(trial.asks(part, of) for part in range(of)) == 1 for trial in trials)


def test_a_check_asked_alone_asks_all_its_parts() -> None:
    trial = Trial(Bench(CpuBackend()), _problem("linear"))
    assert trial.poisoned() == (POISONED, LARGE)
    assert all(trial.asks(part, 3) for part in range(3))
