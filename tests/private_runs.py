"""What do tests of private runs build again and again? Specs with an organizer, credentials, and bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coordinator.admission import Admission
from coordinator.credentials import Invite, make_invite, make_revocations, open_revocations
from coordinator.identity import Identity
from coordinator.records import Certificate, Credential, Revocations, Signed, signature_text
from coordinator.spec import RunSpec
from tests.fakes import hash_of, identity, make_spec, peer

ORGANIZER = identity("organizer")
DAY = 24 * 3600.0


def private_spec(**changes: object) -> RunSpec:
    return make_spec(**{"organizer": ORGANIZER.peer_id, **changes})


def invite(
    run: str, *, expires_at: float, for_peer: str | None = None, entry: tuple[str, ...] = ()
) -> Invite:
    return make_invite(ORGANIZER, run, entry, expires_at=expires_at, for_peer=for_peer)


def credential(run: str, peer_id: str, *, now: float, for_peer: bool = False) -> Credential:
    """A good one, by an invite for whoever holds it, or by one for this peer."""
    made = invite(run, expires_at=now + DAY, for_peer=peer_id if for_peer else None)
    return made.credential_for(peer_id, now)


def admission(run: str, peer_id: str, *, now: Callable[[], float], file: Path | None = None) -> Admission:
    return Admission(
        run=run,
        organizer=ORGANIZER.peer_id,
        peer_id=peer_id,
        credential=credential(run, peer_id, now=now()),
        file=file,
        now=now,
    )


def revocations(run: str, keys: set[str], before: Signed | None = None) -> Signed:
    known = None if before is None else _open(before, run)
    return make_revocations(ORGANIZER, run, keys, known)


def bad_credentials(run: str, outsider: str, *, now: float) -> dict[str, tuple[Credential | None, str]]:
    """By kind: what an outsider may show, and what it is told."""
    good = credential(run, outsider, now=now)
    return {
        "none": (None, "no credential"),
        "self-made": (_by(identity("mallory"), run, outsider, now), "forged"),
        "prolonged": (_changed(good, expires_at=now + 400 * DAY), "forged"),
        "expired": (_expired(run, outsider, now), "expired"),
        "another run's": (credential(hash_of("another"), outsider, now=now), "of another run"),
        "another's, for one peer": (
            credential(run, peer("member"), now=now, for_peer=True),
            "another peer's",
        ),
        "another's, by an invite": (credential(run, peer("member"), now=now), "another peer's"),
        "an invite without its key": (good.model_copy(update={"vouching": ""}), "another peer's"),
    }


def _open(signed: Signed, run: str) -> Revocations:
    return open_revocations(signed.to_bytes(), run=run, organizer=ORGANIZER.peer_id)


def _by(author: Identity, run: str, peer_id: str, now: float) -> Credential:
    certificate = Certificate(run=run, role="peer", key=peer_id, expires_at=now + DAY)
    return Credential(certificate=certificate, signature=signature_text(certificate, author))


def _changed(good: Credential, **changes: object) -> Credential:
    return good.model_copy(update={"certificate": good.certificate.model_copy(update=changes)})


def _expired(run: str, peer_id: str, now: float) -> Credential:
    made = invite(run, expires_at=now - 1.0)
    return made.credential_for(peer_id, now - DAY)
