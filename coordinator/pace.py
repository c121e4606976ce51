"""How long to wait for a peer: deadlines from measured round trips and from the exchange, not from a guess.

The estimator is that of TCP (RFC 6298, section 2): a smoothed round trip plus four times its smoothed
deviation, doubled after each call that got no answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

UNMEASURED_SECONDS = 3.0  # of a peer that has never answered; RFC 6298 says 1, but peers also finetune
FLOOR_SECONDS = 1.0  # RFC 6298, 2.4; a busy machine pauses a process for as long
ALPHA, BETA = 1 / 8, 1 / 4  # RFC 6298, 2.3
MIN_BYTES_PER_SECOND = 125_000.0  # 1 Mbit/s: what the slowest link that we serve moves of a long message
MIN_VOTE_SECONDS = 3.0
LEADER_CALLS = 2  # from "we could fuse" to "begin" the leader waits for its slowest call, then calls again


@dataclass(frozen=True)
class Rtt:
    """Round trips to one peer."""

    smoothed_seconds: float | None = None  # None: never measured
    deviation_seconds: float = 0.0
    num_timeouts: int = 0  # since the last answer

    def measured(self, seconds: float) -> Rtt:
        if self.smoothed_seconds is None:
            return Rtt(seconds, seconds / 2)
        deviation = (1 - BETA) * self.deviation_seconds + BETA * abs(self.smoothed_seconds - seconds)
        return Rtt((1 - ALPHA) * self.smoothed_seconds + ALPHA * seconds, deviation)

    def timed_out(self) -> Rtt:
        return Rtt(self.smoothed_seconds, self.deviation_seconds, self.num_timeouts + 1)

    def timeout_seconds(self, ceiling_seconds: float) -> float:
        if self.smoothed_seconds is None:
            base = UNMEASURED_SECONDS
        else:
            base = max(FLOOR_SECONDS, self.smoothed_seconds + 4 * self.deviation_seconds)
        return min(ceiling_seconds, base * 2.0 ** min(self.num_timeouts, 10))


class Pace:
    """Round trips to all peers, and the deadlines that follow from them."""

    def __init__(self, lease_seconds: float) -> None:
        self._ceiling_seconds = max(
            FLOOR_SECONDS, lease_seconds / 2
        )  # whoever needs longer is as good as gone
        self._rtts: dict[str, Rtt] = {}

    def measured(self, peer_id: str, seconds: float) -> None:
        self._rtts[peer_id] = self._rtts.get(peer_id, Rtt()).measured(seconds)

    def timed_out(self, peer_id: str) -> None:
        self._rtts[peer_id] = self._rtts.get(peer_id, Rtt()).timed_out()

    def keep(self, peer_ids: Collection[str]) -> None:
        """Forget all others: identities that come and go must not fill the memory."""
        self._rtts = {peer: rtt for peer, rtt in self._rtts.items() if peer in peer_ids}

    def call_seconds(self, peer_id: str, *, size_bytes: int = 0) -> float:
        """Limit of one call that moves `size_bytes`."""
        base = self._rtts.get(peer_id, Rtt()).timeout_seconds(self._ceiling_seconds)
        return base + size_bytes / MIN_BYTES_PER_SECOND

    def leader_seconds(self, peer_ids: Collection[str], *, size_bytes: int = 0) -> float:
        """From "we could fuse" to the leader's begin."""
        slowest = max((self.call_seconds(peer) for peer in peer_ids), default=UNMEASURED_SECONDS)
        return LEADER_CALLS * (slowest + size_bytes / MIN_BYTES_PER_SECOND)

    def rtt_seconds(self, peer_ids: Collection[str]) -> float:
        """The longest smoothed round trip; a quarter of the timeout for those that were never measured."""
        rtts = [self._rtts.get(peer, Rtt()).smoothed_seconds for peer in peer_ids]
        return max((UNMEASURED_SECONDS / 4 if s is None else s for s in rtts), default=0.0)

    def grace_seconds(self, peer_ids: Collection[str]) -> float:
        """From a majority of signatures to the commit: for those of the rest, who may have been paused."""
        return max(FLOOR_SECONDS, 4 * self.rtt_seconds(peer_ids))

    def vote_seconds(self, peer_ids: Collection[str], *, exchange_seconds: float) -> float:
        """From my result to a majority of signatures: the others may end as much later as I took myself."""
        return max(MIN_VOTE_SECONDS, exchange_seconds) + 4 * self.rtt_seconds(peer_ids)
