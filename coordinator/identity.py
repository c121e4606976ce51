"""Who am I: the key of a peer, its file, its peer id, and signatures with it.

An identity is an Ed25519 key in libp2p's protobuf form, so the p2p daemon runs under it and the
peer id of a record is the one that the transport authenticates. An Ed25519 peer id contains
its public key (libp2p peer-ids specification), so a signature needs nothing else to be checked.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from coordinator.errors import StateError

# libp2p: PrivateKey{Type: Ed25519 = 1, Data: 64 bytes, seed then public key}
_PRIVATE_KEY_HEADER = b"\x08\x01\x12\x40"
# identity multihash (0x00, 36 bytes) of PublicKey{Type: Ed25519 = 1, Data: 32 bytes}
_PEER_ID_HEADER = b"\x00\x24\x08\x01\x12\x20"


@dataclass(frozen=True)
class Identity:
    private_key: Ed25519PrivateKey
    path: Path  # libp2p's key file, readable by its owner only
    peer_id: str  # base58

    def sign(self, data: bytes) -> bytes:
        """64 bytes, deterministic (RFC 8032)."""
        return self.private_key.sign(data)


def load_identity(path: Path) -> Identity:
    """Read the identity at `path`, or make one there. Raises StateError when the file is not usable."""
    try:
        if not path.exists():
            _create(path)
        raw = path.read_bytes()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise StateError(f"{path}: cannot read or write the identity: {error.strerror}") from error
    if len(raw) != 68 or not raw.startswith(_PRIVATE_KEY_HEADER):
        raise StateError(f"{path}: not an Ed25519 identity file; move it away to get a new identity")
    if mode & 0o077:
        raise StateError(f"{path}: the identity is readable by others (mode {mode:o}); run: chmod 600 {path}")
    key = Ed25519PrivateKey.from_private_bytes(raw[4:36])
    return Identity(private_key=key, path=path, peer_id=peer_id_of(key.public_key()))


def peer_id_of(key: Ed25519PublicKey) -> str:
    return base58.b58encode(_PEER_ID_HEADER + key.public_bytes_raw()).decode()


def is_signed_by(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made with the key of `peer_id`; False for anything malformed."""
    try:
        raw = base58.b58decode(peer_id[:64])
        if len(raw) != 38 or not raw.startswith(_PEER_ID_HEADER):
            return False
        if base58.b58encode(raw).decode() != peer_id:  # one key, one name: base58 forgives trailing spaces
            return False
        Ed25519PublicKey.from_public_bytes(raw[6:]).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    data = _PRIVATE_KEY_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
