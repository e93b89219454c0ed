"""The rules and the list they make of a source file."""

from __future__ import annotations

import ast

import pytest

from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import all_edits, sources
from polyaccel_conformance.mutation.listing import edits_of
from polyaccel_conformance.mutation.rules import RULES


def changes(body: str, head: str = "def f(x, y):") -> list[tuple[str, str, str]]:
    """Kind, before and after of every mutant of a function with this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return [(e.kind, e.before, e.after) for e in edits_of("f.py", f"{head}\n{lines}\n".encode())]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return x < y", ("comparison", "x < y", "x <= y")),
        ("return x < y", ("comparison", "x < y", "x >= y")),
        ("return x is None", ("comparison", "x is None", "x is not None")),
        ("return 0 <= x < y", ("comparison", "0 <= x < y", "0 <= x <= y")),
        ("return x[y:]", ("offset", "y", "y + 1")),
        ("return range(y)", ("offset", "y", "y - 1")),
        ("return x + 1", ("offset", "1", "2")),
        ("return x + 1", ("offset", "1", "0")),
        ("return x + y", ("arithmetic", "x + y", "(x - y)")),
        ("return x.sum(-1)", ("axes", "-1", "-2")),
        ("return (x + y).float()", ("cast", "(x + y).float()", "(x + y)")),
        ("return x.to(y.dtype)", ("cast", "x.to(y.dtype)", "x")),
        ("return x.float() @ y", ("cast", "x.float()", "x")),
        ("return np.ascontiguousarray(x)", ("contiguous", "np.ascontiguousarray(x)", "x")),
        ("return x.masked_fill(y, 0.0)", ("mask", "x.masked_fill(y, 0.0)", "x")),
        ("return np.where(x, y, 3)", ("mask", "x", "np.full_like(x, True)")),
        ("return torch.minimum(x, y)", ("mask", "torch.minimum(x, y)", "y")),
        ("return x & ~y", ("mask", "x & ~y", "x")),
        ("return x & ~y", ("mask", "~y", "y")),
        ("return x.transpose(1, 2)", ("axes", "x.transpose(1, 2)", "x")),
        ("return x.permute(0, 2, 1)", ("axes", "x.permute(0, 2, 1)", "x.permute(0, 1, 2)")),
        ("return x.T", ("axes", "x.T", "x")),
        ("return x.sum(keepdim=True)", ("flag", "True", "False")),
    ],
)
def test_a_rule_makes_its_change(body: str, expected: tuple[str, str, str]) -> None:
    assert expected in changes(body)


@pytest.mark.parametrize(
    "body",
    [
        '"""At most 3, x < y."""',
        "raise OperatorError('f', f'{x + 1} < {y}')",
        "z: tuple[int, 3] = x",
        "return x.to(y.device)",
        "return x.to(torch.int64)",
        "return x or 0",
        "if x or y:\n    reason = f'{x} of {3}'\n    raise OperatorError('f', reason)",
        "if x:\n    return f'no {x + 1}'",
        "return zip(x, y, strict=True)",
        "import os",
    ],
)
def test_what_nobody_could_see_is_left_alone(body: str) -> None:
    assert changes(body) == []


def test_a_conversion_beside_an_operand_that_torch_promotes_it_to_is_left_alone() -> None:
    assert {kind for kind, _, _ in changes("return x.float() * y")} == {"arithmetic"}
    assert "cast" in {kind for kind, _, _ in changes("return x.float() @ y")}


def test_signatures_decorators_and_module_constants_are_left_alone() -> None:
    source = b"TILE = 256\n\n@wraps(1)\ndef f(x: int = 3, y: A[4] = -1) -> B[5]:\n    return x\n"
    assert edits_of("f.py", source) == ()


def test_an_edit_changes_its_own_bytes_only_and_keeps_lines() -> None:
    source = "def f(x):\n    é = '<'\n    return (x\n            == 3)\n".encode()
    (edit,) = (e for e in edits_of("f.py", source) if e.kind == "comparison")
    mutated = edit.apply(source).decode()
    assert mutated == "def f(x):\n    é = '<'\n    return (x != 3)\n"
    assert (edit.line, edit.first, edit.last) == (3, 3, 4)


def test_equal_changes_in_equal_lines_have_keys_of_their_own() -> None:
    edits = edits_of("f.py", b"def f(x):\n    x += ~x\n    x += ~x\n")
    assert [e.occurrence for e in edits] == [0, 1]
    assert len({e.key for e in edits}) == 2


def test_a_key_outlives_lines_above() -> None:
    (before,) = edits_of("f.py", b"def f(x):\n    return ~x\n")
    (after,) = edits_of("f.py", b"# more\n\ndef f(x):\n    return ~x\n")
    assert before.key == after.key
    assert before.line != after.line


def test_an_edit_of_another_text_is_refused() -> None:
    (edit,) = edits_of("f.py", b"def f(x):\n    return ~x\n")
    with pytest.raises(ValueError, match=r"f\.py:2 does not read"):
        edit.apply(b"def f(x):\n    return ~y\n")


@pytest.fixture(scope="module")
def composites() -> list[Edit]:
    return all_edits()


def test_the_composites_have_at_least_three_hundred_mutants_of_every_kind(composites: list[Edit]) -> None:
    assert len(composites) >= 300
    assert {e.kind for e in composites} == set(RULES)
    assert {e.file for e in composites} == set(sources()) - {"__init__.py"}


def test_the_list_is_the_same_every_time_and_its_keys_are_unique(composites: list[Edit]) -> None:
    assert composites == all_edits()
    assert len({e.key for e in composites}) == len(composites)


def test_every_mutant_of_the_composites_compiles_and_differs(composites: list[Edit]) -> None:
    texts = {name: path.read_bytes() for name, path in sources().items()}
    for edit in composites:
        mutated = edit.apply(texts[edit.file])
        # Parsed with its statement's own lines only: a whole file each would take minutes.
        assert ast.dump(_function(mutated, edit)) != ast.dump(_function(texts[edit.file], edit)), edit.key


def _function(source: bytes, edit: Edit) -> ast.AST:
    """The mutated expression's function, found in the text between its ``def`` and the next one."""
    lines = source.decode().splitlines()
    starts = [i for i in range(edit.first) if lines[i].lstrip().startswith("def ")]
    begin = starts[-1]
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    end = next(
        (i for i in range(edit.last, len(lines)) if lines[i].strip() and _indent(lines[i]) <= indent), len(lines)
    )
    return ast.parse("\n".join(line[indent:] for line in lines[begin:end]))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
