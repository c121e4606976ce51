"""How a commit gets its signatures: the own one goes to all members, theirs come in, until they suffice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.ballot import Ballot, VoteBox, Voter, signers_of
from coordinator.chain import Chain
from coordinator.errors import RoundError
from coordinator.identity import Identity
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.pace import Pace
from coordinator.presence import Presence
from coordinator.records import Commit, SignedCommit

POLL_SECONDS = 0.1  # looks at the heartbeats while votes come in


class Bell:
    """Wakes whoever waits for something to arrive."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()

    async def rung(self, timeout_seconds: float) -> None:
        """Until something arrives, or the time is over."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_seconds)
        except TimeoutError:
            return
        self._event.clear()


class Voting:
    """The votes of one round."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        membership: Membership,
        voter: Voter,
        pace: Pace,
        presence: Presence,
        bell: Bell,
        store_promise: Callable[[], Awaitable[None]],
    ) -> None:
        self._network, self._identity, self._membership = network, identity, membership
        self._voter, self._pace, self._presence, self._bell = voter, pace, presence, bell
        self._store_promise = store_promise
        self.begin_round()

    def begin_round(self) -> None:
        self._box = VoteBox()
        self._until = 0.0  # DHT time
        self._allowed: frozenset[str] = frozenset()  # whose signatures belong to the running ballot

    @property
    def is_running(self) -> bool:
        return self._network.now() < self._until

    def stop(self) -> None:
        self._until = 0.0

    def expects(self, peer_id: str) -> bool:
        return peer_id in self._allowed

    def add(self, peer_id: str, digest: str, signature: str) -> None:
        self._box.add(peer_id, digest, signature)
        self._bell.ring()

    async def commit(self, ballot: Ballot, commit: Commit, chain: Chain, exchange_seconds: float) -> Chain:
        """`chain` with the commit. Raises RoundError when no majority signs the same in time."""
        now = self._network.now()
        own = self._voter.sign(commit, ballot.proposal, now)
        others = [peer for peer in ballot.members if peer != self._identity.peer_id]
        self._until = now + self._pace.vote_seconds(others, exchange_seconds=exchange_seconds)
        await self._store_promise()
        self._box.add(self._identity.peer_id, commit.digest, own)
        body = {"run": commit.run, "commit": commit.digest, "signature": own}
        for peer in others:
            self._network.create_task(self._presence.tell(peer, "vote", body))
        grace_seconds = self._pace.grace_seconds(others)
        return chain.extended(await self._collect(ballot, commit, chain, grace_seconds))

    async def _collect(
        self, ballot: Ballot, commit: Commit, chain: Chain, grace_seconds: float
    ) -> SignedCommit:
        """Raises RoundError when a majority does not sign the same in time."""
        self._allowed = allowed = signers_of(ballot, commit)
        majority_at: float | None = None
        while True:
            now = self._network.now()
            is_over = now >= self._until
            is_committed = any(member.record.commit == commit.hash for member in self._membership.live(now))
            certificate = self._box.certificate(commit, allowed, chain)
            if certificate is not None:
                majority_at = majority_at or now
                is_complete = certificate.signatures.keys() >= set(ballot.members)
                if is_over or is_complete or is_committed or now >= majority_at + grace_seconds:
                    return certificate
            if is_committed:
                raise RoundError("the others have committed this state already; their signatures follow")
            if is_over:
                raise RoundError(self._box.lacks(commit, allowed, chain))
            await self._bell.rung(POLL_SECONDS / 5)
