"""``polyaccel cache list`` and ``clear``: they find caches by the folders' convention, and touch nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.cli.console import printed, run

FIELDS = {"kernels": "12ab", "triton": "3.6.0", "device": "NVIDIA H100 80GB HBM3"}
DAY = 86400.0


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYACCEL_CACHE", str(tmp_path))
    return tmp_path


def cached(root: Path, backend: str, digit: str, *, days: float = 0.0, kernels: int = 2) -> Path:
    """A cache as a backend writes it, created a day before it was last used."""
    folder = root / backend / (digit * 24)
    for number in range(kernels):
        entry = folder / "kernels" / f"ENTRY{number}"
        entry.mkdir(parents=True)
        for name in ("rows_kernel.cubin", "rows_kernel.json", "__grp__rows_kernel.json"):
            (entry / f"{'0' * 32}.{name}").write_bytes(b"x" * 100)
    manifest = folder / "manifest.json"
    used = time.time() - days * DAY
    manifest.write_text(json.dumps({"format": "any", "fields": FIELDS, "created": used - DAY}))
    os.utime(manifest, (used, used))
    return folder


def test_an_empty_cache_says_where_it_is(root: Path) -> None:
    assert printed("cache", "list") == f"no kernels are cached in {root}\n"
    assert json.loads(printed("cache", "list", "--json")) == []
    assert printed("cache", "clear") == "0 removed, 0 B\n"


def test_a_folder_that_does_not_exist_is_an_empty_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYACCEL_CACHE", str(root / "nowhere"))
    assert printed("cache", "list") == f"no kernels are cached in {root / 'nowhere'}\n"


def test_list_shows_keys_kernels_bytes_and_ages(root: Path) -> None:
    size = sum(path.stat().st_size for path in cached(root, "cuda", "a", days=2.5).rglob("*") if path.is_file())
    assert printed("cache", "list").splitlines() == [
        f"cuda  {'a' * 24}  2 kernels, {size} B, 3 d old, used 2 d ago",
        "    kernels 12ab, triton 3.6.0, device NVIDIA H100 80GB HBM3",
    ]


def test_list_json_has_every_field(root: Path) -> None:
    folder = cached(root, "cuda", "a")
    (row,) = json.loads(printed("cache", "list", "--json"))
    assert row.pop("used") - row.pop("created") == pytest.approx(DAY, abs=1)
    assert row.pop("bytes") > 600
    assert row == {
        "backend": "cuda",
        "key": "a" * 24,
        "fields": FIELDS,
        "kernels": 2,
        "path": str(folder),
        "problem": "",
    }


def test_list_is_in_order_of_use_within_a_backend(root: Path) -> None:
    for backend, digit, days in (("npu", "a", 0), ("cuda", "b", 3), ("cuda", "c", 1), ("cuda", "d", 2)):
        cached(root, backend, digit, days=days)
    rows = json.loads(printed("cache", "list", "--json"))
    assert [row["backend"] + row["key"][0] for row in rows] == ["cudac", "cudad", "cudab", "npua"]
    assert [row["key"][0] for row in json.loads(printed("cache", "list", "--backend", "npu", "--json"))] == ["a"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fields": 3}', '{"fields": {}, "created": "now"}'])
def test_a_manifest_that_cannot_be_read_is_a_row_with_the_reason(root: Path, text: str) -> None:
    folder = cached(root, "cuda", "a")
    (folder / "manifest.json").write_text(text)
    assert "its manifest cannot be read" in printed("cache", "list")
    assert json.loads(printed("cache", "list", "--json"))[0]["problem"]
    assert printed("cache", "clear").splitlines()[-1].startswith("1 removed")
    assert not folder.exists()


def test_clear_removes_everything_and_says_what(root: Path) -> None:
    folders = [cached(root, "cuda", "a"), cached(root, "cuda", "b", days=1), cached(root, "npu", "c")]
    *lines, last = printed("cache", "clear").splitlines()
    assert [line.split()[1:3] for line in lines] == [["cuda", "a" * 24], ["cuda", "b" * 24], ["npu", "c" * 24]]
    assert last.startswith("3 removed, ")
    assert not any(folder.exists() for folder in folders)
    assert list(root.rglob(".trash-*")) == []


def test_clear_all_is_clear(root: Path) -> None:
    cached(root, "cuda", "a")
    assert printed("cache", "clear", "--all").startswith("removed cuda")
    assert printed("cache", "list", "--json") == "[]\n"


def test_clear_others_keeps_the_last_used_of_each_backend(root: Path) -> None:
    kept = [cached(root, "cuda", "a", days=1), cached(root, "npu", "c", days=9)]
    gone = [cached(root, "cuda", "b", days=2), cached(root, "cuda", "d", days=3)]
    assert printed("cache", "clear", "--others").splitlines()[-1].startswith("2 removed")
    assert all(folder.exists() for folder in kept)
    assert not any(folder.exists() for folder in gone)


def test_clear_of_a_backend_leaves_the_others_alone(root: Path) -> None:
    cuda, npu = cached(root, "cuda", "a"), cached(root, "npu", "b")
    assert printed("cache", "clear", "--backend", "npu").splitlines()[-1].startswith("1 removed")
    assert cuda.exists()
    assert not npu.exists()
    assert printed("cache", "clear", "--backend", "abacus") == "0 removed, 0 B\n"


def test_clear_touches_nothing_that_is_no_cache(root: Path) -> None:
    extension = root / "browser" / "manifests"
    extension.mkdir(parents=True)
    (extension / "manifest.json").write_text("{}")
    bare = root / "cuda" / ("e" * 24)
    bare.mkdir(parents=True)
    assert printed("cache", "clear") == "0 removed, 0 B\n"
    assert (extension / "manifest.json").exists()
    assert bare.exists()


def test_a_cache_that_cannot_be_removed_is_an_error_that_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(root, "cuda", "a")

    def refuse(*paths: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    outcome = run("cache", "clear")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"polyaccel: ConfigurationError: {folder} cannot be removed (Permission denied)")
    assert folder.exists()


@pytest.mark.parametrize(
    ("arguments", "word"), [((), "action"), (("burn",), "burn"), (("clear", "--all", "--others"), "--others")]
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...], word: str) -> None:
    outcome = run("cache", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert word in outcome.err.splitlines()[-1]


def test_the_help_names_both_actions() -> None:
    text = printed("cache", "--help")
    assert "list" in text
    assert "clear" in text
