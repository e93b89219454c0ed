"""How ranks talk: NCCL between GPUs, a kernel of our own for small sums, host memory where ranks share a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from polyaccel.backend import CommunicationError, Launcher, OperatorError, OutOfMemory, RankAddress, Reason
from polyaccel.backend.composite.communicator import ProcessGroup, Store, TorchCommunicator
from polyaccel.backend.errors import ConfigurationError
from polyaccel.backend.ledger import COPY_PREFIX
from polyaccel_cuda.nccl import NcclGroup
from polyaccel_cuda.overlap import Produce, SideStream, bounds, overlapped
from polyaccel_cuda.symmetric import DTYPES, OneShot, open_one_shot
from polyaccel_cuda.threshold import measured_threshold, measured_two_shot
from polyaccel_cuda.watch import Watch

P = ParamSpec("P")
R = TypeVar("R")

CLOSE_SECONDS = 2.0
"""How long a rank that leaves waits for the others to be done as well."""
RENDEZVOUS_SECONDS = 20.0
TRIAL_SECONDS = 20.0
"""How long our kernels may take to compile and to be tried before ranks do without."""
BY_PUSH = True
"""Whether two ranks sum the parts of a product by copy engines; else by NCCL, as more ranks do."""


class CudaCommunicator(TorchCommunicator):
    """Collectives of one rank's GPU, ordered with its current stream; they may be captured in graphs.

    - Sums of at most :attr:`threshold` bytes are one kernel (:mod:`polyaccel_cuda.kernels.one_shot`): every rank adds
      the same numbers in the order of ranks. So are those of at most :attr:`two_shot_threshold` bytes, by shares
      (:mod:`polyaccel_cuda.kernels.two_shot`). Larger ones, and all other collectives, are NCCL, whose rings and trees
      sum an element once and hand the number to all. Either way all ranks end with identical bits.
    - A large product is summed by parts while its next part is computed: :meth:`sum_in_parts`.
    - Collectives of tensors in host memory, objects and barriers are gloo's, on the host.
    - Where ranks share a GPU, which NCCL refuses, or torch has no NCCL, everything is gloo's and passes through host
      memory: ``transport`` is ``gloo`` and :attr:`hosted` says why.

    The ledger counts ``cuda.one_shot_all_reduce``, ``cuda.two_shot_all_reduce``, ``cuda.one_shot_add_norm``,
    ``cuda.push_copy``, ``cuda.push_meet``, ``cuda.push_add``, ``cuda.nccl_<collective>`` and
    ``cuda.host_<collective>``.

    A rank that does not take part is noticed within the timeout: what waits for it is given up, and from then on every
    collective, and every wait for the device that the backend hands out, raises a CommunicationError. Graphs must be
    closed before the communicator.

    Args:
        address: where the ranks meet.
        launcher: the backend's.
        device: this rank's GPU; its current stream at the time of a call is used.
        like: a group that the same ranks gave up: what was measured for it is not measured again, so that sums keep
            their form.

    Attributes:
        hosted: why collectives pass through host memory; empty if they do not.
        refusal: why no sum uses symmetric memory; empty if some do.
        threshold: bytes up to which they are one-shot, as measured by rank 0; 0 if none is.
        two_shot_threshold: bytes up to which the larger ones are two-shot; 0 if none is.

    Raises:
        CommunicationError: not all ranks came within the timeout, or NCCL could not be set up.
    """

    def __init__(
        self, address: RankAddress, launcher: Launcher, device: torch.device, like: CudaCommunicator | None = None
    ) -> None:
        self._store: Store | None = None
        super().__init__(address)
        self._launcher, self._device = launcher, device
        self._nccl: NcclGroup | None = None
        self._one_shot: OneShot | None = None
        self._watch: Watch | None = None
        self._closed = self._abandoned = False
        self._lane: SideStream | None = None
        self.threshold = self.two_shot_threshold = 0
        self.refusal: Reason = ""
        self.hosted = self._why_hosted()
        if self.hosted:
            self.refusal = self.hosted
            return
        self.transport = "nccl"
        self._open_nccl()
        if like is not None and not like.threshold:
            self.refusal = like.refusal
            return
        self._open_one_shot(address, like)

    def check(self) -> None:
        """Raise if collectives were given up; called after every wait for the device.

        Raises:
            CommunicationError: a rank did not take part; results since are worth nothing.
        """
        if self._watch is not None and not self._closed:
            self._watch.check()

    @property
    def closed(self) -> bool:
        """Whether the rank has left the group."""
        return self._closed

    @property
    def abandoned(self) -> bool:
        """Whether this rank has given up the group before the others were done."""
        return self._abandoned

    def abandon(self) -> None:
        """Have the kernels of this group return, here and, within a fraction of a second, on the other ranks."""
        if self._closed or self._abandoned:
            return
        self._abandoned = True
        if self._watch is None:
            super().abandon()
            return
        with contextlib.suppress(RuntimeError):
            self._prefixed("abandoned").set("by", str(self.rank))
        self._watch.abandon("this rank cannot go on")
        # What is the host's is gloo's.
        super().close()

    def issued(self, kind: str = "graph") -> None:
        """Note that collectives are on their way: for replays of graphs, which hold some."""
        if self._watch is None or self._closed:
            return
        with torch.cuda.device(self._device):
            if not torch.cuda.is_current_stream_capturing():
                self._watch.issued(kind)

    def describe(self) -> str:
        """How sums travel, in words that are the same on all ranks."""
        if self.hosted:
            return f"through host memory: {self.hosted}"
        if not self.threshold:
            return f"nccl: {self.refusal}"
        two_shot = f", two_shot up to {self.two_shot_threshold}" if self.two_shot_threshold else ""
        return f"one_shot up to {self.threshold} bytes{two_shot}, nccl beyond"

    def describe_parts(self) -> str:
        """How the parts of a product are summed, in words that are the same on all ranks."""
        if self.hosted:
            return ""
        return "pushed" if self._pushes() is not None else "nccl"

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        nccl, one_shot, watch = self._nccl, self._one_shot, self._watch
        if nccl is not None:
            self._leave(watch)
            # Peers are done, or will never be: either way nobody is waited for.
            with contextlib.suppress(RuntimeError):
                nccl.abort()
        if one_shot is not None:
            one_shot.close()
        self._nccl = self._one_shot = None
        super().close()

    # -- collectives -------------------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor) -> None:
        nccl = self._group("all_reduce", x)
        if nccl is None:
            self._on_host("all_reduce", x, super()._all_reduce, x)
        elif x.numel():
            one_shot, dense = self._one_shot, self._dense("all_reduce", x)
            if one_shot is not None and self.by_one_shot(dense):
                self._issue("one_shot_all_reduce", dense, one_shot.all_reduce, dense)
            elif one_shot is not None and self.by_two_shot(dense):
                self._issue("two_shot_all_reduce", dense, one_shot.two_shot, dense)
            else:
                self._issue("nccl_all_reduce", dense, nccl.all_reduce, dense)
            if dense is not x:
                x.copy_(dense)

    def by_one_shot(self, x: torch.Tensor) -> bool:
        """Whether the sum of x, dense, is one kernel. The same on all ranks, whose tensors are alike."""
        one_shot = self._one_shot
        return one_shot is not None and x.numel() * x.element_size() <= self.threshold and one_shot.takes(x)

    def by_two_shot(self, x: torch.Tensor) -> bool:
        """Whether the sum of x, dense, is the two-shot kernel's. The same on all ranks, whose tensors are alike."""
        return x.dtype in DTYPES and x.numel() * x.element_size() <= self.two_shot_threshold

    # -- what stations ask for -----------------------------------------------------------------------------------------

    def adds_and_norms(self, x: torch.Tensor, n: int) -> bool:
        """Whether :meth:`sum_add_norm` takes ``x: [T, n]``. The same on all ranks."""
        one_shot = self._one_shot
        small = x.shape[0] * n * x.element_size() <= self.threshold
        return one_shot is not None and small and x.is_cuda and one_shot.takes_norm(x, n)

    def sum_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(normed, total)``: x summed over ranks, a residual added, rms_norm; one kernel, and one traced all_reduce.

        Args:
            x: ``[T, n]``, rows dense, for which :meth:`adds_and_norms` is true; it is not changed.
            residual: ``[T, n]``, rows dense, the same on all ranks. weight: ``[n]``.
        """
        one_shot = self._one_shot
        assert one_shot is not None
        self._note("all_reduce", x)
        self._group("all_reduce", x)
        operands = {"x": x, "residual": residual, "norm_weight": weight}
        return self._issued("one_shot_add_norm", operands, one_shot.reduce_add_norm, x, residual, weight, eps)

    def parts(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
        """Where the parts begin by which :meth:`sum_in_parts` takes a product, and the end; ``(0, rows)`` for one.

        The same on all ranks, whose products are alike.
        """
        if self._nccl is None or dtype not in DTYPES:
            return (0, rows)
        return bounds(rows, columns * dtype.itemsize)

    def sum_in_parts(self, y: torch.Tensor, starts: tuple[int, ...], produce: Produce) -> None:
        """Have y's rows produced part by part and sum each over ranks while the next one is; one traced all_reduce.

        The sums run on a stream of their own, which what follows on the current stream waits for. May be captured.

        Args:
            y: ``[T, n]`` contiguous, of this rank's GPU.
            starts: of :meth:`parts`, of more than one part.
            produce: fills rows ``begin`` to ``end`` of y on the current stream.
        """
        nccl = self._group("all_reduce", y)
        assert nccl is not None
        assert len(starts) > 2
        self._note("all_reduce", y)
        if self._lane is None:
            self._lane = SideStream(self._device)
        pushes, launch = self._pushes(), self._launcher.launch

        def summed(part: torch.Tensor, index: int) -> None:
            slot = index % 2
            if pushes is None:
                launch("cuda.nccl_all_reduce", {"x": part}, nccl.all_reduce, part)
            else:
                launch("cuda.push_copy", {"x": part}, pushes.push, part, slot)
                launch("cuda.push_meet", {"x": part}, pushes.meet)
                launch("cuda.push_add", {"x": part}, pushes.add_received, part, slot)

        with torch.cuda.device(self._device):
            try:
                overlapped(y, starts, produce, summed, self._lane)
            except dist.DistBackendError as error:
                raise self._failed("all_reduce", error) from error
        self.issued("all_reduce of parts")

    def _pushes(self) -> OneShot | None:
        one_shot = self._one_shot
        return one_shot if BY_PUSH and one_shot is not None and one_shot.pushes else None

    # -- further collectives -------------------------------------------------------------------------------------------

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        nccl = self._group("all_gather", x)
        if nccl is None:
            return self._on_host("all_gather", x, super()._all_gather, x, dim)
        if not -x.dim() <= dim < x.dim():
            raise ConfigurationError(f"all_gather along dim={dim} of {x.dim()} dimensions")
        dim %= x.dim()
        shape = (*x.shape[:dim], x.shape[dim] * self.world_size, *x.shape[dim + 1 :])
        if not x.numel():
            return x.new_empty(shape)

        def gathered(dense: torch.Tensor) -> torch.Tensor:
            return nccl.all_gather(dense).movedim(0, dim).reshape(shape)

        dense = self._dense("all_gather", x)
        return self._issue("nccl_all_gather", dense, gathered, dense)

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        nccl = self._group("reduce_scatter", x)
        if nccl is None:
            return self._on_host("reduce_scatter", x, super()._reduce_scatter, x)
        if not x.numel():
            return x.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))
        dense = self._dense("reduce_scatter", x)
        return self._issue("nccl_reduce_scatter", dense, nccl.reduce_scatter, dense)

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        nccl = self._group("all_to_all", x)
        if nccl is None:
            return self._on_host("all_to_all", x, super()._all_to_all, x, send_rows, receive_rows)
        world = self.world_size
        if len(send_rows) != world or len(receive_rows) != world or min(*send_rows, *receive_rows) < 0:
            raise ConfigurationError(
                f"all_to_all sends {send_rows}, receives {receive_rows}; expected {world} counts >= 0"
            )
        if sum(send_rows) != x.shape[0]:
            raise ConfigurationError(f"all_to_all sends {send_rows} rows of {x.shape[0]}")
        dense = self._dense("all_to_all", x)
        return self._issue("nccl_all_to_all", dense, nccl.all_to_all, dense, send_rows, receive_rows)

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        nccl = self._group("broadcast", x)
        if nccl is None:
            self._on_host("broadcast", x, super()._broadcast, x, source)
            return
        if not 0 <= source < self.world_size:
            raise ConfigurationError(f"broadcast from rank {source} of {self.world_size}")
        if x.numel():
            dense = self._dense("broadcast", x)
            self._issue("nccl_broadcast", dense, nccl.broadcast, dense, source)
            if dense is not x:
                x.copy_(dense)

    def _barrier(self) -> None:
        self.check()
        self._launcher.ledger.record("cuda.host_barrier")
        super()._barrier()

    # -- issuing -----------------------------------------------------------------------------------------------------

    def _group(self, collective: str, x: torch.Tensor) -> NcclGroup | None:
        """NCCL's group if it is to carry x, None if gloo is."""
        if self._closed:
            raise CommunicationError(f"{collective} on rank {self.rank}: the group was closed")
        self.check()
        if x.device.type != "cuda" or self._nccl is None:
            return None
        if x.device != self._device:
            raise OperatorError.describe(collective, f"the group is of {self._device}", {"x": x}, self.rank)
        return self._nccl

    def _dense(self, collective: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous():
            return x
        self._launcher.ledger.record(f"{COPY_PREFIX}{collective}.x")
        return x.contiguous()

    def _issue(self, kernel: str, x: torch.Tensor, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._issued(kernel, {"x": x}, fn, *args, **kwargs)

    def _issued(
        self, kernel: str, operands: dict[str, torch.Tensor], fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        try:
            result = self._launcher.launch(f"cuda.{kernel}", operands, fn, *args, **kwargs)
        except dist.DistBackendError as error:
            raise self._failed(kernel, error) from error
        self.issued(kernel)
        return result

    def _failed(self, kernel: str, error: Exception) -> CommunicationError:
        return CommunicationError(f"{kernel} on rank {self.rank} of {self.world_size}: {error}")

    def _on_host(self, collective: str, x: torch.Tensor, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._launcher.ledger.record(f"cuda.host_{collective}")
        return fn(*args, **kwargs)

    # -- the group ---------------------------------------------------------------------------------------------------

    def _open(self, store: Store, address: RankAddress) -> ProcessGroup:
        self._store = store
        return super()._open(store, address)

    def _why_hosted(self) -> Reason:
        """Asked of all ranks, so that they choose alike."""
        if not dist.is_nccl_available():
            own: tuple[str, str] = ("this torch has no NCCL", "")
        elif self._device.type != "cuda":
            own = (f"rank {self.rank} has no GPU", "")
        else:
            own = ("", str(torch.cuda.get_device_properties(self._device).uuid))
        answers = [answer for answer in self.gather_objects(own) if isinstance(answer, tuple)]
        for reason, _ in answers:
            if reason:
                return str(reason)
        return shared_device([str(uuid) for _, uuid in answers])

    def _prefixed(self, name: str) -> c10d.Store:
        return c10d.PrefixStore(name, self._store)  # type: ignore[arg-type]

    def _open_nccl(self) -> None:
        try:
            self._nccl = self._run(
                "connect", lambda: NcclGroup(self._prefixed("nccl"), self.rank, self.world_size, self._device)
            )
        except CommunicationError as error:
            # NCCL allocates by itself, and torch reports that as a failure of the group.
            if "out of memory" not in str(error):
                raise
            raise OutOfMemory(f"NCCL found no memory on {self._device}: {error}") from error
        with torch.cuda.device(self._device):
            self._watch = Watch(
                f"rank {self.rank} of {self.world_size}",
                self._timeout,
                torch.cuda.Event,
                self._give_up,
                self._told,
            )

    def _open_one_shot(self, address: RankAddress, like: CudaCommunicator | None) -> None:
        assert self._nccl is not None
        opened = open_one_shot(
            self._prefixed("symmetric"),
            self._nccl,
            self.rank,
            self.world_size,
            self.gather_objects,
            min(address.timeout, RENDEZVOUS_SECONDS),
        )
        if isinstance(opened, Reason):
            self.refusal = opened
            return
        if like is not None:
            self.threshold, self.two_shot_threshold = like.threshold, like.two_shot_threshold
            self._one_shot = opened
            return
        # Rank 0's, since ranks that chose differently would wait for each other; and only where all could.
        answers = [answer for answer in self.gather_objects(self._tried(opened)) if isinstance(answer, tuple)]
        self.refusal = next((str(answer[1]) for answer in answers if answer[1]), "")
        if self.refusal:
            opened.close()
        else:
            self.threshold, self.two_shot_threshold, self._one_shot = int(answers[0][0]), int(answers[0][2]), opened

    def _tried(self, one_shot: OneShot) -> tuple[int, Reason, int]:
        """The threshold that this rank would choose, why none, and two-shot's."""
        assert self._nccl is not None
        who = f"rank {self.rank} of {self.world_size}"
        with torch.cuda.device(self._device):
            # Of its own, for the group itself must not end with a kernel that does not work here.
            watch = Watch(who, min(self._timeout, TRIAL_SECONDS), torch.cuda.Event, one_shot.abort)
            try:
                issued = functools.partial(watch.issued, "one_shot_all_reduce")
                found = measured_threshold(self._device, self.rank, self.world_size, one_shot, self._nccl, issued)
                larger = measured_two_shot(self._device, self.rank, self.world_size, one_shot, self._nccl, issued)
                watch.check()
            except Exception as error:
                watch.close()
                refusal = f"{who}: {type(error).__name__}: {str(error).partition(chr(10))[0]:.300}"
                return 0, refusal, 0
            watch.close()
        return found, "" if found else f"{who}: NCCL is faster at every size measured", larger

    def _told(self) -> str:
        """From the watch's thread: which rank has abandoned the group."""
        with contextlib.suppress(RuntimeError):
            store = self._prefixed("abandoned")
            if store.check(["by"]):
                return f"rank {store.get('by').decode()} cannot go on"
        return ""

    def _give_up(self) -> None:
        """From the watch's thread, or by who abandons the group."""
        if self._one_shot is not None:
            self._one_shot.abort()
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()

    def _leave(self, watch: Watch | None) -> None:
        """Wait until no rank uses this rank's memory any more, if that can be."""
        if watch is None:
            return
        if not watch.broken:
            # A device that fails here has said so to others before.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
        watch.close()
        if watch.broken:
            return
        # A peer may still read what this rank has shown it. The store rather than gloo, which a late rank would break.
        store = self._prefixed("leave")
        with contextlib.suppress(RuntimeError):
            store.set(str(self.rank), "1")
            store.wait([str(rank) for rank in range(self.world_size)], timedelta(seconds=CLOSE_SECONDS))


def shared_device(uuids: Sequence[str]) -> Reason:
    """Why ranks with these GPUs cannot use NCCL; empty if each has its own."""
    for rank, uuid in enumerate(uuids):
        first = list(uuids).index(uuid)
        if first != rank:
            return f"ranks {first} and {rank} share one GPU"
    return ""
