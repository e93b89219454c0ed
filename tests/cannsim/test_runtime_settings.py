"""The machine that the environment describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.errors import ErrorText, Refused, SettingError, Status, cann_text, op_plugin_6_text
from polyaccel_cannsim.settings import Settings
from polyaccel_cannsim.soc import CannVersion, Chip, find_soc


def test_an_empty_environment_describes_eight_910b_cards() -> None:
    settings = Settings.from_environment({})
    assert (settings.devices, settings.soc.chip, settings.soc.name) == (8, Chip.A2, "Ascend910B3")
    assert settings.memory == settings.soc.memory
    assert settings.poison is None


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "CANNSIM_DEVICES": "2",
            "CANNSIM_SOC": "310P",
            "CANNSIM_CANN": "8.0.RC2",
            "CANNSIM_MEMORY": "3G",
            "CANNSIM_QUIET_MS": "-1",
            "CANNSIM_POISON": "0xff",
            "CANNSIM_LEDGER": "there/calls",
            "CANNSIM_RULES": "one,two.three",
            "CANNSIM_LOG": "1",
        }
    )
    assert (settings.devices, settings.memory, settings.quiet_ms, settings.poison) == (2, 3 << 30, -1, 255)
    assert (settings.soc.name, settings.soc.bfloat16, str(settings.cann)) == ("Ascend310P3", False, "8.0.RC2")
    assert (settings.ledger, settings.rules, settings.log) == (Path("there/calls"), ("one", "two.three"), True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CANNSIM_DEVICES", "0"),
        ("CANNSIM_DEVICES", "many"),
        ("CANNSIM_SOC", "910Z"),
        ("CANNSIM_CANN", "eight"),
        ("CANNSIM_MEMORY", "64T"),
        ("CANNSIM_MEMORY", "0G"),
        ("CANNSIM_MEMORY", "1.5G"),
        ("CANNSIM_POISON", "256"),
        ("CANNSIM_ERROR_TEXT", "modern"),
    ],
)
def test_a_wrong_value_is_refused_and_named(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=value):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("name", "chip"),
    [("910B", Chip.A2), ("Ascend910B4", Chip.A2), ("A3", Chip.A3), ("910_9382", Chip.A3), ("310P", Chip.P310)],
)
def test_chips_are_found_by_family_and_by_name(name: str, chip: Chip) -> None:
    assert find_soc(name).chip is chip


def test_release_candidates_come_before_the_release() -> None:
    words = ["8.5.0", "8.0.RC2", "8.1.RC1", "8.0.0", "8.0.RC1", "8.0.RC3", "8.3.RC2", "8.0.1"]
    ordered = ["8.0.RC1", "8.0.RC2", "8.0.RC3", "8.0.0", "8.0.1", "8.1.RC1", "8.3.RC2", "8.5.0"]
    assert [str(one) for one in sorted(CannVersion(word) for word in words)] == ordered


@given(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), st.booleans())
def test_a_version_reads_back_its_numbers(numbers: tuple[int, int, int], candidate: bool) -> None:
    major, minor, last = numbers
    version = CannVersion(f"{major}.{minor}.{'RC' if candidate else ''}{last}")
    assert version.key == (major, minor, not candidate, last)


@pytest.mark.parametrize(
    ("version", "tells"), [("8.0.RC1", False), ("8.0.1", False), ("8.1.RC1", True), ("8.3.RC1", True)]
)
def test_cann_tells_its_version_from_8_1_on(version: str, tells: bool) -> None:
    assert CannVersion(version).tells_itself == tells


def test_the_two_layouts_of_an_error_text_name_operator_code_and_reason() -> None:
    refusal = Refused(Status.INNER, "1 uncontiguous input")
    classic, stamped = (cann_text("MatmulAllReduce", refusal, style) for style in ErrorText)
    assert classic.startswith("EZ9999: Inner Error!\nEZ9999: [PID: ")
    assert stamped.startswith("[PID: ")
    assert "(EZ9999):  Inner Error!" in stamped
    for text in (classic, stamped):
        assert "MatmulAllReduce: 1 uncontiguous input" in text
        assert "errno[561000]" in text


def test_the_layout_follows_the_cann_version_unless_it_is_chosen() -> None:
    assert Settings.from_environment({"CANNSIM_CANN": "8.1.RC1"}).error_text is ErrorText.CLASSIC
    assert Settings.from_environment({"CANNSIM_CANN": "8.2.RC1"}).error_text is ErrorText.STAMPED
    chosen = {"CANNSIM_CANN": "8.5.0", "CANNSIM_ERROR_TEXT": "classic"}
    assert Settings.from_environment(chosen).error_text is ErrorText.CLASSIC


def test_the_wording_of_the_older_torch_npu_is_at_hand() -> None:
    text = op_plugin_6_text("aclnnMm", "EZ9999: Inner Error!", device=1, rank=3)
    assert text.startswith("call aclnnMm failed, detail:EZ9999")
    assert "Device:1, RankID:3) ERR01005 OPS internal error" in text
