"""Does the protocol hold when messages are lost, doubled, reordered, and peers die, return, are cut off?

A hypothesis state machine of three to six peers. Each runs the functions of the product (`decide`, `Voter`,
`Candidacy`, `check_begin`, `VoteBox`, `Leaders`, `Chain`, `Membership`) on real signed records; only calls,
waiting and the all-reduce are replaced: a message lies in a bag until a rule delivers, doubles or drops it.
A peer that crashes keeps its stored `Promise` and its last checkpoint; what it adopted since then is lost.

Claimed, after each step: the chains of a peer only get better, and two values of one round exist only if
somebody who voted on one was cut off, for longer than the lease, from somebody who voted on the other.
Claimed in the end, when the network is whole again: one chain, no worse than any that was kept, and the run
goes on within a bounded time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator import records as records_module
from coordinator.ballot import (
    Ballot,
    Candidacy,
    View,
    VoteBox,
    Voter,
    check_begin,
    fusion_commit,
    group_of,
    member_records,
    rollback_commit,
    signers_of,
)
from coordinator.chain import Chain, is_better
from coordinator.errors import RoundError
from coordinator.identity import is_signed_by
from coordinator.membership import TRAINING_PHASES, Membership
from coordinator.records import (
    GENESIS,
    Commit,
    PeerRecord,
    Phase,
    Promise,
    Proposal,
    RecordError,
    SignedCommit,
    open_envelope,
    sign,
)
from coordinator.rounds import CatchUp, Fuse, Leaders, Standing, decide, electorate_of
from tests.fakes import NOW, hash_of, identity, make_spec, peer

NAMES = "abcdef"
LEASE = 24.0
BEAT = LEASE / 6
LIMIT = 20.0  # of a round, and of an exchange
VOTE_SECONDS = 3.0
LEADER_SECONDS = 3.0
FINAL_SECONDS = 200  # in which a whole network must commit a round: see `_settle`
SPEC = make_spec(
    created_at=NOW,
    lease_seconds=LEASE,
    num_rounds=1000,
    round_limit_seconds=LIMIT,
    exchange_limit_seconds=LIMIT,
    min_peers=2,
)


@dataclass
class Disk:
    """What survives a crash."""

    chain: Chain
    states: frozenset[str]
    promise: Promise | None = None


@dataclass(frozen=True)
class Message:
    source: str
    target: str
    kind: str  # propose, answer, begin, vote
    body: Any


@dataclass
class Peer:
    """One peer's memory, and its driver: what `Agreement` does with calls, done with messages."""

    name: str
    offset: float  # of its clock, seconds
    disk: Disk
    world: World
    is_alive: bool = True
    phase: Phase = "joining"
    num_examples: int = 0
    entered_at: float = 0.0
    found: Chain | None = None
    wanted: str = ""  # tip that it wants to roll back
    exchange_seconds: float = 0.0  # from begin to the own result

    def __post_init__(self) -> None:
        self.start()

    @property
    def peer_id(self) -> str:
        return peer(self.name)

    @property
    def now(self) -> float:
        return self.world.time + self.offset

    # life

    def start(self) -> None:
        self.is_alive, self.phase, self.found = True, "joining", None
        self.chain, self.states = self.disk.chain, set(self.disk.states)
        self.membership = Membership(SPEC, self.peer_id)
        self.voter = Voter(identity(self.name), self.chain, self.disk.promise, holds=self.states.__contains__)
        self.started = self.world.time
        self.rejected: set[str] = set()
        self.leaders = Leaders()
        self.begin_round()

    def begin_round(self) -> None:
        self.attempt = 0
        self.proposal: tuple[str, Proposal] | None = None
        self.candidacy: tuple[Candidacy, Proposal, float] | None = None  # with its deadline
        self.begun: Ballot | None = None
        self.done_at = 0.0  # when the exchange of the begun ballot ends
        self.last_begun = self.charged = ""
        self.accepted_at = 0.0
        self.voting: tuple[Ballot, Commit, float] | None = None
        self.votes = VoteBox()
        self.waits_until: float | None = None  # for the leader
        self.leaders = self.leaders.in_next_round()

    def store_promise(self) -> None:
        self.disk.promise = self.voter.promise

    def save(self) -> None:
        before = {self.chain.before().state_hash}  # the two newest checkpoints
        self.disk.chain, self.disk.states = (
            self.chain,
            frozenset({self.chain.state_hash} | (before & self.states)),
        )

    def adopt(self, chain: Chain) -> None:
        assert is_better(chain, self.chain), "a peer moved to a worse chain"
        self.states.add(chain.state_hash)
        self.chain, self.found = chain, None
        self.voter.move_to(chain)
        self.begin_round()
        self.phase, self.num_examples = "evaluating", 0

    # what it knows

    def heartbeat(self) -> PeerRecord:
        promise = self.voter.promise
        return PeerRecord(
            run=SPEC.digest,
            phase=self.phase,
            round=self.chain.round,
            state_hash=self.chain.state_hash,
            commit=self.chain.tip,
            num_examples=self.num_examples,
            entered_at=self.entered_at,
            resigned=self.chain.tip if promise.has_resigned and promise.previous == self.chain.tip else "",
            issued_at=self.now,
            expires_at=self.now + LEASE,
        )

    def envelope(self) -> dict[str, str]:
        return sign(self.heartbeat(), identity(self.name)).to_json()

    def absent(self) -> frozenset[str]:
        listened = self.world.time - self.started
        absent = self.membership.absent(
            self.chain.cohort, tip=self.chain.tip, now=self.now, listened_seconds=listened
        )
        promise = self.voter.promise
        own = promise.has_resigned and promise.previous == self.chain.tip
        return absent | ({self.peer_id} if own else set())

    def counted(self) -> frozenset[str]:
        return self.voter.counted(self.membership, self.now, self.world.time - self.started)

    def view(self) -> View:
        expected = electorate_of(
            self.chain,
            self.peer_id,
            self.membership.live(self.now),
            absent=self.absent(),
            counted=self.counted(),
        )
        wants = self.wanted == self.chain.tip
        return View(
            self.chain, self.phase, self.num_examples, frozenset(expected), self.now, self.attempt, wants
        )

    def known_tips(self) -> set[str]:
        return {signed.commit.hash for signed in self.chain.commits} | self.rejected

    # steps

    def enter(self) -> None:
        if self.phase in ("joining", "evaluating", "waiting"):
            self.phase, self.entered_at = "finetuning", self.now

    def get_ready(self) -> None:
        if self.phase == "finetuning":
            self.phase, self.num_examples = "ready", 100

    def sit_out(self) -> None:
        if self.phase in ("finetuning", "evaluating") and self.voter.resign():
            self.store_promise()
            self.phase = "waiting"

    def step(self) -> None:
        """What its loop would do next."""
        self.save()
        if self.candidacy is not None and self.now >= self.candidacy[2]:
            self.end_candidacy()
        if self.begun is not None:
            if self.now >= self.done_at:
                self.run_ballot()
        elif self.voting is not None:
            self.count_votes()
        elif self.candidacy is None:
            self.take_up()

    def take_up(self) -> None:
        if self.found is not None and self.get_state(self.found.state_hash, self.world.peers):
            self.adopt(self.found)
            return
        ready = self.phase == "ready"
        action = decide(
            self.chain,
            Standing(self.peer_id, ready, self.entered_at),
            self.membership.live(self.now),
            self.now,
            known_tips=self.known_tips(),
            absent=self.absent(),
            counted=self.counted(),
        )
        if isinstance(action, CatchUp):
            self.catch_up(action)
        elif isinstance(action, Fuse):
            self.form_group(action)

    def catch_up(self, action: CatchUp) -> None:
        for peer_id in action.peer_ids:
            other = self.world.by_id(peer_id)
            if not self.world.is_linked(self, other):
                continue
            chain = other.chain
            if not is_better(chain, self.chain):
                self.rejected.add(chain.tip)
            elif self.get_state(chain.state_hash, self.world.peers):
                self.adopt(self.world.verified(chain))
                return

    def get_state(self, state_hash: str, donors: list[Peer]) -> bool:
        linked = (p for p in donors if p is self or self.world.is_linked(self, p))
        if any(state_hash in donor.states for donor in linked) or state_hash == SPEC.backbone_hash:
            self.states.add(state_hash)
        return state_hash in self.states

    def form_group(self, fuse: Fuse) -> None:
        fuse = self.leaders.ranked(fuse)
        if fuse.leader(self.attempt) == self.peer_id:
            self.waits_until = None
            self.lead(self.make_proposal(fuse))
        elif self.waits_until is None:
            self.waits_until = self.now + LEADER_SECONDS * self.leaders.patience
        elif self.now >= self.waits_until:
            self.waits_until = None
            self.leaders.was_silent(fuse.leader(self.attempt))
            self.attempt += 1

    def make_proposal(self, fuse: Fuse) -> Proposal:
        known = [self.membership.get(member) for member in fuse.members]
        return Proposal(
            run=SPEC.digest,
            round=self.chain.round + 1,
            attempt=max(self.attempt, self.voter.promise.attempt),
            previous=self.chain.tip,
            members=[self.envelope(), *(member.signed for member in known if member is not None)],
            electorate=list(fuse.electorate),
            proposed_at=self.now,
        )

    def propose_rollback(self) -> None:
        if (
            self.wanted != self.chain.tip
            or not self.chain.commits
            or self.phase not in ("finetuning", "ready")
        ):
            return
        members = [m for m in self.membership.live(self.now) if m.record.commit == self.chain.tip]
        proposal = Proposal(
            purpose="rollback",
            run=SPEC.digest,
            round=self.chain.round + 1,
            attempt=max(self.attempt, self.voter.promise.attempt + 1),
            previous=self.chain.tip,
            members=[
                self.envelope(),
                *(m.signed for m in members if m.record.phase in ("finetuning", "ready")),
            ],
            electorate=sorted(self.view().expected),
            reason="worse",
            proposed_at=self.now,
        )
        self.lead(proposal)

    def lead(self, proposal: Proposal) -> None:
        self.begun = self.voting = None
        candidacy = Candidacy(self.peer_id, proposal, self.chain)
        try:
            own = self.voter.accept(self.peer_id, proposal, self.view()).to_json()
            candidacy.add(self.peer_id, own["acceptance"], own["lock"])
        except RecordError:
            self.attempt = max(self.attempt, self.voter.promise.attempt) + 1
            return
        self.store_promise()
        self.take_proposal(self.peer_id, proposal)
        self.attempt = proposal.attempt
        self.candidacy = (candidacy, proposal, self.now + LEADER_SECONDS / 2)
        body = sign(proposal, identity(self.name)).to_json()
        for peer_id, _ in member_records(proposal):
            self.world.send(self, peer_id, "propose", body)

    def end_candidacy(self) -> None:
        assert self.candidacy is not None
        candidacy, proposal, _ = self.candidacy
        self.candidacy = None
        try:
            if self.voter.promise.proposal != proposal.hash:
                raise RoundError("gave way")
            ballot = candidacy.begin()
        except RoundError:
            self.attempt = max(self.attempt, proposal.attempt + 1)
            return
        self.begun, self.done_at = ballot, self.now + self.exchange_seconds
        for peer_id in ballot.members:
            self.world.send(self, peer_id, "begin", ballot.to_json())

    def run_ballot(self) -> None:
        ballot, self.begun = self.begun, None
        assert ballot is not None
        author, proposal = self.proposal or ("", None)
        if proposal is not None and self.voter.promise.proposal == proposal.hash != ballot.proposal.hash:
            self.count_replaced(author, proposal)
        try:
            commit = self.make_commit(ballot)
            own = self.voter.sign(commit, ballot.proposal, self.now)
        except (RoundError, RecordError):
            self.attempt = max(self.attempt, ballot.attempt + 1)
            return
        self.store_promise()
        self.votes.add(self.peer_id, commit.digest, own)
        self.voting = (ballot, commit, self.now + VOTE_SECONDS)
        for peer_id in ballot.members:
            self.world.send(self, peer_id, "vote", [commit.digest, own])

    def make_commit(self, ballot: Ballot) -> Commit:
        again = ballot.again()
        if again is not None:
            donors = [self.world.by_id(donor) for donor in ballot.donors]
            if again.kind == "fuse" and not self.get_state(again.state_hash, donors):
                raise RoundError("the state cannot be had")
            return again
        if ballot.proposal.purpose == "rollback":
            return rollback_commit(ballot.proposal, self.chain)
        group = group_of(ballot, self.chain)
        state_hash = hash_of(group.group_id.hex())
        self.states.add(state_hash)
        return fusion_commit(group, state_hash, group.contributions, self.chain)

    def count_votes(self) -> None:
        assert self.voting is not None
        ballot, commit, deadline = self.voting
        certificate = self.votes.certificate(commit, signers_of(ballot, commit), self.chain)
        if certificate is not None:
            chain = self.chain.extended(certificate)
            self.world.certified(certificate)
            self.voting = None
            if commit.kind == "fuse" or self.get_state(commit.state_hash, self.world.peers):
                self.adopt(chain)
            else:
                self.found = chain
        elif self.now >= deadline:
            self.voting = None
            self.attempt = max(self.attempt, ballot.attempt + 1)

    # messages

    def receive(self, message: Message) -> None:
        source = self.world.peers[NAMES.index(message.source)]
        body = json.loads(json.dumps(message.body))
        getattr(self, f"on_{message.kind}")(source, body)

    def on_propose(self, source: Peer, body: Any) -> None:
        author, proposal = open_envelope(body, Proposal)
        if self.voting is not None and self.now < self.voting[2]:
            return
        promised = max(self.attempt, self.voter.promise.attempt)
        if not self.leaders.is_heard(author, self.world.time):
            self.world.send(self, source.peer_id, "answer", {"accept": False, "attempt": promised})
            return
        mine = self.proposal
        if mine is not None and mine[0] == self.peer_id and mine[1].attempt == proposal.attempt:
            self.leaders.two_at_once()
        try:
            answer = self.voter.accept(author, proposal, self.view())
        except RecordError:
            self.world.send(self, source.peer_id, "answer", {"accept": False, "attempt": promised})
            return
        self.store_promise()
        self.take_proposal(author, proposal)
        self.voting = None
        self.attempt = max(self.attempt, proposal.attempt)
        self.world.send(self, source.peer_id, "answer", {**answer.to_json(), "proposal": proposal.hash})

    def take_proposal(self, newer_author: str, newer: Proposal) -> None:
        author, proposal = self.proposal or ("", None)
        is_counted = proposal is not None and proposal.hash not in (self.last_begun, self.charged)
        if proposal is not None and is_counted and "rollback" not in (proposal.purpose, newer.purpose):
            had_time = self.world.time >= self.accepted_at + LEADER_SECONDS
            costly = author if had_time or author == newer_author else newer_author
            self.count_costly(costly, LEADER_SECONDS, LEASE)
        self.proposal, self.accepted_at = (newer_author, newer), self.world.time

    def count_replaced(self, author: str, proposal: Proposal) -> None:
        if proposal.purpose == "fuse" and proposal.hash != self.charged:
            self.charged = proposal.hash
            pause = LEADER_SECONDS + 2 * self.exchange_seconds
            self.count_costly(author, pause, max(LEASE, SPEC.exchange_limit_seconds))

    def count_costly(self, author: str, pause: float, limit: float) -> None:
        if author != self.peer_id:
            self.leaders.cost_an_attempt(author, self.world.time, pause, limit)

    def on_answer(self, source: Peer, body: Any) -> None:
        if not body["accept"]:
            self.attempt = max(self.attempt, body["attempt"])
            return
        if self.candidacy is None or self.candidacy[1].hash != body["proposal"]:
            return  # of an attempt that is over
        candidacy, _, _ = self.candidacy
        candidacy.add(source.peer_id, body["acceptance"], body["lock"])

    def on_begin(self, source: Peer, body: Any) -> None:
        author, proposal = self.proposal or ("", None)
        if proposal is None or author != source.peer_id or body["proposal"] != proposal.hash:
            return
        if self.last_begun == proposal.hash or self.voter.promise.proposal != proposal.hash:
            return
        if self.phase != "ready" and proposal.purpose == "fuse":
            return
        ballot = check_begin(body, author, proposal, self.chain, self.peer_id)
        if self.begun is not None:  # it was running
            self.count_replaced(author, proposal)
        self.begun = ballot
        self.done_at = self.now + self.exchange_seconds
        self.last_begun, self.voting = proposal.hash, None

    def on_vote(self, source: Peer, body: Any) -> None:
        self.votes.add(source.peer_id, *body)


@dataclass
class World:
    """The network, the true time, and what is true of it all."""

    time: float = NOW
    peers: list[Peer] = field(default_factory=list)
    bag: list[Message] = field(default_factory=list)
    cut: set[frozenset[str]] = field(default_factory=set)
    next_beat: dict[str, float] = field(default_factory=dict)
    heard: dict[tuple[str, str], float] = field(default_factory=dict)  # (from, to) -> true time of the last
    gaps: list[tuple[str, str, float]] = field(default_factory=list)  # from, to, when a long silence ended
    met: set[tuple[str, str]] = field(default_factory=set)  # from, to: heard in training for the first round
    values: dict[str, dict[str, SignedCommit]] = field(
        default_factory=dict
    )  # previous tip -> value -> any copy
    first_at: dict[str, float] = field(default_factory=dict)  # value -> when it was first certified
    best: Chain | None = None  # of all that were written to a disk

    def by_id(self, peer_id: str) -> Peer:
        return next(p for p in self.peers if p.peer_id == peer_id)

    def is_linked(self, one: Peer, other: Peer) -> bool:
        return one.is_alive and other.is_alive and frozenset({one.name, other.name}) not in self.cut

    def send(self, source: Peer, target: str, kind: str, body: Any) -> None:
        if target != source.peer_id:
            self.bag.append(Message(source.name, self.by_id(target).name, kind, body))

    def deliver(self, message: Message) -> None:
        target = self.peers[NAMES.index(message.target)]
        if target.is_alive and frozenset({message.source, message.target}) not in self.cut:
            with contextlib.suppress(RoundError, RecordError):  # what a handler refuses, the caller logs
                target.receive(message)

    @functools.cached_property
    def _verified(self) -> dict[str, Chain]:
        return {}

    def verified(self, chain: Chain) -> Chain:
        """As one that is fetched: every commit is checked again."""
        rebuilt = Chain(SPEC)
        for signed in chain.commits:
            tip = signed.commit.hash
            rebuilt = self._verified.get(tip) or rebuilt.extended(signed)
            self._verified[tip] = rebuilt
        return rebuilt

    def advance(self, seconds: float) -> None:
        """Heartbeats go out in time, over the board or directly, to whoever can be reached."""
        ends_at = self.time + seconds
        while self.time < ends_at:
            self.time = min(ends_at, self.time + BEAT / 4)
            for source in self.peers:
                if source.is_alive and self.next_beat.get(source.name, 0.0) <= self.time:
                    self.next_beat[source.name] = self.time + BEAT
                    self.beat(source)

    def beat(self, source: Peer) -> None:
        data = sign(source.heartbeat(), identity(source.name)).to_bytes()
        for target in self.peers:
            if target is not source and self.is_linked(source, target):
                target.membership.observe(data, now=target.now)
                pair = (source.peer_id, target.peer_id)
                if self.time - self.heard.get(pair, NOW) > LEASE:
                    self.gaps.append((*pair, self.time))
                self.heard[pair] = self.time
                if source.phase in TRAINING_PHASES and source.chain.round == 0:
                    self.met.add(pair)

    def was_cut_off(self, one: set[str], other: set[str], since: float) -> bool:
        """Whether somebody of the one was unheard by somebody of the other for longer than the lease."""
        for a, b in itertools.product(one, other):
            for pair in ((a, b), (b, a)):
                if a != b and self.time - self.heard.get(pair, NOW) > LEASE:
                    return True
                if any((p, q) == pair and ended_at >= since for p, q, ended_at in self.gaps):
                    return True
        return False

    def have_never_met(self, one: set[str], other: set[str]) -> bool:
        """A run has no cohort before its first round: who trains is known by being heard to train."""
        return not one & other and not any(
            (a, b) in self.met or (b, a) in self.met for a, b in itertools.product(one, other)
        )

    def is_kept(self, signed: SignedCommit) -> bool:
        """Unless all who had seen its certificate crashed before they could write or tell it."""
        chains = [p.chain if p.is_alive else p.disk.chain for p in self.peers]
        index, value = signed.commit.round - 1, signed.commit.hash
        return any(c.round > index and c.commits[index].commit.hash == value for c in chains)

    def certified(self, signed: SignedCommit) -> None:
        commit = signed.commit
        values = self.values.setdefault(commit.previous, {})
        if commit.hash not in values:
            since = self.first_at.get(commit.previous, NOW)
            for other in filter(self.is_kept, values.values()):
                sides = [set(s.signatures) | set(s.commit.electorate) for s in (signed, other)]
                is_apart = commit.round == 1 and self.have_never_met(*sides)
                assert is_apart or self.was_cut_off(sides[0], sides[1], since), (
                    f"round {commit.round} has two values, of attempts "
                    f"{other.commit.attempt} and {commit.attempt}, and nobody was cut off"
                )
            values[commit.hash] = signed
            self.first_at[commit.hash] = self.time


@contextmanager
def remembered_signatures() -> Iterator[None]:
    """A signature that was found good or bad once need not be computed again: ten times faster."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.lru_cache(maxsize=100_000)(is_signed_by)
        patch.setattr(records_module, "is_signed_by", cached)
        yield


INDEX = st.integers(0, 5)


class Swarm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._cache = remembered_signatures()
        self._cache.__enter__()
        self.world = World()
        self.dead_stay_dead = False

    @initialize(
        num_peers=st.integers(3, 6),
        offsets=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
        dead=st.booleans(),
        rounds=st.integers(0, 1),
    )
    def begin(self, num_peers: int, offsets: list[float], dead: bool, rounds: int) -> None:
        world, self.dead_stay_dead = self.world, dead
        first = Disk(Chain(SPEC), frozenset({SPEC.backbone_hash}))
        for name, offset in zip(NAMES[:num_peers], offsets, strict=False):
            world.peers.append(Peer(name, offset, Disk(first.chain, first.states), world))
        world.advance(2 * BEAT)
        for _ in range(rounds):
            self._run(lambda: min(p.chain.round for p in world.peers) > 0, 40)

    def _peer(self, index: int) -> Peer:
        return self.world.peers[index % len(self.world.peers)]

    @rule(index=INDEX)
    def step(self, index: int) -> None:
        if (p := self._peer(index)).is_alive:
            p.step()
            self._note_saved(p)

    @rule(
        seed=st.integers(0, 2**32),
        loss=st.sampled_from([0.0, 0.2, 0.5]),
        faults=st.sampled_from([0.0, 0.3, 1.0]),
        seconds=st.integers(1, 12),
    )
    def a_while(self, seed: int, loss: float, faults: float, seconds: int) -> None:
        """Everybody acts; messages arrive in any order, some twice, some later, some never."""
        world, chance = self.world, Random(seed)
        for _ in range(seconds):
            world.advance(1.0)
            if chance.random() < faults:
                happens = [self.isolate, self.isolate, self.crash, self.restart, self.crash_and_restart]
                happens.append(lambda index: self.think_gone(index, chance.randrange(6)))
                chance.choice([*happens, lambda _: self.heal()])(chance.randrange(6))
            for p in world.peers:
                if p.is_alive and chance.random() < 0.8:
                    p.enter()
                    p.get_ready()
            for _ in range(2):
                for p in chance.sample(world.peers, len(world.peers)):
                    if p.is_alive and chance.random() < 0.9:
                        p.step()
                        self._note_saved(p)
                messages, world.bag = world.bag, []
                for message in chance.sample(messages, len(messages)):
                    is_lost = chance.random() < loss
                    if not is_lost:
                        world.deliver(message)
                    if chance.random() < (0.5 if is_lost else 0.1):
                        world.bag.append(message)

    @rule(index=INDEX)
    def get_ready(self, index: int) -> None:
        if (p := self._peer(index)).is_alive:
            p.enter()
            p.get_ready()
            self.world.beat(p)

    @rule(index=INDEX)
    def sit_out(self, index: int) -> None:
        if (p := self._peer(index)).is_alive:
            p.sit_out()
            self.world.beat(p)

    @precondition(lambda self: self.world.bag)
    @rule(index=st.integers(0, 50), is_doubled=st.booleans())
    def deliver(self, index: int, is_doubled: bool) -> None:
        bag = self.world.bag
        index %= len(bag)
        self.world.deliver(bag[index] if is_doubled else bag.pop(index))

    @precondition(lambda self: self.world.bag)
    @rule(index=st.integers(0, 50))
    def drop(self, index: int) -> None:
        self.world.bag.pop(index % len(self.world.bag))

    @rule(seconds=st.sampled_from([LEASE / 2, LEASE, 2 * LEASE]))
    def a_long_time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(index=INDEX)
    def crash(self, index: int) -> None:
        self._peer(index).is_alive = False

    @rule(index=INDEX)
    def restart(self, index: int) -> None:
        if not (p := self._peer(index)).is_alive:
            p.start()

    @rule(side=st.sets(st.sampled_from(NAMES), min_size=1, max_size=3))
    def cut_off(self, side: set[str]) -> None:
        for one, other in itertools.product(side, set(NAMES) - side):
            self.world.cut.add(frozenset({one, other}))

    @rule(index=INDEX, seconds=st.sampled_from([0.0, 1.0, 4.0, 8.0]))
    def is_slow(self, index: int, seconds: float) -> None:
        self._peer(index).exchange_seconds = seconds

    @rule(index=INDEX)
    def isolate(self, index: int) -> None:
        name = self._peer(index).name
        self.world.cut.update(frozenset({name, other}) for other in NAMES if other != name)

    @rule(index=INDEX)
    def crash_and_restart(self, index: int) -> None:
        """At once: too fast to be missed."""
        self.crash(index)
        self.restart(index)

    @rule()
    def heal(self) -> None:
        self.world.cut.clear()

    @rule(index=INDEX, who=st.sets(INDEX, max_size=6))
    def roll_back(self, index: int, who: set[int]) -> None:
        proposer = self._peer(index)
        for other in (self._peer(i) for i in who | {index}):
            other.wanted = proposer.chain.tip
        if proposer.is_alive and proposer.candidacy is None:
            proposer.propose_rollback()

    @rule(index=INDEX, other=INDEX)
    def think_gone(self, index: int, other: int) -> None:
        """A peer believes that another one has ended (`departures.py`): wrongly, for all it matters here."""
        one, gone = self._peer(index), self._peer(other)
        if one.is_alive:
            one.membership.forget(gone.peer_id)

    @invariant()
    def two_kept_chains_of_one_tip_are_equal_in_worth(self) -> None:
        chains = [p.chain for p in self.world.peers]
        for one, other in itertools.combinations(chains, 2):
            assert not (is_better(one, other) and is_better(other, one))

    def _note_saved(self, p: Peer) -> None:
        best = self.world.best
        if best is None or is_better(p.disk.chain, best):
            self.world.best = p.disk.chain

    def _run(self, is_done: Callable[[], bool], seconds: int) -> bool:
        """Fair play for some seconds: everybody acts, everything arrives."""
        world = self.world
        for _ in range(seconds):
            for p in world.peers:
                if p.is_alive:
                    p.enter()
                    p.get_ready()
            world.advance(1.0)
            for _ in range(3):
                for index in range(len(world.peers)):
                    self.step(index)
                messages, world.bag = world.bag, []
                for message in messages:
                    world.deliver(message)
            if is_done():
                return True
        return False

    def teardown(self) -> None:
        try:
            if self.world.peers:
                self._settle()
        finally:
            self._cache.__exit__(None, None, None)

    def _settle(self) -> None:
        """The network is whole again: one chain, and a new round on it."""
        world = self.world
        world.cut.clear()
        for p in world.peers:
            p.wanted, p.exchange_seconds = "", 0.0
            num_alive = sum(q.is_alive for q in world.peers)
            if not p.is_alive and (not self.dead_stay_dead or num_alive < SPEC.min_peers):
                p.start()
        alive = [p for p in world.peers if p.is_alive]
        kept = [p.disk.chain for p in alive]
        best = functools.reduce(lambda a, b: b if is_better(b, a) else a, kept)
        reached = max(p.chain.round for p in alive)

        def is_done() -> bool:
            tips = {p.chain.tip for p in alive}
            return len(tips) == 1 and alive[0].chain.round > reached

        assert self._run(is_done, FINAL_SECONDS), "stuck: " + "; ".join(
            f"{p.name} {p.chain.round} {p.phase} {p.attempt}" for p in alive
        )
        assert not is_better(best, alive[0].chain), "committed work was lost"


def test_agreement_holds() -> None:
    run_model(max_examples=20, num_steps=15)


def test_peers_parted_before_they_hear_each_other_train_undo_one_of_two_first_rounds() -> None:
    swarm = Swarm()
    swarm.begin(num_peers=4, offsets=[0.0] * 6, dead=False, rounds=0)
    swarm.cut_off(side={"a", "b"})
    swarm.a_while(faults=0.0, loss=0.0, seconds=8, seed=0)
    swarm.world.cut.clear()
    swarm.a_while(faults=0.0, loss=0.0, seconds=8, seed=0)
    assert len(swarm.world.values[GENESIS]) == 2
    swarm.teardown()
    assert len({p.chain.tip for p in swarm.world.peers}) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_agreement_holds_for_long() -> None:
    run_model(max_examples=2000, num_steps=40)


def run_model(max_examples: int, num_steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Swarm,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
