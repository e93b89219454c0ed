"""``polyaccel generate MODEL PROMPT...``"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from polyaccel.cli.options import (
    Commands,
    adapter_mix,
    add_engine_options,
    add_sampling_options,
    open_llm,
    sampling_params,
)
from polyaccel.observe.progress import ProgressBar


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("generate", help="answer prompts, together in one batch")
    add_engine_options(parser)
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='"-" reads one prompt from standard input')
    add_sampling_options(parser)
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object a completion, a line each")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in options.prompts]
    params, mix = sampling_params(options), adapter_mix(options.adapter)
    with open_llm(options) as llm, ProgressBar("generating", unit="answers", enabled=not options.no_progress) as bar:
        if options.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            completions = llm.chat(conversations, params, adapter=mix, progress=bar)
        else:
            completions = llm.generate(prompts, params, adapter=mix, progress=bar)
    for prompt, completion in zip(prompts, completions, strict=True):
        if options.json:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}))
        else:
            print(completion.text)
    return 0
