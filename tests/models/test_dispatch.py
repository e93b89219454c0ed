"""During a step no tensor operation runs outside an operator call, and nothing is read back, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polyaccel.backend.communicator import SingleRank
from polyaccel.backend.ledger import Ledger
from polyaccel.backend.stations import STATIONS
from polyaccel.backend.vocabulary import OPERATORS
from polyaccel.models.decoder import DecoderModel
from tests.models.families import FAMILIES, build, open_saved
from tests.models.peft_adapters import make, write_all
from tests.support.driver import Mix, StepDriver
from tests.support.operators_only import OperatorsOnly, Violation, no_host_methods
from tests.support.thread_comm import ThreadCommunicator, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTED: dict[int, Mix] = {0: ((0, 1.0),), 2: ((1, 0.5), (0, 2.0))}


def _forward(driver: StepDriver, ledger: Ledger, **options: object) -> OperatorsOnly:
    """One step of a mixed batch and one of pure decode under the mode."""
    mode = OperatorsOnly(ledger)
    for chunks in ({0: [1, 2, 3], 1: [4], 2: [5, 6]}, {0: [7], 1: [8], 2: [1]}):
        inputs = driver.inputs(chunks, last_only=True, mixes=options.get("mixes", {}))  # type: ignore[arg-type]
        steps = {
            device.index: driver.backend.begin_step(inputs, driver.states[device.index], device)
            for device in driver.model.devices
        }
        with mode:
            driver.model.forward(steps)
    return mode


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_operators_and_views_and_reads_nothing_back(tmp_path: Path, family: str) -> None:
    reference, checkpoint = open_saved(family, tmp_path / "model")
    adapters = make(reference, family, tmp_path)
    model = build(checkpoint, rank_rows=sum(adapter.rank for adapter in adapters))
    driver = StepDriver(model, SingleRank(), slots=2)
    write_all(driver, adapters)
    with no_host_methods():
        plain = _forward(driver, model.options.backend.ledger)
        adapted = _forward(driver, model.options.backend.ledger, mixes=ADAPTED)
    assert 0 < plain.inside < adapted.inside, "the mode saw no operator"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_holds_on_several_ranks(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)

    def rank(comm: ThreadCommunicator) -> int:
        model = build(checkpoint, rank=comm.rank, world_size=2)
        return _forward(StepDriver(model, comm), model.options.backend.ledger).inside

    assert min(run_ranks(2, rank)) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_the_plan_is_called_and_every_operator_was_planned(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    model = build(checkpoint)
    driver = StepDriver(model, SingleRank())
    names = [request.site for request in model.requests()]
    assert len(set(names)) == len(names)
    called: list[str] = []
    for site in driver.plan.sites.values():
        calls = [_recording(call, site.name, called) for call in site._calls]
        site.assign(site.planned, calls)
    driver.step({0: [1, 2]})
    assert called == names


def _recording(call: Callable[..., object], name: str, called: list[str]) -> Callable[..., object]:
    def recorded(*args: object) -> object:
        called.append(name)
        return call(*args)

    return recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_has_the_arguments_of_the_contract_in_their_order(tmp_path: Path, family: str) -> None:
    _, checkpoint = open_saved(family, tmp_path)
    model = build(checkpoint)
    driver = StepDriver(model, SingleRank())
    for site in driver.plan.sites.values():
        spec = STATIONS.get(site.operator) or OPERATORS[site.operator]
        required = [argument.name for argument in spec.arguments if not argument.optional]

        def check(call: Callable[..., object], operator: str, least: int, most: int) -> Callable[..., object]:
            def checked(*args: object) -> object:
                assert least <= len(args) <= most, f"{operator} was called with {len(args)} arguments"
                return call(*args)

            return checked

        calls = [check(call, site.operator, len(required), len(spec.arguments)) for call in site._calls]
        site.assign(site.planned, calls)
    driver.step({0: [1, 2]})


def test_arithmetic_outside_of_an_operator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    model = build(checkpoint)
    assert isinstance(model, DecoderModel)
    forward = model._head.forward
    monkeypatch.setattr(model._head, "forward", lambda x, step: forward(x * 1.0, step))
    with pytest.raises(Violation, match="aten::mul computes outside"):
        _forward(StepDriver(model, SingleRank()), model.options.backend.ledger)


@pytest.mark.parametrize("read", [lambda x: x.max().item(), lambda x: bool(x.isnan().any()), lambda x: x.tolist()])
def test_a_readback_inside_an_operator_is_caught(tmp_path: Path, read: Callable[[torch.Tensor], object]) -> None:
    _, checkpoint = open_saved("llama", tmp_path)
    model = build(checkpoint)
    driver = StepDriver(model, SingleRank())
    site = driver.plan["select_rows"]
    ledger = model.options.backend.ledger

    def reading(x: torch.Tensor, step: object) -> torch.Tensor:
        ledger.enter("reading")
        read(x)
        ledger.leave("reading")
        return x

    site.assign(site.planned, [reading] * 4)
    with pytest.raises(Violation, match="reads from the device"), no_host_methods():
        _forward(driver, ledger)
