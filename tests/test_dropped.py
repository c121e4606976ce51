"""Is it told who was left out of a round and why, and is nobody accused who was just not drawn?"""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.chain import Chain
from coordinator.dropped import Drop, find_dropped
from coordinator.records import PeerRecord
from tests.fakes import extend, make_heartbeat, make_spec, peer


def fused(chain: Chain, names: str, **changes: Any) -> Chain:
    """One round more; those vote who were there before, or all."""
    voters = [peer(name) for name in names if peer(name) in chain.cohort] or [peer(name) for name in names]
    return extend(chain, names, **{"electorate": voters, **changes})


EMPTY = Chain(make_spec(num_rounds=50, gate_left_out_rounds=2))
TWO = fused(fused(EMPTY, "abcd"), "abc")  # d is missing in round 2
AT = TWO.committed_at  # of round 2, for the heartbeats


def told(chain: Chain, heard: dict[str, PeerRecord] | None = None, *, now: float = AT + 5.0) -> list[Drop]:
    by_id = {peer(name): record for name, record in (heard or {}).items()}
    return list(find_dropped(chain, by_id, now=now, max_rounds=1000))


def heartbeat(issued_at: float, **changes: Any) -> PeerRecord:
    return make_heartbeat(EMPTY, issued_at=issued_at, expires_at=issued_at + 30.0, **changes)


def undone(chain: Chain, *left_out: str, reason: str = "2 of 3 reject it") -> Chain:
    names = [name for name in "abcde" if peer(name) in chain.cohort]
    changes: dict[str, Any] = {
        "kind": "rollback",
        "state_hash": chain.before().state_hash,
        "electorate": sorted(chain.cohort),
        "excluded": [{"peer": peer(name), "reason": f"why {name}"} for name in left_out],
        "reason": reason,
    }
    return extend(chain, "", names, **changes)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "not in this round"),
        (heartbeat(AT - 1.0, phase="leaving"), "left"),
        (heartbeat(AT - 29.0), "silent: its heartbeats ended before this round"),
        (heartbeat(AT - 20.0), "not in this round"),  # not expired yet: it may only be late
        (heartbeat(AT + 4.0, phase="paused"), "paused"),
        (heartbeat(AT - 29.0, phase="paused"), "silent: its heartbeats ended before this round"),
        (heartbeat(AT + 4.0), "not in this round"),  # it is there, and was not ready in time
        (heartbeat(AT + 4.0, phase="leaving"), "not in this round"),  # it left later than that
    ],
    ids=["never heard", "left", "silent", "late?", "paused", "paused, then silent", "there", "left later"],
)
def test_an_absent_peer_with_what_its_heartbeat_tells(record: PeerRecord | None, reason: str) -> None:
    heard = {} if record is None else {"d": record}
    assert told(TWO, heard) == [Drop(2, peer("d"), "absent", reason)]


def test_it_is_told_once_and_what_it_does_now_says_nothing_of_then() -> None:
    stays_away = fused(TWO, "abc")
    assert [drop.round for drop in told(stays_away)] == [2]
    is_back = fused(stays_away, "abcd")
    left = {"d": heartbeat(AT + 130.0, phase="leaving")}
    assert told(is_back, left) == [Drop(2, peer("d"), "absent", "not in this round; back in round 4")]
    left_now = fused(is_back, "abc")
    assert [(drop.round, drop.reason) for drop in told(left_now, left, now=AT + 200.0)] == [
        (5, "left"),
        (2, "not in this round; back in round 4"),
    ]


def test_nobody_is_absent_from_the_first_round_or_while_all_come() -> None:
    assert told(fused(fused(EMPTY, "abc"), "abcd")) == []


def test_who_was_excluded_is_not_absent_as_well() -> None:
    chain = fused(fused(EMPTY, "abcd"), "abc", excluded=[{"peer": peer("d"), "reason": "sent garbage"}])
    assert told(chain) == [Drop(2, peer("d"), "excluded", "sent garbage")]


def test_of_a_full_round_only_who_is_gone_is_missing() -> None:
    """Five train, three are drawn: d and e had no luck, or one of them is dead."""
    chain = Chain(make_spec(max_peers=3))
    chain = fused(fused(chain, "ade"), "abc")
    assert chain.committed_at == AT
    there = heartbeat(AT + 4.0)
    assert told(chain, {"d": there, "e": there}) == []
    assert told(chain, {"d": heartbeat(AT + 4.0, phase="paused")}) == []  # since when, nobody knows
    assert told(fused(chain, "ade"), {"d": heartbeat(AT - 29.0)}, now=AT + 5.0) == []
    dead = {"d": there, "e": heartbeat(AT - 29.0)}
    assert [(drop.peer, drop.what) for drop in told(chain, dead)] == [(peer("e"), "absent")]


def test_who_sits_out_is_told_from_the_convicted_and_for_how_long() -> None:
    chain = undone(fused(EMPTY, "abcd"), "d")
    expected = Drop(2, peer("d"), "sits out", "for 2 more rounds: why d", num_rounds_left=2)
    assert told(chain) == [expected]
    chain = fused(chain, "abc")  # d is not absent besides
    assert told(chain) == [Drop(2, peer("d"), "sits out", "for 1 more round: why d", num_rounds_left=1)]
    chain = undone(fused(chain, "abc"), "c")  # an undone round does not count
    assert [(drop.peer, drop.num_rounds_left) for drop in told(chain)] == [(peer("c"), 2), (peer("d"), 1)]
    chain = fused(fused(chain, "ab"), "abd")
    assert [(drop.peer, drop.num_rounds_left) for drop in told(chain)] == [(peer("c"), 0), (peer("d"), 0)]
    assert [drop.reason for drop in told(chain)] == [
        "its rounds are over: why c",
        "its rounds are over: why d",
    ]


def test_of_two_roll_backs_that_name_a_peer_the_later_counts() -> None:
    chain = fused(fused(undone(fused(EMPTY, "abcd"), "d"), "abc"), "abc")
    chain = undone(fused(chain, "abcd"), "d")
    assert [(drop.round, drop.num_rounds_left) for drop in told(chain)] == [(6, 2), (2, 0)]


def test_who_does_not_come_back_after_a_roll_back_that_names_nobody() -> None:
    """A reducer that lied: its round is undone, and each peer bans it; no commit names it."""
    chain = undone(fused(EMPTY, "abcd"), reason="a reducer lied")
    assert told(chain) == []
    (drop,) = told(fused(chain, "abc"), {"d": heartbeat(AT + 60.0)})
    assert (drop.round, drop.peer, drop.what) == (3, peer("d"), "absent")
    assert drop.reason == "not in this round, the first after one was undone: a reducer lied"


def test_it_looks_back_only_so_far() -> None:
    chain = fused(fused(TWO, "ab"), "ab")
    assert [drop.round for drop in find_dropped(chain, {}, now=AT, max_rounds=1000)] == [3, 2]
    assert [drop.round for drop in find_dropped(chain, {}, now=AT, max_rounds=3)] == [3]
