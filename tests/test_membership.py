"""Who counts as alive? The newest valid heartbeat of each peer, until it expires."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from coordinator import membership as membership_module
from coordinator.chain import Chain
from coordinator.membership import Membership
from coordinator.records import sign
from tests.fakes import NOW, hash_of, identity, make_heartbeat, make_spec, peer, peers

CHAIN = Chain(make_spec())


def beat(name: str, **changes: Any) -> bytes:
    return sign(make_heartbeat(CHAIN, **changes), identity(name)).to_bytes()


@pytest.fixture
def members() -> Membership:
    return Membership(CHAIN.spec, peer("me"))


def names(members: Membership, now: float = NOW) -> list[str]:
    return [name for name in "abcdefgh" if peer(name) in [m.peer_id for m in members.live(now)]]


def test_a_heartbeat_counts_until_it_expires(members: Membership) -> None:
    member = members.observe(beat("a"), now=NOW)  # issued at NOW - 1, for 30 s
    assert member is not None
    assert member.peer_id == peer("a")
    assert members.get(peer("a")) == member
    assert names(members, NOW + 28.9) == ["a"]
    assert names(members, NOW + 29.0) == []
    assert members.get(peer("a")) is None  # not kept beyond that


def test_live_is_in_order_of_peer_id(members: Membership) -> None:
    for name in "cab":
        members.observe(beat(name), now=NOW)
    live = [m.peer_id for m in members.live(NOW)]
    assert live == sorted(map(peer, "abc"))


def test_the_newest_wins_whatever_the_order_of_arrival(members: Membership) -> None:
    assert members.observe(beat("a", phase="ready", issued_at=NOW), now=NOW) is not None
    assert members.observe(beat("a", phase="finetuning", issued_at=NOW - 2), now=NOW) is None
    assert members.observe(beat("a", phase="waiting", issued_at=NOW), now=NOW) is None
    [member] = members.live(NOW)
    assert member.record.phase == "ready"


def test_who_says_goodbye_is_gone(members: Membership) -> None:
    members.observe(beat("a"), now=NOW)
    members.observe(beat("a", phase="leaving", issued_at=NOW), now=NOW)
    assert names(members) == []
    assert members.observe(beat("a", issued_at=NOW - 0.5), now=NOW) is None  # an old one does not revive it
    assert names(members) == []


def test_forget_counts_a_peer_as_gone_until_its_next_heartbeat(members: Membership) -> None:
    members.observe(beat("a", issued_at=NOW), now=NOW)
    members.forget(peer("a"))
    assert names(members) == []
    members.observe(beat("a", issued_at=NOW), now=NOW)  # still on the board
    assert names(members) == []
    members.observe(beat("a", issued_at=NOW + 0.1), now=NOW)
    assert names(members) == ["a"]
    members.forget(peer("never seen"))


def test_own_heartbeats_are_not_others(members: Membership) -> None:
    assert members.observe(beat("me"), now=NOW) is None
    assert members.live(NOW) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": hash_of("other")}, "of another run"),
        ({"issued_at": NOW + 60.0, "expires_at": NOW + 90.0}, "in the future"),
        ({"expires_at": NOW + 4000.0}, "longer than the lease"),
        ({"issued_at": NOW - 40.0, "expires_at": NOW - 10.0}, "expired"),
    ],
)
def test_a_bad_heartbeat_costs_only_itself(
    members: Membership, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    caplog.set_level(logging.INFO)
    members.observe(beat("b"), now=NOW)
    for _ in range(3):
        assert members.observe(beat("a", **changes), now=NOW, claimed_by=peer("a")) is None
    assert names(members) == ["b"]
    [record] = caplog.records  # said once: who, and why
    assert peer("a")[-8:] in record.getMessage()
    assert reason in record.getMessage()


def test_a_heartbeat_under_anothers_name_is_dropped(members: Membership) -> None:
    assert members.observe(beat("a"), now=NOW, claimed_by=peer("b")) is None
    assert members.observe(b"no record", now=NOW, claimed_by=peer("b")) is None
    assert members.live(NOW) == []


def test_a_flood_of_identities_is_bounded(members: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership_module, "MAX_PEERS_KNOWN", 3)
    for name in "abcde":
        members.observe(beat(name), now=NOW)
    assert names(members) == ["a", "b", "c"]
    assert members.observe(beat("a", issued_at=NOW), now=NOW) is not None  # who is known goes on


# Silence, as a majority counts it: lease 30 s, heartbeats 5 s apart, clocks 2 s apart: 37 s


def absent(members: Membership, names: str, now: float, listened: float = 0.0) -> str:
    gone = members.absent([peer(n) for n in names], tip=CHAIN.tip, now=now, listened_seconds=listened)
    return "".join(name for name in names if peer(name) in gone)


def test_silence_is_the_lease_itself_and_is_known_after_the_heartbeat_expired(members: Membership) -> None:
    members.observe(beat("a", issued_at=NOW, expires_at=NOW + 30.0), now=NOW)
    assert names(members, NOW + 30.0) == []
    assert absent(members, "a", NOW + 37.0) == ""
    assert absent(members, "a", NOW + 37.1) == "a"


def test_who_was_never_heard_is_silent_once_there_was_time_to_hear_it(members: Membership) -> None:
    assert absent(members, "ab", NOW, listened=37.0) == ""
    assert absent(members, "ab", NOW, listened=37.1) == "ab"
    assert absent(members, "", NOW) == ""
    gone = members.absent([peer("me")], tip=CHAIN.tip, now=NOW, listened_seconds=1e9)
    assert gone == frozenset()  # oneself is never silent


def test_who_is_forgotten_because_a_call_failed_still_counts(members: Membership) -> None:
    members.observe(beat("a", issued_at=NOW), now=NOW)
    members.forget(peer("a"))
    assert absent(members, "a", NOW, listened=1e9) == ""
    assert members.in_training(tip=CHAIN.tip, now=NOW) == {peer("a")}
    assert members.in_training(tip=hash_of("other"), now=NOW) == frozenset()
    assert members.in_training(tip=CHAIN.tip, now=NOW + 37.1) == frozenset()


def test_who_resigned_is_absent_in_that_round_only(members: Membership) -> None:
    members.observe(beat("a", resigned=CHAIN.tip), now=NOW)
    members.observe(beat("b", resigned=hash_of("round before")), now=NOW)
    assert absent(members, "ab", NOW) == "a"
    assert members.in_training(tip=CHAIN.tip, now=NOW) == {peer("b")}
    members.observe(beat("a", issued_at=NOW, phase="leaving", resigned=""), now=NOW)
    assert absent(members, "a", NOW) == ""  # left without giving up its vote: it had signed


def test_who_is_banned_is_gone_for_good(members: Membership, caplog: pytest.LogCaptureFixture) -> None:
    members.observe(beat("a"), now=NOW)
    members.ban(peer("a"), "lied as a reducer")
    assert f"{peer('a')[-8:]} is excluded from the run: lied as a reducer" in caplog.text
    assert members.observe(beat("a", issued_at=NOW), now=NOW) is None
    assert names(members) == []
    assert absent(members, "a", NOW) == "a"
    assert members.in_training(tip=CHAIN.tip, now=NOW) == frozenset()
    assert members.banned == {peer("a")}


def test_a_flood_of_identities_makes_nobody_silent(
    members: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership_module, "MAX_PEERS_KNOWN", 3)
    for name in "abcde":
        members.observe(beat(name, issued_at=NOW, expires_at=NOW + 30.0), now=NOW)
    assert absent(members, "abc", NOW + 30.0, listened=1e9) == ""
    later = NOW + 38.0  # the three are silent and make room
    members.observe(beat("d", issued_at=later, expires_at=later + 30.0), now=later)
    assert names(members, later) == ["d"]
    assert absent(members, "abcd", later, listened=1e9) == "abc"


def test_what_is_kept_of_peers_that_could_not_be_reached_is_bounded_by_time(members: Membership) -> None:
    """A heartbeat of before counts for no longer than it could be taken for a new one."""
    told = sign(make_heartbeat(CHAIN), identity("b")).to_bytes()
    assert members.observe(told, now=NOW) is not None
    members.forget(peer("b"))
    assert members.observe(told, now=NOW) is None
    assert members.live(NOW + 30.0) == []
    assert members._forgotten
    members.live(NOW + CHAIN.spec.lease_seconds + 11.0)
    assert not members._forgotten


def test_members_of_the_chain_stay_banned_whatever_strangers_do(
    members: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.membership.MAX_BANNED", 3)
    chain_members = [peer("a"), peer("b")]
    for name in "ab":
        members.ban(peer(name), "lied", members=chain_members)
    for number in range(10):
        members.ban(f"stranger {number}", "lied", members=chain_members)
    assert members.banned == {*chain_members, "stranger 9"}
    for name in "cd":
        members.ban(peer(name), "lied", members=[*chain_members, *peers("cd")])
    assert members.banned == set(peers("abcd"))
