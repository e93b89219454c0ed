"""The parts of the documentation that are written from the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from itertools import groupby

from polyaccel.backend import API_VERSION, OPERATORS, STATIONS
from polyaccel.backend.levels import LEVELS, Requirement, Span, Value
from polyaccel.backend.spec import Argument, OperatorSpec
from polyaccel.backend.version import format_version
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.outputs import Completion, Timing
from polyaccel.engine.sampling_params import SamplingParams
from tests.project.source import Module, backend_modules, modules, suite_modules


def module_list() -> str:
    """One line a module, its docstring's first sentence, under a heading for each package."""
    lines: list[str] = []
    for module in (*modules(), *backend_modules(), *suite_modules()):
        if _has_heading(module):
            lines += ["", f"## {module.name}", "", f"{module.summary()}.", ""]
        else:
            lines.append(f"- `{module.name}`: {module.summary()}.")
    return "\n".join(lines).strip() + "\n"


def _has_heading(module: Module) -> bool:
    return module.is_package and module.name.count(".") == (module.name.split(".")[0] == "polyaccel")


def operator_tables() -> str:
    """One section an operator under a heading for each group, then the stations."""
    lines: list[str] = []
    for group, specs in groupby(OPERATORS.values(), key=lambda spec: spec.group):
        lines += [f"### Group {group}", ""]
        for spec in specs:
            lines += _section(spec)
    lines += ["### Stations", "", "Models call a station, never its parts, where one fits.", ""]
    for station in STATIONS.values():
        lines += _section(station)
    return "\n".join(lines).strip() + "\n"


def _section(spec: OperatorSpec) -> list[str]:
    arguments = ", ".join(_argument(argument) for argument in spec.arguments)
    marks = [word for word, holds in (("mandatory", spec.mandatory), ("critical", spec.critical)) if holds]
    lines = [f"#### {spec.name}", "", f"`{spec.name}({arguments})`" + (f": {', '.join(marks)}." if marks else "")]
    lines += ["", spec.semantics, "", f"Returns {spec.returns}."]
    if spec.parts:
        lines += ["", "Parts: " + ", ".join(f"`{part}`" for part in spec.parts) + "."]
    return [*lines, ""]


def _argument(argument: Argument) -> str:
    shape = f": {argument.shape}" if argument.shape else ""
    return f"{argument.name}{shape}{' = None' if argument.optional else ''}"


def level_tables() -> str:
    """The required table of each level: a row for each operator, what of it must be covered, then the checks."""
    lines = [f"Of contract {format_version(API_VERSION)}.", ""]
    for level in LEVELS.values():
        below = f" It builds on {', '.join(level.builds_on)}." if level.builds_on else ""
        lines += [f"## {level.name} {level.title}", ""]
        if level.table:
            lines += ["| operator | dtypes | every | only where |", "|---|---|---|---|"]
            for row in level.table:
                where = ", ".join(f"{_axis(name)} is {value}" for name, value in row.where.items())
                needs = ["several devices"] if row.needs else []
                cells = (
                    f"`{row.operator}`",
                    ", ".join(row.dtypes),
                    _every(row),
                    ", ".join(filter(None, [where, *needs])),
                )
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
        checks = ", ".join(f"`{name}`" for name in level.checks)
        lines += [f"Checks that must be conclusive and pass: {checks}.{below}" if checks else below.strip(), ""]
    return "\n".join(lines).strip() + "\n"


def _every(row: Requirement) -> str:
    words = ["layout"] if row.layouts else []
    words += ["listed attribute"] if row.attributes else []
    words += [_axis(name) + _values(values) for name, values in row.each.items()]
    words += ["world size from 2"] if row.needs else []
    return "; ".join(words)


def _axis(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ")


def _values(values: tuple[Value | Span, ...]) -> str:
    if values == (True,):
        return ""
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(numbers) == len(values) and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f" of {numbers[0]} to {numbers[-1]}, one by one"
    return f" of {', '.join(map(str, values))}"


def parameter_tables() -> str:
    """One table a class: each field with its type, its default and its line in the docstring."""
    parts: list[str] = []
    for title, cls in (
        ("Options of `LLM` and `AsyncLLM`", EngineConfig),
        ("`SamplingParams`", SamplingParams),
        ("`Completion`", Completion),
        ("`Completion.timing`", Timing),
    ):
        notes = _attributes(cls)
        parts += [f"## {title}", "", "| name | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            # A cell ends at a bar, even inside code.
            kind = str(field.type).replace("|", "\\|")
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            parts.append(f"| `{field.name}` | `{kind}` | {default} | {notes.get(field.name, '')} |")
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def _attributes(cls: type) -> dict[str, str]:
    """Name -> text of the ``Attributes:`` section of a docstring."""
    lines = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() and not line.startswith("    "):
            break
        if match := re.match(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found
