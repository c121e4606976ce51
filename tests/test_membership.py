"""Who counts as alive? The newest valid heartbeat of each peer, until it expires."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from coordinator import membership as membership_module
from coordinator.chain import Chain
from coordinator.membership import Membership
from coordinator.records import sign
from tests.fakes import NOW, hash_of, identity, make_heartbeat, make_spec, peer

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
