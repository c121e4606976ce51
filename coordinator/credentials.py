"""Who may take part in a private run? Certificates, invites and revocations: pure, nobody is asked online.

The spec of a private run names its organizer, an Ed25519 key, and the spec's digest binds it. There are two
kinds of invite, and both end in a `Credential` that any peer checks by itself:

- **For whoever holds it.** The string carries a fresh private key. The organizer has certified that key, and
  the holder signs its own peer id with it: organizer -> invite -> peer. So one string can be sent before
  anybody knows the peer id of who will use it. It is a secret: who has it can let in as many peers as he
  likes, until it expires or is revoked, which ends all of them at once.
- **For one peer** (`--for-peer`). The organizer certifies the peer's own key: organizer -> peer. The string
  is no secret, since nobody else can use it. Where one voice per member matters, this is the one to use.

A credential names one peer id, and the transport (libp2p's TLS or Noise) proves that the other side holds its
key, so one that was seen and is shown by somebody else is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from coordinator.errors import AccessError
from coordinator.identity import Identity, peer_id_of
from coordinator.records import (
    MAX_REVOKED,
    Certificate,
    Credential,
    HashText,
    PeerIdText,
    Record,
    RecordError,
    Revocations,
    Signed,
    Vouching,
    is_signature_of,
    open_signed,
    parse_json,
    parse_record,
    sign,
    signature_text,
)

INVITE_PREFIX = "cold-invite-1."
MAX_INVITE_CHARS = 8192
MAX_CREDENTIAL_BYTES = 2048
_CHECKSUM_CHARS = 8


class CredentialError(RecordError):
    """A peer that may not take part in this run; the message says why."""


class RevokedError(CredentialError):
    pass


class _InviteBody(Record):
    """What stands in the string."""

    kind: Literal["invite"] = "invite"
    run: HashText
    organizer: PeerIdText
    entry_points: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=8)]
    certificate: Certificate
    signature: Annotated[str, Field(max_length=88)]
    secret: Annotated[str, Field(max_length=44)] = ""  # base64 of the invite's private key


@dataclass(frozen=True)
class Invite:
    """A parsed string, whose certificate is signed by the organizer that it names."""

    run: str  # digest of the spec
    organizer: str  # its key, as a peer id
    entry_points: tuple[str, ...]  # addresses
    certificate: Certificate
    signature: str  # of the organizer over the certificate
    secret: str = ""  # base64 of the invite's private key; empty: for one peer

    @property
    def for_peer(self) -> str | None:
        """The only one that may use it."""
        return self.certificate.key if self.certificate.role == "peer" else None

    def to_text(self) -> str:
        values = {name: getattr(self, name) for name in ("run", "organizer", "signature", "secret")}
        body = _InviteBody(entry_points=list(self.entry_points), certificate=self.certificate, **values)
        text = base64.urlsafe_b64encode(body.canonical()).decode().rstrip("=")
        return f"{INVITE_PREFIX}{text}.{_checksum(text)}"

    def credential_for(self, peer_id: str, now: float) -> Credential:
        """Raises AccessError where the invite is of no use to this peer, or any more."""
        try:
            credential = self._credential(peer_id)
            check_credential(credential, peer_id, run=self.run, organizer=self.organizer, revoked=(), now=now)
        except CredentialError as error:
            raise AccessError(
                f"this invite does not let {peer_id} in: {error}; ask the organizer for a new one"
            ) from error
        return credential

    def _credential(self, peer_id: str) -> Credential:
        if self.for_peer is not None:
            return Credential(certificate=self.certificate, signature=self.signature)
        key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(self.secret))
        holder = Identity(private_key=key, path=Path(), peer_id=peer_id_of(key.public_key()))
        vouching = signature_text(Vouching(run=self.run, peer=peer_id), holder)
        return Credential(certificate=self.certificate, signature=self.signature, vouching=vouching)


def make_invite(
    organizer: Identity,
    run: str,
    entry_points: Sequence[str],
    *,
    expires_at: float,
    for_peer: str | None = None,
    name: str = "",
) -> Invite:
    """A fresh key for whoever holds the string; with `for_peer`, for that peer alone."""
    key = Ed25519PrivateKey.generate()
    certificate = Certificate(
        run=run,
        role="invite" if for_peer is None else "peer",
        key=peer_id_of(key.public_key()) if for_peer is None else for_peer,
        name=name,
        expires_at=expires_at,
    )
    secret = base64.b64encode(key.private_bytes_raw()).decode() if for_peer is None else ""
    signature = signature_text(certificate, organizer)
    return Invite(run, organizer.peer_id, tuple(entry_points), certificate, signature, secret)


def parse_invite(text: str) -> Invite:
    """Raises AccessError that says what is wrong with the string."""
    text = text.strip()
    if len(text) > MAX_INVITE_CHARS:
        raise AccessError(f"an invite has at most {MAX_INVITE_CHARS} characters, this has {len(text)}")
    body, _, checksum = text.removeprefix(INVITE_PREFIX).rpartition(".")
    if not text.startswith(INVITE_PREFIX):
        raise AccessError(f"not an invite: one begins with {INVITE_PREFIX} and is one word; copy all of it")
    if checksum != _checksum(body):
        raise AccessError("the invite is cut off or mistyped; copy all of it, in one line")
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        invite = _invite_of(parse_record(parse_json(raw, max_bytes=MAX_INVITE_CHARS), _InviteBody))
    except (binascii.Error, ValueError) as error:
        raise AccessError(f"the invite is malformed ({error}); ask the organizer for a new one") from error
    if not is_signature_of(invite.signature, invite.certificate, invite.organizer):
        raise AccessError("the invite is forged: the organizer that it names has not signed it")
    return invite


def check_credential(
    credential: Credential | None,
    peer_id: str,
    *,
    run: str,
    organizer: str,
    revoked: Collection[str],
    now: float,
) -> None:
    """Whether `peer_id` may take part. Raises CredentialError with the reason, in words for both sides."""
    if credential is None:
        raise CredentialError("it shows no credential")
    certificate = credential.certificate
    if certificate.run != run:
        raise CredentialError("its credential is of another run")
    if certificate.role == "peer" and certificate.key != peer_id:
        raise CredentialError("its credential is another peer's")
    if not is_signature_of(credential.signature, certificate, organizer):
        raise CredentialError("its credential is forged: the organizer has not signed it")
    if certificate.role == "invite":
        vouching = Vouching(run=run, peer=peer_id)
        if not is_signature_of(credential.vouching, vouching, certificate.key):
            raise CredentialError("its credential is another peer's")
    if not revoked_keys(credential, peer_id).isdisjoint(revoked):
        raise RevokedError("the organizer has revoked it")
    if certificate.expires_at <= now:
        raise CredentialError(f"its credential has expired, at {instant_text(certificate.expires_at)}")


def revoked_keys(credential: Credential, peer_id: str) -> frozenset[str]:
    """Keys of which one on the list is enough to keep this peer out."""
    return frozenset((peer_id, credential.certificate.key))


def parse_credential(value: object) -> Credential | None:
    """Of another peer's JSON; None where it shows none. Raises RecordError."""
    if value is None:
        return None
    if len(json.dumps(value)) > MAX_CREDENTIAL_BYTES:
        raise RecordError("a credential that is too large")
    return parse_record(value, Credential)


def make_revocations(
    organizer: Identity, run: str, keys: Collection[str], before: Revocations | None
) -> Signed:
    """The next version: what was revoked before stays so. Raises AccessError when there is no more room."""
    known = list(before.keys) if before else []
    added = sorted(set(keys) - set(known))
    if len(known) + len(added) > MAX_REVOKED:
        raise AccessError(f"a run revokes at most {MAX_REVOKED} keys; begin a new one with who may stay")
    version = 1 if before is None else before.version + 1
    return sign(Revocations(run=run, version=version, keys=[*known, *added]), organizer)


def open_revocations(data: bytes, *, run: str, organizer: str) -> Revocations:
    """Raises RecordError for anything but a list of this run that its organizer has signed."""
    author, revocations = open_signed(data, Revocations)
    if author != organizer:
        raise RecordError("the list of revocations is not the organizer's")
    if revocations.run != run:
        raise RecordError("the list of revocations is of another run")
    return revocations


def instant_text(instant: float) -> str:
    """For people: minutes, UTC."""
    try:
        return f"{datetime.fromtimestamp(instant, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "an instant beyond the calendar"


def _invite_of(body: _InviteBody) -> Invite:
    """Raises ValueError when its pieces do not fit together."""
    certificate = body.certificate
    if certificate.run != body.run:
        raise ValueError("its certificate is of another run")
    if (certificate.role == "invite") != bool(body.secret):
        raise ValueError("the key is missing, or is one too many")
    if body.secret:
        raw = base64.b64decode(body.secret, validate=True)
        if peer_id_of(Ed25519PrivateKey.from_private_bytes(raw).public_key()) != certificate.key:
            raise ValueError("its key is not the certified one")
    entry_points = tuple(body.entry_points)
    return Invite(body.run, body.organizer, entry_points, certificate, body.signature, body.secret)


def _checksum(text: str) -> str:
    """Against a string that was cut when it was copied; what is signed needs no checksum."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:_CHECKSUM_CHARS]
