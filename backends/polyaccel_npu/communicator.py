"""How ranks talk: HCCL between NPUs, gloo for objects and barriers."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import socket
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from polyaccel.backend import CommunicationError, OperatorError, RankAddress, Reason
from polyaccel.backend.communicator import Collective
from polyaccel.backend.composite.communicator import ProcessGroup, Store, TorchCommunicator
from polyaccel.backend.errors import ConfigurationError
from polyaccel_npu import runtime
from polyaccel_npu.chip import Chip
from polyaccel_npu.issue import Issuer

P = ParamSpec("P")
R = TypeVar("R")

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # The order of a sum, and so its last bits, is the same in every run (HCCL's own sums and the fused one's).
        "HCCL_DETERMINISTIC": "true",
        # A collective that waits in vain is an error where the host waits for the device: torch_npu's watchdog, which
        # finds it too, would end the process.
        "HCCL_ASYNC_ERROR_HANDLING": "0",
    }
)
"""Set before a communicator is made unless the environment says otherwise; part of the plan's text."""


class NpuCommunicator(TorchCommunicator):
    """Collectives of one rank's NPU, ordered with its current stream.

    Tensors in host memory, objects and barriers are gloo's. The ledger counts ``npu.hccl_<collective>`` and
    ``npu.host_<collective>``. HCCL sums an element along one path and hands the number to all, so all ranks have its
    bits; ``deterministic`` says whether every run has them.

    Args:
        address: where the ranks meet.
        issuer: the backend's.
        device: this rank's NPU.
        chip: what that is.

    Attributes:
        nodes: the hosts of all ranks.
        chips: the families of all ranks.

    Raises:
        CommunicationError: not all ranks came within the timeout, or HCCL could not be set up.
    """

    transport = "hccl"

    def __init__(self, address: RankAddress, issuer: Issuer, device: torch.device, chip: Chip) -> None:
        self._store: Store | None = None
        super().__init__(address)
        self.transport = "hccl"
        self._issuer, self._device, self._closed = issuer, device, False
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self.deterministic = os.environ["HCCL_DETERMINISTIC"].lower() in ("true", "1", "strict")
        own = (socket.gethostname(), chip.family, chip.fused_all_reduce, str(device), os.environ["HCCL_DETERMINISTIC"])
        answers = [answer for answer in self.gather_objects(own) if isinstance(answer, tuple)]
        self.nodes = tuple(str(answer[0]) for answer in answers)
        self.chips = tuple(str(answer[1]) for answer in answers)
        self.fused_chips = all(bool(answer[2]) for answer in answers)
        self._check_devices([(str(a[0]), str(a[3])) for a in answers], [str(a[4]) for a in answers])
        self._name = ""
        self._hccl: Any = self._run("connect", lambda: self._open_hccl(address))

    @property
    def closed(self) -> bool:
        """Whether the rank has left the group."""
        return self._closed

    def describe(self) -> str:
        """How sums travel, in words that are the same on all ranks."""
        return f"hccl, {'deterministic' if self.deterministic else 'order of sums may differ between runs'}"

    def fused_refusals(self) -> list[Reason]:
        """Why fused operators may not use this group; the same on all ranks."""
        hosts = sorted(set(self.nodes))
        return (
            [] if len(hosts) == 1 else [f"ranks on {len(hosts)} nodes ({', '.join(hosts)}); MatmulAllReduce needs one"]
        )

    def hcom(self) -> str:
        """The communicator's name, by which fused operators find it."""
        if self._closed:
            raise CommunicationError(f"MatmulAllReduce on rank {self.rank}: the group was closed")
        return self._name

    def note_all_reduce(self, nbytes: int) -> None:
        """Trace a sum that a fused operator makes."""
        if self.trace is not None:
            self.trace.append(Collective("all_reduce", nbytes))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        hccl, self._hccl = self._hccl, None
        if hccl is not None:
            # A device that fails here has said so to others before.
            with contextlib.suppress(RuntimeError):
                runtime.npu().synchronize(self._device)
            with contextlib.suppress(RuntimeError):
                hccl.shutdown()
        super().close()

    # -- collectives -------------------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor) -> None:
        if not self._on_device("all_reduce", x):
            self._on_host("all_reduce", super()._all_reduce, x)
        elif x.numel():
            dense = self._dense("all_reduce", x)
            self._issue("all_reduce", dense, lambda: self._hccl.allreduce([dense]).wait())
            if dense is not x:
                x.copy_(dense)

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if not self._on_device("all_gather", x):
            return self._on_host("all_gather", super()._all_gather, x, dim)
        if not -x.dim() <= dim < x.dim():
            raise ConfigurationError(f"all_gather along dim={dim} of {x.dim()} dimensions")
        dim %= x.dim()
        shape = (*x.shape[:dim], x.shape[dim] * self.world_size, *x.shape[dim + 1 :])
        if not x.numel():
            return x.new_empty(shape)
        dense = self._dense("all_gather", x)
        joined = dense.new_empty((self.world_size, *dense.shape))
        self._issue("all_gather", dense, lambda: self._hccl._allgather_base(joined.view(-1), dense.view(-1)).wait())
        return joined.movedim(0, dim).reshape(shape)

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_device("reduce_scatter", x):
            return self._on_host("reduce_scatter", super()._reduce_scatter, x)
        own = x.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))
        if x.numel():
            dense = self._dense("reduce_scatter", x)
            self._issue("reduce_scatter", dense, lambda: self._hccl._reduce_scatter_base(own, dense).wait())
        return own

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        if not self._on_device("all_to_all", x):
            return self._on_host("all_to_all", super()._all_to_all, x, send_rows, receive_rows)
        world = self.world_size
        if len(send_rows) != world or len(receive_rows) != world or min(*send_rows, *receive_rows) < 0:
            raise ConfigurationError(
                f"all_to_all sends {send_rows}, receives {receive_rows}; expected {world} counts >= 0"
            )
        if sum(send_rows) != x.shape[0]:
            raise ConfigurationError(f"all_to_all sends {send_rows} rows of {x.shape[0]}")
        dense = self._dense("all_to_all", x)
        received = dense.new_empty((sum(receive_rows), *dense.shape[1:]))
        self._issue(
            "all_to_all", dense, lambda: self._hccl.alltoall_base(received, dense, receive_rows, send_rows).wait()
        )
        return received

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        if not self._on_device("broadcast", x):
            self._on_host("broadcast", super()._broadcast, x, source)
            return
        if not 0 <= source < self.world_size:
            raise ConfigurationError(f"broadcast from rank {source} of {self.world_size}")
        if x.numel():
            options = dist.BroadcastOptions()
            options.rootRank = source
            dense = self._dense("broadcast", x)
            self._issue("broadcast", dense, lambda: self._hccl.broadcast([dense], options).wait())
            if dense is not x:
                x.copy_(dense)

    def _barrier(self) -> None:
        self._issuer.launcher.ledger.record("npu.host_barrier")
        super()._barrier()

    # -- issuing -----------------------------------------------------------------------------------------------------

    def _on_device(self, collective: str, x: torch.Tensor) -> bool:
        """Whether HCCL carries x, or gloo."""
        if self._closed:
            raise CommunicationError(f"{collective} on rank {self.rank}: the group was closed")
        if x.device.type != "npu":
            return False
        if x.device != self._device:
            raise OperatorError.describe(collective, f"the group is of {self._device}", {"x": x}, self.rank)
        return True

    def _dense(self, collective: str, x: torch.Tensor) -> torch.Tensor:
        return self._issuer.operands.dense(collective, "x", x)

    def _issue(self, collective: str, x: torch.Tensor, fn: Callable[[], object]) -> None:
        self._issuer.issue(f"hccl_{collective}", {"x": x}, fn)

    def _on_host(self, collective: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._issuer.launcher.ledger.record(f"npu.host_{collective}")
        return fn(*args, **kwargs)

    # -- the group ---------------------------------------------------------------------------------------------------

    def _open(self, store: Store, address: RankAddress) -> ProcessGroup:
        self._store = store
        return super()._open(store, address)

    def _open_hccl(self, address: RankAddress) -> Any:
        runtime.npu()
        hccl = importlib.import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL
        options = hccl.Options()
        options._timeout = timedelta(seconds=address.timeout)
        # How long a collective on the device waits for the other ranks: half an hour if nothing is said.
        options.hccl_config = {"hccl_exec_timeout": max(1, math.ceil(address.timeout))}
        # Part of the name by which fused operators find the communicator: another for every group, one for all ranks.
        options.group_id = f"polyaccel_{zlib.crc32(address.init_method.encode()):08x}"
        prefixed = dist.PrefixStore("hccl", self._store)  # type: ignore[attr-defined, arg-type]
        with runtime.npu().device(self._device):
            group = hccl(prefixed, address.rank, address.world_size, options)
            # HCCL meets the other ranks when it is first asked for anything: now, where waiting for them is expected.
            self._name = str(group.get_hccl_comm_name(address.rank))
            return group

    def _check_devices(self, devices: list[tuple[str, str]], settings: list[str]) -> None:
        for rank, device in enumerate(devices):
            if devices.index(device) != rank:
                raise ConfigurationError(f"ranks {devices.index(device)} and {rank} share {device[1]} of {device[0]}")
        if len(set(settings)) > 1:
            raise ConfigurationError(f"HCCL_DETERMINISTIC differs between ranks: {', '.join(settings)}")
