"""The result of a campaign as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polyaccel_conformance.mutation.campaign import Outcome
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.survivors import Explanation
from polyaccel_conformance.mutation.unit import PREFIX

MARK = "<!-- result -->"

Label = Callable[[Edit], str]


def by(label: Label, edits: Sequence[Edit], outcomes: Mapping[str, Outcome], head: str) -> list[str]:
    """Mutants, killed by cases and by unit tests, and survived, by file or by rule, with a last row for all."""
    run = [edit for edit in edits if edit.key in outcomes]
    mutants = Counter(label(edit) for edit in run)
    killed = Counter(label(edit) for edit in run if outcomes[edit.key].killed)
    unit = Counter(label(edit) for edit in run if outcomes[edit.key].killed.startswith(PREFIX))
    lines = [f"| {head} | mutants | killed by cases | by unit tests | survived |", "|---|---|---|---|---|"]
    for name, n in sorted(mutants.items()):
        lines.append(f"| {name} | {n} | {killed[name] - unit[name]} | {unit[name]} | {n - killed[name]} |")
    total, dead, late = mutants.total(), killed.total(), unit.total()
    share = f"{(dead - late) / max(total, 1):.1%}", f"{dead / max(total, 1):.1%}"
    lines.append(f"| all | {total} | {dead - late} ({share[0]}) | {late} ({share[1]} with these) | {total - dead} |")
    return lines


def killers(edits: Sequence[Edit], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Which checks were the first to fail."""
    counts = Counter(outcomes[edit.key].killed for edit in edits if edit.key in outcomes)
    late = [name for name in counts if name.startswith(PREFIX)]
    counts["unit tests"] = sum(counts.pop(name) for name in late)
    counts.pop("", None)
    lines = ["| first to fail | mutants |", "|---|---|"]
    return [*lines, *(f"| `{check}` | {n} |" for check, n in counts.most_common())]


def survivors(edits: Sequence[Edit], outcomes: Mapping[str, Outcome], explained: Sequence[Explanation]) -> list[str]:
    """Every survivor with its place, its change and its explanation."""
    why = {explanation.key: f"{explanation.why}: {explanation.reason}" for explanation in explained}
    lines = ["| where | before | after | why it survives |", "|---|---|---|---|"]
    for edit in edits:
        if edit.key in outcomes and not outcomes[edit.key].killed:
            cells = (edit.where, _code(edit.before), _code(edit.after), why.get(edit.key, "not explained"))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def markdown(edits: Sequence[Edit], outcomes: Mapping[str, Outcome], explained: Sequence[Explanation]) -> str:
    """The tables by file and by rule, the killers, the survivors."""
    parts = [
        by(lambda edit: edit.file, edits, outcomes, "file"),
        by(lambda edit: edit.kind, edits, outcomes, "rule"),
        killers(edits, outcomes),
        survivors(edits, outcomes, explained),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def write(path: Path, text: str) -> None:
    """The text as a file, or instead of what follows the line :data:`MARK` in one that has it."""
    head, mark, _ = path.read_text(encoding="utf-8").partition(MARK) if path.exists() else ("", "", "")
    path.write_text(f"{head}{mark}\n\n{text}" if mark else text, encoding="utf-8")


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`"
