"""How peers agree on a round: heartbeats, a leader's proposal, the group, and a commit signed by a majority.

One `Agreement` lives in the network's thread. It holds the chain of commits and the own heartbeat,
answers the others' calls, and runs `fuse`: decide -> lead or follow -> reduce -> vote -> commit.
The reduction itself is given to it as a function, so it knows nothing of tensors. What may be promised, begun
and signed is decided by `ballot.py`; here are the calls, the deadlines and the order of things: a promise
is remembered before it leaves the peer.

    propose   leader -> member    signed proposal: who is ready (their own signed records), who must sign
    begin     leader -> member    the acceptances; the all-reduce may start, or a value is signed again
    vote      member -> member    signature over the commit that this member computed
    chain     anybody -> peer     commits after a round
    heartbeat anybody -> peer     a signed heartbeat, so that nobody waits for the next look at the board

Who need not be waited for gives up its vote (`resigned` in its heartbeat): a peer that waits, is done,
leaves or serves only. A peer that has signed in a round cannot: `set_phase` then changes the phase and keeps
the vote, so the others count it until it is silent for longer than the lease.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from coordinator.about import AboutPeer
from coordinator.admission import NOT_ADMITTED, Admission
from coordinator.ballot import (
    MAX_ATTEMPTS_AHEAD,
    Ballot,
    Candidacy,
    Group,
    View,
    Voter,
    check_begin,
    fusion_commit,
    group_of,
    member_records,
    rollback_commit,
    voters_of,
)
from coordinator.beginning import Beginning
from coordinator.chain import Chain, is_better
from coordinator.chain_exchange import ChainExchange
from coordinator.departures import Departures
from coordinator.errors import AccessError, RoundError
from coordinator.gate_votes import GateVotes
from coordinator.identity import Identity
from coordinator.membership import TRAINING_PHASES, Member, Membership
from coordinator.network import Network, PeerUnreachable
from coordinator.pace import Pace
from coordinator.presence import Presence
from coordinator.records import (
    GENESIS,
    MAX_REASON_CHARS,
    Commit,
    Contribution,
    Exclusion,
    PeerRecord,
    Phase,
    Promise,
    Proposal,
    RecordError,
    open_envelope,
    parse_json,
    sign,
)
from coordinator.roster import Roster
from coordinator.rounds import (
    LEFT_OUT,
    NOT_DRAWN,
    Action,
    Alone,
    CatchUp,
    Fuse,
    Leaders,
    Standing,
    Stop,
    Wait,
    barred_from,
    decide,
    training_deadline,
    trains_on,
)
from coordinator.voting import Bell, Voting

__all__ = [
    "Agreement",
    "Committed",
    "Fused",
    "Group",
    "GroupFailed",
    "LeftAlone",
    "Overtaken",
    "Reduce",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS = 0.5  # looks at the board while ready
WATCH_SECONDS = 2.0  # looks at the board otherwise
MAX_ROLLBACK_ATTEMPTS = 3
MAX_ADDRESSES = 8
RESIGNING_PHASES = frozenset({"waiting", "paused", "done", "leaving", "serving"})
WATCHING_PHASES = frozenset({"finetuning", "paused"})  # others may go on meanwhile


class GroupFailed(RoundError):
    """An attempt failed because of one peer, who is left out of the next one.

    Proven (it sent what does not fit what it signed): out for the rest of the round, and named in the commit.
    """

    def __init__(self, culprit: str, why: str, *, is_proven: bool = False) -> None:
        super().__init__(f"peer {culprit[-8:]}: {why}")
        self.culprit, self.why, self.is_proven = culprit, why, is_proven


class _Replaced(RoundError):
    """An attempt was running when a later one was accepted, or began."""

    def __init__(self, author: str, proposal: Proposal) -> None:
        super().__init__("replaced by a later attempt")
        self.author, self.proposal = author, proposal


@dataclass(frozen=True)
class Fused:
    """What an all-reduce made."""

    state_hash: str
    contributions: tuple[Contribution, ...]  # the group's, with norm, factor and missing filled in


Reduce = Callable[[Group], Awaitable[Fused]]  # runs the all-reduce
Remember = Callable[[Promise], Awaitable[None]]  # stores durably; awaited before anything leaves the peer
Obtain = Callable[[str, tuple[str, ...]], Awaitable[bool]]  # gets a state by its hash from donors, as pending


@dataclass(frozen=True)
class Committed:
    """A fusion is adopted already. A roll-back is not: get the state of `chain`, then `adopt` it."""

    chain: Chain
    group: Group  # without members for a roll-back; they need not include me for a value signed again
    kind: Literal["fuse", "rollback"] = "fuse"


@dataclass(frozen=True)
class Overtaken:
    """The others have a state that is not mine: catch up."""


@dataclass(frozen=True)
class LeftAlone:
    """Fewer live peers than the quorum."""


class Agreement:
    def __init__(
        self,
        network: Network,
        identity: Identity,
        chain: Chain,
        *,
        serves_only: bool = False,
        about: Callable[[], AboutPeer | None] = lambda: None,  # what heartbeats say to people who watch
        remember: Remember | None = None,
        initial_promise: Promise | None = None,
        obtain: Obtain | None = None,
        holds: Callable[[str], bool] | None = None,
        wants_rollback: Callable[[str], bool] | None = None,
        leaves_out: Callable[[], tuple[Exclusion, ...]] = tuple,
        beginning: Beginning | None = None,
    ) -> None:
        """`holds`: whether the session has a state at hand, by its hash; by default, if it computed it here.

        `wants_rollback`: whether it agrees to undo the commit of that hash; by default never. `leaves_out`:
        whom a roll-back of the tip has to name, the same for all who want it; by default nobody. `beginning`:
        the starter's own, which signs.
        """
        self.chain = chain
        self._admission = _admission_of(network, chain)
        self.membership = Membership(chain.spec, identity.peer_id, self._admission, beginning)
        self.is_overtaken = False  # a better chain than mine was seen and verified
        self._network, self._identity = network, identity
        self._pace = Pace(chain.spec.lease_seconds)
        self._presence = Presence(
            network, identity, chain.spec, self.membership, self._pace, lambda: self._heartbeat()
        )
        self._chains = ChainExchange(
            network,
            self.membership,
            self._pace,
            lambda: self.chain,
            lambda: self._phase in TRAINING_PHASES and not self._roster.has_resigned(self.chain),
        )
        self._about = about
        self._serves_only = serves_only  # follows the chain, holds round 0 and trains nothing
        self._remember, self._obtain = remember, obtain
        self._holds = holds or self._has_computed
        self._wants_rollback = wants_rollback or (lambda _: False)
        self._leaves_out = leaves_out
        self._voter = Voter(identity, chain, initial_promise, holds=lambda state: self._holds(state))
        # Before a restart it may have begun: signing anew what it says would contradict what I signed then.
        self._accepted_before = "" if initial_promise is None else initial_promise.proposal
        self._phase: Phase = "serving" if serves_only else "joining"
        self._num_examples, self._entered_at = 0, 0.0
        self._bell = Bell()
        self._roster = Roster(self.membership, self._voter, identity.peer_id, network.now)
        self._voting = Voting(
            network,
            identity,
            self.membership,
            self._voter,
            self._pace,
            self._presence,
            self._bell,
            self._store_promise,
        )
        self.gate_votes = GateVotes(
            network, identity, self.membership, self._presence, lambda: self.chain, self._bell.ring
        )
        self._departures = Departures(network, self.membership, self._needed, self._bell.ring)
        self._addresses: list[str] = []
        self._is_fusing = False
        self._leaders = Leaders()
        self._found: Chain | None = None  # better than mine, certified here; its state is not here yet
        self._begin_round()

    def _begin_round(self) -> None:
        self._attempt = 0  # the next one to try
        self._proposal: tuple[str, Proposal] | None = None  # its author, and what I accepted
        self._begun: Ballot | None = None
        self._accepted_at = 0.0  # by time.monotonic()
        self._charged = ""  # hash of the proposal that cost an attempt last: it costs its author once
        self._last_begun = ""  # hash of the proposal that began last: a begin that comes twice counts once
        self._computed: tuple[Group, str] | None = None  # my last all-reduce and the hash of its state
        self._leaders = self._leaders.in_next_round()

    # the session's side

    async def start(self) -> None:
        for method in ("propose", "begin", "vote", "heartbeat"):
            self._network.on_call(method, getattr(self, f"_on_{method}"))
        self.gate_votes.start()
        self._roster.listen()
        self._addresses = (await self._network.addresses())[:MAX_ADDRESSES]
        await self._presence.read_board()
        await self.publish()
        self._network.create_task(self._presence.keep_publishing())
        self._network.create_task(self._keep_reading())
        self._network.create_task(self._keep_watching())
        self._network.create_task(self._departures.keep_looking())
        self._network.on_restart(self._come_back)
        if self._admission is not None:
            self._start_revoking(self._admission)

    async def set_phase(
        self, phase: Phase, *, num_examples: int = 0, entered_at: float | None = None
    ) -> None:
        """Change the own heartbeat, on the board and at every live peer."""
        if phase in RESIGNING_PHASES:
            await self._resign()
        self._phase, self._num_examples = phase, num_examples
        if phase != "ready":  # a begin that comes too late must not start the next round's `fuse`
            self._proposal = self._begun = None
        self._entered_at = self._entered_at if entered_at is None else entered_at
        await self.publish()
        await self._presence.tell_everybody()

    async def publish(self) -> None:
        await self._presence.publish()

    @property
    def locked_state_hash(self) -> str | None:
        """Of the state that I signed last in this round: the others may commit it yet."""
        lock = self._voter.lock
        return None if lock is None else lock.state_hash

    def live(self) -> list[Member]:
        return self.membership.live(self._network.now())

    def standing(self) -> Standing:
        return Standing(self._identity.peer_id, self._phase == "ready", self._entered_at)

    def decide(self) -> Action:
        if self._found is not None:
            return CatchUp(())
        action = decide(
            self.chain,
            self.standing(),
            self._roster.candidates(),
            self._network.now(),
            known_tips=self._chains.known_tips(),
            absent=self._roster.absent(self.chain),
            counted=self._roster.counted(),
            left_out=self._roster.left_out(self._attempt),
        )
        return self._leaders.ranked(action) if isinstance(action, Fuse) else action

    def training_deadline(self) -> float:
        """Instant (DHT time) at which to stop finetuning; may move as peers come and go."""
        return training_deadline(self.chain, self.standing(), self.live())

    def adopt(self, chain: Chain) -> None:
        """Move to a chain whose state is held here; the round begins anew."""
        self.chain = chain
        self._look_at_beginning()
        chain = self.chain
        self._voter.move_to(chain)
        self._roster.begin_round()
        self._voting.begin_round()
        self._begin_round()
        self.is_overtaken = False
        if self._found is not None and not is_better(self._found, chain):
            self._found = None
        self._pace.keep({member.peer_id for member in self.live()})
        if self._phase == "ready":  # for the round that is over, not for the next one
            self._phase, self._num_examples = "evaluating", 0
        self._bell.ring()

    async def fuse(self, reduce: Reduce) -> Committed | Overtaken | LeftAlone:
        """Be ready until the round is committed, the others have gone on, or nobody is left.

        Failed attempts are logged and tried again without the peer that failed them.
        """
        self._is_fusing = True
        try:
            while True:
                ballot, self._begun = self._begun, None
                if ballot is None:
                    match action := self.decide():
                        case CatchUp():
                            with suppress(RoundError):  # a fusion begins: the others wait for me
                                found = await self._unless_replaced(self.better_chain())
                                if found is not None:
                                    return self._committed_elsewhere(found[0]) or Overtaken()
                        case Stop():
                            return Overtaken()
                        case Alone():
                            return LeftAlone()
                        case Fuse():
                            ballot = await self._form_group(action)
                        case _:
                            await self._wait(action)
                if ballot is not None and (committed := await self._try(ballot, reduce)) is not None:
                    return committed
        finally:
            self._is_fusing = False

    async def roll_back(self, reason: str) -> Committed | None:
        """Propose to undo the last commit; its electorate is the one that the next fusion would have.

        None when too few agree (why is in the log), or when `fuse` is running: it then returns the outcome.
        """
        for _ in range(MAX_ROLLBACK_ATTEMPTS):
            if not self.chain.commits or self.chain.is_rolled_back or self._phase not in TRAINING_PHASES:
                logger.warning("nothing to roll back from here: round %d, %s", self.chain.round, self._phase)
                return None
            ballot = await self._lead(self._make_rollback(reason))
            if ballot is None:
                continue
            if self._is_fusing:
                self._begun = ballot
                self._bell.ring()
                return None
            if (committed := await self._try(ballot, _no_reduce)) is not None:
                return committed
        return None

    async def better_chain(self) -> tuple[Chain, tuple[str, ...]] | None:
        """The best chain that others claim or that was certified here, with peers that may hold its state."""
        best = await self._chains.best_claimed()
        found = self._found
        if found is not None and not is_better(found, self.chain):
            found = self._found = None
        if found is not None and (best is None or is_better(found, best)):
            best = found
        if best is None:
            return None
        donors = self.donors(best.state_hash)
        if not donors and best.is_rolled_back:  # the state before: whoever was there may still have it
            donors = tuple(p for p in best.commits[-1].signatures if p != self._identity.peer_id)
        return best, donors

    def donors(self, state_hash: str) -> tuple[str, ...]:
        return tuple(m.peer_id for m in self.live() if m.record.state_hash == state_hash)

    def ban(self, peer_id: str, why: str) -> None:
        """Exclude a peer from the rest of the run: never in a group, never counted."""
        self.membership.ban(peer_id, why, members=self.chain.members)
        self._bell.ring()

    async def leave(self) -> None:
        await self._resign()
        self._phase = "leaving"
        await self.publish()
        await self._presence.tell_everybody()

    def _committed_elsewhere(self, chain: Chain) -> Committed | None:
        """The round that I computed, whose signatures did not reach me in time."""
        if (
            self._computed is None
            or chain.round != self.chain.round + 1
            or chain.commits[:-1] != self.chain.commits
        ):
            return None
        group, state_hash = self._computed
        if chain.state_hash != state_hash or chain.is_rolled_back:
            return None
        self.adopt(chain)
        return Committed(chain, group)

    def _has_computed(self, state_hash: str) -> bool:
        return self._computed is not None and self._computed[1] == state_hash

    async def _resign(self) -> None:
        if not self._roster.has_resigned(self.chain) and self._voter.resign():
            await self._store_promise()

    async def _store_promise(self) -> None:
        if self._remember is not None:
            await self._remember(self._voter.promise)

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
            about=self._about(),
            resigned=self.chain.tip if self._roster.has_resigned(self.chain) else "",
            credential=None if self._admission is None else self._admission.credential,
            witness=self.membership.beginning.witness,
            issued_at=now,
            expires_at=now + self.chain.spec.lease_seconds,
        )

    async def _keep_watching(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS if self._phase == "ready" else WATCH_SECONDS)
            chain = self.chain
            if self._phase in WATCHING_PHASES and not self.is_overtaken:
                found = await self.better_chain()
                if found is not None and self.chain is chain:  # else I have caught up meanwhile
                    self.is_overtaken = True
            self._bell.ring()

    async def _keep_reading(self) -> None:
        """Beside the watching: to look at what others claim may take longer than their leases."""
        while True:
            await asyncio.sleep(POLL_SECONDS if self._phase == "ready" else WATCH_SECONDS)
            await self._presence.read_board()
            self._look_at_beginning()
            self._bell.ring()

    def _look_at_beginning(self) -> None:
        """What the heartbeats that came tell of it."""
        beginning = self.membership.beginning
        if beginning.watches:
            training = self.membership.in_training(tip=GENESIS, now=self._network.now())
            beginning.consider(self.chain, training)
        self.chain = beginning.of(self.chain)

    async def _come_back(self) -> None:
        """With a new daemon: while there was none, my machine refused, so the others may count me as gone."""
        self._network.create_task(self._presence.tell_everybody())

    def _needed(self) -> tuple[list[Member], bool]:
        """Whom I may have to wait for in this round, and whether I do already."""
        if self._phase not in TRAINING_PHASES:
            return [], False
        return [m for m in self.live() if trains_on(m, self.chain)], self._phase == "ready"

    async def _wait(self, action: Action) -> None:
        is_out = isinstance(action, Wait) and action in (NOT_DRAWN, LEFT_OUT)
        if is_out and not self._roster.has_resigned(self.chain):
            await self._resign()  # the drawn must be able to commit without me
            await self._presence.tell_everybody()
        await self._bell.rung(POLL_SECONDS)

    # forming a group

    async def _form_group(self, fuse: Fuse) -> Ballot | None:
        leader = fuse.leader(self._attempt)
        if leader == self._identity.peer_id:
            return await self._lead(self._make_proposal(fuse))
        deadline = time.monotonic() + self._leaders.patience * self._attempt_seconds(fuse.members)
        attempt = self._attempt
        while self._begun is None and self._attempt == attempt and time.monotonic() < deadline:
            action = self.decide()
            if not isinstance(action, Fuse) or leader not in action.members:  # it is gone: who is the next?
                return None
            await self._bell.rung(POLL_SECONDS)
        if self._begun is None and self._attempt == attempt:
            logger.warning("leader %s of attempt %d is silent", leader[-8:], attempt)
            self._leaders.was_silent(leader)
            self._attempt += 1
        return None

    async def _lead(self, proposal: Proposal) -> Ballot | None:
        """One attempt to win a majority. None when it fails; why is in the log."""
        me = self._identity.peer_id
        candidacy = Candidacy(me, proposal, self.chain)
        try:
            own = self._voter.accept(me, proposal, self._view())
            candidacy.add(me, own.acceptance, own.to_json()["lock"])
        except RecordError as error:
            logger.info("attempt %d: not led: %s", proposal.attempt, error)
            self._attempt = max(self._attempt, self._voter.promise.attempt) + 1
            await self._bell.rung(POLL_SECONDS)
            return None
        self._take_proposal(me, proposal)
        self._attempt = max(self._attempt, proposal.attempt)
        await self._store_promise()
        others = [peer for peer, _ in member_records(proposal) if peer != me]
        body = sign(proposal, self._identity).to_json()
        await asyncio.gather(*(self._ask_to_join(peer, body, candidacy, proposal) for peer in others))
        if self._voter.promise.proposal != proposal.hash:
            logger.info("attempt %d: gave way to a later one", proposal.attempt)
            return None
        try:
            ballot = candidacy.begin()
        except RoundError as error:
            logger.info("%s", error)
            self._attempt = max(self._attempt, proposal.attempt + 1)
            await self._bell.rung(POLL_SECONDS)
            return None
        self._log_begun(ballot)
        begin = ballot.to_json()
        told = [peer for peer in ballot.members if peer != me]
        await asyncio.gather(*(self._presence.tell(peer, "begin", begin) for peer in told))
        return ballot

    def _make_proposal(self, fuse: Fuse) -> Proposal:
        records = [sign(self._heartbeat(), self._identity).to_json()]
        for peer in fuse.members:
            member = self.membership.get(peer)
            if member is not None:
                records.append(member.signed)
        return Proposal(
            run=self.chain.spec.digest,
            round=self.chain.round + 1,
            attempt=max(self._attempt, self._voter.promise.attempt),
            previous=self.chain.tip,
            members=records,
            excluded=self._roster.excluded,
            electorate=list(fuse.electorate),
            proposed_at=self._network.now(),
        )

    def _make_rollback(self, reason: str) -> Proposal:
        members = [m for m in self._roster.candidates() if trains_on(m, self.chain)]
        own = sign(self._heartbeat(), self._identity).to_json()
        self._attempt = max(self._attempt, self._voter.promise.attempt + 1)
        return Proposal(
            purpose="rollback",
            run=self.chain.spec.digest,
            round=self.chain.round + 1,
            attempt=self._attempt,
            previous=self.chain.tip,
            members=[own, *(member.signed for member in members)],
            excluded=list(self._leaves_out()),
            electorate=sorted(self._roster.expected(self.chain)),
            reason=reason[:MAX_REASON_CHARS],
            proposed_at=self._network.now(),
        )

    async def _ask_to_join(
        self, peer_id: str, body: dict[str, str], candidacy: Candidacy, proposal: Proposal
    ) -> None:
        try:
            reply = await self._presence.call(peer_id, "propose", body)
            answer = parse_json(reply)
            if isinstance(answer, dict) and answer.get("accept") is True:
                candidacy.add(peer_id, answer.get("acceptance"), answer.get("lock"))
                return
        except PeerUnreachable as error:
            logger.warning("left out of the next attempt: %s", error)
            self._roster.leave_out(peer_id, proposal.attempt + 1)
            return
        except RecordError as error:
            logger.warning("dropped the answer of %s: %s", peer_id[-8:], error)
            return
        why = str(answer.get("why"))[:200] if isinstance(answer, dict) else "no answer"
        logger.info("peer %s does not join the group: %s", peer_id[-8:], why)
        if isinstance(answer, dict) and type(answer.get("attempt")) is int:
            self._attempt = max(self._attempt, min(answer["attempt"], self._attempt + MAX_ATTEMPTS_AHEAD))

    def _view(self) -> View:
        return View(
            chain=self.chain,
            phase=self._phase,
            num_examples=self._num_examples,
            expected=self._roster.expected(self.chain),
            now=self._network.now(),
            attempt=self._attempt,
            wants_rollback=bool(self.chain.commits) and self._wants_rollback(self.chain.tip),
            leaves_out=self._leaves_out(),
            barred=barred_from(self.chain, self._identity.peer_id, self._roster.candidates()),
        )

    # one attempt

    async def _try(self, ballot: Ballot, reduce: Reduce) -> Committed | None:
        """None when the attempt failed; why is in the log."""
        group = group_of(ballot, self.chain)
        started = time.monotonic()
        try:
            commit = await self._make_commit(ballot, group, reduce)
            self._check_not_replaced(ballot)
            exchange_seconds = time.monotonic() - started
            chain = await self._voting.commit(ballot, commit, self.chain, exchange_seconds)
        except (RoundError, RecordError) as error:
            logger.warning("round %d, attempt %d failed: %s", group.round, group.attempt, error)
            if isinstance(error, GroupFailed):
                if error.is_proven:
                    self._roster.exclude(error.culprit, error.why)
                else:
                    self._roster.failed(error.culprit, group.attempt)
            if isinstance(error, _Replaced):
                self._count_replaced(error, ballot, time.monotonic() - started)
            self._voting.stop()
            self._attempt = max(self._attempt, group.attempt + 1)
            return None
        if commit.kind == "fuse":
            self.adopt(chain)
        else:
            self._found, self.is_overtaken = chain, True
        return Committed(chain, group, commit.kind)

    async def _make_commit(self, ballot: Ballot, group: Group, reduce: Reduce) -> Commit:
        """A new value, or the one to be signed again, once its state is here."""
        again = ballot.again()
        if again is None and ballot.proposal.purpose == "rollback":
            return rollback_commit(ballot.proposal, self.chain)
        if again is None:
            fused = await self._unless_replaced(reduce(group))
            self._computed = (group, fused.state_hash)
            return fusion_commit(group, fused.state_hash, fused.contributions, self.chain)
        if again.kind == "fuse" and not self._holds(again.state_hash):
            await self._get_state(again, ballot)
        if again.kind == "fuse":
            self._computed = (group, again.state_hash)
        return again

    async def _get_state(self, commit: Commit, ballot: Ballot) -> None:
        limit = self.chain.spec.exchange_limit_seconds
        logger.info("attempt %d: a value may be committed already; getting its state", ballot.attempt)
        is_here = False
        if self._obtain is not None:
            try:
                got = asyncio.wait_for(self._obtain(commit.state_hash, ballot.donors), limit)
                is_here = await self._unless_replaced(got)
            except TimeoutError:
                logger.warning("the state did not come within %.0f s", limit)
        if not is_here:
            for peer in ballot.donors:
                self._roster.leave_out(peer, ballot.attempt + 1)
            raise RoundError("the state of a value to be signed again cannot be had")

    async def _unless_replaced(self, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if self._begun is not None:
                    raise _Replaced(self._begun.author, self._begun.proposal)
                wake = asyncio.ensure_future(self._bell.rung(POLL_SECONDS))
                await asyncio.wait({task, wake}, return_when=asyncio.FIRST_COMPLETED)
                wake.cancel()
            return task.result()
        finally:
            task.cancel()

    async def _follow(self, ballot: Ballot) -> None:
        """A roll-back that begins while no `fuse` is running; the session then finds a better chain."""
        await self._try(ballot, _no_reduce)
        self._bell.ring()

    # whom the organizer of a private run takes back

    def _start_revoking(self, admission: Admission) -> None:
        admission.on_revoked(self._put_out)
        self._put_out(admission.revoked)
        self._network.on_call("revocations", self._on_revocations)
        admission.on_revoked(lambda _: self._tell_revocations(admission.signed_revocations.decode()))
        self._network.create_task(self._presence.keep_spreading_revocations(admission))

    def _put_out(self, peer_ids: frozenset[str]) -> None:
        for peer in sorted(peer_ids - self.membership.banned - {self._identity.peer_id}):
            self.membership.ban(peer, "the organizer has revoked it", members=self.chain.members)
        self._bell.ring()

    async def _on_revocations(self, _peer_id: str, body: Any) -> bytes:
        if self._admission is not None:
            self._admission.learn(str(body).encode(errors="replace"))
        return b"{}"

    def _tell_revocations(self, text: str) -> None:
        """On to the others, at once: whoever knows this version already tells nobody."""
        for member in self.live():
            self._network.create_task(self._presence.tell(member.peer_id, "revocations", text))

    # answers to the others

    async def _on_heartbeat(self, peer_id: str, body: Any) -> bytes:
        self.membership.observe(json.dumps(body).encode(), now=self._network.now(), claimed_by=peer_id)
        self._look_at_beginning()
        self._bell.ring()
        return b"{}"

    async def _on_propose(self, peer_id: str, body: Any) -> bytes:
        try:
            author, proposal = open_envelope(body, Proposal)
            if author != peer_id:
                raise RecordError("the proposal is not signed by its sender")
            if self._roster.is_excluded(author):
                raise RecordError("the proposer is excluded")
            if not (author in self.chain.cohort or self.membership.has_heard(author)):
                raise RecordError("the proposer is not known here")  # before 1024 records of it are opened
            self._check_credentials(proposal)
            if not self._leaders.is_heard(author, time.monotonic()):
                raise RecordError("several of your proposals cost an attempt: let others propose")
            if self._is_leading(proposal.attempt):
                self._leaders.two_at_once()
            if self._voting.is_running:
                raise RecordError(f"I still collect the votes of attempt {self._attempt}")
            answer = self._voter.accept(author, proposal, self._view())
        except RecordError as error:
            attempt = max(self._attempt, self._voter.promise.attempt)
            return json.dumps({"accept": False, "why": str(error), "attempt": attempt}).encode()
        self._take_proposal(author, proposal)
        self._attempt = max(self._attempt, proposal.attempt)
        await self._store_promise()
        return json.dumps(answer.to_json()).encode()

    def _take_proposal(self, author: str, proposal: Proposal) -> None:
        """The one that I have accepted. The one before it, if it has not begun, never will."""
        self._count_unbegun(author, proposal)
        self._proposal, self._accepted_at = (author, proposal), time.monotonic()

    def _count_unbegun(self, newer_author: str, newer: Proposal) -> None:
        """The fault of its author if it had time to begin; else of who came too early with another one."""
        author, proposal = self._proposal or ("", None)
        if proposal is None or proposal.hash in (self._last_begun, self._charged):
            return
        if "rollback" in (proposal.purpose, newer.purpose):  # which only those accept who want it as well
            return
        pause = self._attempt_seconds(peer for peer, _ in member_records(proposal))
        had_time = time.monotonic() >= self._accepted_at + pause
        costly = author if had_time or author == newer_author else newer_author
        self._count_costly(costly, pause, self.chain.spec.lease_seconds)

    def _check_not_replaced(self, ballot: Ballot) -> None:
        """Raises _Replaced when a later proposal was accepted meanwhile: what is done cannot be signed."""
        author, proposal = self._proposal or ("", None)
        if proposal is not None and self._voter.promise.proposal == proposal.hash != ballot.proposal.hash:
            raise _Replaced(author, proposal)

    def _count_replaced(self, replaced: _Replaced, ballot: Ballot, ran_seconds: float) -> None:
        """The next one is given twice as long."""
        if replaced.proposal.purpose == "rollback" or replaced.proposal.hash == self._charged:
            return
        self._charged = replaced.proposal.hash
        spec = self.chain.spec
        pause = self._attempt_seconds(ballot.members) + 2.0 * ran_seconds
        self._count_costly(replaced.author, pause, max(spec.lease_seconds, spec.exchange_limit_seconds))

    def _count_costly(self, author: str, pause_seconds: float, max_seconds: float) -> None:
        if author != self._identity.peer_id:
            self._leaders.cost_an_attempt(author, time.monotonic(), pause_seconds, max_seconds)

    def _attempt_seconds(self, members: Iterable[str]) -> float:
        """From the first call of a leader to the begin of its attempt."""
        return self._pace.leader_seconds([peer for peer in members if peer != self._identity.peer_id])

    def _check_credentials(self, proposal: Proposal) -> None:
        """A member must not bring in an outsider either. Raises RecordError."""
        if self._admission is not None:
            for peer, record in member_records(proposal):
                if peer != self._identity.peer_id:
                    self._admission.admit(peer, record.credential)

    def _is_leading(self, attempt: int) -> bool:
        author, proposal = self._proposal or ("", None)
        is_mine = proposal is not None and author == self._identity.peer_id
        return is_mine and proposal is not None and proposal.attempt == attempt

    async def _on_begin(self, peer_id: str, body: Any) -> bytes:
        author, proposal = self._proposal or (None, None)
        if author is None or proposal is None:
            raise RecordError("no such proposal was accepted")
        is_ready = self._phase == "ready" or proposal.purpose == "rollback"
        if peer_id != author or not is_ready or self._voter.promise.proposal != proposal.hash:
            raise RecordError("only who proposed it can begin it, while I am ready")
        if proposal.hash in (self._last_begun, self._accepted_before):
            return b"{}"
        ballot = check_begin(body, author, proposal, self.chain, self._identity.peer_id)
        self._last_begun = proposal.hash
        self._log_begun(ballot)
        if proposal.purpose == "rollback" and not self._is_fusing:
            self._network.create_task(self._follow(ballot))
        else:
            self._begun = ballot
        self._bell.ring()
        return b"{}"

    def _log_begun(self, ballot: Ballot) -> None:
        for exclusion in ballot.proposal.excluded:
            logger.warning(
                "round %d: peer %s is left out: %s",
                ballot.proposal.round,
                exclusion.peer[-8:],
                exclusion.reason,
            )

    async def _on_vote(self, peer_id: str, body: Any) -> bytes:
        if not isinstance(body, dict) or body.get("run") != self.chain.spec.digest:
            raise RecordError("of another run")
        _, proposal = self._proposal or (None, None)
        expected = self.chain.cohort if proposal is None else self.chain.cohort | voters_of(proposal)
        if not (peer_id in expected or self._voting.expects(peer_id)):
            raise RecordError("your vote does not count here")
        self._voting.add(peer_id, str(body.get("commit"))[:64], str(body.get("signature"))[:88])
        return b"{}"


def _admission_of(network: Network, chain: Chain) -> Admission | None:
    """Raises AccessError rather than run a private swarm with its doors open."""
    admission, spec = network.admission, chain.spec
    if spec.organizer is None and admission is None:
        return None
    if admission is None:
        raise AccessError(f"{NOT_ADMITTED}: join with --invite STRING, which its organizer makes")
    if (admission.run, admission.organizer) != (spec.digest, spec.organizer):
        raise AccessError("the invite is of another run, or of another organizer, than the run's spec")
    return admission


async def _no_reduce(_group: Group) -> Fused:
    raise RoundError("nothing to reduce: this is not an attempt to fuse")
