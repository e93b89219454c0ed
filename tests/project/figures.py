"""The tables of the documentation that are written from the benchmarks' results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tests.project.source import ROOT

CPU, H100 = "amd-epyc-2c", "nvidia-h100-80gb-hbm3"
Row = dict[str, Any]


def speed_tables() -> str:
    """Tokens a second on the CPU."""
    plain = [
        [
            f"{row['batch']}",
            f"{row['prompt_tokens']}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_ratio']:.2f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_ratio']:.2f}",
        ]
        for row in _rows(CPU, "cpu_vs_transformers")
    ]
    adapted = [
        [
            f"{row['prompt_tokens']}",
            f"{row['base_tokens_per_s']:.1f}",
            f"{row['adapters_tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in _rows(CPU, "cpu_adapters")
    ]
    return (
        _table("batch | prompt | prefill, tokens/s | ratio | decode, tokens/s | ratio", plain)
        + "\n"
        + _table("8 requests, prompt | base, tokens/s | 8 adapters of rank 8 on all linear layers | ratio", adapted)
    )


def peer_tables() -> str:
    """A decode step and a prefill on an H100, and what adapters add to them, here and with vLLM's kernels."""
    rows = _rows(H100, "cuda_peers")
    decode = [row for row in rows if row["what"] == "decode"]
    steps = []
    for batch in sorted({row["batch"] for row in decode}):
        of = _finder([row for row in decode if row["batch"] == batch], "kernels", "adapters")
        ours = of("polyaccel", "none")
        cells = [f"{batch}", f"{ours['ms']:.2f} ({ours['of_floor']:.0%})", f"{of('cublas', 'none')['ms']:.2f}"]
        for mix in ("one" if batch == 1 else "all rows one", "each row its own"):
            cells += [_added(of(side, mix)) for side in ("polyaccel", "vllm")]
        steps.append(cells)
    prefill = [row for row in rows if row["what"] == "prefill"]
    layers = []
    for segments in sorted({row["segments"] for row in prefill}):
        of = _finder([row for row in prefill if row["segments"] == segments], "kernels", "adapters")
        found = [of(side, "each its own") for side in ("polyaccel", "vllm")]
        cells = [f"{row['added_us_per_layer']:.0f} ({row['added']})" for row in found]
        layers.append([f"{segments}", f"{of('polyaccel', 'none')['us_per_layer']:.0f}", *cells])
    return (
        _table(
            "batch | step, ms (of the floor) | with cuBLAS | one adapter on all rows adds, ms | vLLM's kernels "
            "| each row its own adds, ms | vLLM's kernels",
            steps,
        )
        + "\n"
        + _table("prefill of 2,048 tokens, segments | layer, us | adapters of rank 16 add, us | vLLM's kernels", layers)
    )


def shape_table() -> str:
    """What adapters of three ranks add to decode steps of models of several shapes on an H100."""
    cells = []
    for shape in ("0.1B", "1B", "7B", "13B", "70B/4"):
        rows = [row for row in _rows(H100, f"cuda_shapes_{shape.replace('/', '_')}") if "shape" in row]
        for batch in sorted({row["batch"] for row in rows}):
            of = _finder([{"rank": 0, **row} for row in rows if row["batch"] == batch], "kernels", "adapters", "rank")
            # The step alone is measured beside every rank.
            plain = of("polyaccel", "none", 0)
            line = [shape, f"{batch}", f"{plain['ms']:.2f} ({plain['of_floor']:.0%})"]
            one = "one" if batch == 1 else "all rows one"
            for mix, rank in ((one, 8), (one, 16), (one, 64), ("eight in turn", 8)):
                line += [_added(of(side, mix, rank)) for side in ("polyaccel", "vllm")]
            cells.append(line)
    return _table(
        "shape | batch | step, ms (of the floor) | one adapter of rank 8 adds, ms | vLLM's kernels | one of rank 16 "
        "| vLLM's kernels | one of rank 64 | vLLM's kernels | eight of rank 8 in turn | vLLM's kernels",
        cells,
    )


def engine_tables() -> str:
    """Decode through the public API on an H100, and start-up."""
    rows = _rows(H100, "cuda_engine")
    decode = [row for row in rows if row["what"] == "decode"]
    steps = []
    for batch, loaded in sorted({(row["batch"], row["loaded"]) for row in decode}):
        of = _finder([row for row in decode if (row["batch"], row["loaded"]) == (batch, loaded)], "adapters")
        plain = of("none")
        cells = [f"{batch}", f"{loaded}", f"{plain['tokens_per_s']:,.0f}", f"{plain['ms_per_step']:.2f}"]
        for mix in ("one" if batch == 1 else "all rows one", "each row its own"):
            cells.append(_added(of(mix)))
        steps.append([*cells, f"{plain['host_gap']:.1%}"])
    starts = [
        [
            row["kernels"],
            f"{row['to_first_token_s']:.1f}",
            f"{row['without_copy_s']:.1f}",
            f"{row['import_s']:.1f}",
            f"{row['first_token_s']:.1f}",
        ]
        for row in rows
        if row["what"] == "start-up"
    ]
    return (
        _table(
            "batch | adapters loaded | tokens/s | ms a step | one adapter on all rows adds, ms "
            "| each row its own adds, ms | no kernel runs in",
            steps,
        )
        + "\n"
        + _table(
            "kernel cache | first token, s | without the weights' copy | of that imports | of that prefill", starts
        )
    )


def invariance_table() -> str:
    """What ``batch_invariant`` costs on an H100."""
    rows = _rows(H100, "cuda_batch_invariant")
    cells = []
    for row in rows:
        if row["what"] == "prefill":
            what, unit, names = f"prefill of {row['tokens']:,} tokens", "ms", ("ms", "invariant_ms")
        elif row["what"] == "decode":
            what, unit, names = f"decode, batch {row['batch']}", "tokens/s", ("tokens_per_s", "invariant_tokens_per_s")
        else:
            continue
        adapters = "one on every row" if row["adapter"] != "none" else "none"
        figures = [f"{row[name]:,.1f}" for name in names]
        cells.append([what, adapters, *(f"{figure} {unit}" for figure in figures), f"{row['cost']:.0%}"])
    return _table("what | adapter of rank 32 | without | with | more time", cells)


def _rows(device: str, benchmark: str) -> list[Row]:
    path = ROOT / "benchmarks" / "results" / device / f"{benchmark}.json"
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _finder(rows: Sequence[Row], *keys: str) -> Callable[..., Row]:
    """The one row with these values of the keys; an empty one if there is none."""
    by_values = {tuple(row[key] for key in keys): row for row in rows}
    return lambda *values: by_values.get(values, {})


def _added(row: Row) -> str:
    """Empty for a mix that was not measured."""
    if not row:
        return ""
    share = row["added"] if isinstance(row["added"], str) else f"{row['added']:.0%}"
    return f"{row['added_ms']:.2f} ({share})"


def _table(head: str, cells: Sequence[Sequence[str]]) -> str:
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | "))]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"
