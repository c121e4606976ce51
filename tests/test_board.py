"""Can anybody but its owner write, erase, lock or outlive an entry of the board?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hypothesis import given
from hypothesis import strategies as st

from coordinator import board
from coordinator.board import MAX_LIFETIME_SECONDS, Board, BoardValidator, board_key
from coordinator.chain import Chain
from coordinator.identity import Identity
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.records import MAX_RECORD_BYTES, PeerRecord, Signed, sign
from tests.fakes import (
    CALL_SECONDS,
    NOW,
    hash_of,
    identity,
    make_heartbeat,
    make_spec,
    new_directory,
    peer,
    running_networks,
)

CHAIN = Chain(make_spec())
RUN = CHAIN.spec.digest
KEY = DHTID.generate(source=board_key(RUN)).to_bytes()


def make_record(
    *,
    author: str = "a",
    owner: object = None,
    value: object = None,
    expires_at: float | None = None,
    **changes: Any,
) -> DHTRecord:
    heartbeat = make_heartbeat(CHAIN, **changes)
    return DHTRecord(
        key=KEY,
        subkey=msgpack.packb(peer("a") if owner is None else owner),
        value=msgpack.packb(sign(heartbeat, identity(author)).to_bytes() if value is None else value),
        expiration_time=heartbeat.expires_at if expires_at is None else expires_at,
    )


def is_taken(record: DHTRecord) -> bool:
    return BoardValidator(RUN, now=lambda: NOW).validate(record)


def test_the_owners_heartbeat_is_taken() -> None:
    assert is_taken(make_record())
    assert is_taken(make_record(expires_at=NOW))


@pytest.mark.parametrize(
    "record",
    [
        make_record(author="b"),  # signed by another
        make_record(owner=peer("b")),  # under another's name
        make_record(author="b", owner=peer("b") + " "),  # under a second name
        make_record(run=hash_of("other run")),
        make_record(value=b"no heartbeat"),
        make_record(value="text"),
        make_record(value=None, owner=7),
        make_record(value={"a": 1}),
        make_record(value=bytes(MAX_RECORD_BYTES)),
        make_record(expires_at=NOW + 29.5),  # replayed so as to outlive the owner's next one
        make_record(issued_at=NOW, expires_at=NOW + 10 * MAX_LIFETIME_SECONDS),
        DHTRecord(KEY, b"", b"erased", NOW + 1.0),  # a plain store over the dictionary
        DHTRecord(KEY, b"\xc1", b"\xc1", NOW + 1.0),
    ],
    ids=str,
)
def test_what_does_not_belong_there_is_refused(record: DHTRecord) -> None:
    assert not is_taken(record)


def test_nothing_is_stored_under_other_keys() -> None:
    good = make_record()
    assert not is_taken(DHTRecord(b"k" * 20, good.subkey, good.value, good.expiration_time))


@pytest.mark.parametrize("expires_at", [NOW + MAX_LIFETIME_SECONDS + 1.0, math.inf, math.nan])
def test_nothing_lives_for_ever(expires_at: float) -> None:
    assert not is_taken(make_record(expires_at=expires_at))


def test_a_good_record_is_checked_once_and_one_that_differs_is_checked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validator, good = BoardValidator(RUN, now=lambda: NOW), make_record()
    assert validator.validate(good)
    with monkeypatch.context() as patch:
        patch.setattr(board, "open_signed", None)  # calling it would be a TypeError
        assert validator.validate(good)
    assert not validator.validate(dataclasses.replace(good, expiration_time=NOW + 29.5))
    assert not validator.validate(dataclasses.replace(good, subkey=msgpack.packb(peer("b"))))
    assert not validator.validate(dataclasses.replace(good, key=b"k" * 20))


def test_what_is_remembered_of_records_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "MAX_REMEMBERED_RECORDS", 3)
    validator = BoardValidator(RUN, now=lambda: NOW)
    for second in range(5):
        assert validator.validate(make_record(expires_at=NOW + second))
    assert len(validator._good) == 3


@given(st.binary(max_size=60), st.binary(max_size=60), st.floats())
def test_any_bytes_are_just_refused(subkey: bytes, value: bytes, expires_at: float) -> None:
    assert not is_taken(DHTRecord(KEY, subkey, value, expires_at))


@given(st.binary(max_size=60))
def test_any_signed_bytes_are_just_refused(payload: bytes) -> None:
    signature = identity("a").sign(b"cold-fusion-peer-v1\n" + payload)
    text = payload.decode(errors="replace").encode()
    assert not is_taken(make_record(value=Signed(peer("a"), text, signature).to_bytes()))


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Network]]:
    with running_networks(2, new_directory()) as networks:
        for network in networks:
            network.run(network.start_dht(BoardValidator(RUN)), timeout_seconds=CALL_SECONDS)
        yield networks


def fresh_heartbeat(**changes: Any) -> PeerRecord:
    now = Network.now()
    return make_heartbeat(CHAIN, **{"issued_at": now, "expires_at": now + 30.0, **changes})


def publish(network: Network, owner: Identity, record: PeerRecord) -> bool:
    signed = sign(record, owner)
    return network.run(
        Board(network, RUN).publish(signed, expires_at=record.expires_at), timeout_seconds=CALL_SECONDS
    )


def seen_by(network: Network) -> dict[str, PeerRecord]:
    membership = Membership(CHAIN.spec, peer("reader"))
    network.run(Board(network, RUN).read_into(membership), timeout_seconds=CALL_SECONDS)
    return {member.peer_id: member.record for member in membership.live(Network.now())}


def store(network: Network, key: str, value: object, expires_at: float, subkey: object = None) -> bool:
    """As an attacker does who runs hivemind without our validator in the way of its own stores."""
    node = network._node
    assert node is not None
    changes = {} if subkey is None else {"subkey": subkey}
    return bool(
        network.run(
            node.store(key, value, expiration_time=expires_at, **changes), timeout_seconds=CALL_SECONDS
        )
    )


def test_heartbeats_travel(pair: list[Network]) -> None:
    record = fresh_heartbeat(phase="ready", num_examples=7)
    assert publish(pair[0], identity("traveller"), record)
    assert seen_by(pair[1])[peer("traveller")] == record
    newer = fresh_heartbeat(phase="waiting")
    assert publish(pair[1], identity("traveller"), newer)
    assert seen_by(pair[0])[peer("traveller")] == newer


def test_nobody_overwrites_erases_or_locks_anothers_entry(pair: list[Network]) -> None:
    honest, attacker = pair
    attacker._node.protocol.record_validator, guard = None, attacker._node.protocol.record_validator  # type: ignore[union-attr]
    try:
        record = fresh_heartbeat(phase="ready")
        assert publish(honest, identity("victim"), record)
        later = Network.now() + 3000.0
        victim, mallory = peer("victim"), identity("mallory")
        old = sign(record, identity("victim")).to_bytes()
        store(attacker, board_key(RUN), sign(fresh_heartbeat(), mallory).to_bytes(), later, victim)
        store(attacker, board_key(RUN), old, later, victim)
        store(attacker, board_key(RUN), b"erased", later)
        store(attacker, board_key(RUN), bytes(50_000), later, mallory.peer_id)
    finally:
        attacker._node.protocol.record_validator = guard  # type: ignore[union-attr]
    newer = fresh_heartbeat(phase="evaluating")
    publish(honest, identity("victim"), newer)  # the attacker's own node refuses it
    seen = seen_by(honest)
    assert seen[victim] == newer
    assert mallory.peer_id not in seen


def test_without_a_dht_the_error_has_a_name(tmp_path: Any) -> None:
    with running_networks(1, tmp_path) as [network]:
        with pytest.raises(Exception, match="the DHT is not running"):
            publish(network, identity("a"), fresh_heartbeat())
        with pytest.raises(Exception, match="the DHT is not running"):
            seen_by(network)
