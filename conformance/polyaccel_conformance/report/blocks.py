"""One block for each kind of failure: the minimal case, its worst element, where the wrong ones lie, how to replay."""

from __future__ import annotations

from polyaccel_conformance.results import FailureGroup


def failure_block(group: FailureGroup) -> str:
    """Plain text of several lines; the first one names operator, check and cause."""
    failure = group.failure
    lines = [f"{group.operator}: {group.check}: {group.cause} ({group.cases} cases)"]
    axes = ", ".join(f"{name}={value}" for name, value in sorted(_shown(group).items()))
    lines.append(f"  case     {group.result.case.key}: {axes}")
    lines.append(f"  ran as   {group.result.implementation or 'nothing: the plan was not reached'}")
    lines.append(f"  found    {failure.message}")
    if failure.index or failure.got is not None:
        lines.append(f"  worst    {failure.output}{list(failure.index)}: {_element(group)}")
    if failure.term:
        lines.append(f"  bound    mostly {failure.term}")
    if failure.pattern:
        lines.append(f"  wrong    {failure.pattern}")
    if group.path:
        lines.append(f"  replay   polyaccel conformance replay {group.path}")
    return "\n".join(lines)


def _element(group: FailureGroup) -> str:
    failure = group.failure
    parts = [f"got {_number(failure.got)}, expected {_number(failure.expected)}"]
    if failure.error is not None and failure.tolerance is not None:
        ratio = failure.error / failure.tolerance if failure.tolerance else float("inf")
        parts.append(f"error {failure.error:.3g}, tolerance {failure.tolerance:.3g}, err/tol {ratio:.3g}")
    return "; ".join(parts)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.9g}"


def _shown(group: FailureGroup) -> dict[str, object]:
    """Axes whose value says something: not the ones that are off."""
    quiet = {"alias": "none", "device": "current", "stream": "default", "ranks": 1, "skew": ()}
    return {name: value for name, value in group.result.case.axes().items() if quiet.get(name, "") != value}
