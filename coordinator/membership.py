"""Who is alive, at which round, holding which state, and who has been silent for too long to be counted?

A table of the newest valid heartbeats. **Live** is whose heartbeat has not expired: it can take part.
**Silent** is stricter, since a majority is counted without the silent: no heartbeat for the lease itself,
given that heartbeats are a sixth of a lease apart and clocks differ by up to two seconds.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass

from coordinator.admission import Admission
from coordinator.beginning import Beginning
from coordinator.records import (
    MAX_CLOCK_SKEW_SECONDS,
    PeerRecord,
    Phase,
    RecordError,
    check_times,
    open_signed,
)
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

MAX_PEERS_KNOWN = 4096
MAX_BANNED = 4096  # whoever made a round is banned beyond that number, too
TRAINING_PHASES = frozenset({"finetuning", "ready", "evaluating"})
CLOCK_DIFFERENCE_SECONDS = 2.0  # between two peers; beyond that, rounds may fork and heal


def silence_seconds(spec: RunSpec) -> float:
    """Since its newest heartbeat was issued, after which a peer was unheard for longer than the lease."""
    return spec.lease_seconds * 7 / 6 + CLOCK_DIFFERENCE_SECONDS


@dataclass(frozen=True)
class Member:
    peer_id: str
    record: PeerRecord
    signed: dict[str, str]  # the envelope, to be shown to others as proof


class Membership:
    """Newest valid heartbeat per peer. Bad ones are dropped, and the log says who and why. Thread-safe."""

    def __init__(
        self,
        spec: RunSpec,
        own_peer_id: str,
        admission: Admission | None = None,
        beginning: Beginning | None = None,
    ) -> None:
        """`admission`: of a private run; only those that it lets in are members."""
        self.beginning = beginning or Beginning(spec)
        self._spec, self._own_peer_id, self._admission = spec, own_peer_id, admission
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._forgotten: dict[str, float] = {}  # peer id -> instant up to which its heartbeats do not count
        self._heard: dict[str, PeerRecord] = {}  # the newest of each, expired and forgotten ones included
        self._banned: dict[str, None] = {}  # in order of time
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
            if self._admission is not None:
                self._admission.admit(author, record.credential)
        except RecordError as error:
            self._complain(claimed_by or "a peer", str(error))
            return None
        with self._lock:
            if author in self._banned or not self._hear(author, record, now):
                return None
            self.beginning.learn(record.witness)
            return self._store(Member(author, record, _envelope(data)))

    def _hear(self, peer_id: str, record: PeerRecord, now: float) -> bool:
        """Note when a peer was last heard; False when there is no room for one more."""
        known = self._heard.get(peer_id)
        if known is None and len(self._heard) >= MAX_PEERS_KNOWN:
            limit = now - silence_seconds(self._spec)
            self._heard = {p: heard for p, heard in self._heard.items() if heard.issued_at >= limit}
            if len(self._heard) >= MAX_PEERS_KNOWN:
                self._complain(peer_id, f"more than {MAX_PEERS_KNOWN} peers are known already")
                return False
        if known is None or record.issued_at > known.issued_at:
            self._heard[peer_id] = record
        return True

    def _store(self, member: Member) -> Member | None:
        known = self._members.get(member.peer_id)
        newest = known.record.issued_at if known else self._forgotten.get(member.peer_id, 0.0)
        if member.peer_id == self._own_peer_id or member.record.issued_at <= newest:
            return None
        self._members[member.peer_id] = member
        return member

    def live(self, now: float) -> list[Member]:
        """Others whose heartbeat has not expired and who have not said goodbye, in order of peer id."""
        with self._lock:
            for peer_id in [p for p, member in self._members.items() if member.record.expires_at <= now]:
                del self._members[peer_id]
            self._forgotten = {p: at for p, at in self._forgotten.items() if self._may_come_again(at, now)}
            members = list(self._members.values())
        return sorted((m for m in members if m.record.phase != "leaving"), key=lambda member: member.peer_id)

    def get(self, peer_id: str) -> Member | None:
        return self._members.get(peer_id)

    def live_phase(self, peer_id: str, now: float) -> Phase | None:
        """What a peer is doing; None when it is not here. As quick as a look-up: strangers may ask for it."""
        member = self._members.get(peer_id)
        if member is None or member.record.expires_at <= now or member.record.phase == "leaving":
            return None
        return member.record.phase

    def has_heard(self, peer_id: str) -> bool:
        """Of late: expired and forgotten ones included."""
        return peer_id in self._heard

    def heard(self) -> dict[str, PeerRecord]:
        """The newest record of each, by peer id; those that have expired or said goodbye included."""
        with self._lock:
            return dict(self._heard)

    def forget(self, peer_id: str) -> None:
        """Count a peer that cannot be reached as gone; its next heartbeat brings it back."""
        with self._lock:
            member = self._members.pop(peer_id, None)
            if member is not None:
                self._forgotten[peer_id] = member.record.issued_at

    def _may_come_again(self, issued_at: float, now: float) -> bool:
        """Whether a heartbeat of that instant may still count as a new one; see `check_times`."""
        return issued_at + self._spec.lease_seconds + MAX_CLOCK_SKEW_SECONDS > now

    def ban(self, peer_id: str, why: str, *, members: Collection[str] = ()) -> None:
        """For the rest of the run: no record of it counts, and no majority counts it.

        Beyond MAX_BANNED the oldest go that are no `members` of the chain: their holders can make new keys.
        """
        with self._lock:
            self._banned[peer_id] = None
            self._members.pop(peer_id, None)
            if len(self._banned) > MAX_BANNED:
                strangers = [p for p in self._banned if p not in members and p != peer_id]
                for stranger in strangers[: len(self._banned) - MAX_BANNED]:
                    del self._banned[stranger]
        logger.warning("peer %s is excluded from the run: %s", peer_id[-8:], why)

    @property
    def banned(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._banned)

    def absent(
        self, peer_ids: Collection[str], *, tip: str, now: float, listened_seconds: float
    ) -> frozenset[str]:
        """Who of `peer_ids` need not be counted for the round after `tip`: silent, resigned, or banned.

        A peer never heard of is silent once I have listened for as long (`listened_seconds`, of a clock that
        never jumps). One that is forgotten because a call failed is not: it may be there for others.
        """
        with self._lock:
            return frozenset(
                peer
                for peer in peer_ids
                if peer != self._own_peer_id
                and (
                    peer in self._banned
                    or self._is_silent(peer, now, listened_seconds)
                    or (peer in self._heard and self._heard[peer].resigned == tip)
                )
            )

    def in_training(self, *, tip: str, now: float) -> frozenset[str]:
        """Who said last that it trains on `tip`, and is not silent: live, expired of late, or forgotten."""
        with self._lock:
            return frozenset(
                peer
                for peer, record in self._heard.items()
                if record.commit == tip
                and record.phase in TRAINING_PHASES
                and record.resigned != tip
                and peer not in self._banned
                and not self._is_silent(peer, now, 0.0)
            )

    def _is_silent(self, peer_id: str, now: float, listened_seconds: float) -> bool:
        heard = self._heard.get(peer_id)
        since = listened_seconds if heard is None else now - heard.issued_at
        return since > silence_seconds(self._spec)

    def _complain(self, who: str, why: str) -> None:
        if (who, why) not in self._complained and len(self._complained) < 1000:
            self._complained.add((who, why))
            log = logger.info if why == "expired" else logger.warning
            log("dropped a record of %s: %s", who[-8:], why)


def _envelope(data: bytes) -> dict[str, str]:
    envelope: dict[str, str] = json.loads(data)
    return envelope
