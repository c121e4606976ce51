"""Who is alive, at which round, holding which state: a table of the newest valid heartbeats."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass

from coordinator.records import PeerRecord, RecordError, check_times, open_signed
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

MAX_PEERS_KNOWN = 4096


@dataclass(frozen=True)
class Member:
    peer_id: str
    record: PeerRecord
    signed: dict[str, str]  # the envelope, to be shown to others as proof


class Membership:
    """Newest valid heartbeat per peer. Bad ones are dropped, and the log says who and why. Thread-safe."""

    def __init__(self, spec: RunSpec, own_peer_id: str) -> None:
        self._spec, self._own_peer_id = spec, own_peer_id
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._forgotten: dict[str, float] = {}  # peer id -> instant up to which its heartbeats do not count
        self._complained: set[tuple[str, str]] = set()

    def observe(self, data: bytes, *, now: float, claimed_by: str | None = None) -> Member | None:
        """Take in one signed heartbeat; None when it is refused or older than what is known."""
        try:
            author, record = open_signed(data, PeerRecord)
            if claimed_by is not None and author != claimed_by:
                raise RecordError(f"signed by {author[-8:]}")
            if record.run != self._spec.digest:
                raise RecordError("of another run")
            check_times(record, now=now, lease_seconds=self._spec.lease_seconds)
        except RecordError as error:
            self._complain(claimed_by or "a peer", str(error))
            return None
        with self._lock:
            return self._store(Member(author, record, _envelope(data)))

    def _store(self, member: Member) -> Member | None:
        known = self._members.get(member.peer_id)
        newest = known.record.issued_at if known else self._forgotten.get(member.peer_id, 0.0)
        if member.peer_id == self._own_peer_id or member.record.issued_at <= newest:
            return None
        if known is None and len(self._members) >= MAX_PEERS_KNOWN:
            self._complain(member.peer_id, f"more than {MAX_PEERS_KNOWN} peers are known already")
            return None
        self._members[member.peer_id] = member
        return member

    def live(self, now: float) -> list[Member]:
        """Others whose heartbeat has not expired and who have not said goodbye, in order of peer id."""
        with self._lock:
            for peer_id in [p for p, member in self._members.items() if member.record.expires_at <= now]:
                del self._members[peer_id]
            members = list(self._members.values())
        return sorted((m for m in members if m.record.phase != "leaving"), key=lambda member: member.peer_id)

    def get(self, peer_id: str) -> Member | None:
        return self._members.get(peer_id)

    def forget(self, peer_id: str) -> None:
        """Count a peer that cannot be reached as gone; its next heartbeat brings it back."""
        with self._lock:
            member = self._members.pop(peer_id, None)
            if member is not None:
                self._forgotten[peer_id] = member.record.issued_at

    def _complain(self, who: str, why: str) -> None:
        if (who, why) not in self._complained and len(self._complained) < 1000:
            self._complained.add((who, why))
            log = logger.info if why == "expired" else logger.warning
            log("dropped a record of %s: %s", who[-8:], why)


def _envelope(data: bytes) -> dict[str, str]:
    envelope: dict[str, str] = json.loads(data)
    return envelope
