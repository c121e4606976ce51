"""How a chain of commits comes from another peer, page by page, each verified; and how mine is handed out.

Anybody may claim, under its signature, to be at a commit that I do not know, and I look at that before
anything else: it may be where all the others are. So whose claims turn out to be empty is not looked at for
as long as that took, and twice as long each time; a claim that proves true clears its author. All claims are
looked at together, and within a time that does not grow with their number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from coordinator.chain import Chain, fork_round, is_better, required_signatures
from coordinator.errors import NetworkError
from coordinator.limits import Recent
from coordinator.membership import TRAINING_PHASES, Member, Membership
from coordinator.network import Network
from coordinator.pace import Pace
from coordinator.records import GENESIS, PeerRecord, RecordError, SignedCommit, parse_json, parse_record

logger = logging.getLogger(__name__)

CONTESTED_SECONDS = 2.0  # until a chain is looked at again that says of peers that they are gone, who are not
LOOKING_SECONDS = 40.0  # at all claims together, however long the chains
MORE_SECONDS = 2.0  # once a better chain is there: for others, which may be better yet
MIN_PAUSE_SECONDS = 1.0  # after an empty claim
MAX_PAUSE_LEASES = 10.0
MAX_DOUBTED = 1024
MAX_CHAIN_REPLY_COMMITS = 50
MAX_REJECTED_TIPS = 1024  # anybody can make chains of his own keys; one forgotten is fetched once more
MAX_CHAIN_REPLY_BYTES = 256 * 1024  # of several commits: 4 tokens of a caller's budget (guard.py)


@dataclass(frozen=True)
class _Doubt:
    num_empty: int = 0  # claims in a row of which nothing came
    until: float = 0.0  # time.monotonic()


class ChainExchange:
    def __init__(
        self,
        network: Network,
        membership: Membership,
        pace: Pace,
        own_chain: Callable[[], Chain],
        is_training: Callable[[], bool] = lambda: False,  # whether I train on the tip of the own chain
    ) -> None:
        self._network, self._membership, self._pace = network, membership, pace
        self._own_chain, self._is_training = own_chain, is_training
        self._contested: dict[str, tuple[float, float]] = {}  # tip -> not looked at until, after a pause
        self._contested_since: dict[str, float] = {}  # first commit -> time.monotonic()
        self._rejected_tips: Recent[str] = Recent(MAX_REJECTED_TIPS)
        self._rejected_under = membership.beginning.witness
        self._doubts: dict[str, _Doubt] = {}  # by peer
        network.on_call("chain", self._on_chain)

    def known_tips(self) -> set[str]:
        """Commits that need no looking at: the own ones, the tips of chains that lost, and what only peers
        claim whose claims were empty before.
        """
        doubted: set[str] = set()
        believed: set[str] = set()
        for member in self._membership.live(self._network.now()):
            (doubted if self._is_doubted(member.peer_id) else believed).add(member.record.commit)
        if self._rejected_under != self._membership.beginning.witness:  # what lost may win now
            self._rejected_under = self._membership.beginning.witness
            self._rejected_tips = Recent(MAX_REJECTED_TIPS)
        own = {signed.commit.hash for signed in self._own_chain().commits}
        now = time.monotonic()
        contested = {tip for tip, (until, _) in self._contested.items() if until > now}
        return own.union(self._rejected_tips, contested, doubted - believed)

    async def best_claimed(self) -> Chain | None:
        """The best chain among those that live peers claim, verified, if it is better than the own one.

        Takes LOOKING_SECONDS at most, and MORE_SECONDS from where there is one.
        """
        create = self._network.create_task
        looks = {create(self._look(m.peer_id, m.record)): m.peer_id for m in self._claims()}
        best: Chain | None = None
        ends_at = time.monotonic() + LOOKING_SECONDS
        pending: Collection[asyncio.Task[Chain | None]] = looks
        try:
            while pending and (seconds := ends_at - time.monotonic()) > 0:
                done, pending = await asyncio.wait(
                    pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                for chain in (look.result() for look in done):
                    if chain is not None and (best is None or is_better(chain, best)):
                        best = chain
                        ends_at = min(ends_at, time.monotonic() + MORE_SECONDS)
        finally:
            for look in pending:
                look.cancel()
        if best is None:
            for look in pending:
                self._doubt(looks[look], LOOKING_SECONDS)
        return best

    def _claims(self) -> list[Member]:
        """One for each tip that is to be looked at, of a peer that is in no doubt where there is one."""
        known = self.known_tips()
        claims: dict[str, Member] = {}
        for member in self._membership.live(self._network.now()):
            tip = member.record.commit
            if member.record.round == 0 or tip in known:
                continue
            if tip not in claims or self._is_doubted(claims[tip].peer_id):
                claims[tip] = member
        return list(claims.values())

    async def _look(self, peer_id: str, claim: PeerRecord) -> Chain | None:
        """The chain of one claim, if it is better than the own one."""
        began_at, own_tip = time.monotonic(), self._own_chain().tip
        try:
            chain = await self._fetch(peer_id, claim.round)
        except (NetworkError, RecordError) as error:
            logger.warning("no chain from %s: %s", peer_id[-8:], error)
            self._doubt(peer_id, time.monotonic() - began_at)
            return None
        beginning = self._membership.beginning
        beginning.consider(chain, self._membership.in_training(tip=GENESIS, now=self._network.now()))
        whole = beginning.of(chain)
        chain = self._uncontested(whole)
        if is_better(chain, self._own_chain()):
            self._doubts.pop(peer_id, None)
            return chain
        if chain.tip != whole.tip:
            self._put_off(peer_id, whole.tip, time.monotonic() - began_at)
            return None
        if self._own_chain().tip != own_tip:  # I have gone on meanwhile, so it says nothing about the claim
            return None
        self._rejected_tips.add(chain.tip)
        if chain.tip != claim.commit:  # another peer may hold the chain of that tip
            self._doubt(peer_id, time.monotonic() - began_at)
        return None

    def _uncontested(self, chain: Chain) -> Chain:
        """Cut before a commit that some signed as if others were gone whom I hear train for that round.

        Catching up is no vote, so `View.expected` does not protect it: a few made-up keys could follow each
        commit with one of their own, at once, and all would leave the round that they are in. Those who train
        must be more of the last cohort than must have signed the next commit, and enough to commit it
        themselves, with all who are here now; else they would wait for each other. And only within the time
        that a round takes, so that who only says that he trains holds nobody back for longer.
        """
        spec = chain.spec
        limit = spec.round_limit_seconds + spec.exchange_limit_seconds + spec.lease_seconds
        here, training = self._voters()
        for index in range(fork_round(chain, self._own_chain()), chain.round):
            tip = chain.commits[index - 1].commit.hash if index else GENESIS
            if tip not in training:
                continue
            before, signed = Chain(spec, chain.commits[:index]), chain.commits[index]
            if index == 0:
                is_contested = self._is_contested_first(chain, training[tip], limit)
            else:
                of_cohort = (training[tip] & before.cohort) - signed.signatures.keys()
                present = of_cohort | (before.cohort & (here | signed.signatures.keys()))
                is_contested = (
                    len(of_cohort) > chain.backing(index).cohort
                    and len(of_cohort) >= required_signatures(present)
                    and len(training[tip]) >= spec.min_peers
                    and self._network.now() <= before.committed_at + limit
                )
            if is_contested:
                logger.info("%d train for round %d, which others say is over", len(training[tip]), index + 1)
                return before
        return chain

    def _voters(self) -> tuple[set[str], dict[str, set[str]]]:
        """Who is here and has not given up its vote; and who of these trains, by the commit it trains on."""
        here: set[str] = set()
        training: dict[str, set[str]] = {}
        for member in self._membership.live(self._network.now()):
            if member.record.resigned != member.record.commit:
                here.add(member.peer_id)
                if member.record.phase in TRAINING_PHASES:
                    training.setdefault(member.record.commit, set()).add(member.peer_id)
        if self._is_training():
            training.setdefault(self._own_chain().tip, set()).add(self._network.peer_id)
        return here, training

    def _is_contested_first(self, chain: Chain, training: set[str], limit: float) -> bool:
        """By those who train for the first round, among them I: nobody made one before that could tell."""
        if chain.witness is not None or self._network.peer_id not in training:
            return False
        first = chain.commits[0]
        if len(training - first.voters) <= len(first.voters):
            return False
        since, now = self._contested_since, time.monotonic()
        if len(since) < MAX_REJECTED_TIPS:  # beyond that no room is made: forged ones would make it
            since.setdefault(first.commit.hash, now)
        return now - since.get(first.commit.hash, now) <= limit

    def _put_off(self, peer_id: str, tip: str, looked_seconds: float) -> None:
        """Looked at again later, each time twice as late. Who took long to show it would fill the time."""
        _, last_pause = self._contested.get(tip, (0.0, CONTESTED_SECONDS / 2))
        pause = min(self._own_chain().spec.lease_seconds, 2.0 * last_pause)
        self._contested[tip] = (time.monotonic() + pause, pause)
        while len(self._contested) > MAX_REJECTED_TIPS:
            self._contested.pop(next(iter(self._contested)))
        if looked_seconds > CONTESTED_SECONDS / 2:
            self._doubt(peer_id, looked_seconds)

    def _is_doubted(self, peer_id: str) -> bool:
        return self._doubts.get(peer_id, _Doubt()).until > time.monotonic()

    def _doubt(self, peer_id: str, seconds: float) -> None:
        """Nothing came of its claim, which I looked at for so long."""
        self._membership.forget(peer_id)
        doubt = self._doubts.pop(peer_id, _Doubt())
        longest = MAX_PAUSE_LEASES * self._own_chain().spec.lease_seconds
        pause = min(longest, max(MIN_PAUSE_SECONDS, seconds) * 2.0 ** min(doubt.num_empty, 30))
        self._doubts[peer_id] = _Doubt(doubt.num_empty + 1, time.monotonic() + pause)
        while len(self._doubts) > MAX_DOUBTED:  # the oldest: identities that come and go fill no memory
            self._doubts.pop(next(iter(self._doubts)))

    async def _on_chain(self, _peer_id: str, body: Any) -> bytes:
        chain = self._own_chain()
        if not isinstance(body, dict) or body.get("run") != chain.spec.digest:
            raise RecordError("of another run")
        after = body.get("after")
        if type(after) is not int or after < 0:
            raise RecordError("after is a round")
        replies: list[str] = []
        size = 0
        for signed in chain.commits[after : after + MAX_CHAIN_REPLY_COMMITS]:
            text = signed.text
            size += len(text) + 1
            if replies and size > MAX_CHAIN_REPLY_BYTES:
                break
            replies.append(text)
        return f"[{','.join(replies)}]".encode()

    async def _fetch(self, peer_id: str, claimed_round: int) -> Chain:
        """What `peer_id` says happened, verified from my own chain on, or from the start where it differs.

        Page by page, so that the first commit that does not fit ends it. Raises NetworkError, RecordError.
        """
        chain = self._own_chain()
        page = await self._fetch_commits(peer_id, chain.round, claimed_round)
        if not page or page[0].commit.previous != chain.tip:
            chain = Chain(chain.spec)
            page = await self._fetch_commits(peer_id, 0, claimed_round)
        while page:
            for signed in page:
                chain = chain.extended(signed)
            page = await self._fetch_commits(peer_id, chain.round, claimed_round)
        return chain

    async def _fetch_commits(self, peer_id: str, after: int, claimed_round: int) -> list[SignedCommit]:
        """The next ones after round `after`; none at the end of the chain."""
        spec = self._own_chain().spec
        if after > spec.num_rounds:  # the last round, undone
            return []
        limit = self._pace.call_seconds(peer_id, size_bytes=MAX_CHAIN_REPLY_BYTES)
        body = {"run": spec.digest, "after": after}
        reply = await self._network.call(peer_id, "chain", body, timeout_seconds=limit)
        page = parse_json(reply)
        if not isinstance(page, list):
            raise RecordError("a chain is a list of commits")
        wanted = min(MAX_CHAIN_REPLY_COMMITS, claimed_round - after)
        if 0 < len(page) < wanted and len(reply) < MAX_CHAIN_REPLY_BYTES // 8:  # one by one it takes for ever
            raise RecordError(f"{len(page)} commits, where it claims {wanted} more")
        return [parse_record(entry, SignedCommit) for entry in page]
