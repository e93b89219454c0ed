"""``polyaccel chat MODEL``: a conversation at the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from polyaccel.backend.errors import AdapterError, RequestError
from polyaccel.cli.options import (
    Commands,
    UsageError,
    adapter_mix,
    add_engine_options,
    add_sampling_options,
    open_llm,
    sampling_params,
)

HELP = "/adapter NAME[=WEIGHT] or /adapter none, /reset, /quit"


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("chat", help="talk to a model; reads lines from standard input")
    add_engine_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    params, mix = sampling_params(options), adapter_mix(options.adapter)
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(beginning)
    with open_llm(options) as llm:
        for line in _lines():
            if line == "/quit":
                break
            if line == "/reset":
                messages = list(beginning)
                continue
            if line.startswith("/adapter "):
                name = line.removeprefix("/adapter ").strip()
                try:
                    mix = None if name == "none" else adapter_mix(name)
                except UsageError as error:
                    print(error, file=sys.stderr)
                continue
            if line.startswith("/"):
                print(HELP)
                continue
            messages.append({"role": "user", "content": line})
            answer: list[str] = []
            try:
                for delta in llm.stream_chat(messages, params, adapter=mix):
                    answer.append(delta.text)
                    print(delta.text, end="", flush=True)
            except (RequestError, AdapterError) as error:
                messages.pop()
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                continue
            print()
            messages.append({"role": "assistant", "content": "".join(answer)})
    return 0


def _lines() -> Iterator[str]:
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
