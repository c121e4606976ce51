"""Whom does a peer leave out of the attempts of a round, and for how long?"""

from __future__ import annotations

from coordinator.ballot import Voter
from coordinator.chain import Chain
from coordinator.membership import Membership
from coordinator.records import sign
from coordinator.roster import Roster
from tests.fakes import NOW, identity, make_heartbeat, make_spec, peer

CHAIN = Chain(make_spec())


def make_roster() -> tuple[Roster, Membership]:
    membership = Membership(CHAIN.spec, peer("me"))
    voter = Voter(identity("me"), CHAIN, holds=lambda _: False)
    return Roster(membership, voter, peer("me"), lambda: NOW), membership


def hear(membership: Membership, name: str, issued_at: float) -> None:
    record = make_heartbeat(CHAIN, issued_at=issued_at)
    membership.observe(sign(record, identity(name)).to_bytes(), now=NOW)


def test_who_fails_again_is_left_out_of_twice_as_many_attempts() -> None:
    roster, membership = make_roster()
    hear(membership, "a", NOW - 5.0)
    left_out_of = []
    for attempt in (0, 2, 5):
        roster.failed(peer("a"), attempt)
        hear(membership, "a", NOW - 4.0 + attempt / 10)  # it is still there
        left_out_of.append([n for n in range(attempt + 1, 20) if roster.left_out(n)])
    assert left_out_of == [[1], [3, 4], [6, 7, 8, 9]]
    roster.begin_round()
    roster.failed(peer("a"), 0)
    hear(membership, "a", NOW - 1.0)
    assert [n for n in range(1, 20) if roster.left_out(n)] == [1]


def test_two_that_fail_in_turn_are_both_out_in_the_end() -> None:
    """With one attempt each they would change places for ever."""
    roster, membership = make_roster()
    failed_by = []
    for attempt in range(20):
        for name in "ab":
            hear(membership, name, NOW - 5.0 + attempt / 10)
        here = [name for name in "ab" if peer(name) not in roster.left_out(attempt)]
        if not here:
            break
        roster.failed(peer(here[0]), attempt)
        failed_by.append(here[0])
    assert failed_by == ["a", "b", "a", "b"]


def test_who_says_nothing_after_it_failed_stays_out() -> None:
    roster, membership = make_roster()
    hear(membership, "a", NOW - 5.0)
    roster.failed(peer("a"), 0)
    assert roster.left_out(7) == [peer("a")]
    hear(membership, "a", NOW - 4.0)
    assert roster.left_out(7) == []
