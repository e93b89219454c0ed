"""``polyaccel warm``: every shape that a server meets first, once; what that added to the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polyaccel.cli import warm
from polyaccel.cli.warm import Round
from tests.cli.console import ENGINE, printed, run
from tests.support.tiny_model import TinyModel

NULL = ("--backend", "null", "--policy", "allow", "--kv-cache-bytes", "4000000", "--max-model-len", "300")
KEY = "a" * 24


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYACCEL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiles(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """The null backend as if it compiled a kernel for each number of requests; the rounds that it answered."""
    answered: list[Round] = []
    answer = warm._answer

    def compiling(llm: Any, round_: Round, *, seed: int) -> None:
        answer(llm, round_, seed=seed)
        answered.append(round_)
        entry = root / "null" / KEY / "kernels" / f"ENTRY{round_.requests}"
        entry.mkdir(parents=True, exist_ok=True)
        (entry / f"{'0' * 32}.rows_kernel.cubin").write_bytes(b"code")
        (root / "null" / KEY / "manifest.json").write_text('{"fields": {}, "created": 0}')

    monkeypatch.setattr(warm, "_answer", compiling)
    return answered


def report(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed("warm", *arguments, "--json"))
    return found


@pytest.mark.parametrize("engine", [ENGINE, NULL], ids=["cpu", "null"])
def test_a_backend_that_keeps_no_kernels_says_so(tiny: TinyModel, root: Path, engine: tuple[str, ...]) -> None:
    lines = printed("warm", tiny.folder, *engine).splitlines()
    assert lines[0] == f"{tiny.folder} on {engine[1]}"
    assert [line.split()[0] for line in lines[1:3]] == ["load", "warm"]
    assert lines[3:] == [f"backend '{engine[1]}' keeps no kernels in {root}: nothing to cache"]


def test_json_has_every_field(tiny: TinyModel) -> None:
    found = report(tiny.folder, *ENGINE)
    assert found.pop("load_seconds") > 0
    assert found.pop("warm_seconds") > 0
    assert found == {
        "model": str(tiny.folder),
        "backend": "cpu",
        "batch_sizes": [],
        "adapters": [],
        "compiled": {},
        "cached_before": 0,
        "cache": None,
    }


def test_every_number_of_rows_of_a_graph_is_decoded_and_what_is_new_is_counted(
    tiny: TinyModel, root: Path, compiles: list[Round]
) -> None:
    first = report(tiny.folder, *NULL, "--max-num-seqs", 20)
    assert first["batch_sizes"] == [1, 2, 4, 8, 16, 20]
    assert first["compiled"] == {"rows_kernel": 6}
    assert (first["cached_before"], first["cache"]) == (0, str(root / "null" / KEY))
    assert max(round_.prompt for round_ in compiles) == 299
    assert {round_.prompt for round_ in compiles if round_.new == 1} >= {1, 16, 100, 256}
    second = report(tiny.folder, *NULL, "--max-num-seqs", 20)
    assert (second["compiled"], second["cached_before"]) == ({}, 6)


def test_the_text_lists_what_was_compiled(tiny: TinyModel, compiles: list[Round]) -> None:
    lines = printed("warm", tiny.folder, *NULL, "--max-num-seqs", 2).splitlines()
    assert lines[3].split() == ["compiled", "2,", "0", "were", "in", "the", "cache", "before"]
    assert lines[4].split() == ["2", "rows_kernel"]


def test_kernels_of_another_key_are_not_counted(tiny: TinyModel, root: Path, compiles: list[Round]) -> None:
    old = root / "null" / ("b" * 24)
    (old / "kernels" / "ENTRY1").mkdir(parents=True)
    (old / "kernels" / "ENTRY1" / f"{'0' * 32}.rows_kernel.cubin").write_bytes(b"code")
    (old / "manifest.json").write_text('{"fields": {}, "created": 0}')
    found = report(tiny.folder, *NULL, "--max-num-seqs", 1)
    assert (found["compiled"], found["cached_before"]) == ({"rows_kernel": 1}, 0)


def test_adapters_are_met_alone_by_rank_and_beside_the_base_model(tiny: TinyModel, compiles: list[Round]) -> None:
    options = [
        text
        for name, folder in (("a", "plain"), ("b", "subset"), ("c", "plain"))
        for text in ("--load-adapter", f"{name}={tiny.adapter(folder).folder}")
    ]
    found = report(tiny.folder, *NULL, "--max-num-seqs", 4, *options)
    assert found["adapters"] == ["a", "b", "c"]
    mixes = list(dict.fromkeys(round_.mix for round_ in compiles))
    # Of two adapters of one rank one is enough.
    assert mixes == [(None,), ("c",), ("b",), (None, "a", "b", "c")]
    decoded = {mix: [round_.requests for round_ in compiles if round_.mix == mix and round_.new > 1] for mix in mixes}
    assert set(map(tuple, decoded.values())) == {(1, 2, 4)}


def test_prompts_that_do_not_fit_into_one_step_decode_together_in_the_end(
    tiny: TinyModel, compiles: list[Round]
) -> None:
    report(tiny.folder, *NULL, "--max-num-seqs", 16, "--max-batched-tokens", 20)
    last = compiles[-1]
    assert (last.requests, last.prompt) == (16, 2)
    # A step has 20 tokens, of which up to 16 are those that decode already.
    assert last.new == 2 + 8
    assert max(round_.prompt for round_ in compiles) == 20


def test_an_error_of_the_engine_exits_with_1(tmp_path: Path) -> None:
    outcome = run("warm", tmp_path / "nowhere")
    assert (outcome.code, outcome.out) == (1, "")
    assert "ModelNotFound" in outcome.err


def test_warm_has_a_help() -> None:
    assert printed("warm", "--help").startswith("usage: polyaccel warm")
