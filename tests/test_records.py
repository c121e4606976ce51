"""Is everything that another peer sends checked, and what is refused refused with a reason, no worse?"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chain import Chain
from coordinator.records import (
    MAX_CLOCK_SKEW_SECONDS,
    MAX_RECORD_BYTES,
    Commit,
    Contribution,
    Exclusion,
    PeerRecord,
    Promise,
    Proposal,
    RecordError,
    Signed,
    check_times,
    is_signature_of,
    open_envelope,
    open_signed,
    parse_json,
    parse_record,
    sign,
    signature_text,
)
from tests.fakes import NOW, extend, hash_of, identity, make_commit, make_heartbeat, make_spec, peer

CHAIN = Chain(make_spec())
ALICE = identity("alice")


def signed_json(payload: object) -> bytes:
    """What a peer can send that signs whatever it likes."""
    text = json.dumps(payload)
    genuine = sign(make_heartbeat(CHAIN), ALICE)
    domain = b"cold-fusion-peer-v1\n"
    assert ALICE.sign(domain + genuine.payload) == genuine.signature
    return Signed(ALICE.peer_id, text.encode(), ALICE.sign(domain + text.encode())).to_bytes()


def heartbeat_values(**changes: Any) -> dict[str, Any]:
    return {**make_heartbeat(CHAIN).model_dump(mode="json"), **changes}


def test_round_trip() -> None:
    record = make_heartbeat(CHAIN, addresses=["/ip4/127.0.0.1/tcp/1"], num_examples=7)
    assert open_signed(sign(record, ALICE).to_bytes(), PeerRecord) == (ALICE.peer_id, record)
    commit = make_commit(CHAIN, ["alice", "bob"])
    assert parse_record(json.loads(commit.canonical()), Commit) == commit
    assert parse_record(json.loads(commit.canonical()), Commit).hash == commit.hash


def test_signature_covers_all_of_the_record() -> None:
    envelope = sign(make_heartbeat(CHAIN), ALICE).to_json()
    forged = envelope["payload"].replace('"num_examples":0', '"num_examples":9')
    assert forged != envelope["payload"]
    with pytest.raises(RecordError, match="does not fit"):
        open_envelope({**envelope, "payload": forged}, PeerRecord)
    with pytest.raises(RecordError, match="does not fit"):
        open_envelope({**envelope, "peer_id": peer("bob")}, PeerRecord)


def test_a_signature_of_the_bare_payload_means_nothing() -> None:
    payload = make_heartbeat(CHAIN).canonical()
    with pytest.raises(RecordError, match="does not fit"):
        open_signed(Signed(ALICE.peer_id, payload, ALICE.sign(payload)).to_bytes(), PeerRecord)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"phase": "idle"}, "phase"),
        ({"round": -1}, "round"),
        ({"round": "1"}, "round"),
        ({"round": True}, "round"),
        ({"round": 1.0}, "round"),
        ({"num_examples": 10**400}, "num_examples"),
        ({"num_examples": 2**53 + 1}, "num_examples"),
        ({"entered_at": float("nan")}, "entered_at"),
        ({"issued_at": float("inf")}, "issued_at"),
        ({"issued_at": 1e300}, "issued_at"),
        ({"expires_at": 10**400}, "expires_at"),
        ({"commit": "x"}, "commit"),
        ({"state_hash": hash_of("x") + "\n"}, "state_hash"),
        ({"addresses": ["a"] * 9}, "addresses"),
        ({"addresses": ["a" * 257]}, "addresses"),
        ({"weight": 1e30}, "weight"),
        ({"kind": "commit"}, "kind"),
        ({"\ud800": 1}, ""),
    ],
)
def test_malformed_heartbeats(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=f"malformed PeerRecord: {reason}"):
        open_signed(signed_json(heartbeat_values(**changes)), PeerRecord)


def test_one_kind_of_record_does_not_pass_for_another() -> None:
    signed = sign(make_heartbeat(CHAIN), ALICE).to_bytes()
    for other in (Proposal, Commit):
        with pytest.raises(RecordError, match="malformed"):
            open_signed(signed, other)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"peer_id":1,"payload":2,"signature":3}',
        b"\xff",
        b"[" * 9000,
        b"9" * 5000,
    ],
)
def test_no_envelope(data: bytes) -> None:
    with pytest.raises(RecordError):
        open_signed(data, PeerRecord)


@pytest.mark.parametrize(("key", "value"), [("signature", "%%%"), ("signature", "ä"), ("payload", "\ud800")])
def test_envelope_of_odd_text(key: str, value: str) -> None:
    with pytest.raises(RecordError):
        open_envelope({**sign(make_heartbeat(CHAIN), ALICE).to_json(), key: value}, PeerRecord)


def test_size_is_checked_first() -> None:
    with pytest.raises(RecordError, match=f"at most {MAX_RECORD_BYTES}"):
        open_signed(b" " * (MAX_RECORD_BYTES + 1), PeerRecord)
    with pytest.raises(RecordError, match="11 bytes where at most 10"):
        parse_json(b" " * 11, max_bytes=10)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_record_error(data: bytes) -> None:
    with pytest.raises(RecordError):
        open_signed(data, PeerRecord)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3)
    ),
    max_leaves=10,
)


@given(st.sampled_from(sorted(heartbeat_values())), JSON_VALUES)
def test_any_signed_value_is_taken_or_refused(key: str, value: object) -> None:
    data = signed_json(heartbeat_values(**{key: value}))
    try:
        author, _record = open_signed(data, PeerRecord)
    except RecordError:
        return
    assert author == ALICE.peer_id


def test_vote_signatures() -> None:
    commit = make_commit(CHAIN, ["alice", "bob"])
    text = signature_text(commit, ALICE)
    assert len(base64.b64decode(text)) == 64
    assert is_signature_of(text, commit, ALICE.peer_id)
    assert not is_signature_of(text, commit, peer("bob"))
    assert not is_signature_of(text, make_commit(CHAIN, ["alice", "bob"], attempt=1), ALICE.peer_id)
    assert not is_signature_of("no base64!", commit, ALICE.peer_id)
    assert not is_signature_of("ä", commit, ALICE.peer_id)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"issued_at": NOW - 31.0, "expires_at": NOW}, "expired"),
        ({"issued_at": NOW + MAX_CLOCK_SKEW_SECONDS, "expires_at": NOW + 40.0}, None),
        ({"issued_at": NOW + 11.0, "expires_at": NOW + 41.0}, "issued 11 s in the future"),
        ({"issued_at": NOW, "expires_at": NOW + 40.0}, None),
        ({"issued_at": NOW, "expires_at": NOW + 41.0}, "longer than the lease"),
    ],
)
def test_times(changes: dict[str, float], reason: str | None) -> None:
    record = make_heartbeat(CHAIN, **changes)
    if reason is None:
        check_times(record, now=NOW, lease_seconds=30.0)
    else:
        with pytest.raises(RecordError, match=reason):
            check_times(record, now=NOW, lease_seconds=30.0)


def test_the_hash_of_a_commit_is_its_value_and_a_signature_is_of_one_attempt() -> None:
    commit = make_commit(CHAIN, ["alice", "bob"])
    again = commit.under(3)
    assert again.attempt == 3
    assert again.hash == commit.hash
    assert again.digest != commit.digest
    for changes in (
        {"state_hash": hash_of("x")},
        {"electorate": [peer("bob")]},
        {"committed_at": 1.0},
        {"excluded": [Exclusion(peer=peer("x"), reason="")]},
    ):
        assert commit.model_copy(update=changes).hash != commit.hash  # not the one computed before the copy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": float("nan")}, "norm"),
        ({"norm": -1.0}, "norm"),
        ({"factor": 1.1}, "factor"),
        ({"factor": -0.1}, "factor"),
        ({"missing": [[0, 1]] * 257}, "missing"),
        ({"missing": [[0]]}, "missing"),
        ({"missing": [["0", 1]]}, "missing"),
        ({"missing": [[-1, 1]]}, "missing"),
        ({"missing": [[0, 1.5]]}, "missing"),
    ],
)
def test_malformed_contributions(changes: dict[str, Any], reason: str) -> None:
    values = {"peer": peer("a"), "num_examples": 1, "weight": 1.0, "norm": 2.5, "missing": [[0, 1], [2, 3]]}
    good = parse_record(values, Contribution)
    assert (good.norm, good.factor, good.missing) == (2.5, 1.0, ((0, 1), (2, 3)))
    assert parse_record(json.loads(good.canonical()), Contribution) == good
    with pytest.raises(RecordError, match=f"malformed Contribution: {reason}"):
        parse_record({**values, **changes}, Contribution)


def test_a_promise_survives_being_written() -> None:
    commit = make_commit(CHAIN, ["alice", "bob"])
    promise = Promise(
        run=CHAIN.spec.digest, round=1, previous=CHAIN.tip, attempt=2, lock=commit, lock_until=NOW
    )
    assert parse_record(json.loads(promise.canonical()), Promise) == promise


def test_what_was_computed_of_a_record_is_not_that_of_a_changed_copy() -> None:
    signed = extend(Chain(make_spec()), ["a", "b"]).commits[0]
    before = (signed.text, signed.commit.hash, signed.commit.digest)
    unsigned = signed.model_copy(update={"signatures": {}})
    assert unsigned.text == unsigned.canonical().decode() != signed.text
    later = signed.commit.model_copy(update={"round": 2})
    assert later.hash == type(later).model_validate(later.model_dump()).hash != signed.commit.hash
    assert (signed.text, signed.commit.hash, signed.commit.digest) == before
