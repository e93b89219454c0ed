"""The backend contract: everything a plugin may import.

Torch tensors in, torch tensors out; no engine type crosses it. ``polyaccel.backend.composite`` holds the plain-torch
form of every operator and of the storage classes, which plugins may reuse or subclass.
"""

from polyaccel.backend.adapter_store import AdapterStore, LoraMatrices, PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.backend import Availability, Backend, RankAddress
from polyaccel.backend.communicator import Collective, Communicator, SingleRank
from polyaccel.backend.device import Device, DoneEvent, Event, HostCopy, MemoryInfo, ReadyHostCopy, TorchDevice
from polyaccel.backend.errors import (
    BackendError,
    BackendUnavailable,
    CommunicationError,
    DeviceLost,
    OperandInfo,
    OperatorError,
    OutOfMemory,
    PolyaccelError,
    UnsupportedError,
)
from polyaccel.backend.graph import Graph, GraphKey, StepFunction
from polyaccel.backend.guard import Launcher
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.ledger import Ledger
from polyaccel.backend.plan import Plan, Planned, Policy, Site, SiteRequest
from polyaccel.backend.registry import BackendStatus, choose, list_backends, load
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.sampling import SampleOutput, SamplingRow, SamplingSpec, SamplingState
from polyaccel.backend.spec import Argument, Layout, NonFinite, Numerics, OperatorSpec
from polyaccel.backend.stations import STATIONS
from polyaccel.backend.step import AdapterRows, DeviceState, RowSet, Step, StepInput, TokenClass
from polyaccel.backend.support import Entry, Query, Reason
from polyaccel.backend.table import TableBackend
from polyaccel.backend.version import API_VERSION, ApiRange
from polyaccel.backend.vocabulary import OPERATORS
from polyaccel.backend.weight import Quantisation, Slice, Weight, WeightSpec

__all__ = [
    "API_VERSION",
    "OPERATORS",
    "STATIONS",
    "AdapterRows",
    "AdapterStore",
    "ApiRange",
    "Argument",
    "Availability",
    "Backend",
    "BackendError",
    "BackendStatus",
    "BackendUnavailable",
    "Collective",
    "CommunicationError",
    "Communicator",
    "Device",
    "DeviceLost",
    "DeviceState",
    "DoneEvent",
    "Entry",
    "Event",
    "Graph",
    "GraphKey",
    "HostCopy",
    "KVCache",
    "KVSpec",
    "Launcher",
    "Layout",
    "Ledger",
    "LoraMatrices",
    "MemoryInfo",
    "NonFinite",
    "Numerics",
    "OperandInfo",
    "OperatorError",
    "OperatorSpec",
    "OutOfMemory",
    "PackedAdapter",
    "PackedEntry",
    "Plan",
    "Planned",
    "Policy",
    "PolyaccelError",
    "Quantisation",
    "Query",
    "RankAddress",
    "ReadyHostCopy",
    "Reason",
    "RopeTable",
    "RowSet",
    "SampleOutput",
    "SamplingRow",
    "SamplingSpec",
    "SamplingState",
    "SingleRank",
    "Site",
    "SiteRequest",
    "Slice",
    "SlotRange",
    "Step",
    "StepFunction",
    "StepInput",
    "TableBackend",
    "TokenClass",
    "TorchDevice",
    "UnsupportedError",
    "Weight",
    "WeightSpec",
    "choose",
    "list_backends",
    "load",
]
