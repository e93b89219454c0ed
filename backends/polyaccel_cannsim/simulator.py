"""The simulated machine in this process: loads the libraries, answers their functions, runs the operators' closures."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .build import LIBRARIES
from .descriptor import Decoder
from .errors import Refused, Status
from .first_phase import FirstPhase, illegal_address, placed
from .ledger import Call, Ledger
from .registry import Compute, Launch, Rule
from .settings import Settings


class Simulator:
    """One process has one: the libraries are the process's.

    Attributes:
        settings: the machine.
        ledger: every call.
        rules: what is exported, by name.
        communicators: of HCCL, by whatever its package keys them with; the runtime does not look at them.
    """

    def __init__(self, settings: Settings, rules: Mapping[str, Rule], folder: Path) -> None:
        self.settings = settings
        self.rules = dict(rules)
        self.ledger = Ledger()
        self.communicators: dict[Any, Any] = {}
        self._numbers = itertools.count(1)
        self._checks: dict[int, Callable[[], None]] = {}
        self._work: dict[int, tuple[Compute, Call]] = {}
        self._captured: dict[int, dict[int, Call]] = {}
        self._keep: list[Any] = []
        loaded = {name: ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES}
        self._acl = loaded["ascendcl"]
        self._describe_machine()
        owner = self._acl.cannsim_device_of
        owner.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.device_of: Callable[[int, int], int] = owner
        """``(address, bytes)``: the card that owns the range, -1 pinned host memory, -2 unknown."""
        self.decoder = Decoder()
        self._install(loaded["opapi"], loaded["hccl"])

    def _describe_machine(self) -> None:
        acl, s = self._acl, self.settings
        acl.cannsim_machine(
            s.devices,
            s.soc.name.encode(),
            str(s.cann).encode() if s.cann.tells_itself else b"",
            s.soc.cube_cores,
            s.soc.vector_cores,
            int(s.soc.bfloat16),
        )
        acl.cannsim_memory(ctypes.c_uint64(s.memory), ctypes.c_int(-1 if s.poison is None else s.poison))
        acl.cannsim_show_log(int(s.log))
        self.set_quiet(s.quiet_ms)
        acl.cannsim_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        for name in ("cannsim_stream_id", "cannsim_pending"):
            getattr(acl, name).argtypes = [ctypes.c_void_p]
        acl.cannsim_pending.restype = ctypes.c_int64
        acl.cannsim_memory_used.restype = acl.cannsim_memory_peak.restype = ctypes.c_uint64
        acl.cannsim_last_error.restype = ctypes.c_char_p

    def _install(self, opapi: ctypes.CDLL, hccl: ctypes.CDLL) -> None:
        self._set("cannsim_set_call", ctypes.c_int, self._run, ctypes.c_int64, *[ctypes.c_int] * 3)
        self._set("cannsim_set_check", ctypes.c_int, self._check, ctypes.c_int64, ctypes.c_void_p)
        self._set("cannsim_set_captured", None, self._was_captured, ctypes.c_int64, ctypes.c_int64)
        self._set("cannsim_set_replayed", None, self._replayed, ctypes.c_int64)
        self._set("cannsim_set_forgotten", None, self._forgotten, ctypes.c_int64)
        aclnn = sorted(name for name, rule in self.rules.items() if rule.library == "opapi")
        slots = (ctypes.c_void_p * (len(aclnn) + 1)).in_dll(opapi, "cannsim_opapi")
        for i, name in enumerate(aclnn):
            slots[i] = self._first_phase(self.rules[name])
        slots[len(aclnn)] = ctypes.cast(self._acl.cannsim_launch, ctypes.c_void_p).value
        collectives = sorted(name for name, rule in self.rules.items() if rule.library == "hccl")
        slots = (ctypes.c_void_p * (len(collectives) + 1)).in_dll(hccl, "cannsim_hccl")
        for i, name in enumerate(collectives):
            slots[i] = self._collective(self.rules[name])

    def _set(self, setter: str, result: Any, function: Callable[..., Any], *arguments: Any) -> None:
        callback = ctypes.CFUNCTYPE(result, *arguments)(function)
        self._keep.append(callback)
        getattr(self._acl, setter)(callback)

    # --- aclnn ------------------------------------------------------------------------------------------------------

    def _first_phase(self, rule: Rule) -> int | None:
        name, count = rule.name, len(rule.signature)
        extra = {"simulator": self} if rule.wants_simulator else {}
        phase = FirstPhase(rule, self.decoder, functools.partial(rule.function, **extra) if extra else rule.function)

        def first_phase(*raw: Any) -> int:
            call = Call(name, ())
            try:
                result = phase(raw, call)
            except Refused as refusal:
                call.refused = refusal.code
                self.ledger.add(call)
                return self._refuse(name, refusal)
            except Exception as problem:
                return self._broken(name, problem)
            executor = 0
            if isinstance(result, Launch):
                token = self._keep_work(call, result.compute)
                self._checks[token] = result.check
                executor = token << 1 | 1
            elif not rule.asks_size:
                executor = self._keep_work(call, result) << 1
            # The last two arguments: the size of the workspace, none, and what phase 2 gets.
            ctypes.c_uint64.from_address(raw[count]).value = 0
            ctypes.c_uint64.from_address(raw[count + 1]).value = executor
            return 0

        callback = ctypes.CFUNCTYPE(ctypes.c_int, *rule.c_types, ctypes.c_void_p, ctypes.c_void_p)(first_phase)
        self._keep.append(callback)
        return ctypes.cast(callback, ctypes.c_void_p).value

    def _check(self, token: int, stream: int | None) -> int:
        call = self._work[token][1]
        try:
            self._checks.pop(token)()
        except Exception as problem:
            del self._work[token]
            if isinstance(problem, Refused):
                call.refused = problem.code
                return self._refuse(call.name, problem)
            return self._broken(call.name, problem)
        return 0

    # --- hccl -------------------------------------------------------------------------------------------------------

    def _collective(self, rule: Rule) -> int | None:
        extra = {"simulator": self} if rule.wants_simulator else {}
        where = rule.signature.index("stream") if "stream" in rule.signature else -1

        def collective(*raw: Any) -> int:
            call = Call(rule.name, raw[:where] if where == len(raw) - 1 else raw)
            try:
                result = rule.function(*raw, **extra)
                if callable(result):
                    return self.enqueue(raw[where], result, call)
                return int(result or 0)
            except Refused as refusal:
                call.refused = refusal.code
                self.ledger.add(call)
                return self._refuse(rule.name, refusal)
            except Exception as problem:
                return self._broken(rule.name, problem)

        callback = ctypes.CFUNCTYPE(ctypes.c_int, *rule.c_types)(collective)
        self._keep.append(callback)
        return ctypes.cast(callback, ctypes.c_void_p).value

    # --- streams ----------------------------------------------------------------------------------------------------

    def enqueue(self, stream: int | None, compute: Compute, call: Call) -> int:
        """Queues a closure on a stream (None: the device's default stream) and notes the call.

        It runs when the stream does, not now; on a captured stream it is recorded instead. With tensors of one card
        on a stream of another it fails when it runs, as hardware does.

        Returns:
            0, or the runtime's error code, with its text set.
        """
        token = self._keep_work(call, placed(call, compute))
        code = int(self._acl.cannsim_enqueue(stream, token))
        if code:
            self._forgotten(token)
        return code

    def _keep_work(self, call: Call, compute: Compute) -> int:
        """Notes the call, and keeps its closure under the returned number until the stream has run it."""
        token = next(self._numbers)
        self._work[token] = compute, call
        self.ledger.add(call)
        return token

    def _was_captured(self, token: int, graph: int) -> None:
        call = self._work[token][1]
        call.captured = True
        self._captured.setdefault(graph, {})[token] = call

    def set_quiet(self, milliseconds: int) -> None:
        """After so long without new work a stream runs although nobody waits for it; negative: never."""
        self._acl.cannsim_set_quiet(ctypes.c_int64(milliseconds))

    def pending(self, stream: int | None) -> int:
        """How much on a stream has been queued and has not run."""
        return int(self._acl.cannsim_pending(stream))

    def memory_used(self, device: int) -> int:
        """Bytes that torch_npu's allocator holds on a card; ``memory_peak`` the most so far."""
        return int(self._acl.cannsim_memory_used(device))

    def memory_peak(self, device: int) -> int:
        return int(self._acl.cannsim_memory_peak(device))

    def release_python_in_waits(self) -> int:
        """Makes torch_npu's waits for its queue let go of Python's lock; how many places. torch_npu must be loaded."""
        return int(self._acl.cannsim_release_python_in_waits())

    def retain(self, thing: Any) -> None:
        """Keeps something alive as long as the process: the libraries point to it."""
        self._keep.append(thing)

    def shutdown(self) -> None:
        """Runs what is queued and ends the streams' threads. Nothing can be launched afterwards."""
        self._acl.cannsim_shutdown()

    def _run(self, token: int, keep: int, stream: int, device: int) -> int:
        compute, call = self._work[token] if keep else self._work.pop(token)
        call.stream = stream
        if call.device != device:
            # Tensors without elements touch no memory.
            touched = [tensor for tensor in call.tensors if tensor.numel]
            if touched:
                compute = illegal_address(call.name, touched[0], device)
            call.device = device
        torch._C._set_grad_enabled(False)
        try:
            compute()
        except Refused as refusal:
            return self._refuse(call.name, refusal)
        except Exception as problem:
            return self._broken(call.name, problem, Status.DEVICE_FAULT)
        return 0

    def _replayed(self, graph: int) -> None:
        for call in list(self._captured.get(graph, {}).values()):
            self.ledger.add(replace(call, captured=False, replayed=True))

    def _forgotten(self, token: int) -> None:
        self._work.pop(token, None)
        for calls in list(self._captured.values()):
            calls.pop(token, None)

    # --- errors -----------------------------------------------------------------------------------------------------

    def _refuse(self, name: str, refusal: Refused) -> int:
        operator = name.removeprefix("aclnn")
        self._acl.cannsim_set_error(refusal.report(operator, self.settings.error_text).encode())
        return refusal.code

    def _broken(self, name: str, problem: Exception, code: int = Status.NOT_SIMULATED) -> int:
        """A defect of a rule, not a refusal of CANN's: told apart, and printed where it happened."""
        print(f"cannsim: the rule of {name} failed", file=sys.stderr)
        traceback.print_exception(problem, file=sys.stderr)
        text = f"cannsim: the rule of {name} failed: {type(problem).__name__}: {problem}"
        self._acl.cannsim_set_error(text.encode())
        return int(code)
