"""Making, naming, asking and destroying communicators.

Document for all: Ascend/pytorch third_party/hccl/inc/hccl/hccl.h and hccl_types.h, the declarations' comments.
"""

from __future__ import annotations

import ctypes
import os
import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..registry import hccl
from .codes import HcclRefused, Result
from .domain import Domain
from .domains import domains_of

if TYPE_CHECKING:
    from ..simulator import Simulator

HEADER = "Ascend/pytorch third_party/hccl/inc/hccl/hccl.h"

_ROOT_BYTES = 4108  # HCCL_ROOT_INFO_BYTES
_NAME_BYTES = 128  # COMM_NAME_MAX_LENGTH
_NAME_AT = 32  # HcclCommConfig: 24 reserved bytes, buffer size, determinism, name
_TIMEOUT_AT = 316  # HcclCommConfig.hcclExecTimeOut, int32
_NOT_SET = -1  # HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET
_CAPABILITIES = 9  # HcclCommConfigCapability: up to HCCL_COMM_CONFIG_EXEC_TIMEOUT


@dataclass(frozen=True)
class _Config:
    name: str
    execute_timeout: float | None


def _read_config(address: int | None) -> _Config:
    if not address:
        return _Config("", None)
    raw = ctypes.string_at(address, _TIMEOUT_AT + 4)
    name = raw[_NAME_AT : _NAME_AT + _NAME_BYTES].split(b"\0", 1)[0].decode()
    (seconds,) = struct.unpack_from("i", raw, _TIMEOUT_AT)
    return _Config(name, float(seconds) if seconds not in (0, _NOT_SET) else None)


def _write_handle(address: int | None, handle: int) -> None:
    if not address:
        raise HcclRefused(Result.POINTER, "the place for the communicator is a null pointer.")
    ctypes.c_void_p.from_address(address).value = handle


@hccl("HcclGetRootInfo", "pointer", source=HEADER)
def get_root_info(root: int | None) -> int:
    """Fill a root info: here the key under which the ranks meet."""
    if not root:
        raise HcclRefused(Result.POINTER, "HcclGetRootInfo: rootInfo is a null pointer.")
    text = f"{os.getpid():x}-{uuid.uuid4().hex}".encode()
    ctypes.memmove(root, text.ljust(_ROOT_BYTES, b"\0"), _ROOT_BYTES)
    return 0


def _init(simulator: Simulator, size: int, root: int | None, rank: int, config: _Config, place: int | None) -> int:
    if not root:
        raise HcclRefused(Result.POINTER, "HcclCommInitRootInfo: rootInfo is a null pointer.")
    key = ctypes.string_at(root).decode()
    name = config.name or f"127.0.0.1%lo_60000_0_{key[-16:]}"
    domain = Domain.join(name, key, rank, size, config.execute_timeout)
    _write_handle(place, domains_of(simulator).add(domain))
    return 0


@hccl("HcclCommInitRootInfo", "uint32 pointer uint32 pointer", source=HEADER)
def comm_init_root_info(size: int, root: int | None, rank: int, place: int | None, *, simulator: Simulator) -> int:
    """Join the domain of a root info as one of `size` ranks. Blocks until all have come."""
    return _init(simulator, size, root, rank, _Config("", None), place)


@hccl("HcclCommInitRootInfoConfig", "uint32 pointer uint32 pointer pointer", source=HEADER)
def comm_init_root_info_config(
    size: int, root: int | None, rank: int, config: int | None, place: int | None, *, simulator: Simulator
) -> int:
    """The same with a name and a timeout of the caller's."""
    return _init(simulator, size, root, rank, _read_config(config), place)


@hccl("HcclCreateSubCommConfig", "pointer uint32 pointer uint64 uint32 pointer pointer", source=HEADER)
def create_sub_comm_config(
    parent: int | None,
    size: int,
    ranks: int | None,
    number: int,
    rank: int,
    config: int | None,
    place: int | None,
    *,
    simulator: Simulator,
) -> int:
    """A domain of some of the parent's ranks; `ranks` holds their numbers there. `parent` points to the handle."""
    if not parent or not ranks:
        raise HcclRefused(Result.POINTER, "HcclCreateSubCommConfig: comm or rankIds is a null pointer.")
    whole = domains_of(simulator).get("HcclCreateSubCommConfig", ctypes.c_void_p.from_address(parent).value)
    members = struct.unpack(f"{size}I", ctypes.string_at(ranks, 4 * size))
    if max(members) >= whole.size or len(set(members)) != size or members[rank] != whole.rank:
        raise HcclRefused(
            Result.PARAMETER,
            f"HcclCreateSubCommConfig: ranks {list(members)} of {whole.size}; rank {whole.rank} is number {rank}.",
        )
    settings = _read_config(config)
    key = f"{whole.key}-{number:x}-{'.'.join(map(str, members))}"
    name = settings.name or f"{whole.name}_sub_{number}"
    domain = Domain.join(name, key, rank, size, settings.execute_timeout)
    _write_handle(place, domains_of(simulator).add(domain))
    return 0


@hccl("HcclCommDestroy", "pointer", source=HEADER)
def comm_destroy(handle: int | None, *, simulator: Simulator) -> int:
    """Leave a domain; using its handle afterwards is refused."""
    domains_of(simulator).remove("HcclCommDestroy", handle)
    return 0


@hccl("HcclGetCommName", "pointer pointer", source=HEADER)
def get_comm_name(handle: int | None, place: int | None, *, simulator: Simulator) -> int:
    """The name that fused operators take as their group."""
    if not place:
        raise HcclRefused(Result.POINTER, "HcclGetCommName: commName is a null pointer.")
    name = domains_of(simulator).get("HcclGetCommName", handle).name.encode()[: _NAME_BYTES - 1]
    ctypes.memmove(place, name + b"\0", len(name) + 1)
    return 0


@hccl("HcclGetCommAsyncError", "pointer pointer", source=HEADER)
def get_comm_async_error(handle: int | None, place: int | None, *, simulator: Simulator) -> int:
    """The first failure of a collective of this domain, or success."""
    if not place:
        raise HcclRefused(Result.POINTER, "HcclGetCommAsyncError: asyncError is a null pointer.")
    found = domains_of(simulator).get("HcclGetCommAsyncError", handle).asynchronous
    ctypes.c_int32.from_address(place).value = int(found)
    return 0


@hccl("HcclGetRankSize", "pointer pointer", source=HEADER)
def get_rank_size(handle: int | None, place: int | None, *, simulator: Simulator) -> int:
    """How many ranks a domain has."""
    if not place:
        raise HcclRefused(Result.POINTER, "HcclGetRankSize: rankSize is a null pointer.")
    ctypes.c_uint32.from_address(place).value = domains_of(simulator).get("HcclGetRankSize", handle).size
    return 0


@hccl("HcclGetRankId", "pointer pointer", source=HEADER)
def get_rank_id(handle: int | None, place: int | None, *, simulator: Simulator) -> int:
    """Which rank of a domain this process is."""
    if not place:
        raise HcclRefused(Result.POINTER, "HcclGetRankId: rank is a null pointer.")
    ctypes.c_uint32.from_address(place).value = domains_of(simulator).get("HcclGetRankId", handle).rank
    return 0


@hccl("HcclSetConfig", "int32 int32", source=HEADER)
def set_config(config: int, value: int) -> int:
    """HCCL_DETERMINISTIC: accepted, and true anyway: gloo adds in a fixed order."""
    return 0 if config == 0 else int(Result.NOT_SUPPORTED)


@hccl("HcclGetCommConfigCapability", "", source=HEADER, since="8.0.RC3")
def get_comm_config_capability() -> int:
    """How many entries of HcclCommConfigCapability are known: names and timeouts among them."""
    return _CAPABILITIES
