"""The executor of one rank in the engine's own process."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.backend import Backend, RankAddress
from polyaccel.backend.errors import EngineDead, PolyaccelError
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.executor import Executor, PreparedHandle
from polyaccel.engine.messages import StepMessage, StepResult
from polyaccel.engine.runner import PendingStep, PreparedAdapter, Runner
from polyaccel.lora.receipt import AdapterReceipt
from polyaccel.parallel.thread import call_on_fresh_thread


class InlineExecutor(Executor):
    """Steps run when they are submitted; a device that computes asynchronously still overlaps with the host."""

    def __init__(
        self, config: EngineConfig, backend: Backend, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._runner = Runner(config, RankAddress(rank=0, world_size=1, init_method=""), backend)
        self._pending: deque[PendingStep] = deque()
        self._prepared: dict[int, PreparedAdapter] = {}
        self._tokens = itertools.count(1)
        try:
            self.capacity = call_on_fresh_thread(lambda: self._runner.load(progress))
        except BaseException:
            self._runner.close()
            raise

    def submit(self, message: StepMessage) -> None:
        try:
            self._pending.append(self._runner.execute(message))
        except Exception as error:
            raise self._dead(error) from error

    def collect(self) -> StepResult:
        try:
            return self._pending.popleft().wait()
        except Exception as error:
            raise self._dead(error) from error

    def prepare_adapter(
        self, path: str, *, allow_unmatched: bool = False, allow_no_effect: bool = False
    ) -> PreparedHandle:
        prepared = call_on_fresh_thread(
            lambda: self._runner.prepare_adapter(path, allow_unmatched=allow_unmatched, allow_no_effect=allow_no_effect)
        )
        handle = PreparedHandle(token=next(self._tokens), max_rank=prepared.matched.max_rank)
        self._prepared[handle.token] = prepared
        return handle

    def commit_adapter(self, handle: PreparedHandle, name: str, where: SlotRange, generation: int) -> AdapterReceipt:
        return self._runner.commit_adapter(self._prepared.pop(handle.token), name, where, generation)

    def discard_adapter(self, handle: PreparedHandle) -> None:
        self._prepared.pop(handle.token, None)

    def clear_adapter(self, slot: int) -> None:
        self._runner.clear_adapter(slot)

    def merge_adapter(self, path: str, weight: float) -> None:
        self._runner.merge_adapter(path, weight)

    def unmerge_adapters(self) -> None:
        self._runner.unmerge_adapters()

    def explain(self) -> list[dict[str, object]]:
        return [self._runner.explain()]

    def collectives(self) -> list[list[tuple[str, int]]]:
        return [self._runner.collectives()]

    def close(self) -> None:
        self._pending.clear()
        self._runner.close()

    @staticmethod
    def _dead(error: Exception) -> EngineDead:
        kind = "" if isinstance(error, PolyaccelError) else f"{type(error).__name__}: "
        return EngineDead(f"a step failed: {kind}{error}")
