"""Which value may a round commit? Consensus on one value per round, as a pure protocol.

No network, no clock, no waiting: messages go in and come out, the time is passed in. `agreement.py` drives
it with calls, `tests/test_agreement_model.py` with a bag of messages that are lost, doubled and reordered.

It is single-decree Paxos (Lamport, "Paxos Made Simple", 2001) among the electorate of the round:

    prepare   the leader's proposal of attempt a; who accepts it refuses lower attempts from then on, to join
              and to sign, and says which value it signed last in this round: its **lock**
    begin     with acceptances of more than half of the electorate. If a value may have been committed already
              (`locked_value`), the attempt signs that value again; else it begins a new all-reduce
    sign      the whole commit, attempt included; more than half of the electorate over the same bytes are a
              certificate

Why one round has one value: let value v have a certificate of attempt a. Its signers are a majority, so
every later majority of acceptances holds some of them, and each of these reports v as its lock (a later lock
would be v as well, by induction), or it had promised a later attempt before and could not have signed. All
signers of v that answer report v and the others have not answered, so v passes the count in `locked_value`;
and of the values that do, v was signed last. The begin carries the acceptances, so a leader cannot overlook a
lock. The electorates of two attempts may differ: by peers that are silent beyond the lease (then the round
may fork, and the chains are compared when they meet), and by those that resigned, who never sign.

A lock that is a lie: a member may report a value of its own making. It counts only if so many of the
electorate have not answered that a majority could have signed it; if all answer, it is ignored. Else its
state is downloaded from its reporter and signed. So while half of the electorate cannot be reached, a liar
has the power of a reducer that lies; the audit and the roll-back are there for both.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.chain import Chain, missing_signatures, required_signatures, verify_value
from coordinator.errors import RoundError
from coordinator.identity import Identity
from coordinator.membership import TRAINING_PHASES, Membership, silence_seconds
from coordinator.records import (
    MAX_CLOCK_SKEW_SECONDS,
    Acceptance,
    Commit,
    Contribution,
    Exclusion,
    PeerRecord,
    Phase,
    Promise,
    Proposal,
    RecordError,
    SignedCommit,
    is_signature_of,
    open_envelope,
    parse_record,
    sign,
    signature_text,
)

logger = logging.getLogger(__name__)

MAX_ATTEMPTS_AHEAD = 1000  # a ballot further ahead than that is refused: it would lock the others out
MAX_VOTES_PER_PEER = 8  # in a round; more make room by dropping that peer's oldest


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
    excluded: tuple[Exclusion, ...] = ()  # left out for what they sent in an earlier attempt


@dataclass(frozen=True)
class View:
    """What a member knows when it judges a proposal."""

    chain: Chain
    phase: Phase
    num_examples: int
    expected: frozenset[str]  # whom it counts: the electorate must hold all of them
    now: float  # DHT time
    attempt: int = 0  # the one that it would try next
    wants_rollback: bool = False  # whether it agrees to a roll-back of the chain's last commit
    leaves_out: tuple[Exclusion, ...] = ()  # whom such a roll-back has to name
    barred: frozenset[str] = frozenset()  # whom it takes into no group, because of an earlier roll-back


@dataclass(frozen=True)
class Answer:
    """A member that joins: its signed acceptance, and the value that it signed before, with its signature."""

    acceptance: dict[str, str]
    lock: SignedCommit | None

    def to_json(self) -> dict[str, Any]:
        lock = None if self.lock is None else self.lock.model_dump(mode="json")
        return {"accept": True, "acceptance": self.acceptance, "lock": lock}


@dataclass(frozen=True)
class Ballot:
    """An attempt that has begun: `lock` is the value to sign again; without one, a new value is made."""

    author: str
    proposal: Proposal
    members: tuple[str, ...]  # who accepted, in the order of the proposal
    acceptances: tuple[dict[str, str], ...]  # signed, of all members
    lock: Commit | None
    donors: tuple[str, ...]  # who says that it holds the state of the lock

    @property
    def attempt(self) -> int:
        return self.proposal.attempt

    def to_json(self) -> dict[str, Any]:
        """What the leader sends, and `check_begin` reads."""
        return {
            "proposal": self.proposal.hash,
            "members": list(self.members),
            "acceptances": list(self.acceptances),
            "lock": None if self.lock is None else self.lock.model_dump(mode="json"),
        }

    def again(self) -> Commit | None:
        """The value to sign again, as a commit of this attempt."""
        return None if self.lock is None else self.lock.under(self.attempt)


class Voter:
    """What one peer promised and signed in the round after its chain; refuses what would break it.

    Whoever calls `accept`, `sign` or `resign` must store `promise` durably before the result leaves the peer.
    """

    def __init__(
        self,
        identity: Identity,
        chain: Chain,
        restored: Promise | None = None,
        *,
        holds: Callable[[str], bool],
    ) -> None:
        """`restored`: what was stored before a restart; `holds`: whether a state is here, by its hash."""
        self._identity, self._holds = identity, holds
        is_of_this_run = restored is not None and restored.run == chain.spec.digest
        self.promise = restored if restored is not None and is_of_this_run else _no_promise(chain)
        self._is_restored = is_of_this_run
        self.move_to(chain)

    def move_to(self, chain: Chain) -> None:
        """The round is over, or another chain was better: nothing is promised in the next one.

        A promise from before a restart stays, if it is of a round that this chain has not reached: the
        chain was lost, not the promise. Until the chain catches up, the peer abstains.
        """
        promise = self.promise
        if (promise.previous, promise.round) == (chain.tip, chain.round + 1):
            self._is_restored = False  # found its chain again
            return
        if not (self._is_restored and promise.round > chain.round):
            self.promise, self._is_restored = _no_promise(chain), False

    @property
    def lock(self) -> Commit | None:
        return self.promise.lock

    def counted(self, membership: Membership, now: float, listened_seconds: float) -> frozenset[str]:
        """Who votes where no previous cohort does: whom I heard in training, and who voted when I signed.

        After a restart the first is forgotten; the second is in the lock.
        """
        tip = self.promise.previous
        lock = self.promise.lock
        voted = frozenset(lock.electorate if lock is not None else ())
        gone = membership.absent(voted, tip=tip, now=now, listened_seconds=listened_seconds)
        return membership.in_training(tip=tip, now=now) | (voted - gone)

    def resign(self) -> bool:
        """Give up the vote in this round, so that nobody waits for it; not possible once it has signed."""
        if self.promise.lock is not None:
            return False
        # Without a proposal, what was accepted before cannot be signed any more.
        self.promise = self.promise.model_copy(update={"has_resigned": True, "proposal": ""})
        return True

    def accept(self, author: str, proposal: Proposal, view: View) -> Answer:
        """Raises RecordError with the reason for which this peer does not join."""
        self._expire(view.chain, view.now)
        check_proposal(author, proposal, view, self._identity.peer_id)
        promise = self.promise
        if promise.previous != view.chain.tip:
            raise RecordError(
                f"I have voted in round {promise.round}, whose previous commit I lost: I abstain"
            )
        if promise.has_resigned and self._identity.peer_id in set(proposal.electorate) - view.expected:
            raise RecordError("I have resigned from the vote of this round")
        if proposal.attempt < promise.attempt:
            raise RecordError(f"I am at attempt {promise.attempt}")
        own_attempt = max(promise.attempt, view.attempt)
        if proposal.attempt > own_attempt + MAX_ATTEMPTS_AHEAD:
            raise RecordError(f"attempt {proposal.attempt} is far ahead: I am at attempt {own_attempt}")
        if proposal.attempt == promise.attempt and promise.proposal != proposal.hash:
            raise RecordError(f"I accepted another proposal of attempt {proposal.attempt}")
        self.promise = promise.model_copy(
            update={
                "attempt": proposal.attempt,
                "proposal": proposal.hash,
                "signs_until": proposal.proposed_at + view.chain.spec.exchange_limit_seconds,
            }
        )
        return self._answer(proposal)

    def sign(self, commit: Commit, proposal: Proposal, now: float) -> str:
        """The own signature. Raises RoundError when a later attempt was accepted, or it is too late."""
        promise = self.promise
        if (promise.attempt, promise.proposal) != (commit.attempt, proposal.hash):
            raise RoundError(f"replaced by a later attempt: {promise.attempt}")
        if promise.previous != commit.previous:
            raise RoundError("the chain has gone on")
        if now > promise.signs_until:
            raise RoundError("too late to sign: the limit of the exchange is over")
        lock = promise.lock
        if lock is not None and lock.attempt == commit.attempt and lock.hash != commit.hash:
            raise RoundError("signed another value in this attempt")
        self.promise = promise.model_copy(update={"lock": commit, "lock_until": promise.signs_until})
        return signature_text(commit, self._identity)

    def _answer(self, proposal: Proposal) -> Answer:
        lock = self.promise.lock
        acceptance = Acceptance(
            run=proposal.run,
            proposal=proposal.hash,
            lock="" if lock is None else lock.hash,
            lock_attempt=0 if lock is None else lock.attempt,
            holds=lock is not None and self._holds(lock.state_hash),
        )
        signed = None
        if lock is not None:
            own = signature_text(lock, self._identity)
            signed = SignedCommit(commit=lock, signatures={self._identity.peer_id: own})
        return Answer(sign(acceptance, self._identity).to_json(), signed)

    def _expire(self, chain: Chain, now: float) -> None:
        """Forget what a restart made useless, once it is too late for it to matter.

        Nobody signs in an attempt after its limit, so by then its value is committed or never will be; and
        who has a certificate says so in every heartbeat, and was not heard for longer than the lease.
        """
        promise, silence = self.promise, silence_seconds(chain.spec)
        if promise.previous != chain.tip and now > promise.signs_until + silence:
            self.promise, self._is_restored = _no_promise(chain), False
        elif promise.lock is None or self._holds(promise.lock.state_hash):
            return
        elif now > promise.lock_until + silence:
            self.promise = promise.model_copy(update={"lock": None})


def check_proposal(author: str, proposal: Proposal, view: View, own_peer_id: str) -> None:
    """Whether a peer with this view takes part, apart from what it promised. Raises RecordError."""
    chain = view.chain
    if proposal.run != chain.spec.digest or proposal.previous != chain.tip:
        raise RecordError(f"I am at round {chain.round}, on another commit")
    if proposal.round != chain.round + 1 or not _takes_part(proposal, view.phase):
        raise RecordError(f"I am not ready for round {proposal.round}: {view.phase}")
    if abs(proposal.proposed_at - view.now) > MAX_CLOCK_SKEW_SECONDS:
        raise RecordError("proposed at another time than now: is a clock wrong?")
    named = [member.get("peer_id") for member in proposal.members]
    if author not in named or len(set(named)) != len(named):  # before the signature of each is checked
        raise RecordError("the proposer is not in the group, or somebody is in it twice")
    if own_peer_id not in named:
        raise RecordError("I am not in the group as I am")
    members = dict(member_records(proposal))
    mine = members.get(own_peer_id)
    if mine is None or mine.num_examples != view.num_examples:
        raise RecordError("I am not in the group as I am")
    for peer, record in members.items():
        is_here = record.run == proposal.run and record.commit == chain.tip
        if not is_here or not _takes_part(proposal, record.phase):
            raise RecordError(f"{peer[-8:]} is not ready for this round")
    is_fusion = proposal.purpose == "fuse"  # in a vote on a roll-back everybody takes part
    if is_fusion and members.keys() & {exclusion.peer for exclusion in proposal.excluded}:
        raise RecordError("somebody is in the group who is excluded from it")
    if is_fusion and members.keys() & view.barred:
        raise RecordError("somebody is in the group whom a roll-back has left out")
    electorate = set(proposal.electorate)
    if electorate & chain.cohort and not electorate <= chain.cohort:
        raise RecordError("the electorate mixes the previous round's peers with others")
    if not view.expected <= electorate:
        raise RecordError("a live peer of the previous round is left out of the vote")
    if proposal.purpose == "rollback":
        _check_rollback(proposal, view)


def _takes_part(proposal: Proposal, phase: Phase) -> bool:
    return phase == "ready" if proposal.purpose == "fuse" else phase in TRAINING_PHASES


def _check_rollback(proposal: Proposal, view: View) -> None:
    if not view.wants_rollback:
        raise RecordError("I see no reason for a roll-back")
    if tuple(proposal.excluded) != view.leaves_out:
        raise RecordError("I would leave out another one after the roll-back")
    verify_value(rollback_commit(proposal, view.chain), view.chain)


def voters_of(proposal: Proposal) -> frozenset[str]:
    """Members and electorate of a proposal that was accepted: by then, the signatures were checked."""
    return frozenset(proposal.electorate) | {member["peer_id"] for member in proposal.members}


def member_records(proposal: Proposal) -> list[tuple[str, PeerRecord]]:
    return [open_envelope(member, PeerRecord) for member in proposal.members]


class Candidacy:
    """The leader's side of one attempt: who has accepted, and what follows."""

    def __init__(self, author: str, proposal: Proposal, chain: Chain) -> None:
        self._author, self._proposal, self._chain = author, proposal, chain
        self._order = [peer for peer, _ in member_records(proposal)]
        self._accepted: dict[str, tuple[Acceptance, dict[str, str]]] = {}
        self._locks: dict[str, Commit] = {}  # value -> the commit of its latest attempt

    def add(self, peer_id: str, acceptance: object, lock: object) -> None:
        """Raises RecordError when the answer is not a valid one."""
        author, accepted = open_envelope(acceptance, Acceptance)
        if not isinstance(acceptance, dict):
            raise RecordError("not a signed record")
        if author != peer_id or author not in self._order or accepted.proposal != self._proposal.hash:
            raise RecordError("accepted another proposal, or is not in the group")
        if accepted.lock:
            self._add_lock(author, accepted, parse_record(lock, SignedCommit))
        self._accepted[author] = accepted, acceptance

    def _add_lock(self, author: str, accepted: Acceptance, lock: SignedCommit) -> None:
        commit = lock.commit
        if (commit.hash, commit.attempt) != (accepted.lock, accepted.lock_attempt):
            raise RecordError("reports another lock than it shows")
        if commit.attempt >= self._proposal.attempt:
            raise RecordError("has signed in this attempt already")
        verify_value(commit, self._chain)
        if not is_signature_of(lock.signatures.get(author, ""), commit, author):
            raise RecordError("reports a lock that it has not signed")
        known = self._locks.get(commit.hash)
        if known is None or known.attempt < commit.attempt:
            self._locks[commit.hash] = commit

    def begin(self) -> Ballot:
        """Raises RoundError when too few have accepted to begin anything."""
        members = tuple(peer for peer in self._order if peer in self._accepted)
        accepted = {peer: acceptance for peer, (acceptance, _) in self._accepted.items()}
        _check_quorum(self._proposal, accepted, self._chain)
        value = locked_value(self._proposal.electorate, accepted)
        return _make_ballot(
            self._author,
            self._proposal,
            members,
            {peer: envelope for peer, (_, envelope) in self._accepted.items()},
            accepted,
            None if value is None else self._locks[value],
        )


def check_begin(body: object, author: str, proposal: Proposal, chain: Chain, own_peer_id: str) -> Ballot:
    """What the leader of an accepted proposal says begins; checked against the acceptances themselves.

    Raises RecordError for what does not fit, RoundError for what cannot begin.
    """
    if not isinstance(body, dict) or body.get("proposal") != proposal.hash:
        raise RecordError("no such proposal was accepted")
    members, envelopes = body.get("members"), body.get("acceptances")
    if not isinstance(members, list) or not isinstance(envelopes, list):
        raise RecordError("members and acceptances are lists")
    known = {peer for peer, _ in member_records(proposal)}
    accepted, by_peer = {}, {}
    for envelope in envelopes[: len(known)]:
        peer, acceptance = open_envelope(envelope, Acceptance)
        if acceptance.proposal != proposal.hash:
            raise RecordError(f"{peer[-8:]} accepted another proposal")
        accepted[peer], by_peer[peer] = acceptance, envelope
    if len(members) != len(envelopes) or not all(isinstance(member, str) for member in members):
        raise RecordError("the members are not those who accepted")
    if set(members) != accepted.keys() or not {author, own_peer_id} <= set(members) <= known:
        raise RecordError("the members are not those of the proposal who accepted")
    _check_quorum(proposal, accepted, chain)
    value = locked_value(proposal.electorate, accepted)
    lock = None
    if value is not None:
        lock = parse_record(body.get("lock"), Commit)
        if lock.hash != value:
            raise RecordError("begins another value than the one that may be committed already")
        verify_value(lock, chain)
    return _make_ballot(author, proposal, tuple(members), by_peer, accepted, lock)


def _check_quorum(proposal: Proposal, accepted: Collection[str], chain: Chain) -> None:
    voters = len(set(proposal.electorate) & set(accepted))
    if len(accepted) < chain.spec.min_peers or voters < required_signatures(proposal.electorate):
        raise RoundError(
            f"attempt {proposal.attempt}: only {len(accepted)} of {len(proposal.members)} peers accepted"
        )


def locked_value(electorate: Sequence[str], accepted: Mapping[str, Acceptance]) -> str | None:
    """The value that may have been committed in an earlier attempt, by the acceptances of this one.

    A value may have a certificate only if those of the electorate who report it, and those who have not
    answered, are a majority together. Of several such values the one signed in the latest attempt: see above.
    """
    voters: dict[str, set[str]] = {}
    attempts: dict[str, int] = {}
    for peer, acceptance in accepted.items():
        if acceptance.lock:
            voters.setdefault(acceptance.lock, set()).update({peer} & set(electorate))
            attempts[acceptance.lock] = max(attempts.get(acceptance.lock, 0), acceptance.lock_attempt)
    num_unheard = len(set(electorate) - accepted.keys())
    needed = required_signatures(electorate)
    possible = [value for value, peers in voters.items() if peers and len(peers) + num_unheard >= needed]
    return max(possible, key=lambda value: (attempts[value], len(voters[value]), value), default=None)


def _make_ballot(
    author: str,
    proposal: Proposal,
    members: tuple[str, ...],
    envelopes: Mapping[str, dict[str, str]],
    accepted: Mapping[str, Acceptance],
    lock: Commit | None,
) -> Ballot:
    """Raises RoundError when a value must be signed again and cannot be, by those who are here."""
    donors: tuple[str, ...] = ()
    if lock is not None:
        needed = required_signatures(lock.electorate)
        if len(set(lock.electorate) & set(proposal.electorate)) < needed:
            # So many of its electorate are silent beyond the lease that it can neither be completed
            # nor waited for; if they have committed it, theirs is a chain of its own.
            logger.warning("a value of attempt %d is given up: most who could sign are gone", lock.attempt)
            lock = None
        elif len(set(lock.electorate) & set(members)) < needed:
            raise RoundError("too few are here of those who must sign a value again")
        else:
            donors = tuple(p for p in members if accepted[p].lock == lock.hash and accepted[p].holds)
            if not donors and lock.kind == "fuse":
                raise RoundError("nobody here holds the state of a value that may be committed")
    acceptances = tuple(envelopes[peer] for peer in members)
    return Ballot(author, proposal, members, acceptances, lock, donors)


# values


def group_of(ballot: Ballot, chain: Chain) -> Group:
    """Who averages in a new all-reduce; of a value that is signed again, who made it."""
    proposal, spec = ballot.proposal, chain.spec
    text = json.dumps([spec.digest, proposal.hash, list(ballot.members)])
    if ballot.lock is None:
        examples = {peer: record.num_examples for peer, record in member_records(proposal)}
        members = ballot.members if proposal.purpose == "fuse" else ()
        contributions = tuple(
            Contribution(peer=p, num_examples=examples[p], weight=spec.contribution_weight(examples[p]))
            for p in members
        )
        electorate, proposed_at, excluded = proposal.electorate, proposal.proposed_at, proposal.excluded
    else:
        contributions = tuple(ballot.lock.contributors)
        electorate, excluded = ballot.lock.electorate, ballot.lock.excluded
        proposed_at = ballot.lock.committed_at
    return Group(
        round=proposal.round,
        attempt=proposal.attempt,
        members=tuple(contribution.peer for contribution in contributions),
        contributions=contributions,
        electorate=tuple(electorate),
        proposed_at=proposed_at,
        group_id=hashlib.sha256(text.encode()).digest(),
        excluded=tuple(excluded),
    )


def fusion_commit(group: Group, state_hash: str, made: Sequence[Contribution], chain: Chain) -> Commit:
    """Raises RecordError when the contributions are not those of the group."""
    if [(c.peer, c.num_examples) for c in made] != [(c.peer, c.num_examples) for c in group.contributions]:
        raise RecordError("the result is not of this group")
    commit = Commit(
        run=chain.spec.digest,
        round=group.round,
        attempt=group.attempt,
        previous=chain.tip,
        state_hash=state_hash,
        group=group.group_id.hex(),
        contributors=list(made),
        excluded=list(group.excluded),
        electorate=list(group.electorate),
        committed_at=group.proposed_at,
    )
    verify_value(commit, chain)
    return commit


def rollback_commit(proposal: Proposal, chain: Chain) -> Commit:
    return Commit(
        kind="rollback",
        run=proposal.run,
        round=proposal.round,
        attempt=proposal.attempt,
        previous=proposal.previous,
        state_hash=chain.before().state_hash,
        contributors=[],
        excluded=proposal.excluded,
        electorate=proposal.electorate,
        reason=proposal.reason,
        committed_at=proposal.proposed_at,
    )


class VoteBox:
    """Signatures as they come in, before or after the own result; bounded per peer, checked when counted."""

    def __init__(self) -> None:
        self._votes: dict[str, dict[str, str]] = {}  # peer -> digest of a commit -> signature
        self._checked: set[tuple[str, str, str]] = set()  # digest, peer and a signature that fits

    def add(self, peer_id: str, digest: str, signature: str) -> None:
        """Costs the same however many peers vote: whose votes may count is for the caller to ask."""
        votes = self._votes.setdefault(peer_id, {})
        votes.pop(digest, None)
        votes[digest] = signature
        if len(votes) > MAX_VOTES_PER_PEER:
            del votes[next(iter(votes))]

    def count(self, commit: Commit, allowed: Collection[str]) -> dict[str, str]:
        """The valid signatures of `commit` by `allowed` peers; others are dropped for good."""
        digest = commit.digest
        votes = {p: by_digest[digest] for p, by_digest in self._votes.items() if digest in by_digest}
        for peer in [p for p, s in votes.items() if p not in allowed or not self._fits(s, commit, p)]:
            logger.warning("dropped a vote of %s: the signature does not fit", peer[-8:])
            del votes[peer], self._votes[peer][digest]
        return dict(sorted(votes.items()))

    def _fits(self, signature: str, commit: Commit, peer_id: str) -> bool:
        vote = (commit.digest, peer_id, signature)
        if vote not in self._checked and is_signature_of(signature, commit, peer_id):
            self._checked.add(vote)
        return vote in self._checked

    def certificate(self, commit: Commit, allowed: Collection[str], chain: Chain) -> SignedCommit | None:
        votes = self.count(commit, allowed)
        if missing_signatures(commit, votes, chain.spec) > 0:
            return None
        return SignedCommit(commit=commit, signatures=votes)

    def lacks(self, commit: Commit, allowed: Collection[str], chain: Chain) -> str:
        """For the log: why there is no certificate."""
        signers, voters = self.count(commit, allowed).keys(), set(commit.electorate)
        needed = f"{required_signatures(voters)} must"
        if len(signers) < chain.spec.min_peers:
            needed += f", and {chain.spec.min_peers} in all, not {len(signers)}"
        others = ", ".join(sorted(peer[-8:] for peer in self.others(commit)))
        differ = f"; {others} signed another state" if others else ""
        return f"{len(signers & voters)} of {len(voters)} signed the state in time, {needed}{differ}"

    def others(self, commit: Commit) -> frozenset[str]:
        """Who has signed something else."""
        return frozenset(p for p, votes in self._votes.items() if votes.keys() - {commit.digest})

    def clear(self) -> None:
        self._votes.clear()
        self._checked.clear()


def signers_of(ballot: Ballot, commit: Commit) -> frozenset[str]:
    """Whose signatures belong into the certificate of a ballot's commit."""
    return frozenset(ballot.members) | frozenset(commit.electorate) | commit.cohort


def _no_promise(chain: Chain) -> Promise:
    return Promise(run=chain.spec.digest, round=chain.round + 1, previous=chain.tip)
