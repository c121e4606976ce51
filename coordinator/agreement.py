"""How peers agree on a round: heartbeats, a leader's proposal, the group, and a commit signed by a majority.

One `Agreement` lives in the network's thread. It holds the chain of commits and the own heartbeat,
answers the others' calls, and runs `fuse`: decide -> lead or follow -> reduce -> vote -> commit.
The reduction itself is given to it as a function, so it knows nothing of tensors.

    propose   leader -> member    signed proposal: who is ready (their own signed records), who must sign
    begin     leader -> member    the members that accepted; the all-reduce may start
    vote      member -> member    signature over the commit that this member computed
    chain     anybody -> peer     commits after a round
    heartbeat anybody -> peer     a signed heartbeat, so that nobody waits for the next look at the board
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.board import Board
from coordinator.chain import Chain, is_better, required_signatures
from coordinator.errors import NetworkError, RoundError
from coordinator.identity import Identity
from coordinator.membership import Member, Membership
from coordinator.network import Network, PeerUnreachable
from coordinator.records import (
    MAX_CLOCK_SKEW_SECONDS,
    MAX_MESSAGE_BYTES,
    Commit,
    Contribution,
    PeerRecord,
    Phase,
    Proposal,
    RecordError,
    SignedCommit,
    is_signature_of,
    open_envelope,
    parse_json,
    parse_record,
    sign,
    signature_text,
)
from coordinator.rounds import (
    Action,
    Alone,
    CatchUp,
    Fuse,
    Standing,
    Stop,
    decide,
    draw,
    training_deadline,
    trains_on,
    voters_of,
)

logger = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 3.0  # a small message to a live peer; loopback needs 0.02
LEADER_TIMEOUT_SECONDS = 6.0  # from "we could fuse" to the leader's begin: two calls
VOTE_TIMEOUT_SECONDS = 15.0  # from my result to a majority of signatures
VOTE_GRACE_SECONDS = 2.0  # after the majority, for the signatures of the rest
POLL_SECONDS = 0.5  # looks at the board while ready
WATCH_SECONDS = 2.0  # looks at the board otherwise
MAX_CHAIN_REPLY_COMMITS = 50
MAX_VOTES_PER_PEER = 8  # in a round; more make room by dropping that peer's oldest
MAX_ATTEMPTS_AHEAD = 100  # a ballot further ahead than that is refused: it would lock the others out


class GroupFailed(RoundError):
    """An attempt failed because of one peer, who is left out of the next one."""

    def __init__(self, culprit: str, why: str) -> None:
        super().__init__(f"peer {culprit[-8:]}: {why}")
        self.culprit = culprit


@dataclass(frozen=True)
class Group:
    """Who averages with whom, agreed by all of its members."""

    round: int
    attempt: int
    members: tuple[str, ...]  # in the order of the slices that they reduce
    contributions: tuple[Contribution, ...]  # in the same order
    electorate: tuple[str, ...]  # more than half of these sign the commit
    proposed_at: float  # DHT time
    group_id: bytes  # 32 bytes: spec, previous commit, ballot and members


Reduce = Callable[[Group], Awaitable[str]]  # runs the all-reduce; returns the hash of the new state


@dataclass(frozen=True)
class Committed:
    chain: Chain
    group: Group


@dataclass(frozen=True)
class Overtaken:
    """The others have a state that is not mine: catch up."""


@dataclass(frozen=True)
class LeftAlone:
    """Fewer live peers than the quorum."""


class Agreement:
    def __init__(
        self, network: Network, identity: Identity, chain: Chain, *, serves_only: bool = False
    ) -> None:
        self.chain = chain
        self.membership = Membership(chain.spec, identity.peer_id)
        self._network, self._identity = network, identity
        self._board = Board(network, chain.spec.digest)
        self._serves_only = serves_only  # follows the chain, holds round 0 and trains nothing
        self._phase: Phase = "serving" if serves_only else "joining"
        self._num_examples, self._entered_at = 0, 0.0
        self._rejected_tips: set[str] = set()
        self._attempt = 0  # the next one to try or to accept in this round
        self._accepted: tuple[int, str] | None = None  # attempt and hash of the proposal I accepted
        self._proposal: tuple[str, Proposal] | None = None  # its author, and what I accepted
        self._begun: Group | None = None
        self._votes: dict[str, dict[str, str]] = {}  # commit hash -> peer -> signature
        self._voting_until = 0.0
        self._wake = asyncio.Event()
        self._addresses: list[str] = []
        self._computed: tuple[Group, str] | None = None  # my last all-reduce and the hash of its state
        self.is_overtaken = False  # a better chain than mine was seen and verified

    # the session's side

    async def start(self) -> None:
        for method in ("propose", "begin", "vote", "chain", "heartbeat"):
            self._network.on_call(method, getattr(self, f"_on_{method}"))
        self._addresses = (await self._network.addresses())[:8]
        try:
            await self._board.read_into(self.membership)
        except NetworkError as error:
            logger.warning("could not read the board: %s", error)
        await self.publish()
        self._network.create_task(self._keep_publishing())
        self._network.create_task(self._keep_watching())

    async def set_phase(
        self, phase: Phase, *, num_examples: int = 0, entered_at: float | None = None
    ) -> None:
        """Change the own heartbeat, on the board and at every live peer."""
        self._phase, self._num_examples = phase, num_examples
        if phase != "ready":  # a begin that comes too late must not start the next round's `fuse`
            self._proposal = self._begun = None
        self._entered_at = self._entered_at if entered_at is None else entered_at
        await self.publish()
        await self._tell_everybody()

    async def publish(self) -> None:
        record = self._heartbeat()
        try:
            await self._board.publish(sign(record, self._identity), expires_at=record.expires_at)
        except NetworkError as error:
            logger.warning("could not publish the heartbeat: %s", error)

    def live(self) -> list[Member]:
        return self.membership.live(self._network.now())

    def standing(self) -> Standing:
        return Standing(self._identity.peer_id, self._phase == "ready", self._entered_at)

    def decide(self) -> Action:
        return decide(
            self.chain, self.standing(), self.live(), self._network.now(), known_tips=self._known_tips()
        )

    def training_deadline(self) -> float:
        """Instant (DHT time) at which to stop finetuning; may move as peers come and go."""
        return training_deadline(self.chain, self.standing(), self.live())

    def adopt(self, chain: Chain) -> None:
        """Move to a chain whose state is held here; the round begins anew."""
        self.chain = chain
        self._attempt, self._accepted, self._proposal, self._begun = 0, None, None, None
        self._computed, self.is_overtaken = None, False
        self._votes.clear()
        self._voting_until = 0.0
        if self._phase == "ready":  # for the round that is over, not for the next one
            self._phase, self._num_examples = "evaluating", 0
        self._wake.set()

    async def fuse(self, reduce: Reduce) -> Committed | Overtaken | LeftAlone:
        """Be ready until the round is committed, the others have gone on, or nobody is left.

        Failed attempts are logged and tried again without the peer that failed them.
        """
        while True:
            if (group := self._begun) is not None:
                self._begun = None
            else:
                match action := self.decide():
                    case CatchUp():
                        if (found := await self.better_chain()) is not None:
                            return self._committed_elsewhere(found[0]) or Overtaken()
                    case Stop():
                        return Overtaken()
                    case Alone():
                        return LeftAlone()
                    case Fuse():
                        group = await self._form_group(action)
                    case _:
                        await self._woken(POLL_SECONDS)
            if group is not None and (chain := await self._try(group, reduce)) is not None:
                return Committed(chain, group)

    async def better_chain(self) -> tuple[Chain, tuple[str, ...]] | None:
        """The best chain among those that others claim, verified, with the peers that hold its state."""
        best: Chain | None = None
        known = self._known_tips()
        claims = {
            m.record.commit: m.peer_id
            for m in self.live()
            if m.record.round > 0 and m.record.commit not in known
        }
        for tip, peer_id in claims.items():
            try:
                chain = await self._fetch_chain(peer_id)
            except (NetworkError, RecordError) as error:
                logger.warning("no chain from %s: %s", peer_id[-8:], error)
                self.membership.forget(peer_id)
                continue
            if not is_better(chain, self.chain):
                self._rejected_tips.add(chain.tip)
                if chain.tip != tip:  # not what it claims; another peer may hold the chain of that tip
                    self.membership.forget(peer_id)
            elif best is None or is_better(chain, best):
                best = chain
        return None if best is None else (best, self.donors(best.state_hash))

    def donors(self, state_hash: str) -> tuple[str, ...]:
        return tuple(m.peer_id for m in self.live() if m.record.state_hash == state_hash)

    async def leave(self) -> None:
        self._phase = "leaving"
        await self.publish()
        await self._tell_everybody()

    def _committed_elsewhere(self, chain: Chain) -> Committed | None:
        """The round that I computed, whose signatures did not reach me in time."""
        if (
            self._computed is None
            or chain.round != self.chain.round + 1
            or chain.commits[:-1] != self.chain.commits
        ):
            return None
        group, state_hash = self._computed
        if chain.state_hash != state_hash:
            return None
        self.adopt(chain)
        return Committed(chain, group)

    # the own heartbeat

    def _heartbeat(self) -> PeerRecord:
        now = self._network.now()
        return PeerRecord(
            run=self.chain.spec.digest,
            phase=self._phase,
            round=self.chain.round,
            state_hash=self.chain.spec.backbone_hash if self._serves_only else self.chain.state_hash,
            commit=self.chain.tip,
            num_examples=self._num_examples,
            entered_at=self._entered_at,
            addresses=self._addresses,
            issued_at=now,
            expires_at=now + self.chain.spec.lease_seconds,
        )

    async def _tell_everybody(self) -> None:
        heartbeat = sign(self._heartbeat(), self._identity).to_json()
        await asyncio.gather(*(self._tell(m.peer_id, "heartbeat", heartbeat) for m in self.live()))

    async def _tell(self, peer_id: str, method: str, body: object) -> None:
        try:
            await self._network.call(peer_id, method, body, timeout_seconds=CALL_TIMEOUT_SECONDS)
        except PeerUnreachable as error:
            logger.info("%s not delivered: %s", method, error)

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(self.chain.spec.lease_seconds / 6)
            await self.publish()

    async def _keep_watching(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS if self._phase == "ready" else WATCH_SECONDS)
            try:
                await self._board.read_into(self.membership)
            except NetworkError as error:
                logger.warning("could not read the board: %s", error)
            chain = self.chain
            if self._phase == "finetuning" and not self.is_overtaken:
                found = await self.better_chain()
                if found is not None and self.chain is chain:  # else I have caught up meanwhile
                    self.is_overtaken = True
            self._wake.set()

    async def _woken(self, timeout_seconds: float) -> None:
        """Until something arrives, or the time is over."""
        try:
            await asyncio.wait_for(self._wake.wait(), timeout_seconds)
        except TimeoutError:
            return
        self._wake.clear()

    def _known_tips(self) -> set[str]:
        return {signed.commit.hash for signed in self.chain.commits} | self._rejected_tips

    # forming a group

    async def _form_group(self, fuse: Fuse) -> Group | None:
        leader = fuse.leader(self._attempt)
        if leader == self._identity.peer_id:
            return await self._lead(fuse)
        deadline = self._network.now() + LEADER_TIMEOUT_SECONDS
        attempt = self._attempt
        while self._begun is None and self._attempt == attempt and self._network.now() < deadline:
            if not isinstance(self.decide(), Fuse):
                return None
            await self._woken(POLL_SECONDS)
        if self._begun is None and self._attempt == attempt:
            logger.warning("leader %s of attempt %d is silent", leader[-8:], attempt)
            self._attempt += 1
        return None

    async def _lead(self, fuse: Fuse) -> Group | None:
        proposal = self._make_proposal(fuse)
        attempt = self._attempt
        self._accept(self._identity.peer_id, proposal)
        others = [peer for peer in fuse.members if peer != self._identity.peer_id]
        body = sign(proposal, self._identity).to_json()
        answers = await asyncio.gather(*(self._ask_to_join(peer, body) for peer in others))
        accepted = {peer for peer, answer in zip(others, answers, strict=True) if answer} | {
            self._identity.peer_id
        }
        members = tuple(peer for peer in fuse.members if peer in accepted)
        voters = len(set(members) & set(fuse.electorate))
        if self._accepted != (attempt, proposal.hash):
            logger.info("attempt %d: gave way to a later one", attempt)
            return None
        if len(members) < self.chain.spec.min_peers or voters < required_signatures(fuse.electorate):
            logger.info("attempt %d: only %d of %d peers accepted", attempt, len(members), len(fuse.members))
            self._attempt = max(self._attempt, attempt + 1)
            await self._woken(POLL_SECONDS)
            return None
        begin = {"proposal": proposal.hash, "members": list(members)}
        await asyncio.gather(
            *(self._tell(peer, "begin", begin) for peer in members if peer != self._identity.peer_id)
        )
        return self._group(proposal, members)

    def _make_proposal(self, fuse: Fuse) -> Proposal:
        records = [sign(self._heartbeat(), self._identity).to_json()]
        for peer in fuse.members:
            member = self.membership.get(peer)
            if member is not None:
                records.append(member.signed)
        return Proposal(
            run=self.chain.spec.digest,
            round=self.chain.round + 1,
            attempt=self._attempt,
            previous=self.chain.tip,
            members=records,
            electorate=list(fuse.electorate),
            proposed_at=self._network.now(),
        )

    async def _ask_to_join(self, peer_id: str, body: object) -> bool:
        try:
            reply = await self._network.call(peer_id, "propose", body, timeout_seconds=CALL_TIMEOUT_SECONDS)
            answer = parse_json(reply)
        except PeerUnreachable as error:
            logger.warning("left out of the round: %s", error)
            self.membership.forget(peer_id)
            return False
        except RecordError:
            return False
        if isinstance(answer, dict) and answer.get("accept") is True:
            return True
        why = str(answer.get("why"))[:200] if isinstance(answer, dict) else "no answer"
        logger.info("peer %s does not join the group: %s", peer_id[-8:], why)
        if isinstance(answer, dict) and type(answer.get("attempt")) is int:
            self._attempt = max(self._attempt, min(answer["attempt"], self._attempt + 100))
        return False

    def _accept(self, author: str, proposal: Proposal) -> None:
        self._accepted = (proposal.attempt, proposal.hash)
        self._proposal = (author, proposal)
        self._attempt = max(self._attempt, proposal.attempt)

    def _group(self, proposal: Proposal, members: Sequence[str]) -> Group:
        spec = self.chain.spec
        examples = {author: record.num_examples for author, record in map(_member_record, proposal.members)}
        ballot = json.dumps([spec.digest, proposal.hash, list(members)]).encode()
        return Group(
            round=proposal.round,
            attempt=proposal.attempt,
            members=tuple(members),
            contributions=tuple(
                Contribution(peer=p, num_examples=examples[p], weight=spec.contribution_weight(examples[p]))
                for p in members
            ),
            electorate=tuple(proposal.electorate),
            proposed_at=proposal.proposed_at,
            group_id=hashlib.sha256(ballot).digest(),
        )

    # one attempt

    async def _try(self, group: Group, reduce: Reduce) -> Chain | None:
        """None when the attempt failed; why is in the log."""
        try:
            state_hash = await self._reduce_unless_replaced(group, reduce)
            self._computed = (group, state_hash)
            chain = await self._commit(group, state_hash)
        except (RoundError, RecordError) as error:
            logger.warning("round %d, attempt %d failed: %s", group.round, group.attempt, error)
            if isinstance(error, GroupFailed):
                self.membership.forget(error.culprit)
            self._voting_until = 0.0
            self._attempt = max(self._attempt, group.attempt + 1)
            return None
        self.adopt(chain)
        return chain

    async def _reduce_unless_replaced(self, group: Group, reduce: Reduce) -> str:
        task = asyncio.ensure_future(reduce(group))
        try:
            while not task.done():
                if self._begun is not None:
                    raise RoundError("replaced by a later attempt")
                wake = asyncio.ensure_future(self._woken(POLL_SECONDS))
                await asyncio.wait({task, wake}, return_when=asyncio.FIRST_COMPLETED)
                wake.cancel()
            return task.result()
        finally:
            task.cancel()

    async def _commit(self, group: Group, state_hash: str) -> Chain:
        commit = Commit(
            run=self.chain.spec.digest,
            round=group.round,
            attempt=group.attempt,
            previous=self.chain.tip,
            state_hash=state_hash,
            contributors=list(group.contributions),
            electorate=list(group.electorate),
            committed_at=group.proposed_at,
        )
        self._voting_until = self._network.now() + VOTE_TIMEOUT_SECONDS
        own = signature_text(commit, self._identity)
        self._votes.setdefault(commit.hash, {})[self._identity.peer_id] = own
        body = {"run": commit.run, "commit": commit.hash, "signature": own}
        for peer in group.members:
            if peer != self._identity.peer_id:
                self._network.create_task(self._tell(peer, "vote", body))
        return self.chain.extended(await self._collect_votes(commit, group))

    async def _collect_votes(self, commit: Commit, group: Group) -> SignedCommit:
        """Raises RoundError when a majority does not sign the same in time."""
        majority_at: float | None = None
        allowed = set(group.members) | set(group.electorate)
        while True:
            now = self._network.now()
            is_over = now >= self._voting_until
            votes = self._votes[commit.hash]
            for peer in [
                p for p, text in votes.items() if p not in allowed or not is_signature_of(text, commit, p)
            ]:
                logger.warning("dropped a vote of %s: the signature does not fit", peer[-8:])
                del votes[peer]
            is_committed = any(member.record.commit == commit.hash for member in self.live())
            if len(votes.keys() & set(commit.electorate)) >= required_signatures(commit.electorate):
                majority_at = majority_at or now
                waited = now >= majority_at + VOTE_GRACE_SECONDS
                if is_over or waited or is_committed or votes.keys() >= set(group.members):
                    return SignedCommit(commit=commit, signatures=dict(sorted(votes.items())))
            if is_committed:
                raise RoundError("the others have committed this state already; their signatures follow")
            if is_over:
                raise RoundError(self._why_no_majority(commit))
            await self._woken(POLL_SECONDS / 5)

    def _why_no_majority(self, commit: Commit) -> str:
        others = {peer[-8:] for hash_, votes in self._votes.items() if hash_ != commit.hash for peer in votes}
        differ = f"; {', '.join(sorted(others))} signed another state" if others else ""
        return f"{len(self._votes[commit.hash])} of {len(commit.electorate)} signed the state in time{differ}"

    # answers to the others

    async def _on_heartbeat(self, peer_id: str, body: Any) -> bytes:
        self.membership.observe(json.dumps(body).encode(), now=self._network.now(), claimed_by=peer_id)
        self._wake.set()
        return b"{}"

    async def _on_propose(self, peer_id: str, body: Any) -> bytes:
        try:
            author, proposal = open_envelope(body, Proposal)
            if author != peer_id:
                raise RecordError("the proposal is not signed by its sender")
            self._check_proposal(author, proposal)
        except RecordError as error:
            return json.dumps({"accept": False, "why": str(error), "attempt": self._attempt}).encode()
        self._accept(author, proposal)
        return b'{"accept":true}'

    def _check_proposal(self, author: str, proposal: Proposal) -> None:
        """Raises RecordError with the reason for which I do not join."""
        if proposal.run != self.chain.spec.digest or proposal.previous != self.chain.tip:
            raise RecordError(f"I am at round {self.chain.round}, on another commit")
        if proposal.round != self.chain.round + 1 or self._phase != "ready":
            raise RecordError(f"I am not ready for round {proposal.round}: {self._phase}")
        if proposal.attempt < self._attempt or self._network.now() < self._voting_until:
            raise RecordError(f"I am at attempt {self._attempt}")
        if proposal.attempt > self._attempt + MAX_ATTEMPTS_AHEAD:
            raise RecordError(f"attempt {proposal.attempt} is far ahead: I am at attempt {self._attempt}")
        if abs(proposal.proposed_at - self._network.now()) > MAX_CLOCK_SKEW_SECONDS:
            raise RecordError("proposed at another time than now: is a clock wrong?")
        if (
            self._accepted is not None
            and self._accepted[0] == proposal.attempt
            and self._accepted[1] != proposal.hash
        ):
            raise RecordError(f"I accepted another proposal of attempt {proposal.attempt}")
        members = dict(map(_member_record, proposal.members))
        mine = members.get(self._identity.peer_id)
        if mine is None or mine.num_examples != self._num_examples:
            raise RecordError("I am not in the group as I am")
        if author not in members or len(members) != len(proposal.members):
            raise RecordError("the proposer is not in the group, or somebody is in it twice")
        for peer, record in members.items():
            if record.run != proposal.run or record.commit != self.chain.tip or record.phase != "ready":
                raise RecordError(f"{peer[-8:]} is not ready for this round")
        live = self.live()
        drawn = draw(
            self.chain, [*(m.peer_id for m in live if trains_on(m, self.chain)), self._identity.peer_id]
        )
        expected = voters_of(self.chain, live, drawn) or members.keys()
        if not expected <= set(proposal.electorate):
            raise RecordError("a live peer of the previous round is left out of the vote")

    async def _on_begin(self, peer_id: str, body: Any) -> bytes:
        author, proposal = self._proposal or (None, None)
        if proposal is None or not isinstance(body, dict) or body.get("proposal") != proposal.hash:
            raise RecordError("no such proposal was accepted")
        if peer_id != author or self._phase != "ready":
            raise RecordError("only who proposed it can begin it, while I am ready")
        authors = [_member_record(member)[0] for member in proposal.members]
        members = body.get("members")
        if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
            raise RecordError("the members are a list of peers")
        if not {peer_id, self._identity.peer_id} <= set(members) <= set(authors):
            raise RecordError("the members are not those of the proposal")
        spec = self.chain.spec
        if len(set(members)) != len(members) or not spec.min_peers <= len(members) <= spec.max_peers:
            raise RecordError("the members are too few, too many, or named twice")
        self._begun = self._group(proposal, members)
        self._wake.set()
        return b"{}"

    async def _on_vote(self, peer_id: str, body: Any) -> bytes:
        if not isinstance(body, dict) or body.get("run") != self.chain.spec.digest:
            raise RecordError("of another run")
        commit, signature = str(body.get("commit"))[:64], str(body.get("signature"))[:88]
        earlier = [votes for votes in self._votes.values() if peer_id in votes]
        if len(earlier) >= MAX_VOTES_PER_PEER:
            del earlier[0][peer_id]
        self._votes.setdefault(commit, {})[peer_id] = signature
        self._wake.set()
        return b"{}"

    async def _on_chain(self, _peer_id: str, body: Any) -> bytes:
        if not isinstance(body, dict) or body.get("run") != self.chain.spec.digest:
            raise RecordError("of another run")
        after = body.get("after")
        if type(after) is not int or after < 0:
            raise RecordError("after is a round")
        replies: list[str] = []
        size = 0
        for signed in self.chain.commits[after : after + MAX_CHAIN_REPLY_COMMITS]:
            text = signed.canonical().decode()
            size += len(text) + 1
            if replies and size > MAX_MESSAGE_BYTES:
                break
            replies.append(text)
        return f"[{','.join(replies)}]".encode()

    async def _fetch_chain(self, peer_id: str) -> Chain:
        """What `peer_id` says happened, verified from my own chain on, or from the start where it differs.

        Page by page, so that the first commit that does not fit ends it. Raises NetworkError, RecordError.
        """
        chain = self.chain
        page = await self._fetch_commits(peer_id, chain.round)
        if not page or page[0].commit.previous != chain.tip:
            chain = Chain(chain.spec)
            page = await self._fetch_commits(peer_id, 0)
        while page:
            for signed in page:
                chain = chain.extended(signed)
            page = await self._fetch_commits(peer_id, chain.round)
        return chain

    async def _fetch_commits(self, peer_id: str, after: int) -> list[SignedCommit]:
        """The next ones after round `after`; none at the end of the chain."""
        if after >= self.chain.spec.num_rounds:
            return []
        body = {"run": self.chain.spec.digest, "after": after}
        reply = await self._network.call(peer_id, "chain", body, timeout_seconds=2 * CALL_TIMEOUT_SECONDS)
        page = parse_json(reply, max_bytes=2 * MAX_MESSAGE_BYTES)
        if not isinstance(page, list):
            raise RecordError("a chain is a list of commits")
        return [parse_record(entry, SignedCommit) for entry in page]


def _member_record(envelope: dict[str, str]) -> tuple[str, PeerRecord]:
    return open_envelope(envelope, PeerRecord)
