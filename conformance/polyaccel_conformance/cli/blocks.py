"""What is printed of a failure and of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from polyaccel_conformance.case import Case
from polyaccel_conformance.results import FailureGroup, RunResult

PLAIN = {"alias": "none", "device": "current", "stream": "default", "ranks": 1, "skew": ()}
"""Axes that are not worth a word at these values."""
WIDTH = 118


def describe(case: Case) -> str:
    """``linear float32 dims.k=16 ... data=normal seed=0``."""
    axes = {path: value for path, value in case.axes().items() if PLAIN.get(path, object()) != value}
    dtype = axes.pop("dtype")
    return " ".join(
        [case.operator, str(dtype), *(f"{path}={value}" for path, value in axes.items()), f"seed={case.seed}"]
    )


def failure_block(group: FailureGroup, *, so_far: bool = False) -> str:
    """One group of failures: minimal case, worst element, bound, pattern, and how to see it again.

    ``so_far``: while the run goes on; there may be more cases.
    """
    return "\n".join(_failure(group, so_far))


def _failure(group: FailureGroup, so_far: bool) -> Iterator[str]:
    failure = group.failure
    cases = f"{group.cases} case{'s' if group.cases != 1 else ''}{' so far' if so_far else ''}"
    yield f"FAILED {group.operator}: {group.check}: {group.cause} ({cases})"
    yield from _wrapped("case", describe(group.result.case))
    if group.shrink:
        yield f"  shrunk    {group.shrink} simpler cases tried in {group.shrink_seconds:.1f} s"
    if group.result.implementation:
        yield f"  ran       {group.result.implementation} ({group.result.kind})"
    for number, line in enumerate(failure.message.splitlines() or [""]):
        yield f"  {'' if number else 'message':<10}{line}"
    if failure.got is not None and failure.output:
        where = f"{failure.output}{list(failure.index)}" if failure.index else failure.output
        expected = "?" if failure.expected is None else f"{failure.expected:.9g}"
        worst = f"{where}: got {failure.got:.9g}, expected {expected}"
        if failure.error is not None and failure.tolerance is not None:
            worst += f", err {failure.error:.3g}, tol {failure.tolerance:.3g}"
            worst += f", err / tol {failure.error / failure.tolerance:.3g}" if failure.tolerance > 0 else ""
        yield f"  worst     {worst}"
    if failure.term:
        yield f"  bound     mostly {failure.term}"
    if failure.pattern:
        yield f"  wrong     {failure.pattern}"
    if group.path:
        yield f"  replay    {replay_command(group)}"


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12, break_on_hyphens=False
    )


def replay_command(group: FailureGroup) -> str:
    """What shows this failure again; the case file says on what."""
    return f"polyaccel conformance replay {group.path}"


def _listed(name: str, items: Iterable[str]) -> list[str]:
    return textwrap.wrap(f"{name}: {', '.join(items)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def summary(result: RunResult) -> str:
    """The last lines of a run."""
    return "\n".join(_summary(result))


def _summary(result: RunResult) -> Iterator[str]:
    header = result.header
    if result.operators:
        width = max(len(state.operator) for state in result.operators)
        for state in result.operators:
            if state.operator in header.out_of_scope:
                continue
            if state.reason and not state.cases:
                yield f"{state.operator:<{width}}  {state.verdict}: {state.reason}"
                continue
            kinds = ", ".join(f"{count} {kind or 'unplanned'}" for kind, count in state.kinds.items())
            head = f", err / tol <= {max(state.headroom.values()):.2f}" if state.headroom else ""
            failed = f", {state.failed} failed" if state.failed else ""
            failed += f", {state.not_promised} not promised" if state.not_promised else ""
            yield f"{state.operator:<{width}}  {state.verdict}: {state.cases} cases ({kinds}){failed}{head}"
    idle = [check.check for check in result.checks if check.verdict == "not exercised" and not check.cases]
    if idle:
        yield from _listed("asked by no case", idle)
    for check in result.checks:
        if check.verdict != "passed" and check.check not in idle:
            detail = f"{check.failures} of {check.cases} cases" if check.failures else check.reason
            yield f"check {check.check}: {check.verdict}: {detail}"
    if result.empty_cells:
        shown = "; ".join(result.empty_cells[:8])
        more = f"; and {len(result.empty_cells) - 8} more" if len(result.empty_cells) > 8 else ""
        yield f"required cells in which nothing ran: {shown}{more}"
    if header.out_of_scope:
        yield from _listed("not in the table", header.out_of_scope)
    if result.device_lost:
        yield f"DEVICE LOST: {result.device_lost}"
    if result.incomplete:
        yield f"incomplete: {result.incomplete}"
    slow = sum(state.slow for state in result.operators)
    excused = sum(state.not_promised for state in result.operators)
    apart = f", {excused} cases differ in what was never promised" if excused else ""
    share = f"{100 * slow / max(result.cases, 1):.1f} % above 10 ms of CPU"
    yield (
        f"{result.exit_code.name}: {result.cases} cases of {header.subject.label}, profile {header.profile}, seed "
        f"{header.seed}, {len(result.failures)} kinds of failure{apart}, {result.seconds:.1f} s ({share})"
    )
