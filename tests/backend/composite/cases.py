"""Steps, random operands, error bounds and a watch on readbacks, shared by the tests of the composites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.composite.adapter_store import TensorAdapterStore
from polyaccel.backend.composite.step import TensorStep
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.device import TorchDevice
from polyaccel.backend.step import DEVICE_ARRAYS, AdapterRows, DeviceState, RowSet, StepInput, TokenClass
from polyaccel.backend.weight import Slice, WeightSpec

CPU = TorchDevice("cpu")
FLOAT_DTYPES = (torch.float32, torch.bfloat16)

Triple = tuple[int, int, float]
"""Row, slot, mix weight."""


class Draw:
    """Random operands from one visible seed."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(self.generator.standard_normal(shape).astype(np.float32)).to(dtype)


def f64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def assert_within(got: torch.Tensor, expected: np.ndarray, magnitude: np.ndarray | float, *, depth: int = 1) -> None:
    """One rounding to got's dtype, and float32 sums of ``depth`` terms with absolute values that sum to magnitude."""
    assert tuple(got.shape) == expected.shape, f"shape {tuple(got.shape)}, expected {expected.shape}"
    rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    bound = rounding * np.abs(expected) + (depth + 8) * 2.0**-23 * np.asarray(magnitude) + 1e-30
    error = np.abs(f64(got) - expected)
    worst = int(np.argmax(error - bound)) if error.size else 0
    assert np.all(error <= bound), (
        f"element {worst}: {f64(got).flat[worst]} for {expected.flat[worst]}, error {error.flat[worst]:.3g} "
        f"above {np.broadcast_to(bound, error.shape).flat[worst]:.3g}"
    )


# -- steps -----------------------------------------------------------------------------------------------------------


def rows_of(triples: Sequence[Triple]) -> AdapterRows:
    ordered = sorted(triples, key=lambda t: (t[1], t[0]))
    return AdapterRows.build(
        np.array([t[0] for t in ordered], dtype=np.int32),
        np.array([t[1] for t in ordered], dtype=np.int32),
        np.array([t[2] for t in ordered], dtype=np.float32),
    )


def step_input(
    lengths: Sequence[tuple[int, int]] = (),
    *,
    tokens: int | None = None,
    token_ids: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    block_tables: np.ndarray | None = None,
    kv_slots: Sequence[int] | None = None,
    logits_rows: Sequence[int] = (),
    sample_slots: Sequence[int] = (),
    uniforms: Sequence[float] = (),
    adapters: Mapping[RowSet, Sequence[Triple]] | None = None,
) -> StepInput:
    """``lengths``: (query tokens, context length) of each sequence; ``tokens`` where there are more than those."""
    queries = [q for q, _ in lengths]
    total = sum(queries) if tokens is None else tokens
    return StepInput(
        token_class=TokenClass.DECODE if all(q == 1 for q in queries) else TokenClass.MIXED,
        token_ids=np.array(token_ids if token_ids is not None else [0] * total, dtype=np.int64),
        positions=np.array(positions if positions is not None else [0] * total, dtype=np.int64),
        query_starts=np.cumsum([0, *queries]).astype(np.int32),
        context_lengths=np.array([c for _, c in lengths], dtype=np.int32),
        block_tables=np.zeros((len(lengths), 1), dtype=np.int32) if block_tables is None else block_tables,
        kv_slots=np.array(kv_slots if kv_slots is not None else [-1] * total, dtype=np.int64),
        request_slots=np.arange(len(lengths), dtype=np.int32),
        logits_rows=np.array(logits_rows, dtype=np.int32),
        sample_slots=np.array(sample_slots, dtype=np.int32),
        uniforms=np.array(uniforms, dtype=np.float32),
        adapters={name: rows_of(triples) for name, triples in (adapters or {}).items()},
    )


def step_of(inputs: StepInput, **state: Any) -> TensorStep:
    """A step whose arrays are all on the device already, so that an upload inside an operator can be noticed."""
    step = TensorStep(inputs, DeviceState(**state), CPU)
    for name in DEVICE_ARRAYS:
        if name != "token_ids" or np.all(inputs.token_ids >= 0):
            step.tensor(name)
    for row_set in inputs.adapters:
        step.adapter_tensors(row_set)
    return step


# -- weights and adapters --------------------------------------------------------------------------------------------


def spec_of(site: str, widths: Sequence[int], k: int, dtype: torch.dtype = torch.float32, **other: Any) -> WeightSpec:
    slices = tuple(Slice(name=f"part{i}", n=n) for i, n in enumerate(widths))
    return WeightSpec(site=site, slices=slices, k=k, dtype=dtype, **other)


def filled_weight(spec: WeightSpec, draw: Draw) -> TensorWeight:
    """A sealed weight of random values, bias included."""
    weight = TensorWeight(spec, CPU)
    for expert in (None,) if spec.experts is None else range(spec.experts):
        for i, part in enumerate(spec.slices):
            weight.write(i, draw.tensor(part.n, spec.k), expert=expert)
            if spec.bias:
                weight.write_bias(i, draw.tensor(part.n), expert=expert)
    weight.seal()
    return weight


@dataclass(frozen=True)
class Module:
    """One adapted matrix: where it is and its rank."""

    site: str
    slice: int
    rank: int
    expert: int | None = None


def pack(weights: Mapping[str, TensorWeight], modules: Sequence[Module], draw: Draw) -> PackedAdapter:
    """Random matrices for the modules, in one buffer of the first weight's dtype."""
    entries, parts, offset = [], [], 0
    for module in modules:
        spec = weights[module.site].spec
        n = spec.slices[module.slice].n
        width, height = (n, spec.k) if spec.lookup else (spec.k, n)
        a_size, b_size = module.rank * width, height * module.rank
        entries.append(
            PackedEntry(
                site=module.site,
                slice=module.slice,
                expert=module.expert,
                kind="embedding" if spec.lookup else "linear",
                rank=module.rank,
                a_offset=offset,
                a_shape=(module.rank, width),
                b_offset=offset + a_size,
                b_shape=(height, module.rank),
            )
        )
        parts.append(draw.tensor(a_size + b_size))
        offset += a_size + b_size
    dtype = next(iter(weights.values())).spec.dtype
    buffer = torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)
    return PackedAdapter(buffer=buffer, entries=tuple(entries), max_rank=max((m.rank for m in modules), default=0))


@dataclass
class Adapters:
    """A store with what was written to it."""

    store: TensorAdapterStore
    packed: dict[int, PackedAdapter]

    def delta(
        self, site: str, slice_index: int, slot: int, x: np.ndarray, expert: int | None = None
    ) -> np.ndarray | None:
        """``B A x`` for one row, from the packed matrices; None where the slot does not touch the module."""
        for entry in self.packed[slot].entries if slot in self.packed else ():
            if (entry.site, entry.slice, entry.expert) == (site, slice_index, expert):
                return f64(self.packed[slot].b(entry)) @ (f64(self.packed[slot].a(entry)) @ x)
        return None


def filled_store(
    weights: Mapping[str, TensorWeight], modules: Mapping[int, Sequence[Module]], draw: Draw, *, slots: int = 6
) -> Adapters:
    """Adapters by slot; between their rank rows lie rows of no slot, which hold NaN."""
    rows = {slot: max((m.rank for m in own), default=1) + 1 for slot, own in modules.items()}
    store = TensorAdapterStore(weights, rank_rows=sum(rows.values()) + len(rows), slots=slots, device=CPU)
    for buffers in store.sites.values():
        for buffer in (buffers.a, *buffers.b):
            buffer.fill_(torch.nan)
    first, packed = 1, {}
    for slot, own in modules.items():
        packed[slot] = pack(weights, own, draw)
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=rows[slot]), packed[slot])
        first += rows[slot] + 1
    return Adapters(store=store, packed=packed)


# -- readbacks -------------------------------------------------------------------------------------------------------

FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "nonzero_static",
    "argwhere",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "lift_fresh",
)
"""Aten operators that wait for the device or whose shape depends on its data; the last one is an upload."""


class Readback(AssertionError):
    """An operator waited for the device, or uploaded something."""


class NoReadback(TorchDispatchMode):
    """Fails on aten operators that bring values to the host, or (unless ``uploads``) from it."""

    def __init__(self, *, uploads: bool = False) -> None:
        super().__init__()
        self.uploads = uploads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in indices)
        counted = name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor")
        if (name in FORBIDDEN or masks or counted) and not (name == "lift_fresh" and self.uploads):
            raise Readback(f"aten::{name} inside an operator")
        return func(*args, **(kwargs or {}))


def without_readback(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with NoReadback():
        return fn(*args, **kwargs)
