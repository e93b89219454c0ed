"""The bench: one backend on one device of this process, on which problems are run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polyaccel.backend import (
    Backend,
    Communicator,
    Device,
    DeviceState,
    Entry,
    Plan,
    Planned,
    SingleRank,
    SiteRequest,
    Step,
    StepInput,
    Weight,
)
from polyaccel.backend.plan import KEYS, Offered, Policy
from polyaccel_conformance.problem import Prepared

if TYPE_CHECKING:
    from polyaccel_conformance.subject import Subject

SITE = "conformance"
FOLDER = "folder"
"""In a bench's memo: a folder that the workers of a run share, and keep what all need in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What the plan chose for a problem: how it is called, and what it is."""

    call: Callable[..., object]
    planned: Planned


class Bench:
    """A backend, one of its devices and this rank's communicator.

    ``strict``: composites entered inside a native implementation raise. ``subject``: how another process opens the same
    backend, where that is known. ``memo``: what checks measured once on this device.
    """

    def __init__(
        self,
        backend: Backend,
        device: Device | None = None,
        comm: Communicator | None = None,
        *,
        policy: Policy = "allow",
        subject: Subject | None = None,
    ) -> None:
        self.subject = subject
        self.memo: dict[str, object] = {}
        self.backend = backend
        self.device = device if device is not None else backend.devices()[0]
        self.comm: Communicator = comm if comm is not None else SingleRank()
        self._policy: Policy = policy

    @property
    def torch_device(self) -> torch.device:
        return self.device.torch_device

    @functools.cached_property
    def table(self) -> Mapping[str, tuple[Entry, ...]]:
        """The backend's own operators, asked for once."""
        return self.backend.table()

    @functools.cached_property
    def composites(self) -> Mapping[str, Callable[..., object]]:
        """Its plain-torch forms, asked for once."""
        return self.backend.composites()

    def dequantize(self, weight: Weight) -> torch.Tensor:
        """By the backend's own ``dequantize``: ``[n, k]`` or ``[experts, n, k]`` of the weight's dtype."""
        values = self.table["dequantize"][0].fn(weight)
        assert isinstance(values, torch.Tensor)
        return values

    def resolve(self, operator: str, prepared: Prepared) -> Resolved:
        """Ask the plan, exactly as a model does, what runs this operator for this problem."""
        if prepared.call is not None:
            own = Planned(operator=operator, kind="native", implementation=f"{self.backend.name}.{operator}")
            return Resolved(call=prepared.call, planned=own)
        largest = prepared.static.get("largest_rank", 0)
        request = SiteRequest(site=SITE, operator=operator, static=prepared.static, ranges=prepared.ranges)
        # As every case has a plan of its own, what these choose from is not asked for again.
        offered = Offered(table=self.table, composites=self.composites)
        plan = Plan(self.backend, [request], policy=self._policy, offered=offered)
        if isinstance(largest, int) and largest > 1:
            plan.extend(largest)
        column = KEYS.index((prepared.token_class, prepared.adapters))
        site = plan[SITE]
        return Resolved(call=site.calls[column], planned=site.planned[column])

    def begin_step(self, inputs: StepInput, state: DeviceState | None = None) -> Step:
        return self.backend.begin_step(inputs, state if state is not None else DeviceState(), self.device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.device.upload(tensor)

    def synchronize(self) -> None:
        """Wait for the device; a pending asynchronous failure is raised here."""
        self.device.synchronize()


def call_by_name(call: Callable[..., object], order: tuple[str, ...], arguments: Mapping[str, object]) -> object:
    """Arguments in the contract's order, by position, as the models pass them; absent optional ones as None."""
    return call(*(arguments.get(name) for name in order))
