"""Host cost of a decode step on the null backend: everything the engine does a step but the device's work.

    python benchmarks/bench_host_step.py [--steps 512] [--temperature 1.0]

Scheduling, step building, metadata, graph replay, collection and token bookkeeping, through the inline executor and the
real runner; the null backend answers at once with scripted tokens. Every sequence decodes throughout, overlap is on,
block allocation and prefix hashing are in the figures, admission and prefill are not. One thread. Limits: 0.25 ms at
batch 64, 1.0 ms at batch 256, flat in the number of loaded adapters.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import add_common_options, save, smollm2

from polyaccel.backend.null.backend import NullBackend
from polyaccel.engine.adapter_manager import AdapterManager
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.core import EngineCore
from polyaccel.engine.inline_executor import InlineExecutor
from polyaccel.engine.sampling_params import SamplingParams

PROMPT = 128
ADAPTER = Path(__file__).parents[1] / "examples" / "adapters" / "pirate"
LIMITS_MS = {64: 0.25, 256: 1.0}


def measure(batch: int, adapters: int, steps: int, temperature: float) -> dict[str, object]:
    config = EngineConfig(
        model=str(smollm2()),
        backend="null",
        max_model_len=PROMPT + steps + 128,
        max_num_seqs=batch,
        adapter_slots=max(1, adapters),
        adapter_rank_rows=max(1, adapters) * 8,
    )
    executor = InlineExecutor(config, NullBackend())
    manager = AdapterManager(executor, on_change=lambda: None)
    for index in range(adapters):
        handle = executor.prepare_adapter(str(ADAPTER))
        manager.commit(f"adapter-{index}", str(ADAPTER), handle, pin=False, options={})
    core = EngineCore(executor, manager, eos_token_ids=(2,), max_batched_tokens=8192)
    generator = np.random.default_rng(0)
    params = SamplingParams(temperature=temperature, ignore_eos=True)
    for index in range(batch):
        prompt = generator.integers(4, 32000, size=PROMPT - index % 16)
        mix = ((f"adapter-{index % adapters}", 1.0),) if adapters else ()
        core.add_request(str(index), prompt, params, mix)
    produced = 0
    while produced < 4 * batch:
        produced += len(core.step().ids)
    spent = np.zeros(steps)
    processor = time.thread_time()
    for step in range(steps):
        begun = time.perf_counter()
        events = core.step()
        spent[step] = time.perf_counter() - begun
        if len(events.ids) != batch:
            raise SystemExit(f"the batch is not steady: {len(events.ids)} tokens of {batch} sequences")
    processor = time.thread_time() - processor
    manager.close()
    executor.close()
    return {
        "batch": batch,
        "adapters": adapters,
        "median_ms": round(float(np.median(spent)) * 1e3, 4),
        "mean_ms": round(float(spent.mean()) * 1e3, 4),
        "p99_ms": round(float(np.percentile(spent, 99)) * 1e3, 4),
        "processor_ms": round(processor * 1e3 / steps, 4),
        "limit_ms": LIMITS_MS.get(batch),
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    add_common_options(parser)
    arguments = parser.parse_args()
    rows = [
        measure(batch, adapters, arguments.steps, arguments.temperature)
        for batch in (1, 64, 256)
        for adapters in (0, 8, 64)
    ]
    save("host_step", rows, enabled=not arguments.no_save)


if __name__ == "__main__":
    main()
