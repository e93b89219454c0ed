"""What changed between two bundles or runs of one backend, or of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NOTABLE = 1.25
"""Factor by which the worst err / tol of an output must differ to be mentioned."""


def diff_summaries(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Levels, operators, checks, environment: what differs, one line each, ``before -> after``."""
    lines = [f"{old['title']} -> {new['title']}"]
    sections = (
        ("levels", _levels(old, new)),
        ("operators", _operators(old, new)),
        ("checks", _checks(old, new)),
        ("environment", _environment(old, new)),
    )
    for title, found in sections:
        changed = list(found)
        lines += [title, *(f"  {line}" for line in changed)] if changed else []
    return "\n".join(lines if len(lines) > 1 else [*lines, "no difference"]) + "\n"


def _levels(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    one = {level["level"]: level for level in old["levels"]}
    two = {level["level"]: level for level in new["levels"]}
    for name in sorted(one.keys() | two.keys()):
        was, now = one.get(name), two.get(name)
        if was is None or now is None:
            yield f"{name}: {'is new' if was is None else 'is gone'}"
        elif (was["verdict"], was["title"]) != (now["verdict"], now["title"]):
            why = f" ({'; '.join(now['reasons'])})" if now["reasons"] else ""
            yield f"{was['title']}, {was['verdict']} -> {now['title']}, {now['verdict']}{why}"


def _operators(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    one, two = _by(old, "operators", "operator"), _by(new, "operators", "operator")
    for name in sorted(one.keys() | two.keys()):
        was, now = one.get(name, {}), two.get(name, {})
        if was.get("failed", 0) != now.get("failed", 0):
            yield f"{name}: failed {was.get('failed', 0)} -> {now.get('failed', 0)}"
        if was.get("not_promised", 0) != now.get("not_promised", 0):
            yield f"{name}: not promised {was.get('not_promised', 0)} -> {now.get('not_promised', 0)}"
        if sorted(was.get("kinds", {})) != sorted(now.get("kinds", {})):
            yield f"{name}: runs as {_names(was.get('kinds', {}))} -> {_names(now.get('kinds', {}))}"
        for output in sorted(was.get("headroom", {}).keys() & now.get("headroom", {}).keys()):
            a, b = float(was["headroom"][output]), float(now["headroom"][output])
            if max(a, b) > NOTABLE * min(a, b):
                yield f"{name} {output}: worst err/tol {a:.3f} -> {b:.3f}"


def _checks(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    one, two = _by(old, "checks", "check"), _by(new, "checks", "check")
    for name in sorted(one.keys() | two.keys()):
        was, now = one.get(name, {}).get("verdict", "not asked"), two.get(name, {}).get("verdict", "not asked")
        if was != now:
            yield f"{name}: {was} -> {now}"


def _environment(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    one, two = old["result"]["header"]["environment"], new["result"]["header"]["environment"]
    for name in sorted(one.keys() | two.keys()):
        if one.get(name) != two.get(name):
            yield f"{name}: {one.get(name)} -> {two.get(name)}"


def _by(summary: Mapping[str, Any], section: str, key: str) -> dict[str, Mapping[str, Any]]:
    return {item[key]: item for item in summary["result"][section]}


def _names(kinds: Mapping[str, int]) -> str:
    return ", ".join(sorted(kinds)) or "nothing"
