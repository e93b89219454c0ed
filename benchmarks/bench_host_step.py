"""Host cost of a decode step: everything the engine does a step but the device's work.

    python benchmarks/bench_host_step.py [--steps 512] [--block-size 16] [--json]

An executor that answers at once stands in for the device, so the time of a step is scheduling, step building,
submission, collection and token bookkeeping, block allocation and prefix hashing included. Overlap is on. The batch is
steady: what admission and prefill cost is not in the figures. On a busy machine read the processor time, which counts
this thread alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Hashable

import numpy as np

from polyaccel.engine.core import EngineCore
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
from polyaccel.engine.sampling_params import SamplingParams

PROMPT = 128


class InstantExecutor:
    """Answers every row of logits with id 1."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._results: deque[StepResult] = deque()

    def submit(self, message: StepMessage) -> None:
        ids = np.ones(len(message.inputs.sample_slots), dtype=np.int64)
        self._results.append(StepResult(step_id=message.step_id, ids=ids))

    def collect(self) -> StepResult:
        return self._results.popleft()


class ResidentAdapters:
    """Every adapter has a slot."""

    def __init__(self, count: int) -> None:
        self._slots = {f"adapter-{index}": index for index in range(count)}

    def acquire(self, mix: tuple[tuple[str, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((self._slots[name], weight) for name, weight in mix)

    def release(self, mix: tuple[tuple[str, float], ...]) -> None:
        pass

    def cache_key(self, mix: tuple[tuple[str, float], ...]) -> Hashable:
        return mix


def measure(batch: int, adapters: int, steps: int, block_size: int, temperature: float) -> dict[str, float]:
    length = PROMPT + steps + 96
    capacity = Capacity(
        kv_blocks=batch * (length // block_size + 2),
        kv_block_size=block_size,
        request_slots=batch,
        max_model_len=length,
        vocabulary=32000,
        adapter_slots=adapters,
        rank_rows=adapters * 16,
        world_size=1,
    )
    core = EngineCore(
        InstantExecutor(capacity), ResidentAdapters(adapters), eos_token_ids=(2, 3), max_batched_tokens=8192
    )
    generator = np.random.default_rng(0)
    params = SamplingParams(temperature=temperature)
    for index in range(batch):
        prompt = generator.integers(4, 32000, size=PROMPT - index % block_size)
        mix = ((f"adapter-{index % adapters}", 1.0),) if adapters else ()
        core.add_request(str(index), prompt, params, mix)
    produced = 0
    while produced < 4 * batch:
        produced += len(core.step().ids)
    spent = np.zeros(steps)
    cpu = time.thread_time()
    for step in range(steps):
        start = time.perf_counter()
        events = core.step()
        spent[step] = time.perf_counter() - start
        if len(events.ids) != batch:
            raise RuntimeError(f"the batch is not steady: {len(events.ids)} tokens of {batch} sequences")
    cpu = time.thread_time() - cpu
    milliseconds = spent * 1e3
    return {
        "batch": batch,
        "adapters": adapters,
        "mean_ms": float(milliseconds.mean()),
        "median_ms": float(np.median(milliseconds)),
        "cpu_ms": cpu * 1e3 / steps,
        "p99_ms": float(np.percentile(milliseconds, 99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="one line of JSON a case")
    arguments = parser.parse_args()
    for batch in (1, 64, 256):
        for adapters in (0, 8, 64):
            row = measure(batch, adapters, arguments.steps, arguments.block_size, arguments.temperature)
            if arguments.json:
                print(json.dumps(row))
            else:
                print(
                    f"batch {batch:4d}  adapters {adapters:3d}  mean {row['mean_ms']:.3f} ms  "
                    f"median {row['median_ms']:.3f} ms  p99 {row['p99_ms']:.3f} ms  processor {row['cpu_ms']:.3f} ms"
                )


if __name__ == "__main__":
    main()
