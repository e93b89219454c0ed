"""``polyaccel backends``, ``explain``, ``bench`` and ``--version``."""

from __future__ import annotations

import json
from typing import Any

import pytest

import polyaccel
from polyaccel.backend.registry import BackendStatus
from polyaccel.cli import backends
from tests.cli.console import ENGINE, printed
from tests.support.tiny_model import LAYERS, TinyModel

STATUSES = (
    BackendStatus(name="good", origin="good-plugin 1.0", usable=True, reason="", devices=("good:0", "good:1")),
    BackendStatus(name="incompatible", origin="old-plugin 0.1", usable=False, reason="needs API >=9"),
)


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "list_backends", lambda: list(STATUSES))


def explain(tiny: TinyModel, *arguments: object) -> dict[str, Any]:
    explained: dict[str, Any] = json.loads(printed("explain", tiny.folder, *ENGINE, "--json", *arguments))
    return explained


def test_backends_lists_the_built_in_backends_as_usable() -> None:
    rows = {line.split()[1]: line for line in printed("backends").splitlines()}
    for name in ("cpu", "null"):
        assert rows[name].startswith("PASS")
        assert f"polyaccel {polyaccel.__version__}" in rows[name]
    assert "[cpu]" in rows["cpu"]


@pytest.mark.usefixtures("two_backends")
def test_backends_says_why_a_backend_cannot_be_used() -> None:
    assert printed("backends").splitlines() == [
        "PASS  good          good-plugin 1.0 [good:0, good:1]",
        "FAIL  incompatible  old-plugin 0.1  needs API >=9",
    ]


@pytest.mark.usefixtures("two_backends")
def test_backends_json_has_every_field() -> None:
    assert json.loads(printed("backends", "--json")) == [
        {"name": "good", "origin": "good-plugin 1.0", "usable": True, "reason": "", "devices": ["good:0", "good:1"]},
        {
            "name": "incompatible",
            "origin": "old-plugin 0.1",
            "usable": False,
            "reason": "needs API >=9",
            "devices": [],
        },
    ]


def test_backends_prints_nothing_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "list_backends", list)
    assert printed("backends") == ""
    assert json.loads(printed("backends", "--json")) == []


def test_explain_json_plans_every_site_on_the_backend_s_own_implementations(tiny: TinyModel) -> None:
    (rank,) = explain(tiny)["ranks"]
    sites = rank["plan"]["sites"]
    assert {f"layers.{layer}.{site}" for layer in range(LAYERS) for site in ("qkv", "attention", "down")} <= set(sites)
    names = {answer["implementation"] for answers in sites.values() for answer in answers.values()}
    assert names
    assert all(name.startswith("cpu.") for name in names), names
    assert rank["ledger"]["cpu.paged_attention"] == LAYERS * 4
    assert all(kernel.startswith("cpu.") for kernel in rank["ledger"])


def test_explain_runs_nothing_for_no_tokens(tiny: TinyModel) -> None:
    explained = explain(tiny, "--tokens", 0)
    assert explained["ranks"][0]["ledger"] == {}
    assert explained["adapters"] == {}


def test_explain_has_a_receipt_of_each_loaded_adapter(tiny: TinyModel) -> None:
    folders = {name: tiny.adapter(name).folder for name in ("plain", "subset")}
    options = [text for name, folder in folders.items() for text in ("--load-adapter", f"{name}={folder}")]
    adapters = explain(tiny, *options)["adapters"]
    assert list(adapters) == ["plain", "subset"]
    assert all(module["applied"] for module in adapters["plain"]["modules"])
    assert {module["true_rank"] for module in adapters["plain"]["modules"]} == {8}
    assert {module["scale"] for module in adapters["plain"]["modules"]} == {2.0}
    assert {module["layer"] for module in adapters["subset"]["modules"]} == {1}
    assert all(name.startswith("cpu.") for name in adapters["plain"]["implementations"].values())


def test_explain_as_text_shows_the_plan_the_launches_and_the_receipts(tiny: TinyModel) -> None:
    folder = tiny.adapter("plain").folder
    text = printed("explain", tiny.folder, *ENGINE, "--tokens", 2, "--load-adapter", f"plain={folder}")
    assert text.startswith("backend cpu, 1 rank(s)")
    assert "layers.0.attention" in text
    assert f"{LAYERS * 2}  cpu.paged_attention" in text
    assert "adapter 'plain'" in text


def test_explain_shows_every_rank(tiny: TinyModel) -> None:
    ranks = explain(tiny, "--tensor-parallel-size", 2)["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert ranks[0]["plan"]["digest"] == ranks[1]["plan"]["digest"]


def test_bench_json_reports_its_settings_and_positive_speeds(tiny: TinyModel) -> None:
    sizes = ("--batch-size", 3, "--prompt-tokens", 5, "--new-tokens", 4, "--repeats", 2)
    adapters = ("--load-adapter", f"plain={tiny.adapter('plain').folder}", "--adapter", "plain")
    report = json.loads(printed("bench", tiny.folder, *ENGINE, *sizes, *adapters, "--json"))
    speeds = {key: report.pop(key) for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds")}
    assert all(value > 0 for value in speeds.values()), speeds
    assert report == {
        "model": str(tiny.folder),
        "backend": "cpu",
        "tensor_parallel_size": 1,
        "dtype": "float32",
        "batch_size": 3,
        "prompt_tokens": 5,
        "new_tokens": 4,
        "adapters": ["plain"],
        "repeats": 2,
    }


def test_bench_as_text_names_the_model_and_the_speeds(tiny: TinyModel) -> None:
    text = printed("bench", tiny.folder, *ENGINE, "--prompt-tokens", 3, "--new-tokens", 1, "--repeats", 1).splitlines()
    assert text[0] == f"{tiny.folder} on cpu, batch 1, 3 + 1 tokens"
    assert [line.split()[0] for line in text[1:]] == ["load", "prefill", "decode"]


def test_the_version_is_the_package_s() -> None:
    assert printed("--version") == f"polyaccel {polyaccel.__version__}\n"


@pytest.mark.parametrize("command", ["generate", "chat", "backends", "explain", "bench"])
def test_every_command_has_a_help(command: str) -> None:
    assert printed(command, "--help").startswith(f"usage: polyaccel {command}")
