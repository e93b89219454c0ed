"""What a user sees who has done something wrong: the command is run, and one line says what and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import MANIFEST, SUMMARY, manifest, write_bundle
from polyaccel_conformance.cli import main
from polyaccel_conformance.errors import ExitCode
from tests.conformance.certificate.small_run import edit_json, rewritten, write_log
from tests.support.plugins import PluginHouse, cli, environment

SMALL = ("--profile", "quick", "--operators", "select_rows", "--checks", "values.exact", "-k", "dtype=float32")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_log(folder / "results.jsonl")
    write_bundle(folder / "cpu.tar.xz", folder / "results.jsonl")
    return folder / "cpu.tar.xz"


def refused(*words: str, variables: dict[str, str] | None = None) -> str:
    """The one line on stderr of a command that exits with 2, without a traceback."""
    code, out, err = cli(variables or environment(), "conformance", *words)
    assert code == ExitCode.USAGE, out + err
    assert "Traceback" not in out + err
    (line,) = err.strip().splitlines()
    return line


def test_an_unknown_backend_is_named_with_those_that_are_installed(tmp_path: Path) -> None:
    line = refused("run", "--backend", "nosuch", "--out", str(tmp_path))
    assert "no backend 'nosuch' is installed; installed are" in line
    assert "'cpu'" in line


def test_the_preflight_names_an_unknown_backend_and_fails() -> None:
    code, out, err = cli(environment(), "conformance", "preflight", "--backend", "nosuch")
    assert code == ExitCode.FAIL
    assert "FAIL  discovery" in out
    assert "no backend 'nosuch' is installed; installed are" in out
    assert err == ""


def test_a_plugin_that_raises_at_import_is_named_with_its_distribution_entry_point_and_cause(tmp_path: Path) -> None:
    site = PluginHouse(tmp_path).site("broken_import")
    variables = environment(site, cache=tmp_path / "cache")
    line = refused("run", "--backend", "broken", "--out", str(tmp_path / "out"), variables=variables)
    for word in ("polyaccel-broken-import 1.0.0", "polyaccel_broken_import:BrokenBackend", "libexample_driver.so.2"):
        assert word in line
    code, out, _ = cli(variables, "conformance", "preflight", "--backend", "broken")
    assert code == ExitCode.FAIL
    assert "libexample_driver.so.2" in out


@pytest.mark.parametrize("clever", [False, True], ids=["plainly", "with every hash repaired"])
def test_a_certificate_edited_by_hand_is_invalid_and_says_where(bundle: Path, tmp_path: Path, clever: bool) -> None:
    def change(files: dict[str, bytes]) -> None:
        def better(summary: dict[str, object]) -> None:
            summary["verdict"] = "earned L0; L1; L2"

        edit_json(files, SUMMARY, better)
        if clever:
            files[MANIFEST] = manifest({name: data for name, data in files.items() if name != MANIFEST})

    edited = rewritten(bundle, tmp_path / "edited.tar.xz", change)
    code, out, err = cli(environment(), "conformance", "verify", str(edited))
    assert code == ExitCode.FAIL, out + err
    wanted = "verdict says" if clever else f"{SUMMARY} does not match its hash: it was edited by hand"
    assert wanted in out
    assert out.splitlines()[-1].startswith("INVALID: ")


@pytest.mark.parametrize(
    ("test", "expires", "says"),
    [
        ("select_rows/values.exact/*", "2026-01-01", "expired on 2026-01-01"),
        ("linear/values.bound/*", "2099-01-01", "matches no failure; remove it"),
    ],
)
def test_a_waiver_that_expired_or_matches_nothing_fails_a_run_that_passes(
    tmp_path: Path, test: str, expires: str, says: str
) -> None:
    waivers = tmp_path / "waivers.toml"
    url = "https://github.com/acme/issues/1"
    text = f'[[waiver]]\ntest = "{test}"\nreason = "known"\nurl = "{url}"\nexpires = {expires}\n'
    waivers.write_text(text, encoding="utf-8")
    words = ["run", "--backend", "cpu", *SMALL, "--no-progress", "--out", str(tmp_path / "out")]
    code, out, err = cli(environment(), "conformance", *words, "--waivers", str(waivers))
    assert code == ExitCode.FAIL, out + err
    assert f"FAILED waiver {test} {says}" in out


TABLE = '[[waiver]]\ntest = "a/b/*"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("waiver = 3", "expected tables [[waiver]]"),
        (TABLE + 'reason = "r"\nexpires = 2099-01-01', "lacks ['url']"),
        (TABLE + 'reason = ""\nurl = "https://github.com/a"\nexpires = 2099-01-01', "has no reason"),
        (TABLE + 'reason = "r"\nurl = "soon"\nexpires = 2099-01-01', "expected an address"),
        (TABLE + 'reason = "r"\nurl = "https://github.com/a"\nexpires = "never"', "expected a date"),
    ],
)
def test_a_waiver_that_does_not_say_why_where_and_until_when_is_refused_before_anything_runs(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    waivers = tmp_path / "waivers.toml"
    waivers.write_text(text, encoding="utf-8")
    words = ["run", "--backend", "cpu", *SMALL, "--out", str(tmp_path / "out"), "--waivers", str(waivers)]
    assert main(words) == ExitCode.USAGE
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""


@pytest.mark.parametrize("backend", ["cpu", "simulated"])
def test_more_devices_than_exist_are_refused_with_how_many_there_are(backend: str, tmp_path: Path) -> None:
    line = refused("run", "--backend", backend, "--devices", "999", "--out", str(tmp_path))
    assert "--devices 999" in line
    assert f"'{backend}' has " in line
