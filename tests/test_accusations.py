"""Who is heard, in which order, and does what is kept stay within its bounds? By hand, without a network."""

from __future__ import annotations

import pytest

from coordinator.records import RecordError
from peer.accusations import (
    FIRST_PAUSE_SECONDS,
    MAX_EVIDENCE_BYTES,
    MAX_PAUSE_SECONDS,
    MAX_WAITING,
    Accusation,
    Docket,
    Published,
    RunRules,
)
from peer.parts import PART_VALUES
from tests.fakes import hash_of, make_spec, peer


def accusation(of: str = "liar") -> Accusation:
    return Accusation(run=hash_of("run"), evidence=hash_of(of), size_bytes=1, reducer=peer(of), round=1)


def add(docket: Docket, accuser: str, *, comes_first: bool = False, now: float = 0.0) -> None:
    docket.add(accuser, accusation(), comes_first=comes_first, now=now)


def order(docket: Docket) -> list[str]:
    taken = []
    while (waiting := docket.take()) is not None:
        taken.append(waiting[0])
    return taken


def test_members_of_the_last_round_come_first() -> None:
    docket = Docket()
    for accuser, comes_first in (("a", False), ("b", True), ("c", False), ("d", True)):
        add(docket, accuser, comes_first=comes_first)
    assert order(docket) == ["b", "d", "a", "c"]


def test_one_accusation_of_each_accuser_waits() -> None:
    docket = Docket()
    add(docket, "a")
    with pytest.raises(RecordError, match="not listening"):
        add(docket, "a")
    assert order(docket) == ["a"]
    add(docket, "a")


def test_a_full_docket_takes_members_only_and_they_displace_others() -> None:
    docket = Docket()
    for number in range(MAX_WAITING):
        add(docket, str(number))
    with pytest.raises(RecordError, match="too many"):
        add(docket, "one more")
    add(docket, "member", comes_first=True)
    assert order(docket) == ["member", *map(str, range(MAX_WAITING - 1))]
    for number in range(MAX_WAITING):
        add(docket, str(number), comes_first=True)
    with pytest.raises(RecordError, match="too many"):
        add(docket, "one more", comes_first=True)


def test_who_lied_is_not_heard_again() -> None:
    docket = Docket()
    docket.lied("a")
    with pytest.raises(RecordError, match="not listening"):
        add(docket, "a", comes_first=True, now=1e9)


def test_pauses_double_up_to_an_hour() -> None:
    docket, now, pauses = Docket(), 0.0, []
    for _ in range(12):
        docket.failed("a", now)
        pauses.append(docket._pauses["a"].seconds)
        with pytest.raises(RecordError, match="not listening"):
            add(docket, "a", now=now + pauses[-1] - 0.1)
        now += pauses[-1]
        add(docket, "a", now=now)
        docket.take()
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == MAX_PAUSE_SECONDS
    add(docket, "b", now=0.0)  # another one is heard


def test_what_is_remembered_of_accusers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.accusations.MAX_REMEMBERED", 3)
    docket = Docket()
    for number in range(10):
        docket.failed(str(number), 0.0)
        docket.lied(str(number))
    assert list(docket._pauses) == list(docket.liars) == ["7", "8", "9"]


def test_published_evidence_is_bounded_and_what_is_asked_for_stays() -> None:
    published = Published(max_bytes=30)
    first, second, third = (published.add(bytes([number]) * 10) for number in range(3))
    assert published.get(first) == bytes(10)
    fourth = published.add(b"x" * 10)
    assert [published.get(digest) is not None for digest in (first, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]
    large = published.add(b"y" * 100)  # larger than all that is kept: it is the one that is announced now
    assert published.get(large) is not None
    assert published.get(first) is None
    assert published.add(b"y" * 100) == large


def test_how_large_evidence_may_be_follows_from_the_spec() -> None:
    small = RunRules.of(make_spec(num_parameters=1000, max_peers=4)).max_evidence_bytes
    minilm = RunRules.of(make_spec(num_parameters=22_713_216, max_peers=64)).max_evidence_bytes
    huge = RunRules.of(make_spec(num_parameters=400_000_000, max_peers=1024)).max_evidence_bytes
    assert 8 * 2**20 < small < 9 * 2**20
    assert 64 * PART_VALUES * 4 + small < minilm < huge == MAX_EVIDENCE_BYTES
