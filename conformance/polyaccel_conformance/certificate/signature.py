"""Signatures of bundles: Ed25519 (RFC 8032) over the manifest, which holds the hash of every other file.

A key pair, not a shared secret: whoever checks a certificate must not be able to write one. The implementation is the
``cryptography`` package, which is needed for signing and for checking signatures only; a bundle without a signature is
still checked in every other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyaccel_conformance.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM = "ed25519"
INSTALL = 'signatures need the package "cryptography": pip install "polyaccel[crypto]"'


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs with a private key."""

    _key: Ed25519PrivateKey

    @classmethod
    def read(cls, path: Path) -> Signer:
        """From a PEM file without a password, as ``openssl genpkey -algorithm ed25519`` writes it.

        Raises:
            UsageError: not such a file, or the package is missing.
        """
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        except ImportError as error:
            raise UsageError(INSTALL) from error
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path} is no private key without a password: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path} is no Ed25519 key")
        return cls(key)

    def sign(self, data: bytes) -> dict[str, str]:
        return {"algorithm": ALGORITHM, "signature": self._key.sign(data).hex()}


def read_public_key(path: Path) -> Ed25519PublicKey:
    """From a PEM file, as ``openssl pkey -pubout`` writes it.

    Raises:
        UsageError: not such a file, or the package is missing.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise UsageError(INSTALL) from error
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is no Ed25519 key")
    return key


def is_signed_by(key: Ed25519PublicKey, data: bytes, signature: Mapping[str, object]) -> bool:
    """Whether the holder of the private half signed ``data``."""
    from cryptography.exceptions import InvalidSignature

    if signature.get("algorithm") != ALGORITHM:
        return False
    try:
        key.verify(bytes.fromhex(str(signature.get("signature", ""))), data)
    except (InvalidSignature, ValueError):
        return False
    return True
