"""Simulated backends with one planted bug each: those of the catalogue, and around ``linear`` some of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyaccel.backend import Backend
from polyaccel_conformance.mutants import devices
from polyaccel_conformance.mutants.catalogue import MUTANTS
from polyaccel_conformance.mutants.devices import wrapped
from polyaccel_conformance.simulated import SimulatedBackend

FILE = __file__


def healthy() -> SimulatedBackend:
    return SimulatedBackend()


def _planted(name: str) -> Backend:
    return MUTANTS[name].apply(SimulatedBackend())


# -- devices -----------------------------------------------------------------------------------------------------------


def no_guard() -> Backend:
    return _planted("launch.no_guard")


def not_restored() -> Backend:
    return _planted("launch.not_restored")


def scratch_on_the_first_device() -> Backend:
    return wrapped("linear", devices.first_device_scratch)(SimulatedBackend())


def takes_any_device() -> Backend:
    """Operands of other devices are fetched silently."""

    def wrap(fn: Any, backend: SimulatedBackend) -> Callable[..., object]:
        def linear(x: torch.Tensor, weight: Any) -> object:
            return fn(x.to(weight.tensor.device), weight)

        return linear

    return wrapped("linear", wrap)(SimulatedBackend())


def leaks() -> Backend:
    return wrapped("linear", devices.leaks)(SimulatedBackend())


# -- streams, errors ---------------------------------------------------------------------------------------------------


def default_stream() -> Backend:
    return _planted("launch.default_stream")


def step_on_another_stream() -> Backend:
    return _planted("step.another_stream")


def swallows() -> Backend:
    return _planted("errors.swallowed_by_device")


def names_no_operands() -> Backend:
    return _planted("errors.names_no_operands")


def goes_on_after_a_failure() -> Backend:
    return _planted("errors.goes_on")


# -- graphs, adapters --------------------------------------------------------------------------------------------------


def metadata_baked_in() -> Backend:
    return _planted("graph.metadata_of_capture")


def grid_sized_at_capture() -> Backend:
    return _planted("graph.grid_of_capture")


def ledger_frozen() -> Backend:
    return _planted("graph.ledger_frozen")


def captures_after_each_load() -> Backend:
    return _planted("graph.captures_after_load")


def base_rows_work_for_adapters() -> Backend:
    return _planted("graph.base_rows_work")


def undeclared_launch() -> Backend:
    return _planted("graph.undeclared_launch")


def one_copy_a_module() -> Backend:
    return _planted("adapters.module_by_module")
