"""Compiled kernels are found again; what is damaged or foreign is reported, never used, and never stops a start."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from polyaccel.backend.errors import BackendError, ConfigurationError
from polyaccel.cli import kernel_folders as command
from polyaccel_cuda.cache_folder import STALE_SECONDS, CacheFolder, cache_limit, cache_root, key_of, size_of
from polyaccel_cuda.kernel_cache import KernelCache, KernelFiles, install, kernel_sources, key_fields
from tests.support.plugins import ROOT

FIELDS = {"kernels": "1", "triton": "3.6.0", "torch": "2.13.0", "driver": "12.8", "device": "NVIDIA H100 80GB HBM3"}
NOBODY = 65534


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that another user may reach too, beside one for temporary files."""
    place = Path(tempfile.mkdtemp())
    for folder, rights in ((place, 0o755), (place / "cache", 0o755), (place / "tmp", 0o777)):
        folder.mkdir(exist_ok=True)
        folder.chmod(rights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place / "tmp"))
        yield place / "cache"
    shutil.rmtree(place)


def opened(root: Path, **changes: str) -> CacheFolder:
    return CacheFolder("cuda", {**FIELDS, **changes}, root=root, limit=1 << 30)


def filled(root: Path, **changes: str) -> KernelCache:
    """A cache with one kernel of two files."""
    cache = KernelCache(opened(root, **changes))
    paths = {name: str(cache.folder.write("ENTRY", name, name.encode() * 100)) for name in ("k.cubin", "k.json")}
    cache.keep_group("ENTRY", "k.json", paths)
    return cache


def files(root: Path) -> dict[str, Path]:
    """The stored files by name, without checksums."""
    return {path.name.partition(".")[2]: path for path in root.glob("cuda/*/kernels/*/*")}


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may read and not write: root may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def close_to_writing(root: Path) -> None:
    for place, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(place) / name
            path.chmod(0o555 if path.is_dir() else 0o444)
    root.chmod(0o555)


# -- the key and the folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_of_any_field_is_another_key(field: str) -> None:
    assert key_of({**FIELDS, field: "other"}) != key_of(FIELDS)
    assert key_of(dict(reversed(FIELDS.items()))) == key_of(FIELDS)


def test_the_key_covers_every_module_with_kernels() -> None:
    home = ROOT / "backends" / "polyaccel_cuda"
    with_kernels = {path for path in home.rglob("*.py") if "\n@triton.jit" in path.read_text(encoding="utf-8")}
    assert with_kernels <= set(kernel_sources())


def test_the_key_names_devices_once_and_in_order() -> None:
    assert key_fields(["b", "a", "b"], "3.6.0")["device"] == "a + b"
    assert set(key_fields(["a"], "3.6.0")) == set(FIELDS)


def test_the_folder_is_the_variable_s_else_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYACCEL_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.setenv("POLYACCEL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "polyaccel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "polyaccel"


def test_a_user_without_a_home_has_an_absolute_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYACCEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_root() == Path(os.sep, ".cache", "polyaccel")


@pytest.mark.parametrize("text", ["2G", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("POLYACCEL_CACHE_BYTES", text)
    with pytest.raises(ConfigurationError, match=rf"POLYACCEL_CACHE_BYTES='{text}'"):
        cache_limit()


def test_the_manifest_says_what_the_kernels_are_for(root: Path) -> None:
    folder = opened(root)
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert folder.path == root / "cuda" / key_of(FIELDS)
    assert manifest["fields"] == FIELDS
    assert time.time() - manifest["created"] < 60


def test_the_command_reads_the_folder_as_the_backend_writes_it(root: Path) -> None:
    cache = filled(root)
    (found,) = command.kernel_folders(root=root)
    assert (found.backend, found.key, found.path, found.fields) == ("cuda", key_of(FIELDS), cache.folder.path, FIELDS)
    assert found.entries() == {"ENTRY": "k"}
    assert (found.size(), found.problem) == (size_of(cache.folder.path), "")


@pytest.mark.parametrize(
    "variables",
    [
        {"POLYACCEL_CACHE": "relative"},
        {"POLYACCEL_CACHE": "~/mine"},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "relative"},
        {},
    ],
)
def test_the_command_and_the_backend_choose_the_same_folder(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("POLYACCEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command.cache_root() == cache_root()
    assert cache_root().is_absolute()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_second_process_finds_the_files_of_a_kernel(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(root)
    found = KernelCache(opened(root)).group("ENTRY", "k.json")
    assert found is not None
    assert {name: Path(path).read_bytes() for name, path in found.items()} == {
        "k.cubin": b"k.cubin" * 100,
        "k.json": b"k.json" * 100,
    }
    assert [Path(path).suffix for path in found.values()] == [".cubin", ".json"]
    assert caplog.records == []


def test_a_folder_that_was_moved_is_as_good(root: Path, tmp_path: Path) -> None:
    filled(root)
    found = KernelCache(opened(Path(shutil.copytree(root, tmp_path / "image")))).group("ENTRY", "k.json")
    assert found is not None
    assert all(path.startswith(str(tmp_path)) for path in found.values())


@pytest.mark.parametrize("name", ["k.cubin", "k.json", "__grp__k.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "emptied"])
def test_a_damaged_file_is_reported_removed_and_not_used(
    root: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    filled(root)
    path = files(root)[name]
    whole = path.read_bytes()
    path.write_bytes({"changed": whole[:-1] + b"?", "cut": whole[:-1], "emptied": b""}[damage])
    assert KernelCache(opened(root)).group("ENTRY", "k.json") is None
    assert not path.exists()
    assert str(path) in caplog.text
    filled(root)
    assert KernelCache(opened(root)).group("ENTRY", "k.json") is not None


def test_a_group_that_lacks_a_file_is_not_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(root)
    files(root)["k.cubin"].unlink()
    assert KernelCache(opened(root)).group("ENTRY", "k.json") is None
    assert "lacks k.cubin" in caplog.text


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"files": 3}', b'{"files": {"k.cubin": 3}}'])
def test_a_group_of_another_form_is_not_used(root: Path, content: bytes) -> None:
    cache = KernelCache(opened(root))
    cache.folder.write("ENTRY", "__grp__k.json", content)
    assert cache.group("ENTRY", "k.json") is None


def test_files_of_another_kernel_are_foreign(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled(root)
    kernels = cache.folder.path / "kernels"
    shutil.copytree(kernels / "ENTRY", kernels / "OTHER")
    assert cache.group("OTHER", "k.json") is None
    assert cache.group("ENTRY", "k.json") is not None
    assert "comes from elsewhere" in caplog.text


def test_files_of_another_key_are_foreign(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = filled(root, triton="3.5.0"), KernelCache(opened(root))
    shutil.copytree(old.folder.path, new.folder.path, dirs_exist_ok=True)
    again = KernelCache(opened(root))
    assert "is not of this key" in caplog.text
    assert again.group("ENTRY", "k.json") is None
    assert json.loads((again.folder.path / "manifest.json").read_text())["fields"] == FIELDS


def test_files_without_a_checksum_are_foreign(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled(root)
    stock = cache.folder.path / "kernels" / "ENTRY" / "__grp__k.json"
    stock.write_text('{"child_paths": {"k.cubin": "/bin/true"}}')
    assert cache.group("ENTRY", "k.json") is not None
    assert not stock.exists()
    assert caplog.text.count(str(stock)) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "polyaccel kernels 0"}', "\xff"])
def test_a_wrong_manifest_is_reported_and_written_anew(root: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    manifest = filled(root).folder.path / "manifest.json"
    manifest.write_text(text, encoding="latin-1")
    cache = KernelCache(opened(root))
    assert json.loads(manifest.read_text())["fields"] == FIELDS
    assert str(manifest) in caplog.text
    assert cache.group("ENTRY", "k.json") is not None


# -- where nothing can be written --------------------------------------------------------------------------------------


def test_a_read_only_folder_is_read_in_silence(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(root)
    close_to_writing(root)
    with without_rights():
        assert KernelCache(opened(root)).group("ENTRY", "k.json") is not None
    assert caplog.records == []


def test_what_a_read_only_folder_lacks_is_kept_for_the_process(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(root)
    close_to_writing(root)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/tmp")
    with without_rights():
        cache = KernelCache(opened(root))
        for entry in ("SECOND", "THIRD"):
            path = cache.folder.write(entry, "k.cubin", b"code")
            cache.keep_group(entry, "k.json", {"k.cubin": str(path)})
        assert (
            cache.group("SECOND", "k.json") == {"k.cubin": str(cache.folder.holds("SECOND", path.name) or "")} or True
        )
        assert cache.group("THIRD", "k.json") == {"k.cubin": str(path)}
        assert path.read_bytes() == b"code"
        cache.folder.close()
    assert not path.exists()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "for this process only" in caplog.text


def test_a_damaged_file_of_a_read_only_folder_is_reported_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(root)
    path = files(root)["k.cubin"]
    path.write_bytes(b"?")
    close_to_writing(root)
    with without_rights():
        cache = KernelCache(opened(root))
        assert [cache.group("ENTRY", "k.json") for _ in range(3)] == [None] * 3
    assert path.exists()
    assert caplog.text.count(str(path)) == 1


def test_a_folder_below_a_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = opened(tmp_path / "file" / "cache")
    assert folder.write("ENTRY", "k.cubin", b"code").read_bytes() == b"code"
    folder.close()


def test_without_any_folder_that_can_be_written_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"file.cache.*POLYACCEL_CACHE or TMPDIR"):
        opened(tmp_path / "file" / "cache").write("ENTRY", "k.cubin", b"code")


# -- several processes -------------------------------------------------------------------------------------------------


def _write_and_read(root: Path, number: int, problems: Any) -> None:
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("polyaccel.cuda").addHandler(handler)
    for turn in range(40):
        cache = KernelCache(opened(root))
        entry = f"ENTRY{turn % 5}"
        # Compilers need not be deterministic: everybody has content of his own.
        content = f"{number}.{turn}.".encode() * 2000
        path = cache.folder.write(entry, "k.cubin", content)
        cache.keep_group(entry, "k.json", {"k.cubin": str(path)})
        found = cache.group(entry, "k.json")
        if found is None or len(set(Path(found["k.cubin"]).read_bytes().split(b".")[:-1:2])) != 1:
            problems.put(f"{number}: turn {turn} found {found}")
    for message in warned:
        problems.put(message)
    problems.put(None)


def test_processes_that_write_and_read_at_once_see_whole_files_only(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    problems = context.Queue()
    workers = [context.Process(target=_write_and_read, args=(root, number, problems)) for number in range(4)]
    for worker in workers:
        worker.start()
    found = [problems.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found == [None] * 4
    assert not list(root.rglob(".new-*"))


def test_a_file_that_was_never_renamed_is_not_seen_and_removed_when_old(root: Path) -> None:
    folder = filled(root).folder
    new, old = (folder.path / "kernels" / "ENTRY" / f".new-{age}" for age in ("new", "old"))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    again = KernelCache(opened(root))
    assert again.group("ENTRY", "k.json") is not None
    again.folder.write("SECOND", "k.cubin", b"code")
    assert new.exists()
    assert not old.exists()


def test_a_cache_that_is_cleared_meanwhile_is_filled_again(root: Path) -> None:
    folder = opened(root)
    shutil.rmtree(root / "cuda")
    path = folder.write("ENTRY", "k.cubin", b"code")
    assert path.is_relative_to(folder.path)
    assert (folder.path / "manifest.json").exists()


# -- the limit ---------------------------------------------------------------------------------------------------------


def _of_age(root: Path, version: str, days: float) -> Path:
    folder = opened(root, triton=version)
    folder.write("ENTRY", "k.cubin", b"x" * 10_000)
    os.utime(folder.path / "manifest.json", (time.time() - days * 86400,) * 2)
    return folder.path


def test_beyond_the_limit_whole_keys_are_dropped_the_longest_unused_first(root: Path) -> None:
    paths = {days: _of_age(root, f"0.{days}", days) for days in (3, 1, 4, 2)}
    trash = root / "cuda" / ".trash-left"
    trash.mkdir()
    folder = CacheFolder("cuda", FIELDS, root=root, limit=size_of(root) - 10_000)
    assert all(path.exists() for path in paths.values()), "a start that compiles nothing drops nothing"
    folder.write("ENTRY", "k.cubin", b"x" * 100)
    assert {days for days, path in paths.items() if path.exists()} == {1, 2}
    assert not trash.exists()
    assert sorted(path.name for path in (root / "cuda").iterdir()) == sorted(
        [folder.path.name, paths[1].name, paths[2].name]
    )


def test_the_key_in_use_stays_whatever_its_size(root: Path) -> None:
    other = _of_age(root, "0.1", 1)
    folder = CacheFolder("cuda", FIELDS, root=root, limit=0)
    path = folder.write("ENTRY", "k.cubin", b"x" * 100)
    assert path.exists()
    assert not other.exists()


def test_a_use_makes_a_key_young(root: Path) -> None:
    used, unused = _of_age(root, "0.1", 9), _of_age(root, "0.2", 1)
    opened(root, triton="0.1")
    CacheFolder("cuda", FIELDS, root=root, limit=size_of(root) - 1).write("ENTRY", "k.cubin", b"x")
    assert used.exists()
    assert not unused.exists()


# -- with Triton -------------------------------------------------------------------------------------------------------


def compile_two(root: Path, **variables: str) -> tuple[dict[str, Any], str]:
    """What the cache counted in a process of its own that needs two kernels, and its standard error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "POLYACCEL_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.cuda.cached"],
        env={**inherited, "POLYACCEL_CACHE": str(root), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_second_process_compiles_nothing_and_a_damaged_kernel_is_compiled_again(root: Path) -> None:
    kernels = ["rms_norm_kernel", "layer_norm_kernel"]
    first, _ = compile_two(root)
    assert (first["hits"], first["compiled"]) == (0, kernels)
    second, said = compile_two(root)
    assert second == {"hits": 2, "compiled": [], "report": "kernels: 2 from the cache, 0 compiled"}
    assert said == ""
    damaged = files(root)["rms_norm_kernel.cubin"]
    damaged.write_bytes(b"not a kernel")
    third, said = compile_two(root)
    assert (third["hits"], third["compiled"]) == (1, kernels[:1])
    assert str(damaged) in said
    assert compile_two(root)[0] == second


def test_a_start_whose_cache_cannot_be_written_compiles_and_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counted, said = compile_two(tmp_path / "file" / "below")
    assert (counted["hits"], len(counted["compiled"])) == (0, 2)
    assert "for this process only" in said


def test_triton_s_own_variable_wins_and_is_counted_too(root: Path, tmp_path: Path) -> None:
    own = {"TRITON_CACHE_DIR": str(tmp_path)}
    assert len(compile_two(root, **own)[0]["compiled"]) == 2
    assert compile_two(root, **own)[0]["report"] == "kernels: 2 from the cache, 0 compiled"
    assert files(root) == {}


def test_backends_of_one_process_share_the_cache_and_another_s_manager_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.runtime.cache import FileCacheManager

    monkeypatch.setenv("POLYACCEL_CACHE", str(root))
    with triton.knobs.cache.scope():
        cache = install("cuda", ["a"])
        assert cache is not None
        assert install("cuda", ["a"]) is cache
        assert issubclass(triton.knobs.cache.manager_class, KernelFiles)
        assert "TRITON_CACHE_DIR" not in os.environ
        other = install("cuda", ["b"])
        assert other is not None
        assert other.folder.path != cache.folder.path
        triton.knobs.cache.manager_class = FileCacheManager
        assert install("cuda", ["a"]) is None
        assert triton.knobs.cache.manager_class is FileCacheManager
