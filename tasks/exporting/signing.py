"""Ed25519 signatures (RFC 8032) of exported folders, by `cryptography`: keys in files, never in a repository.

A list of hashes alone says that a folder is whole. Who wrote the list, only a signature by a key that the reader had
before can say.
"""

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rlhf_core.errors import ConfigError, EnvironmentProblem

KEY_VARIABLE, TRUST_VARIABLE = "RLHF_SIGNING_KEY", "RLHF_TRUSTED_KEYS"
ALGORITHM = "ed25519"
CONTEXT = b"rlhf-pipeline export manifest 1\n"
"""Stands before what is signed, so that no signature made for another purpose fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """A signature as it was found.

    Attributes:
        key: fingerprint of the key that the signature names.
        holds: whether it is that key's signature of these bytes.
        trusted: whether the reader named that key as one to trust.
    """

    key: str
    holds: bool
    trusted: bool


def make_key(path: Path) -> str:
    """Write a new private key to `path` (mode 0600) and its public half to `path`.pub; returns the fingerprint.

    Raises:
        ConfigError: a file is there already, or the place lies in a git checkout.
        EnvironmentProblem: it cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    for one in (path, public):
        if one.exists():
            raise ConfigError(f"{one}: is there already; a key is never overwritten. Fix: another name")
    inside = next((at for at in path.absolute().parents if (at / ".git").exists()), None)
    if inside is not None:
        raise ConfigError(f"{path}: lies in the git checkout {inside}, where keys get published. Fix: a path outside")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        public.write_bytes(shown)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror}). Fix: another place") from error
    return fingerprint(key.public_key())


def signing_key(path: Path | None) -> Ed25519PrivateKey | None:
    """The private key in a file, or in the one that `RLHF_SIGNING_KEY` names; None where neither is given.

    Raises:
        ConfigError: there is no such file, others may read it, or it is no Ed25519 key.
    """
    named = path or (Path(os.environ[KEY_VARIABLE]).expanduser() if os.environ.get(KEY_VARIABLE) else None)
    if named is None:
        return None
    if not named.is_file():
        raise ConfigError(f"{named}: there is no such key. Fix: rlhf models key {named}")
    if named.stat().st_mode & 0o077:
        raise ConfigError(f"{named}: others may read this private key. Fix: chmod 600 {named}")
    try:
        key = serialization.load_pem_private_key(named.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{named}: not a private key in PEM without a password. Fix: rlhf models key FILE") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{named}: not an Ed25519 key. Fix: rlhf models key FILE")
    return key


def trusted_keys(paths: list[Path]) -> tuple[Ed25519PublicKey, ...]:
    """Public keys from files, and from those that `RLHF_TRUSTED_KEYS` lists (separated as in PATH).

    Raises:
        ConfigError: a file is not there or holds no public Ed25519 key.
    """
    listed = [Path(one).expanduser() for one in os.environ.get(TRUST_VARIABLE, "").split(os.pathsep) if one]
    return tuple(_public_key(path) for path in (*paths, *listed))


def sign(key: Ed25519PrivateKey, content: bytes) -> dict[str, str]:
    """The content of a signature file."""
    public = key.public_key()
    return {
        "algorithm": ALGORITHM,
        "public_key": base64.b64encode(public.public_bytes_raw()).decode(),
        "fingerprint": fingerprint(public),
        "signature": base64.b64encode(key.sign(CONTEXT + content)).decode(),
    }


def read_signature(said: Any, content: bytes, trusted: tuple[Ed25519PublicKey, ...]) -> Signature:
    """Hold a signature file's content against the bytes that it is to sign; nonsense does not hold."""
    try:
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(said["public_key"], validate=True))
        signature = base64.b64decode(said["signature"], validate=True)
        if said["algorithm"] != ALGORITHM:
            raise ValueError(said["algorithm"])
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        return Signature(key="unreadable", holds=False, trusted=False)
    raw = public.public_bytes_raw()
    known = any(key.public_bytes_raw() == raw for key in trusted)
    try:
        public.verify(signature, CONTEXT + content)
    except InvalidSignature:
        return Signature(key=fingerprint(public), holds=False, trusted=known)
    return Signature(key=fingerprint(public), holds=True, trusted=known)


def fingerprint(public: Ed25519PublicKey) -> str:
    """A short name of a public key: SHA-256 of its 32 bytes, in base64 as OpenSSH writes fingerprints."""
    digest = hashlib.sha256(public.public_bytes_raw()).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _public_key(path: Path) -> Ed25519PublicKey:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such public key. Fix: the .pub file beside a key of rlhf models key")
    content = path.read_bytes()
    if b"PRIVATE" in content:
        raise ConfigError(f"{path}: a private key, which nobody needs to check with. Fix: the .pub file beside it")
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError as error:
        raise ConfigError(f"{path}: not a public key in PEM. Fix: the .pub file of rlhf models key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: not an Ed25519 key. Fix: the .pub file of rlhf models key")
    return key
