"""The backend: who it is, which devices it has, what it implements and how well, how ranks talk, whether it has graphs.

Only ``devices``, ``probe`` and ``operators`` (with at least ``linear`` and ``dequantize``) must be written; everything
else has a form in plain torch that runs on any torch device, so that a new vendor's first model runs with a few dozen
lines.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyaccel.backend.adapter_store import AdapterStore
from polyaccel.backend.communicator import Communicator, SingleRank
from polyaccel.backend.device import Device
from polyaccel.backend.errors import ConfigurationError, UnsupportedError
from polyaccel.backend.failure import UNTYPED, argument_names, typed
from polyaccel.backend.graph import Graph, GraphKey, StepFunction
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.ledger import COMPOSITE_PREFIX, NESTED_PREFIX, Ledger
from polyaccel.backend.placed import check_devices
from polyaccel.backend.sampling import SamplingSpec, SamplingState
from polyaccel.backend.step import DeviceState, Step, StepInput
from polyaccel.backend.support import Entry, Reason
from polyaccel.backend.weight import Weight, WeightSpec

Implementations = Entry | Callable[..., object] | Sequence[Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a backend can be used on this machine.

    ``hardware`` says that its hardware is present even though it may not be usable: then ``auto`` refuses to pass it
    over.
    """

    usable: bool
    reason: str = ""
    hardware: bool = False
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAddress:
    """Where ranks meet: ``init_method`` of torch.distributed (``file://`` or ``tcp://``) and how long to wait, in
    seconds."""

    rank: int
    world_size: int
    init_method: str
    timeout: float = 120.0


class Backend(ABC):
    """One backend instance serves one worker; it holds no state shared with others.

    Constructing one is cheap and touches no device.

    Attributes:
        name: as chosen by ``backend=``.
        priority: highest usable wins for ``backend="auto"``; None is never chosen so.
        isolate: run in a worker process even with one rank, so that a device fault spares the caller (executor="auto").
        fork_safe: may be opened in a process that was forked from one which has imported torch and touched no device.
            Most vendors' runtimes may not, so the default is False: such a backend gets a new interpreter, which costs
            some seconds a process.
        simulated: its devices are no hardware; whatever is said of them says so too.
        batch_invariant: it has promised so, see :meth:`require_batch_invariance`.
        needs_equal_shards: head groups are zero-padded so that all ranks have equal shapes.
        ledger, launcher: what ran, and the guarded way to run it.
    """

    name: str
    priority: int | None = 0
    needs_equal_shards: bool = False
    isolate: bool = True
    fork_safe: bool = False
    simulated: bool = False
    batch_invariant: bool = False

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.launcher = Launcher(self.ledger)

    # -- mandatory ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def probe(self) -> Availability:
        """Whether this machine can run it, without raising."""

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """The devices, in index order."""

    @abstractmethod
    def operators(self) -> Mapping[str, Implementations]:
        """Native implementations by operator or station name, best first."""

    def require_batch_invariance(self) -> None:
        """Promise that, from here on, a row's result depends on nothing but that row and its own sequence: not on other
        rows, on how many there are, nor on how a prompt is cut into steps. Comes before anything else is asked of it.

        Raises:
            ConfigurationError: it cannot promise that, which is the default.
        """
        raise ConfigurationError(
            f"backend {self.name!r} cannot promise that results do not depend on the batch: leave out batch_invariant"
        )

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        """Room for a weight, in the backend's own layout; with ``tied``, the same values under another site (its
        storage is shared where the layout allows, and nothing is written to the new one).

        Raises:
            OutOfMemory: with the bytes asked for.
        """
        from polyaccel.backend.composite.weight import TensorWeight

        return TensorWeight(spec, device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        """Room for adapters at each site: ``rank_rows`` rank rows per slice, shared by at most ``slots`` adapters."""
        from polyaccel.backend.composite.adapter_store import TensorAdapterStore

        return TensorAdapterStore(weights, rank_rows=rank_rows, slots=slots, device=device)

    def kv_block_size(self) -> int:
        """Tokens in a KV block."""
        return 16

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        from polyaccel.backend.composite.kv_cache import TensorKVCache

        return TensorKVCache(spec, device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        from polyaccel.backend.composite.sampling_state import TensorSamplingState

        return TensorSamplingState(spec, device)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        """Place the step's metadata on the device: the only place where that happens. Asynchronous, ordered."""
        from polyaccel.backend.composite.step import TensorStep

        return TensorStep(inputs, state, device)

    def graph_refusals(self) -> list[Reason]:
        """Why graphs cannot be captured; empty if they can."""
        return [f"backend {self.name!r} does not capture graphs"]

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        """Capture ``fn`` for all steps of ``key``; ``step`` is an example that the capture may run on.

        Raises:
            UnsupportedError: graphs are refused; run eagerly.
        """
        raise UnsupportedError("; ".join(self.graph_refusals()))

    # -- ranks -------------------------------------------------------------------------------------------------------

    def connect(self, address: RankAddress) -> Communicator:
        """Join the group of ranks; blocks until all have joined or the timeout passes.

        Raises:
            CommunicationError: a rank did not arrive in time.
        """
        if address.world_size == 1:
            return SingleRank()
        from polyaccel.backend.composite.communicator import TorchCommunicator

        return TorchCommunicator(address, transport="gloo")

    # -- resolved by the plan ----------------------------------------------------------------------------------------

    def table(self) -> dict[str, tuple[Entry, ...]]:
        """:meth:`operators` in one form."""
        return {name: _entries(self.name, name, value) for name, value in self.operators().items()}

    def composites(self) -> Mapping[str, Callable[..., object]]:
        """The plain-torch form of every operator that has one, recorded in the ledger as ``composite.<operator>``.

        Calling one from inside a native implementation is a fallback that the plan does not show: an UnsupportedError
        under policy ``strict``, counted as ``nested_composite.<operator>`` otherwise.
        """
        from polyaccel.backend.composite.operators import CompositeOperators

        return {name: _counted(name, fn, self.launcher) for name, fn in CompositeOperators(self).table().items()}

    def dequantize(self, weight: Weight) -> torch.Tensor:
        """Call the mandatory ``dequantize``: ``[n, k]`` or ``[experts, n, k]`` of the weight's dtype."""
        result = self.table()["dequantize"][0].fn(weight)
        assert isinstance(result, torch.Tensor)
        return result

    def close(self) -> None:
        """Free what the instance holds. Idempotent."""
        return None


def _entries(backend: str, operator: str, value: Implementations) -> tuple[Entry, ...]:
    if isinstance(value, Entry):
        return (value,)
    if isinstance(value, Sequence):
        return tuple(value)
    if not callable(value):
        raise ConfigurationError(
            f"backend {backend!r}: operator {operator!r} maps to {value!r}, expected a callable or an Entry"
        )
    return (Entry(value, evidence=_known_evidence(operator, value)),)


def _known_evidence(operator: str, fn: Callable[..., object]) -> tuple[str, ...]:
    """What the plain-torch forms that a backend may bring as its own are known to execute."""
    from polyaccel.backend.composite import linear as plain

    return plain.EVIDENCE[operator] if fn in (plain.linear, plain.dequantize) else ()


def _counted(operator: str, fn: Callable[..., object], launcher: Launcher) -> Callable[..., object]:
    ledger = launcher.ledger
    name, nested = f"{COMPOSITE_PREFIX}{operator}", f"{NESTED_PREFIX}{operator}"
    arguments = argument_names(operator)

    @functools.wraps(fn)
    def composite(*args: object, **kwargs: object) -> object:
        outer = ledger.native
        if outer is not None:
            if ledger.strict:
                raise UnsupportedError(
                    f"{outer} called the composite of {operator!r} while it was planned as native; "
                    "the plan would not show it"
                )
            ledger.record(nested)
        check_devices(operator, args, kwargs, arguments, launcher.rank)
        ledger.record(name)
        ledger.enter(None)
        try:
            return fn(*args, **kwargs)
        except UNTYPED as error:
            raise typed(operator, error, args, kwargs, launcher.rank) from error
        finally:
            ledger.leave(None)

    return composite
