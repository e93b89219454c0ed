"""Signatures: Ed25519 over the manifest, checked with the public half."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import SIGNATURE, read_bundle, write_bundle
from polyaccel_conformance.certificate.signature import Signer
from polyaccel_conformance.certificate.verify import verify
from polyaccel_conformance.errors import UsageError
from tests.conformance.certificate.small_run import edit_json, rewritten

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signed_bundle_is_valid_under_its_own_key_and_no_other(log: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    write_bundle(tmp_path / "b.tar.xz", log, signer=Signer.read(private))
    assert verify(read_bundle(tmp_path / "b.tar.xz"), key=public).verdict == "VALID"
    _, other = key_pair(tmp_path, "other")
    assert "not by the holder" in verify(read_bundle(tmp_path / "b.tar.xz"), key=other).problems[0]


def test_a_signature_that_was_changed_or_removed_is_a_problem(log: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    write_bundle(tmp_path / "b.tar.xz", log, signer=Signer.read(private))

    def change(files: dict[str, bytes]) -> None:
        edit_json(files, SIGNATURE, lambda value: value.update(signature="00" * 64))

    changed = rewritten(tmp_path / "b.tar.xz", tmp_path / "changed.tar.xz", change)
    assert verify(read_bundle(changed), key=public).verdict == "INVALID"
    removed = rewritten(tmp_path / "b.tar.xz", tmp_path / "removed.tar.xz", lambda f: f.pop(SIGNATURE) and None)
    assert "it has no signature" in verify(read_bundle(removed), key=public).problems


def test_without_a_key_a_signed_bundle_is_checked_in_every_other_way(log: Path, tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path, "mine")
    write_bundle(tmp_path / "b.tar.xz", log, signer=Signer.read(private))
    found = verify(read_bundle(tmp_path / "b.tar.xz"))
    assert found.verdict == "VALID"
    assert any("it is signed" in note for note in found.notes)


def test_a_file_that_is_no_key_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no key", encoding="utf-8")
    with pytest.raises(UsageError, match="no private key"):
        Signer.read(tmp_path / "x.pem")
