"""Which members have accepted a round, and which rejected it? Their signed bits, as they come in.

A vote is one bit under a signature (`records.GateVote`): no figure of anybody's data. What follows from the
votes is decided elsewhere (`peer/gate.py`), here they are told, checked, counted once and kept in bounds.

    gate_vote   member -> all    [signed vote, ...]: the own one; all that are held, before a roll-back

Only contributors of a commit vote on it. Who signs both bits has told some peers one thing and some the
other: it counts as silent, whichever came first, so all who have heard the same votes count the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from coordinator.chain import Chain
from coordinator.identity import Identity
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.presence import Presence
from coordinator.records import GateVote, RecordError, open_envelope, sign

logger = logging.getLogger(__name__)

MAX_COMMITS = 2  # on so many of the newest commits a peer's votes are kept: some commit before others
MAX_PEERS = 2048

Envelope = dict[str, str]


class GateVotes:
    """The votes on the newest commits. In the network's thread, but for the properties."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        membership: Membership,
        presence: Presence,
        chain: Callable[[], Chain],
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a vote has come in."""
        self._network, self._identity, self._membership = network, identity, membership
        self._presence, self._chain, self._changed = presence, chain, changed
        self._votes: dict[str, dict[str, dict[bool, Envelope]]] = {}  # peer -> commit -> bit -> as signed
        self._late: set[str] = set()  # commits whose deadline is over

    def start(self) -> None:
        self._network.on_call("gate_vote", self._on_gate_vote)

    async def cast(self, commit: str, *, rejects: bool) -> None:
        """Sign the own vote and tell it to all who are here."""
        vote = GateVote(run=self._chain().spec.digest, commit=commit, rejects=rejects)
        envelope = sign(vote, self._identity).to_json()
        self._keep(self._identity.peer_id, vote, envelope)
        await self._tell([envelope])

    async def tell_all(self, commit: str) -> None:
        """Every member's vote that is held: before a roll-back, so that who missed one comes to the same
        verdict. Not those of strangers: with them the message may be longer than anybody takes.
        """
        members = self._chain().cohort
        held = [v[commit].values() for peer, v in self._votes.items() if commit in v and peer in members]
        await self._tell([envelope for envelopes in held for envelope in envelopes])

    def close(self, commit: str) -> None:
        """The deadline is over: later votes do not count."""
        self._late = {commit}

    def of(self, commit: str) -> Mapping[str, bool]:
        """peer -> whether it rejects. From any thread."""
        found = {peer: list(votes.get(commit, ())) for peer, votes in list(self._votes.items())}
        return {peer: bits[0] for peer, bits in found.items() if len(bits) == 1}

    def may_come(self, now: float) -> frozenset[str]:
        """Who made the tip, has not voted, is here, and has not gone on without. From any thread.

        A member votes before it enters the next round.
        """
        chain = self._chain()
        commit = chain.commits[-1].commit
        waiting = {m.peer_id for m in self._membership.live(now) if not _has_gone_on(m.record, chain)}
        return frozenset((waiting & commit.cohort) - self.of(chain.tip).keys())

    async def _tell(self, envelopes: list[Envelope]) -> None:
        await self._presence.tell_all("gate_vote", {"votes": envelopes})

    async def _on_gate_vote(self, _peer_id: str, body: Any) -> bytes:
        envelopes = body.get("votes") if isinstance(body, dict) else None
        if not isinstance(envelopes, list) or len(envelopes) > 2 * self._chain().spec.max_peers:
            raise RecordError("votes are a list, of two for each member at most")
        for envelope in envelopes:
            if not self._is_known(envelope):  # else to open it would cost a signature each time
                self._take(envelope)
        self._changed()
        return b"{}"

    def _is_known(self, envelope: object) -> bool:
        author = envelope.get("peer_id") if isinstance(envelope, dict) else None
        by_commit = self._votes.get(author, {}) if isinstance(author, str) else {}
        return any(envelope in votes.values() for votes in by_commit.values())

    def _take(self, envelope: object) -> None:
        """Raises RecordError."""
        author = envelope.get("peer_id") if isinstance(envelope, dict) else None
        if isinstance(author, str) and not self._may_vote(author):
            return  # not the fault of who passes it on
        author, vote = open_envelope(envelope, GateVote)
        if vote.run != self._chain().spec.digest or not isinstance(envelope, dict):
            raise RecordError("a vote of another run")
        if envelope["payload"].encode(errors="replace") != vote.canonical():  # padded: too long to be told on
            raise RecordError("a vote that is not written as all are")
        if vote.commit in self._late:
            logger.info("a vote of %s came too late", author[-8:])
            return
        self._keep(author, vote, envelope)

    def _may_vote(self, author: str) -> bool:
        """Contributors of the tip; and who is here, as its vote may be on a commit that I do not know yet."""
        return author in self._chain().cohort or self._membership.get(author) is not None

    def _keep(self, author: str, vote: GateVote, envelope: Envelope) -> None:
        if author not in self._votes and len(self._votes) >= MAX_PEERS:
            self._forget_strangers()
        votes = dict(self._votes.get(author, {}))
        both = {**votes.pop(vote.commit, {}), vote.rejects: envelope}
        others = {c: v for c, v in votes.items() if c == self._chain().tip} or votes  # that of the tip stays
        newest = dict(list(others.items())[-(MAX_COMMITS - 1) :])
        # Replaced whole: other threads look through the old one.
        self._votes = {**self._votes, author: {**newest, vote.commit: both}}
        if len(both) == 2:
            logger.warning("%s voted both ways on one round: it counts as silent", author[-8:])

    def _forget_strangers(self) -> None:
        cohort = self._chain().cohort
        self._votes = {peer: votes for peer, votes in self._votes.items() if peer in cohort}


def _has_gone_on(record: Any, chain: Chain) -> bool:
    """Whether a member that is at the tip will not vote on it any more."""
    return bool(record.commit == chain.tip and record.phase != "evaluating")
