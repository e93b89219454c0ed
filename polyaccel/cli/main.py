"""``polyaccel COMMAND``. Options have the names of the Python API, with dashes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from polyaccel.backend.errors import PolyaccelError
from polyaccel.cli import conformance

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed (the error is on stderr), 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [conformance.COMMAND]:
        return conformance.hand_on(words[1:])
    from polyaccel.cli.options import UsageError

    parser = build_parser()
    options = parser.parse_args(words)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        # Here rather than at the interpreter's exit, where a reader that has gone is an error.
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"polyaccel: {error}", file=sys.stderr)
        return EXIT_USAGE
    except PolyaccelError as error:
        print(f"polyaccel: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except UnicodeDecodeError as error:
        print(f"polyaccel: standard input is not {error.encoding} text: {error.reason}", file=sys.stderr)
        return EXIT_USAGE
    except UnicodeEncodeError as error:
        # The text is not in the message: what stdout cannot show, stderr may not show either.
        print(
            f"polyaccel: standard output is {error.encoding} and cannot show the answer; PYTHONUTF8=1 makes it UTF-8",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return 0


def _discard_stdout() -> None:
    """Let what is still in stdout's buffer go nowhere; its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _one_line(error: PolyaccelError) -> str:
    """The message without a worker's traceback, its lines joined."""
    message = str(error).partition("\n--- traceback")[0]
    return "; ".join(line.strip() for line in message.splitlines() if line.strip())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, for the program, its help and its documentation test."""
    # Here, so that the conformance suite can be run without the engine's modules.
    from polyaccel.cli import backends, bench, cache, chat, explain, generate, new_backend, warm

    parser = argparse.ArgumentParser(
        prog="polyaccel", description="An LLM inference engine whose hardware is a plugin."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (generate, chat, backends, explain, bench, warm, cache, conformance, new_backend):
        module.add_parser(commands)
    return parser


def _version() -> str:
    import polyaccel

    return f"polyaccel {polyaccel.__version__}"


if __name__ == "__main__":
    sys.exit(main())
