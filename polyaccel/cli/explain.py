"""``polyaccel explain MODEL``: how every site of a model is planned on a backend, and what an answer launches."""

from __future__ import annotations

import argparse
import json

from polyaccel.cli.options import Commands, add_engine_options, open_llm


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("explain", help="print the dispatch plan, and the launches of a short answer")
    add_engine_options(parser)
    parser.add_argument(
        "--tokens", type=int, default=4, metavar="N", help="tokens to generate for the ledger; 0 runs nothing"
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from polyaccel.engine.sampling_params import SamplingParams

    with open_llm(options) as llm:
        if options.tokens > 0:
            params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
            prompts = [[1, 2, 3, 4]] * (1 + len(options.load_adapter))
            names = [text.partition("=")[0] for text in options.load_adapter]
            llm.generate(prompts, params, adapter=[None, *names])
        explanation = llm.explain()
        receipts = {name: llm.adapters.receipt(name) for name in llm.adapters}
    if options.json:
        adapters = {name: receipt.to_dict() for name, receipt in receipts.items()}
        print(json.dumps({**explanation.to_dict(), "adapters": adapters}, indent=2))
        return 0
    print(explanation)
    for receipt in receipts.values():
        print(f"\n{receipt}")
    return 0
