from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.pattern import PatternTable

peft_other = pytest.importorskip("peft.utils.other")

NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "q_proj", "q.proj", "proj", "a", "b_c"]), min_size=1
).map(".".join)
KEYS = st.one_of(
    NAMES,
    st.sampled_from(
        [
            "^model.*",
            r".*\.q_proj",
            r"layers\.\d+\..*",
            "(a|b_c)",
            "a|b.c",
            "[ab].*",
            "q.proj$",
            "q_pro[^j]?.?",
            r"(?:model)\.layers",
            ".",
            "a{2}",
            "model",
        ]
    ),
)


@given(keys=st.lists(KEYS, max_size=12, unique=True), name=NAMES)
def test_lookups_agree_with_peft_itself(keys: list[str], name: str) -> None:
    patterns = dict(zip(keys, range(1, len(keys) + 1), strict=True))
    expected = patterns.get(peft_other.get_pattern_key(patterns.keys(), name))
    assert PatternTable(patterns, "rank_pattern").get(name) == expected


def test_a_dot_in_a_key_matches_any_character_as_in_peft() -> None:
    table = PatternTable({"self.attn": 1, "self_attn": 2}, "rank_pattern")
    assert table.get("model.self_attn") == 1
    assert table.get("model.self_attnx") is None


def test_the_first_key_in_file_order_wins() -> None:
    assert PatternTable({r".*q_proj": 1, "layers.0.q_proj": 2}, "rank_pattern").get("layers.0.q_proj") == 1
    assert PatternTable({"layers.0.q_proj": 2, r".*q_proj": 1}, "rank_pattern").get("layers.0.q_proj") == 2


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+z",
        "((a*)*)*z",
        "(a|a)*z",
        "(.*.*)+",
        "(a?){30}a{30}",
        ".*.*.*.*.*.*.*z",
        "a?" * 20 + "a" * 20,
        "(a|a)" * 30,
        r"(.)\1",
        "(?P<x>a)(?P=x)*",
        "(x)(?(1)a|b)",
        "x" * 5000 + "+",
    ],
)
def test_a_key_whose_matching_time_may_explode_is_refused(key: str) -> None:
    with pytest.raises(AdapterIncompatible, match=r"rank_pattern"):
        PatternTable({key: 1}, "rank_pattern")


@pytest.mark.parametrize("key", ["(", "[a", "*a", "a{99999999999}", "(?P<1>a)", "a**"])
def test_a_key_that_is_no_expression_is_refused_by_name(key: str) -> None:
    with pytest.raises(AdapterIncompatible, match=r"alpha_pattern key .* is not a valid|may take too long"):
        PatternTable({key: 1.0}, "alpha_pattern")


def test_accepted_expressions_finish_even_on_the_longest_names() -> None:
    table = PatternTable({r".*a\.\d+b.*c": 1}, "rank_pattern")
    assert table.get("a.0b" * 32) is None


def test_a_table_of_thousands_of_full_names_is_looked_up_exactly() -> None:
    keys = {f"model.layers.{layer}.self_attn.{leaf}_proj": layer + 1 for layer in range(1000) for leaf in "qkvo"}
    table = PatternTable(keys, "rank_pattern")
    assert len(table) == 4000
    assert [table.get(key) for key in keys] == list(keys.values())
    assert table.get("model.layers.1000.self_attn.q_proj") is None


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(AdapterIncompatible, match="70000 keys"):
        PatternTable({str(i): 1 for i in range(70000)}, "rank_pattern")
