"""How rules are written down and found."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from polyaccel_cannsim.errors import RuleError
from polyaccel_cannsim.registry import Rule, aclnn, collect, exported, parse
from polyaccel_cannsim.soc import CannVersion
from tests.cannsim import rules


def rule(name: str, since: str = "8.0.RC1", until: str | None = None) -> Rule:
    return aclnn(name, "tensor", source="a document", since=since, until=until)(lambda x: lambda: None)


def test_a_signature_repeats_words_and_refuses_unknown_ones() -> None:
    assert parse("aclnnX", "2*tensor double ints") == ("tensor", "tensor", "double", "ints")
    with pytest.raises(RuleError, match="aclnnX: 'tensr'"):
        parse("aclnnX", "tensor tensr")
    with pytest.raises(RuleError, match="x\\*tensor"):
        parse("aclnnX", "x*tensor")


def test_a_rule_without_a_document_is_refused() -> None:
    with pytest.raises(RuleError, match="cites the document"):
        aclnn("aclnnX", "tensor", source="")


def test_a_version_exports_what_existed_then() -> None:
    found = [rule("aclnnX", until="8.2.RC1"), rule("aclnnX", since="8.2.RC1"), rule("aclnnY", since="8.1.RC1")]
    assert sorted(exported(found, CannVersion("8.0.0"))) == ["aclnnX"]
    newer = exported(found, CannVersion("8.3.RC1"))
    assert sorted(newer) == ["aclnnX", "aclnnY"]
    assert newer["aclnnX"] is found[1]


def test_two_rules_of_one_name_in_one_version_are_refused() -> None:
    with pytest.raises(RuleError, match="aclnnX is described twice for CANN"):
        exported([rule("aclnnX"), rule("aclnnX")], CannVersion("8.3.RC1"))


def test_stacked_names_share_one_function() -> None:
    def function(x: object) -> object:
        return lambda: None

    both = aclnn("aclnnB", "2*tensor", source="s")(aclnn("aclnnA", "tensor", source="s")(function))
    module = types.ModuleType("cannsim_stacked")
    module.both = both  # type: ignore[attr-defined]
    sys.modules["cannsim_stacked"] = module
    try:
        found = collect("cannsim_stacked")
    finally:
        del sys.modules["cannsim_stacked"]
    assert [(one.name, len(one.signature)) for one in found] == [("aclnnA", 1), ("aclnnB", 2)]
    assert all(one.function is function for one in found)


def test_rules_are_collected_from_a_module_and_an_absent_package_has_none() -> None:
    assert {one.name for one in collect(rules.__name__)} >= {"aclnnRmsNorm", "aclnnCast"}
    assert collect("polyaccel_cannsim.no_such_package") == []


def test_a_package_that_fails_to_import_is_no_empty_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cannsim_broken.py").write_text("import cannsim_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="cannsim_absent"):
        collect("cannsim_broken")
