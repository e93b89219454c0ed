"""One rank on a simulated card: calls stations as a model does, and says what reached CANN and what came out.

``python -m tests.npu.constraints.rank RANK``: orders are JSON lines on the standard input, answers lines that begin
with :data:`ANSWER` on the standard output.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from polyaccel.backend import (
    Communicator,
    DeviceState,
    Plan,
    Planned,
    PolyaccelError,
    RankAddress,
    SingleRank,
    SiteRequest,
    Slice,
    SlotRange,
    TokenClass,
    Weight,
    WeightSpec,
)
from polyaccel.backend.plan import KEYS
from polyaccel.backend.support import Static
from polyaccel_npu.backend import NpuBackend
from tests.npu.constraints.case import EPS, ROW_PARALLEL, SITE, StationCase, laid_out
from tests.npu.constraints.witness import Facts, found_in

ANSWER = "ANSWER "
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
ROUNDS = 2
"""Units of rounding by which the size of what was added up may be off: product, sum over ranks and norm round."""


class Rank:
    """What a process holds between orders: a backend instance and its group."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.backend: NpuBackend | None = None
        self.comm: Communicator = SingleRank()
        self.facts = Facts("", {})

    def open(self, world: int, address: str) -> dict[str, Any]:
        import polyaccel_cannsim

        self.backend = NpuBackend()
        self.backend.launcher.rank = self.rank
        self.comm = self._connect(world, address)
        self.world, self.address = world, address
        self.facts = Facts(polyaccel_cannsim.current().settings.soc.chip.value, {})
        return {"device": self.backend.devices()[self.rank if world > 1 else 0].name}

    def close(self) -> dict[str, Any]:
        self.comm.close()
        assert self.backend is not None
        self.backend.close()
        self.backend, self.comm = None, SingleRank()
        return {}

    def call(self, **fields: Any) -> dict[str, Any]:
        """One case: planned, called, compared; what the witness finds in the calls of the station itself."""
        import polyaccel_cannsim

        case, number = StationCase.of(fields["case"]), fields["number"]
        backend = self.backend
        assert backend is not None
        ledger = polyaccel_cannsim.current().ledger
        second = self._connect(self.world, f"{self.address}.{number}") if case.second_group else None
        try:
            device = backend.devices()[self.rank if self.world > 1 else 0]
            with device.scope():
                planned, run = self._placed(case)
                before = dict(backend.ledger.counts())
                ledger.reset()
                outputs = run()
                device.synchronize()
                calls = list(ledger)
            host = [output.cpu() for output in outputs]
        finally:
            if second is not None:
                second.close()
        self.facts.groups, self.facts.decode = groups(), case.token_class == "decode"
        counts = backend.ledger.counts()
        return {
            "excess": self._excess(case, host),
            "dtypes": sorted({str(output.dtype).removeprefix("torch.") for output in host}),
            "broken": sorted({f"{row}: {text}" for call in calls for row, text in found_in(call, self.facts)}),
            "reached": sorted(
                {call.name for call in calls if call.name in self.facts.functions or call.name.startswith("Hccl")}
            ),
            "aclnn": sorted({call.name for call in calls}),
            "lines": [call.line() for call in calls if call.refused],
            "launches": {k: n - before.get(k, 0) for k, n in counts.items() if n > before.get(k, 0)},
            "kind": planned.kind,
            "implementation": str(planned),
            "reasons": list(planned.reasons) + [r for part in planned.parts for r in part.reasons],
            "composites": [part.operator for part in planned.composites()],
        }

    def collect(self) -> dict[str, Any]:
        """Collectives whose results name their contributors."""
        device = self._device().torch_device
        own = torch.arange(6.0).view(2, 3) + 10.0 * self.rank
        strided = torch.stack((own, own), -1).to(device)[..., 0]
        wanted = torch.stack([torch.arange(6.0).view(2, 3) + 10.0 * rank for rank in range(self.world)])
        scattered = torch.arange(4.0 * self.world).view(-1, 2).to(device) * (self.rank + 1)
        total = self.world * (self.world + 1) / 2
        share = torch.arange(4.0 * self.world).view(self.world, 2, 2)[self.rank] * total
        wrong = []
        for name, found, expected in (
            ("all_gather", self.comm.all_gather(own.to(device), 0), wanted.flatten(0, 1)),
            ("all_gather along 1", self.comm.all_gather(own.to(device), 1), torch.cat(list(wanted), 1)),
            ("all_reduce", self.comm.all_reduce(own.to(device)), wanted.sum(0)),
            ("strided all_reduce", self.comm.all_reduce(strided), wanted.sum(0)),
            ("reduce_scatter", self.comm.reduce_scatter(scattered), share),
            ("broadcast", self.comm.broadcast(own.to(device), self.world - 1), wanted[-1]),
        ):
            if not torch.equal(found.cpu(), expected):
                wrong.append(f"{name}: {found.cpu().tolist()}, expected {expected.tolist()}")
        return {"wrong": wrong}

    # -- parts -------------------------------------------------------------------------------------------------------

    def _connect(self, world: int, address: str) -> Communicator:
        assert self.backend is not None
        return self.backend.connect(
            RankAddress(rank=self.rank, world_size=world, init_method=f"file://{address}", timeout=60.0)
        )

    def _device(self) -> Any:
        assert self.backend is not None
        return self.backend.devices()[self.rank if self.world > 1 else 0]

    def _weight(self, case: StationCase) -> Weight:
        assert self.backend is not None
        bias = case.bias_of(self.rank)
        spec = WeightSpec(
            site=SITE,
            slices=tuple(Slice(name=str(i), n=n) for i, n in enumerate(case.widths)),
            k=case.k,
            dtype=case.torch_dtype,
            bias=bias is not None,
            rank_rows=sum(case.adapters),
        )
        weight = self.backend.allocate_weight(spec, self._device())
        matrix = case.matrix(self.rank)
        for i, (begin, end) in enumerate(zip(spec.starts[:-1], spec.starts[1:], strict=True)):
            weight.write(i, matrix[begin:end])
            if bias is not None:
                weight.write_bias(i, bias[begin:end])
        weight.seal()
        return weight

    def _plan(self, case: StationCase) -> Plan:
        assert self.backend is not None
        static: dict[str, Static] = {
            "dtype": case.dtype,
            "hidden": case.n,
            "world_size": self.world,
            "k": case.k,
            "slices": case.widths,
            "bias": case.bias,
        }
        if case.station == "row_parallel_linear" and not case.reduce:
            static["reduce"] = False
        plan = Plan(self.backend, [SiteRequest(site=SITE, operator=case.station, static=static)], policy="allow")
        if case.adapters:
            plan.extend(max(case.adapters))
        return plan

    def _state(self, case: StationCase, weight: Weight) -> DeviceState:
        if not case.adapters:
            return DeviceState()
        assert self.backend is not None
        store = self.backend.allocate_adapters(
            {SITE: weight}, rank_rows=sum(case.adapters), slots=len(case.adapters), device=self._device()
        )
        first = 0
        for slot, size in enumerate(case.adapters):
            store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=size), case.packed(self.rank, slot))
            first += size
        return DeviceState(adapters=store)

    def _placed(self, case: StationCase) -> tuple[Planned, Callable[[], list[torch.Tensor]]]:
        """What the plan chose for a case, and the call of it on operands that are on the device."""
        plan, weight, device = self._plan(case), self._weight(case), self._device()
        assert self.backend is not None
        inputs = case.step_input()
        step = self.backend.begin_step(inputs, self._state(case, weight), device)
        column = KEYS.index((TokenClass(case.token_class), inputs.has_adapters))
        station = plan[SITE]
        arguments: list[Any] = [laid_out(case.x(self.rank), case.layout, device.torch_device), weight, step]
        if case.station in ROW_PARALLEL:
            arguments.append(self.comm)
        if case.station == "row_parallel_linear":
            arguments.append(case.reduce)
        if case.station == "row_parallel_add_norm":
            arguments += [device.upload(case.residual()), device.upload(case.norm_weight()), EPS]
        device.synchronize()

        def run() -> list[torch.Tensor]:
            result = station.calls[column](*arguments)
            return list(result) if isinstance(result, tuple) else [result]

        return station.planned[column], run

    def _excess(self, case: StationCase, outputs: list[torch.Tensor]) -> float:
        """By how many times the largest error of an element exceeds what rounding explains; at most 1 is right."""
        worst = 0.0
        values, sizes = case.expected(self.world, self.rank)
        for output, value, size in zip(outputs, values, sizes, strict=True):
            assert output.shape == value.shape, f"{tuple(output.shape)}, expected {value.shape}"
            if value.size:
                unit = ROUNDING[case.dtype]
                terms = case.k + sum(case.adapters) + self.world
                bound = (ROUNDS * unit + terms * ROUNDING["float32"]) * size + 1e-6
                worst = max(worst, float((np.abs(output.double().numpy() - value) / bound).max()))
        return worst if np.isfinite(worst) else 1e30


def groups() -> dict[str, int]:
    """Ranks by name of the communicators of this process."""
    import polyaccel_cannsim
    from polyaccel_cannsim.hccl.domains import domains_of

    return {domain.name: domain.size for domain in domains_of(polyaccel_cannsim.current())}


def main(rank: str) -> None:
    held = Rank(int(rank))
    orders: Mapping[str, Callable[..., dict[str, Any]]] = {
        "open": held.open,
        "close": held.close,
        "call": held.call,
        "collect": held.collect,
    }
    print(ANSWER + "{}", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = orders[order.pop("do")](**order)
        except (PolyaccelError, RuntimeError, AssertionError) as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(ANSWER + json.dumps(answer), flush=True)
    # Nothing is queued: torch_npu's and HCCL's farewells, seconds each, would have nothing to do.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
