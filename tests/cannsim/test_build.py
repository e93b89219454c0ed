"""Building the simulated libraries, and what they export."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyaccel_cannsim.build import LIBRARIES, Names, build, cache_folder, compiler
from polyaccel_cannsim.errors import BuildFailed, CompilerMissing
from polyaccel_cannsim.symbols import UNSIMULATED, assembly

NAMES = Names(("aclnnOne", "aclnnTwo"), ("HcclOne",))
has_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="this machine has no C compiler"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def in_child(folder: Path, text: str) -> str:
    """Output of Python text in a process that loads the libraries: they must not enter this one."""
    lines = ["import ctypes", f"folder = {str(folder)!r}"]
    lines += [f"{name} = ctypes.CDLL(folder + '/lib{name}.so', mode=ctypes.RTLD_GLOBAL)" for name in LIBRARIES]
    done = subprocess.run([sys.executable, "-c", "\n".join([*lines, text])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@has_compiler
def test_a_second_build_of_the_same_names_compiles_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(NAMES, "2.13.0")
    assert first.parent == cache_folder()
    assert cache in first.parents
    monkeypatch.setenv("PATH", "")
    assert build(NAMES, "2.13.0") == first
    with pytest.raises(CompilerMissing, match=r"install one .* or set CC"):
        build(Names(("aclnnOther",), ()), "2.13.0")


@has_compiler
def test_other_names_and_another_torch_npu_get_folders_of_their_own(cache: Path) -> None:
    folders = {build(NAMES, "2.13.0"), build(NAMES, "2.14.0"), build(Names(("aclnnOne",), ()), "2.13.0")}
    assert len(folders) == 3


@has_compiler
def test_builds_at_the_same_time_agree_and_leave_nothing_behind(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: build(NAMES, "2.13.0"), range(4)))
    assert len(folders) == 1
    assert [entry.name for entry in cache_folder().iterdir()] == [folders.pop().name]


@has_compiler
def test_an_interrupted_build_is_done_again(cache: Path) -> None:
    folder = build(NAMES, "2.13.0")
    shutil.rmtree(folder)
    assert (build(NAMES, "2.13.0") / "complete").exists()


def test_a_missing_cc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(CompilerMissing, match="CC=no-such-compiler"):
        compiler()


def test_a_failing_compiler_is_reported_with_its_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = cache / "bad"
    script.write_text("#!/bin/sh\necho 'unknown planet' >&2\nexit 3\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(BuildFailed, match=r"(?s)ended with 3.*unknown planet"):
        build(NAMES, "2.13.0")
    assert list(cache_folder().iterdir()) == []


@has_compiler
def test_an_empty_slot_answers_with_an_error_that_names_the_function(cache: Path) -> None:
    out = in_child(build(NAMES, "2.13.0"), "print(opapi.aclnnTwoGetWorkspaceSize(), hccl.HcclOne())")
    assert "207000 207000" in out
    assert "aclnnTwoGetWorkspaceSize is not simulated" in out
    assert "HcclOne is not simulated" in out


@has_compiler
def test_a_filled_slot_receives_every_argument_untouched(cache: Path) -> None:
    text = """
    kinds = [ctypes.c_int64, ctypes.c_double, ctypes.c_float, ctypes.c_int8, ctypes.c_bool] * 4
    seen = []
    call = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(lambda *a: seen.append(a) or 7)
    slots = (ctypes.c_void_p * 3).in_dll(opapi, 'cannsim_opapi')
    slots[0] = ctypes.cast(call, ctypes.c_void_p).value
    function = opapi.aclnnOneGetWorkspaceSize
    function.argtypes = kinds
    values = [v for i in range(4) for v in (2**40 + i, 0.5 + i, 1.25 + i, i - 3, i % 2)]
    values = [kind(value).value for kind, value in zip(kinds, values)]
    print(function(*values), seen == [tuple(values)])
    """
    assert in_child(build(NAMES, "2.13.0"), textwrap.dedent(text)).startswith("7 True")


@has_compiler
def test_each_linked_function_that_is_not_simulated_is_loud(cache: Path) -> None:
    out = in_child(build(NAMES, "2.13.0"), f"print([getattr(ascendcl, n)() for n in {UNSIMULATED!r}])")
    assert str([207000] * len(UNSIMULATED)) in out
    assert [name for name in UNSIMULATED if f"cannsim: {name} is not simulated" not in out] == []


@has_compiler
def test_a_legacy_kernel_never_succeeds(cache: Path) -> None:
    text = "print(ascendcl.aclopCompileAndExecute(b'Sinh'), ascendcl.aclopCompileAndExecuteV2(b'Cast'))"
    out = in_child(build(NAMES, "2.13.0"), text)
    assert "500002 500002" in out
    assert "legacy aclop kernel Sinh is not simulated" in out


@pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed; run tox -e npu-sim"
)
@has_compiler
def test_every_plain_c_symbol_that_torch_npu_links_against_is_exported(cache: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm here")
    wanted, own = set(), set()
    for file in importlib.metadata.files("torch-npu") or ():
        if file.name.endswith(".so") and "atb" not in file.name:
            text = subprocess.run(
                [nm, "-D", "--undefined-only", str(file.locate())], capture_output=True, text=True
            ).stdout
            wanted |= {line.split()[-1] for line in text.splitlines()}
            line = [nm, "-D", "--defined-only", str(file.locate())]
            text = subprocess.run(line, capture_output=True, text=True).stdout
            own |= {line.split()[-1] for line in text.splitlines()}
    # HCCL's functions are rows of a table, of which this build has one.
    ours = tuple(name for name in wanted - own if name.startswith(("acl", "rt", "Msprof")))
    assert len(ours) > 60
    folder = build(NAMES, "2.13.0")
    missing = in_child(folder, f"print([n for n in {ours!r} if not any(hasattr(l, n) for l in (ascendcl, hccl))])")
    assert missing.strip() == "[]"


@pytest.mark.parametrize(("machine", "jump"), [("x86_64", "jmp *"), ("aarch64", "br x16")])
def test_trampolines_are_written_for_both_machines(machine: str, jump: str) -> None:
    text = assembly(machine, "table", ["one", "two"], ["second"])
    assert text.count(jump) == 3
    assert text.count(".quad") == 3
    tool = "as" if machine == platform.machine() else f"{machine}-linux-gnu-as"
    if shutil.which(tool):
        subprocess.run([tool, "-o", "/dev/null", "-"], input=text, text=True, check=True)


def test_a_machine_without_trampolines_is_refused() -> None:
    with pytest.raises(BuildFailed, match="no trampolines for riscv64"):
        assembly("riscv64", "table", ["one"])
