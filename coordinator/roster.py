"""Whom does this peer count in the present round, who may take part, and who is left out of it?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from coordinator.ballot import Voter
from coordinator.chain import Chain
from coordinator.membership import Member, Membership
from coordinator.records import MAX_REASON_CHARS, Exclusion
from coordinator.rounds import electorate_of

MAX_DOUBLINGS = 10  # 1024 attempts are more than any round has


class Roster:
    def __init__(
        self, membership: Membership, voter: Voter, own_peer_id: str, now: Callable[[], float]
    ) -> None:
        """`now`: DHT time."""
        self._membership, self._voter, self._own_peer_id, self._now = membership, voter, own_peer_id, now
        self._listening_since = time.monotonic()  # a clock that never jumps
        self.begin_round()

    def begin_round(self) -> None:
        self._excluded: dict[str, Exclusion] = {}  # proven guilty in this round
        self._left_out: dict[str, tuple[int, float]] = {}  # peer -> attempt, and heartbeat, up to which
        self._num_failed: Counter[str] = Counter()  # attempts of this round, by whose fault

    def listen(self) -> None:
        """From now on heartbeats arrive: a peer never heard of counts until it had the time to be heard."""
        self._listening_since = time.monotonic()

    @property
    def excluded(self) -> list[Exclusion]:
        return [self._excluded[peer] for peer in sorted(self._excluded)]

    def is_excluded(self, peer_id: str) -> bool:
        return peer_id in self._excluded or peer_id in self._membership.banned

    def exclude(self, peer_id: str, reason: str) -> None:
        """For the rest of the round, whatever its heartbeats say; it does not vote either."""
        self._excluded[peer_id] = Exclusion(peer=peer_id, reason=reason[:MAX_REASON_CHARS])

    def leave_out(self, peer_id: str, attempt: int) -> None:
        """Up to this attempt, and until a heartbeat says that it is still there; it goes on voting."""
        member = self._membership.get(peer_id)
        self._left_out[peer_id] = attempt, 0.0 if member is None else member.record.issued_at

    def failed(self, peer_id: str, attempt: int) -> None:
        """It failed an attempt: left out of the next one, and each time of twice as many as before.

        Else two that fail in turn would each be back when the other one is out, and no attempt would succeed.
        """
        self._num_failed[peer_id] += 1
        self.leave_out(peer_id, attempt + 2 ** min(self._num_failed[peer_id] - 1, MAX_DOUBLINGS))

    def left_out(self, attempt: int) -> list[str]:
        return [peer for peer in self._left_out if self._is_left_out(peer, attempt)]

    def candidates(self) -> list[Member]:
        """Live peers that may take part in this round."""
        live = self._membership.live(self._now())
        return [member for member in live if member.peer_id not in self._excluded]

    def absent(self, chain: Chain) -> frozenset[str]:
        """Of the previous cohort: who need not be counted, myself included once I have resigned."""
        absent = self._membership.absent(
            chain.cohort, tip=chain.tip, now=self._now(), listened_seconds=self._listened_seconds()
        )
        own = {self._own_peer_id} if self.has_resigned(chain) else set()
        return absent | own | self._excluded.keys()

    def counted(self) -> frozenset[str]:
        counted = self._voter.counted(self._membership, self._now(), self._listened_seconds())
        return counted - self._excluded.keys()

    def expected(self, chain: Chain) -> frozenset[str]:
        """Whom an electorate must hold."""
        absent, counted = self.absent(chain), self.counted()
        candidates = self.candidates()
        return frozenset(electorate_of(chain, self._own_peer_id, candidates, absent=absent, counted=counted))

    def has_resigned(self, chain: Chain) -> bool:
        return self._voter.promise.has_resigned and self._voter.promise.previous == chain.tip

    def _listened_seconds(self) -> float:
        return time.monotonic() - self._listening_since

    def _is_left_out(self, peer_id: str, attempt: int) -> bool:
        until, issued_at = self._left_out[peer_id]
        member = self._membership.get(peer_id)
        return attempt <= until or (member is not None and member.record.issued_at <= issued_at)
