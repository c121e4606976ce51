"""Which commits are put off, because peers are said to be gone who are heard to train?"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.chain import Chain
from coordinator.chain_exchange import ChainExchange
from coordinator.membership import Membership
from coordinator.pace import Pace
from coordinator.records import FirstCommit, sign, signature_text
from tests.fakes import NOW, extend, hash_of, identity, make_heartbeat, make_spec, peer, peers

SPEC = make_spec(
    starter=peer("s"), lease_seconds=10.0, round_limit_seconds=60.0, exchange_limit_seconds=30.0, max_peers=8
)
EMPTY = Chain(SPEC)
ROUND_SECONDS = 100.0  # all three limits


class Here:
    """What a peer named `me` hears. Its network only tells the time: nothing is fetched."""

    def __init__(self, chain: Chain, *, is_training: bool = True, me: str = "me", now: float = NOW) -> None:
        network: Any = SimpleNamespace(now=lambda: now, peer_id=peer(me), on_call=lambda *_: None)
        self.membership = Membership(SPEC, peer(me))
        self.now = now
        self.exchange = ChainExchange(
            network, self.membership, Pace(10.0), lambda: chain, lambda: is_training
        )

    def hears(self, names: str, chain: Chain, phase: str = "finetuning", resigned: bool = False) -> Here:
        changes = {"phase": phase, "resigned": chain.tip if resigned else ""}
        record = make_heartbeat(chain, issued_at=self.now, expires_at=self.now + 10.0, **changes)
        for name in names:
            data = sign(record, identity(name)).to_bytes()
            assert self.membership.observe(data, now=self.now, claimed_by=peer(name)) is not None
        return self

    def takes(self, chain: Chain) -> int:
        """Up to which round."""
        taken = self.exchange._uncontested(chain)
        assert taken.commits == chain.commits[: taken.round]
        return taken.round


def made_by(
    names: str, chain: Chain = EMPTY, *, voters: str = "", signers: str = "", **changes: Any
) -> Chain:
    voters = voters or names
    values = {"committed_at": NOW - 10.0, "state_hash": hash_of(names), "electorate": list(peers(voters))}
    return extend(chain, list(names), list(signers or voters), **{**values, **changes})


def test_two_made_up_keys_that_follow_a_commit_at_once_are_put_off() -> None:
    common = made_by("abc")
    evil = made_by("tu", common)
    for me in ("a", "me"):
        assert Here(common, me=me).hears("bc", common).takes(evil) == 1
    newcomer = Here(EMPTY, is_training=False).hears("abc", common)
    assert newcomer.takes(evil) == 1  # so it gets the round that the others are in
    assert newcomer.takes(made_by("tu", evil)) == 1
    honest = made_by("abc", common)
    assert Here(common, me="a").hears("b", common).hears("c", honest).takes(honest) == 2
    assert Here(common, me="a").hears("bc", common).takes(honest) == 2  # who signed it does not contest it


def test_who_was_late_follows_also_where_he_has_not_heard_yet_that_the_others_are_on() -> None:
    common = made_by("abcdefg")
    honest = made_by("abcd", common, voters="abcdefg", signers="abcd")
    assert Here(common, me="g").hears("abcdef", common).takes(honest) == 2
    assert Here(common, me="g").hears("ef", common).hears("abcd", honest).takes(honest) == 2


def test_who_was_not_drawn_contests_nothing() -> None:
    """It waits, and has given up its vote, or its heartbeat says that it is still ready."""
    common = made_by("abc")
    drawn = made_by("cde", common, voters="c", signers="cde")
    assert (
        Here(common, is_training=False, me="a").hears("b", common, "ready", resigned=True).takes(drawn) == 2
    )
    assert Here(common, is_training=False, me="a").hears("b", common, "waiting").takes(drawn) == 2
    assert Here(EMPTY, is_training=False).hears("ab", common, "ready", resigned=True).takes(drawn) == 2


@pytest.mark.parametrize(
    ("cohort", "went_on", "me", "others", "num_rounds"),
    [
        ("abcd", "ab", "d", "c", 2),
        ("abcdef", "abc", "f", "de", 2),  # three of six cannot commit where the others are back
        ("abcde", "ab", "e", "cd", 1),  # three of five can, and will win
        ("abcde", "abc", "e", "d", 2),
    ],
)
def test_of_a_healed_partition_a_side_waits_only_where_it_can_commit(
    cohort: str, went_on: str, me: str, others: str, num_rounds: int
) -> None:
    common = made_by(cohort)
    on = made_by(went_on, common)
    assert Here(common, me=me).hears(others, common).hears(went_on, on).takes(on) == num_rounds


def test_who_comes_back_alone_follows_strangers_who_went_on() -> None:
    common = made_by("ab")
    on = made_by("xy", made_by("xy", common))
    assert Here(common, me="a").hears("xy", on).takes(on) == 3
    assert Here(EMPTY, is_training=False).hears("xy", on).hears("a", common).takes(on) == 3


@pytest.mark.parametrize(("age_seconds", "num_rounds"), [(ROUND_SECONDS - 1, 1), (ROUND_SECONDS + 1, 2)])
def test_who_only_says_that_he_trains_holds_nobody_back_for_longer_than_a_round(
    age_seconds: float, num_rounds: int
) -> None:
    common = made_by("ab", committed_at=NOW - age_seconds)
    on = made_by("xy", common)
    assert Here(common, is_training=False).hears("ab", common).takes(on) == num_rounds


def test_a_first_commit_is_contested_by_more_who_train_than_signed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evil = made_by("tuvwxyz", voters="tu", signers="tu")
    here = Here(EMPTY, me="a").hears("bc", EMPTY)
    assert here.takes(evil) == 0
    assert here.takes(made_by("tuv")) == 1  # as many: nothing tells them from those who train
    value = FirstCommit(run=SPEC.digest, commit=evil.tip)
    first = evil.commits[0].model_copy(update={"witness": signature_text(value, identity("s"))})
    assert here.takes(Chain(SPEC, (first,))) == 1  # the starter says so
    assert Here(EMPTY, is_training=False).hears("abc", EMPTY).takes(evil) == 1  # a newcomer is in no round
    later = time.monotonic() + ROUND_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert here.takes(evil) == 1


def test_what_is_put_off_is_looked_at_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    common = made_by("abc")
    here = Here(common).hears("t", made_by("tu", common))
    pauses = []
    for _ in range(5):
        here.exchange._put_off(peer("t"), "tip", 0.1)
        began = now
        while "tip" in here.exchange.known_tips():
            now += 0.5
        pauses.append(now - began)
    assert pauses == [2.0, 4.0, 8.0, 10.0, 10.0]  # a lease at most
    assert [claim.peer_id for claim in here.exchange._claims()] == [peer("t")]
    here.exchange._put_off(peer("t"), "tip", 2.5)  # took long to show it, and is not asked for a while
    assert here.exchange._claims() == []
