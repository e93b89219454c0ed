"""A step whose derived metadata (cache and rotary rows, attention and adapter plans) is found once for all layers."""

from __future__ import annotations

import torch

from polyaccel.backend.composite.step import TensorStep
from polyaccel.backend.cpu.adapter_store import SlotMajorAdapterStore
from polyaccel.backend.cpu.attention_plan import AttentionPlan
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache
from polyaccel.backend.cpu.lora_plan import AdapterPlan
from polyaccel.backend.device import Device
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import DeviceState, RowSet, Step, StepInput

PlanKey = tuple[int, int, int, int | None]


class CpuStep(TensorStep):
    """What operators of different layers share is kept here under the arguments it depends on.

    Attributes:
        adapted: some row of some row set has an adapter.
    """

    def __init__(self, inputs: StepInput, state: DeviceState, device: Device) -> None:
        super().__init__(inputs, state, device)
        self.adapted = inputs.has_adapters
        self._rope: dict[int, tuple[RopeTable, torch.Tensor, torch.Tensor]] = {}
        self._kv_rows: tuple[KVSpec, torch.Tensor] | None = None
        self._attention: dict[PlanKey, AttentionPlan] = {}
        self._adapter_plans: dict[RowSet, AdapterPlan | None] = {}

    @classmethod
    def of(cls, operator: str, step: Step) -> CpuStep:
        """``step`` as this backend's own.

        Raises:
            OperatorError: it was begun by another backend.
        """
        if not isinstance(step, cls):
            raise OperatorError(operator, f"takes steps of the cpu backend, not {type(step).__name__}")
        return step

    def rope_rows(self, rope: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
        """``(cos, sin): [T, 1, rotary_dim]`` float32 such that x turns into ``x * cos + partner(x) * sin``.

        ``partner`` swaps the two members of each pair; the sign of its share is in ``sin``.
        """
        found = self._rope.get(id(rope))
        if found is None:
            positions = self.tensor("positions")
            cos, sin = rope.cos.index_select(0, positions), rope.sin.index_select(0, positions)
            if rope.style == "half":
                cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            else:
                cos = torch.stack((cos, cos), dim=-1).flatten(1)
                sin = torch.stack((-sin, sin), dim=-1).flatten(1)
            # The table is kept so that its id stays its own.
            found = self._rope[id(rope)] = (rope, cos.unsqueeze(1), sin.unsqueeze(1))
        return found[1], found[2]

    def kv_rows(self, kv: HeadMajorKVCache) -> torch.Tensor:
        """``[T, 2 kv_heads]`` int64: where each token's keys and values go."""
        if self._kv_rows is None or self._kv_rows[0] is not kv.spec:
            self._kv_rows = (kv.spec, kv.rows_of(self.tensor("kv_slots")))
        return self._kv_rows[1]

    def attention(self, kv: KVSpec, heads: int, window: int | None) -> AttentionPlan:
        """The plan of attention with these dimensions."""
        key = (kv.kv_heads, kv.block_size, heads, window)
        found = self._attention.get(key)
        if found is None:
            found = self._attention[key] = AttentionPlan.of(self.input, kv, heads, window)
        return found

    def adapter_plan(self, row_set: RowSet) -> AdapterPlan | None:
        """How the row set's adapters are applied; None where no row has one."""
        if row_set not in self._adapter_plans:
            triples = self.input.rows(row_set)
            plan: AdapterPlan | None = None
            if len(triples):
                store = self.state.adapters
                if not isinstance(store, SlotMajorAdapterStore):
                    raise OperatorError("sgmv", f"the step names adapters but its store is {type(store).__name__}")
                plan = store.plan(triples)
            self._adapter_plans[row_set] = plan
        return self._adapter_plans[row_set]


def own_cache(operator: str, kv: KVCache) -> HeadMajorKVCache:
    """``kv`` as this backend's own.

    Raises:
        OperatorError: another backend allocated it.
    """
    if not isinstance(kv, HeadMajorKVCache):
        raise OperatorError(operator, f"takes caches of the cpu backend, not {type(kv).__name__}")
    return kv
