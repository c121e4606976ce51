"""Which value may a round commit? Promises, locks and certificates of a few peers, message by message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from coordinator.ballot import (
    MAX_VOTES_PER_PEER,
    Answer,
    Ballot,
    Candidacy,
    View,
    VoteBox,
    Voter,
    check_begin,
    fusion_commit,
    group_of,
    locked_value,
    rollback_commit,
    signers_of,
)
from coordinator.chain import Chain, verify_commit
from coordinator.errors import RoundError
from coordinator.records import (
    MAX_MESSAGE_BYTES,
    Acceptance,
    Commit,
    Promise,
    Proposal,
    RecordError,
    open_envelope,
    sign,
    signature_text,
)
from tests.fakes import NOW, extend, hash_of, identity, make_heartbeat, make_spec, peer, peers

SPEC = make_spec(exchange_limit_seconds=60.0)
EMPTY = Chain(SPEC)


def propose(names: Sequence[str], chain: Chain = EMPTY, **changes: Any) -> Proposal:
    """By the first of them."""
    record = make_heartbeat(chain, phase="ready", num_examples=100)
    values: dict[str, Any] = {
        "run": chain.spec.digest,
        "round": chain.round + 1,
        "attempt": 0,
        "previous": chain.tip,
        "members": [sign(record, identity(name)).to_json() for name in names],
        "electorate": list(peers(names)),
        "proposed_at": NOW,
        **changes,
    }
    return Proposal.model_validate(values)


def view(chain: Chain = EMPTY, **changes: Any) -> View:
    values: dict[str, Any] = {
        "chain": chain,
        "phase": "ready",
        "num_examples": 100,
        "expected": frozenset(),
        "now": NOW,
        **changes,
    }
    return View(**values)


class Side:
    """A voter with the states that it holds."""

    def __init__(self, name: str, chain: Chain = EMPTY, restored: Promise | None = None) -> None:
        self.name, self.chain, self.states = name, chain, set[str]()
        self.voter = Voter(identity(name), chain, restored, holds=self.states.__contains__)

    def accept(self, proposal: Proposal, author: str = "a", **changes: Any) -> Answer:
        return self.voter.accept(peer(author), proposal, view(self.chain, **changes))

    def sign(self, commit: Commit, proposal: Proposal, now: float = NOW) -> str:
        self.states.add(commit.state_hash)
        return self.voter.sign(commit, proposal, now)

    def restarted(self, *, keeps_states: bool) -> Side:
        side = Side(self.name, self.chain, self.voter.promise)
        if keeps_states:
            side.states.update(self.states)
        return side


def sides(names: str) -> list[Side]:
    return [Side(name) for name in names]


def begin(proposal: Proposal, accepting: Sequence[Side], author: str = "a") -> Ballot:
    candidacy = Candidacy(peer(author), proposal, accepting[0].chain)
    for side in accepting:
        answer = side.accept(proposal, author).to_json()
        candidacy.add(peer(side.name), answer["acceptance"], answer["lock"])
    return candidacy.begin()


def value_of(ballot: Ballot, chain: Chain = EMPTY, state: str = "fused") -> Commit:
    group = group_of(ballot, chain)
    return ballot.again() or fusion_commit(group, hash_of(state), group.contributions, chain)


def test_without_a_lock_a_new_group_begins_and_all_sign_the_same_bytes() -> None:
    voters = sides("abc")
    proposal = propose("abc")
    ballot = begin(proposal, voters)
    group = group_of(ballot, EMPTY)
    assert (group.members, group.attempt, ballot.lock) == (peers("abc"), 0, None)
    assert [c.num_examples for c in group.contributions] == [100, 100, 100]
    commit = value_of(ballot)
    votes = VoteBox()
    for side in voters[:2]:
        votes.add(peer(side.name), commit.digest, side.sign(commit, proposal))
    certificate = votes.certificate(commit, signers_of(ballot, commit), EMPTY)
    assert certificate is not None
    verify_commit(certificate, EMPTY)
    votes.clear()
    votes.add(peer("b"), commit.digest, voters[1].sign(commit, proposal))
    lacks = votes.lacks(commit, signers_of(ballot, commit), EMPTY)
    assert lacks == "1 of 3 signed the state in time, 2 must, and 2 in all, not 1"
    told = check_begin(ballot.to_json(), peer("a"), proposal, EMPTY, peer("b"))
    assert group_of(told, EMPTY) == group


def test_a_promise_refuses_lower_attempts_and_other_proposals_of_the_same() -> None:
    [b] = sides("b")
    second = propose("ab", attempt=2)
    b.accept(second)
    b.accept(second)  # twice is once
    with pytest.raises(RecordError, match="I am at attempt 2"):
        b.accept(propose("ab", attempt=1))
    with pytest.raises(RecordError, match="another proposal of attempt 2"):
        b.accept(propose("ab", attempt=2, proposed_at=NOW + 1))
    with pytest.raises(RecordError, match="far ahead"):
        b.accept(propose("ab", attempt=5000))
    b.accept(propose("ab", attempt=5000), attempt=4500)  # unless I am as far by myself
    b.accept(propose("ab", attempt=5001))


def test_who_accepted_a_later_attempt_does_not_sign_in_an_earlier_one() -> None:
    [a, b] = sides("ab")
    first = propose("ab")
    commit = value_of(begin(first, [a, b]))
    b.accept(propose("ab", attempt=1))
    with pytest.raises(RoundError, match="replaced by a later attempt"):
        b.sign(commit, first)
    a.sign(commit, first)
    with pytest.raises(RoundError, match="signed another value"):
        a.sign(commit.model_copy(update={"state_hash": hash_of("other")}), first)
    with pytest.raises(RoundError, match="too late to sign"):
        Side("a", restored=a.voter.promise).sign(commit, first, NOW + 60.1)


def test_a_value_that_may_have_a_majority_is_signed_again() -> None:
    """a, b and c sign in attempt 0. a, who has the certificate, is gone; c is slow. b and d meet with e."""
    a, b, c, d, e = everybody = sides("abcde")
    first = propose("abcde")
    commit = value_of(begin(first, everybody))
    for side in (a, b, c):
        side.sign(commit, first)
    second = propose("bde", attempt=1, electorate=list(peers("abcde")))
    ballot = begin(second, [b, d, e], author="b")
    assert ballot.lock == commit
    assert ballot.donors == (peer("b"),)
    again = value_of(ballot)
    assert (again.attempt, again.hash) == (1, commit.hash)
    assert again.digest != commit.digest
    group = group_of(ballot, EMPTY)
    assert group.members == peers("abcde")  # those whose deltas are in it
    told = check_begin(ballot.to_json(), peer("b"), second, EMPTY, peer("d"))
    assert told.again() == again
    votes = VoteBox()
    for side in (b, d, e):
        votes.add(peer(side.name), again.digest, side.sign(again, second))
    votes.add(peer("c"), again.digest, signature_text(commit, identity("c")))  # of attempt 0: does not count
    certificate = votes.certificate(again, signers_of(ballot, again), EMPTY)
    assert certificate is not None
    assert set(certificate.signatures) == set(peers("bde"))
    assert EMPTY.extended(certificate).tip == commit.hash


def test_a_value_that_cannot_have_a_majority_binds_nobody() -> None:
    """All have answered and only one has signed; so a liar who claims a lock alone claims it in vain."""
    a, b, _ = everybody = sides("abc")
    first = propose("abc")
    commit = value_of(begin(first, everybody))
    a.sign(commit, first)
    assert begin(propose("abc", attempt=1), everybody).lock is None
    second = propose("ab", attempt=2, electorate=list(peers("abc")))
    assert begin(second, [a, b]).lock == commit  # but c may have signed it as well


def accepted(**locks: tuple[int, str] | None) -> dict[str, Acceptance]:
    return {
        name: Acceptance(
            run=SPEC.digest,
            proposal=hash_of("proposal"),
            lock="" if lock is None else hash_of(lock[1]),
            lock_attempt=0 if lock is None else lock[0],
        )
        for name, lock in locks.items()
    }


@pytest.mark.parametrize(
    ("electorate", "locks", "value"),
    [
        ("abc", {"a": None, "b": None}, None),
        ("abc", {"a": (0, "v"), "b": None}, "v"),  # 1 + 1 unheard of 2 needed
        ("abc", {"a": (0, "v"), "b": None, "c": None}, None),
        ("abcd", {"a": (0, "v"), "b": (0, "w"), "c": (0, "v"), "d": (0, "w")}, None),  # 2 and 2 of 3 needed
        ("abcde", {"a": (0, "v"), "b": (2, "w"), "c": None}, "w"),  # both possible: the later one
        ("abcde", {"a": (0, "v"), "b": (0, "v"), "c": (2, "w"), "d": None}, "v"),  # w: 1 + 1 of 3 needed
        ("abc", {"x": (0, "v"), "a": None, "b": None}, None),  # a lock of somebody who does not vote
    ],
)
def test_locked_value(electorate: str, locks: dict[str, Any], value: str | None) -> None:
    found = locked_value(list(electorate), accepted(**locks))
    assert found == (None if value is None else hash_of(value))


def test_a_leader_cannot_overlook_a_lock_or_show_another_value() -> None:
    a, b, _ = everybody = sides("abc")
    first = propose("abc")
    commit = value_of(begin(first, everybody))
    b.sign(commit, first)
    second = propose("ab", attempt=1, electorate=list(peers("abc")))
    ballot = begin(second, [a, b])
    other = commit.model_copy(update={"state_hash": hash_of("mine")})
    for lock in (None, other.model_dump(mode="json")):
        with pytest.raises(RecordError):
            check_begin({**ballot.to_json(), "lock": lock}, peer("a"), second, EMPTY, peer("b"))


def test_locks_are_checked_when_they_are_reported() -> None:
    _, b, _ = everybody = sides("abc")
    first = propose("abc")
    commit = value_of(begin(first, everybody))
    b.sign(commit, first)
    second = propose("abc", attempt=1)
    answer = b.accept(second)
    assert answer.lock is not None
    forged = answer.lock.model_copy(update={"signatures": {peer("b"): signature_text(commit, identity("c"))}})
    heavier = commit.model_copy(update={"state_hash": hash_of("other")})
    candidacy = Candidacy(peer("a"), second, EMPTY)
    for lock, reason in [
        (None, "malformed"),
        (forged.model_dump(mode="json"), "has not signed"),
        ({"commit": heavier.model_dump(mode="json"), "signatures": {}}, "another lock than it shows"),
    ]:
        with pytest.raises(RecordError, match=reason):
            candidacy.add(peer("b"), answer.acceptance, lock)
    with pytest.raises(RecordError, match="another proposal"):
        candidacy.add(peer("c"), answer.acceptance, answer.to_json()["lock"])
    with pytest.raises(RoundError, match="only 0 of 3 peers accepted"):
        candidacy.begin()


def test_a_value_whose_state_nobody_holds_waits_for_a_holder() -> None:
    a, b, c = everybody = sides("abc")
    first = propose("abc")
    commit = value_of(begin(first, everybody))
    b.sign(commit, first)
    c.sign(commit, first)
    lost = b.restarted(keeps_states=False)
    second = propose("ab", attempt=1, electorate=list(peers("abc")))
    with pytest.raises(RoundError, match="nobody here holds the state"):
        begin(second, [a, lost])
    third = propose("abc", attempt=2)
    assert begin(third, [a, lost, c]).donors == (peer("c"),)


def test_a_lock_without_its_state_is_forgotten_when_it_can_no_longer_matter() -> None:
    """Nobody signs after 60 s (the exchange's limit), nobody is unheard beyond 30 x 7/6 + 2 = 37 s."""
    a, b = sides("ab")
    first = propose("ab")
    commit = value_of(begin(first, [a, b]))
    b.sign(commit, first)
    for keeps_states, later, has_lock in [
        (False, 97.0, True),
        (False, 97.1, False),
        (True, 97.1, True),  # who holds the state can complete it at any time
    ]:
        side = b.restarted(keeps_states=keeps_states)
        second = propose("ab", attempt=1, proposed_at=NOW + later)
        assert (side.accept(second, now=NOW + later).lock is not None) == has_lock


def test_who_lost_its_chain_abstains_until_it_has_caught_up() -> None:
    """It has voted in round 2; its checkpoint is of round 0."""
    one = extend(EMPTY, ["a", "b"])
    b = Side("b", one)
    b.accept(propose("ab", one))
    back = Side("b", EMPTY, b.voter.promise)
    with pytest.raises(RecordError, match="I abstain"):
        back.accept(propose("ab"))
    back.chain = one
    back.voter.move_to(one)
    assert back.voter.promise == b.voter.promise  # and what it promised there still holds
    late = Side("b", EMPTY, b.voter.promise)
    late.accept(propose("ab", proposed_at=NOW + 98.0), now=NOW + 98.0)
    foreign = b.voter.promise.model_copy(update={"run": hash_of("other")})
    Side("b", EMPTY, foreign).accept(propose("ab"))  # of another run: means nothing here


def test_who_resigned_contributes_but_does_not_vote_and_who_signed_cannot_resign() -> None:
    one = extend(EMPTY, ["a", "b", "c"])
    b, c = Side("b", one), Side("c", one)
    proposal = propose("abc", one)
    c.accept(proposal)
    assert b.voter.resign()
    with pytest.raises(RecordError, match="resigned from the vote"):
        b.accept(proposal)
    without = propose("abc", one, attempt=1, electorate=list(peers("ac")))
    b.accept(without, expected=frozenset(peers("ac")))
    assert c.voter.resign()  # accepted, not signed: then what it accepted can no longer be signed
    group = group_of(Ballot(peer("a"), proposal, peers("abc"), (), None, ()), one)
    commit = fusion_commit(group, hash_of("x"), group.contributions, one)
    with pytest.raises(RoundError, match="replaced"):
        c.sign(commit, proposal)
    signer = Side("c", one)
    signer.accept(proposal)
    signer.sign(commit, proposal)
    assert not signer.voter.resign()
    assert not signer.voter.promise.has_resigned


def test_a_value_is_given_up_when_most_who_could_sign_are_gone_beyond_the_lease() -> None:
    everybody = sides("abcde")
    first = propose("abcde")
    commit = value_of(begin(first, everybody))
    d, e = everybody[3:]
    d.sign(commit, first)
    e.sign(commit, first)
    second = propose("de", attempt=1, electorate=list(peers("de")))
    assert begin(second, [d, e], author="d").lock is None


def test_a_roll_back_needs_members_who_want_it_and_has_one_value() -> None:
    one = extend(EMPTY, ["a", "b"])
    changes: dict[str, Any] = {"purpose": "rollback", "reason": "worse"}
    proposal = propose("ab", one, **changes)
    b = Side("b", one)
    with pytest.raises(RecordError, match="no reason for a roll-back"):
        b.accept(proposal, phase="finetuning")
    b.accept(proposal, phase="finetuning", wants_rollback=True)
    commit = rollback_commit(proposal, one)
    assert (commit.state_hash, commit.reason) == (SPEC.backbone_hash, "worse")
    b.sign(commit, proposal)
    with pytest.raises(RecordError, match="never the beginning"):
        Side("b").accept(propose("ab", **changes), wants_rollback=True)


def test_contributions_must_be_those_of_the_group() -> None:
    ballot = begin(propose("ab"), sides("ab"))
    group = group_of(ballot, EMPTY)
    swapped = list(reversed(group.contributions))
    greedy = [c.model_copy(update={"num_examples": 10**6}) for c in group.contributions]
    for made in (swapped, greedy, swapped[:1]):
        with pytest.raises(RecordError, match="not of this group"):
            fusion_commit(group, hash_of("x"), made, EMPTY)


def test_votes_are_bounded_and_bad_ones_dropped() -> None:
    voters = sides("abc")
    proposal = propose("abc")
    ballot = begin(proposal, voters)
    commit = value_of(ballot)
    votes = VoteBox()
    for number in range(20):
        votes.add(peer("b"), hash_of(str(number)), "x")
    assert list(votes._votes) == [peer("b")]
    assert list(votes._votes[peer("b")]) == [hash_of(str(n)) for n in range(20 - MAX_VOTES_PER_PEER, 20)]
    allowed = signers_of(ballot, commit)
    votes.add(peer("a"), commit.digest, voters[0].sign(commit, proposal))
    votes.add(peer("c"), commit.digest, signature_text(commit, identity("b")))
    votes.add(peer("x"), commit.digest, signature_text(commit, identity("x")))
    assert votes.certificate(commit, allowed, EMPTY) is None
    assert set(votes.count(commit, allowed)) == {peer("a")}
    votes.add(peer("c"), commit.digest, voters[2].sign(commit, proposal))
    assert votes.certificate(commit, allowed, EMPTY) is not None
    assert votes.others(commit) == {peer("b")}


def test_whose_vote_it_is_costs_the_same_however_many_vote() -> None:
    votes = VoteBox()
    for number in range(1000):
        votes.add(str(number), hash_of("x"), "y")
    votes.add("1", hash_of("x"), "z")
    assert (len(votes._votes), votes._votes["1"]) == (1000, {hash_of("x"): "z"})


def test_a_proposal_without_its_author_or_me_is_refused_before_its_records_are_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 1024 signatures, half a millisecond each."""
    [b] = sides("b")
    without_me, without_author, twice = propose("ac"), propose("bc"), propose("aba")
    monkeypatch.setattr("coordinator.ballot.member_records", lambda _: pytest.fail("opened"))
    for proposal in (without_me, without_author, twice):
        with pytest.raises(RecordError, match=r"in the group|in it twice"):
            b.accept(proposal)


def test_a_proposal_and_a_begin_of_256_members_fit_into_a_message() -> None:
    """With the addresses of a machine with several networks, and locks reported by all."""
    names = [f"peer {number}" for number in range(256)]
    chain = Chain(make_spec(max_peers=256))
    addresses = [f"/ip4/192.168.100.10{n}/tcp/40000/p2p/{peer('a')}" for n in range(8)]
    record = make_heartbeat(chain, phase="ready", num_examples=100, addresses=addresses)
    members = [sign(record, identity(name)).to_json() for name in names]
    proposal = propose(names, chain, members=members)
    assert len(sign(proposal, identity(names[0])).to_bytes()) < MAX_MESSAGE_BYTES
    author, opened = open_envelope(sign(proposal, identity(names[0])).to_json(), Proposal)
    assert (author, opened) == (peer(names[0]), proposal)
    acceptance = Acceptance(run=proposal.run, proposal=proposal.hash, lock=hash_of("x"), holds=True)
    envelopes = tuple(sign(acceptance, identity(name)).to_json() for name in names)
    ballot = Ballot(peer(names[0]), proposal, peers(names), envelopes, None, ())
    group = group_of(ballot, chain)
    commit = fusion_commit(group, hash_of("x"), group.contributions, chain)
    begun = Ballot(peer(names[0]), proposal, peers(names), envelopes, commit, ()).to_json()
    assert len(json.dumps(begun)) < MAX_MESSAGE_BYTES
