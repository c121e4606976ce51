"""Does any bytes of a stranger ever raise anything but the project's own errors, in any parser of them?

Each target gets raw bytes, arbitrary JSON, and valid messages with something in them replaced, signed anew
where a signature would otherwise end it. The default is a few hundred inputs each; the slow run
makes at least 100,000 in all.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import json
import socket
import string
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import numpy as np
import pytest
import torch
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import records
from coordinator.admission import Admission
from coordinator.agreement import Agreement
from coordinator.ballot import Candidacy, View, VoteBox, check_begin, check_proposal
from coordinator.board import BoardValidator, board_key
from coordinator.chain import Chain
from coordinator.credentials import INVITE_PREFIX, _checksum, make_invite, open_revocations, parse_invite
from coordinator.errors import AccessError, RoundError, SpecError
from coordinator.gate_votes import GateVotes
from coordinator.membership import Membership
from coordinator.network import _parse_request, is_entry_address
from coordinator.records import (
    Record,
    RecordError,
    Signed,
    open_envelope,
    open_signed,
    parse_json,
    parse_record,
    sign,
)
from coordinator.spec import parse_spec
from coordinator.streams import FrameStream, StreamError, _read_greeting
from coordinator.transfer import parse_range
from peer import manifest as manifests
from peer.audit import Evidence, NotConclusive, from_bytes, judge, to_bytes
from peer.compression import CODECS
from peer.contradiction import Contradiction, UnknownRoundError, judge_statements
from peer.genesis import _parse_manifest
from peer.layout import TensorLayout, make_manifest
from peer.manifest import Manifest, Statement, open_manifest, open_statement
from peer.parts import PartGrid
from peer.reduction import figures_problem, plan_of
from tests.fakes import NOW, hash_of, identity, make_commit, make_heartbeat, make_spec, peer, signed_by

CHAIN = Chain(make_spec())
RUN = CHAIN.spec.digest
KEY = DHTID.generate(source=board_key(RUN)).to_bytes()
GRID = PartGrid(1000)
NUM_INPUTS_SLOW = 100_000

# --- inputs

_text = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates included
_scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 10**400, 2**53 + 1]),
    st.floats(),
    _text,
    st.sampled_from([peer("a"), RUN, records.GENESIS, "", "A" * 88, "/ip4/1.2.3.4/tcp/1", "\x00", "\x1b[2J"]),
)
_json = st.recursive(
    _scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=8,
)
_DEEP = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 500 + b"]" * 500,
    b"9" * 5000,
    b"1e999",
    b'"\\ud800"',
    b"\xff\xfe",
]
_bytes = st.binary(max_size=200) | st.sampled_from(_DEEP)


def encode(value: object) -> bytes:
    return json.dumps(value).encode(errors="replace")


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """`valid` JSON with one to three of its values replaced, removed or added."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return value


def _change(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(("inside", "inside", "remove", "add"))):
            case "inside":
                value[key] = _change(draw, value[key])
            case "remove":
                del value[key]
            case _:
                value[draw(_text)] = draw(_json)
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(("inside", "inside", "remove", "double"))):
            case "inside":
                value[index] = _change(draw, value[index])
            case "remove":
                del value[index]
            case _:
                value.insert(index, copy.deepcopy(value[index]))
        return value
    if isinstance(value, str) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return (
            value[:index]
            + draw(st.sampled_from([*string.printable[:70], "é", "\ud800", ""]))
            + value[index + 1 :]
        )
    return draw(_json)


def messages(valid: Any) -> st.SearchStrategy[bytes]:
    return st.one_of(_bytes, _json.map(encode), changed(valid).map(encode))


def signed_bytes(payload: Any) -> bytes:
    """As a peer does that signs what is no record."""
    data = encode(payload)
    signature = identity("a").sign(records._SIGNATURE_DOMAIN + data)
    return Signed(peer("a"), data, signature).to_bytes()


def envelopes(valid: Record) -> st.SearchStrategy[bytes]:
    """Honestly signed nonsense, and tampered envelopes."""
    payload = valid.model_dump(mode="json")
    envelope = json.loads(signed_bytes(payload))
    return st.one_of(
        changed(payload).map(signed_bytes), _json.map(signed_bytes), changed(envelope).map(encode), _bytes
    )


# --- what is valid

WITNESS = {"commit": hash_of("first"), "signature": "A" * 88}
HEARTBEAT = make_heartbeat(CHAIN, addresses=["/ip4/1.2.3.4/tcp/1"], witness=WITNESS)
COMMIT = make_commit(CHAIN, "abc")
SIGNED_COMMIT = signed_by(COMMIT, "abc")
PROPOSAL_VALUES: dict[str, Any] = {
    "run": RUN,
    "round": 1,
    "attempt": 0,
    "previous": CHAIN.tip,
    "members": [Signed(peer("a"), b"{}", b"0" * 64).to_json()],
    "electorate": [peer("a")],
    "proposed_at": NOW,
}
MANIFEST_RECORD = Manifest(
    run=RUN,
    round=1,
    previous=CHAIN.tip,
    codec="fp32",
    num_values=GRID.num_values,
    hashes=manifests.join_hashes(b"h" * 32 * GRID.num_parts),
    squared_norms=[1.0] * GRID.num_parts,
)
STATEMENT_VALUES: dict[str, Any] = {
    "kind": "statement",
    "run": RUN,
    "group": hash_of("group"),
    "round": 1,
    "previous": hash_of("previous"),
    "first_part": 0,
    "results": manifests.join_hashes(b"h" * 32),
    "senders": [
        {
            "peer": peer("a"),
            "manifest": hash_of("m"),
            "declared": 1.0,
            "is_planned": True,
            "norm": 1.0,
            "num_parts": 1,
            "weight": 1.0,
        }
    ],
    "figures": [1.0],
}
LAYOUT = TensorLayout(names=("a", "b"), shapes=((2, 3), (4,)))
STATE = make_manifest(LAYOUT, torch.zeros(10))
STATE_VALUES = {"layout": LAYOUT.to_json(), "chunks": list(STATE.chunk_hashes)}
RANGE = {"run": RUN, "key": "state/x", "start": 0, "stop": 10}


INVITE = make_invite(identity("a"), RUN, ("/ip4/1.2.3.4/tcp/1/p2p/x",), expires_at=2 * NOW)
INVITE_BODY = INVITE.to_text().removeprefix(INVITE_PREFIX).rpartition(".")[0]
INVITE_VALUES = json.loads(base64.urlsafe_b64decode(INVITE_BODY + "=="))
REVOCATIONS = records.Revocations(run=RUN, version=1, keys=[peer("c")])
SHOWN = {
    "credential": INVITE.credential_for(peer("b"), NOW).model_dump(mode="json"),
    "revocations": signed_bytes(REVOCATIONS.model_dump(mode="json")).decode(),
}


# --- targets


@dataclass(frozen=True)
class Target:
    inputs: st.SearchStrategy[Any]
    parse: Callable[[Any], object]
    errors: tuple[type[Exception], ...]  # what may come out; anything else fails the test


def parse_values(record_type: type[Record]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        record = parse_record(parse_json(data), record_type)
        return record.canonical()  # what was taken can be hashed and signed

    return parse


def open_as(record_type: type[Record]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        author, record = open_signed(data, record_type)
        assert author == peer("a")
        return record.canonical()

    return parse


def parse_envelope(data: bytes) -> object:
    return open_envelope(parse_json(data), records.PeerRecord)


def extend_chain(data: bytes) -> object:
    return CHAIN.extended(parse_record(parse_json(data), records.SignedCommit))


def observe(data: bytes) -> object:
    return Membership(CHAIN.spec, peer("me")).observe(data, now=NOW, claimed_by=peer("a"))


def validate(entry: tuple[bytes, bytes, float]) -> object:
    subkey, value, expires_at = entry
    return BoardValidator(RUN, now=lambda: NOW).validate(DHTRecord(KEY, subkey, value, expires_at))


def parse_state_manifest(data: bytes) -> object:
    return _parse_manifest(data).state_hash


def parse_request_of_range(data: bytes) -> object:
    _, body = _parse_request(data)
    return parse_range(body, RUN)


def parse_manifest_record(data: bytes) -> object:
    manifest = open_manifest(
        data, sender=peer("a"), run=RUN, round=1, previous=CHAIN.tip, codec="fp32", grid=GRID
    )
    return manifest.norm, manifest.part_hashes(), manifest.digest


def parse_statement(data: bytes) -> object:
    statement = open_statement(
        data,
        reducer=peer("a"),
        run=RUN,
        group=hash_of("group"),
        round=1,
        previous=hash_of("previous"),
        parts=range(1),
    )
    return manifests.figures_of(statement), statement.digest


def decode(entry: tuple[str, bytes, int]) -> object:
    name, data, num_values = entry
    decoded = CODECS[name].decode(data, num_values)
    assert bool(torch.isfinite(decoded).all())
    return decoded


@st.composite
def encoded_parts(draw: st.DrawFn) -> tuple[str, bytes, int]:
    """Of the right size more often than not."""
    name, num_values = draw(st.sampled_from(sorted(CODECS))), draw(st.integers(1, 200))
    size = CODECS[name].size_bytes(num_values)
    if draw(st.booleans()):
        return name, draw(st.binary(min_size=size, max_size=size)), num_values
    return name, draw(st.binary(max_size=300)), num_values


def spec_texts() -> st.SearchStrategy[bytes]:
    lines = make_spec().to_toml().splitlines()
    line = (
        st.sampled_from(lines) | _text | st.sampled_from(["seed = 1" + "0" * 5000, "[" * 5000, "a." * 2000])
    )
    return (
        st.lists(line, max_size=len(lines)).map(lambda chosen: "\n".join(chosen).encode(errors="replace"))
        | _bytes
    )


GATE_VOTE = records.GateVote(run=hash_of("run"), commit=hash_of("commit"), rejects=True)


def board_entries() -> st.SearchStrategy[tuple[bytes, bytes, float]]:
    pack = msgpack.packb
    subkeys = st.sampled_from([pack(peer("a")), pack(None), b"", pack([1]), pack("x")]) | st.binary(
        max_size=40
    )
    deep = st.sampled_from(
        [b"\x91" * 5000 + b"\x90", b"\xc7\x02\x50\x93\x90", b"\xdd\xff\xff\xff\xff", b"\xd9"]
    )
    values = envelopes(HEARTBEAT).map(pack) | st.binary(max_size=60) | deep
    return st.tuples(subkeys, values, st.floats())


def invite_texts() -> st.SearchStrategy[str]:
    """Of changed contents under a checksum that fits; and any text."""
    return messages(INVITE_VALUES).map(invite_text) | _text.map(lambda text: f"{INVITE_PREFIX}{text}") | _text


def invite_text(data: bytes) -> str:
    text = base64.urlsafe_b64encode(data).decode().rstrip("=")
    return f"{INVITE_PREFIX}{text}.{_checksum(text)}"


def take_invite(text: str) -> object:
    invite = parse_invite(text)
    return invite.to_text(), invite.credential_for(peer("b"), NOW)


def present(data: bytes) -> object:
    member = Admission(run=RUN, organizer=peer("a"), peer_id=peer("me"), credential=None, now=lambda: NOW)
    json.loads(member.answer(peer("b"), data))  # whatever is said is answered
    member.take(peer("b"), data)
    return member.is_admitted(peer("b")) and member.presented()


def take_revocations(data: bytes) -> object:
    return open_revocations(data, run=RUN, organizer=peer("a"))


# Of agreement: each signed record is of "a", whoever it claims to be.
READY = make_heartbeat(CHAIN, phase="ready", num_examples=100)
READY_PROPOSAL = records.Proposal.model_validate(
    {
        **PROPOSAL_VALUES,
        "members": [sign(READY, identity(name)).to_json() for name in "ab"],
        "electorate": [peer("a"), peer("b")],
    }
)
VIEW = View(CHAIN, "ready", 100, frozenset({peer("a")}), NOW)
ACCEPTANCES = {
    name: sign(records.Acceptance(run=RUN, proposal=READY_PROPOSAL.hash), identity(name)).to_json()
    for name in "ab"
}
BEGIN = {
    "proposal": READY_PROPOSAL.hash,
    "members": [peer("a"), peer("b")],
    "acceptances": [ACCEPTANCES["a"], ACCEPTANCES["b"]],
    "lock": None,
}
ANSWER = {"acceptance": ACCEPTANCES["a"], "lock": SIGNED_COMMIT.model_dump(mode="json")}
EVIDENCE = Evidence("mean", "none", "fp32", GRID.num_values, 0, peer("a"), (b"{}",), (b"{}",), (b"67",), b"8")


def take_proposal(data: bytes) -> object:
    proposal = parse_record(parse_json(data), records.Proposal)
    check_proposal(peer("a"), proposal, VIEW, peer("b"))
    return proposal.hash


def take_begin(data: bytes) -> object:
    return check_begin(parse_json(data), peer("a"), READY_PROPOSAL, CHAIN, peer("b")).attempt


def take_answer(data: bytes) -> object:
    answer = parse_json(data)
    candidacy = Candidacy(peer("a"), READY_PROPOSAL, CHAIN)
    fields = answer if isinstance(answer, dict) else {}
    candidacy.add(peer("a"), fields.get("acceptance"), fields.get("lock"))
    return candidacy


def take_page(data: bytes) -> object:
    """As `ChainExchange` reads what another peer says happened."""
    page, chain = parse_json(data), CHAIN
    if not isinstance(page, list):
        raise RecordError("no page")
    for entry in page:
        chain = chain.extended(parse_record(entry, records.SignedCommit))
    return chain.tip


def take_evidence(data: bytes) -> object:
    evidence = from_bytes(data)
    if isinstance(evidence, Contradiction):
        return judge_statements(evidence, RUN, CHAIN)
    return judge(evidence, RUN)


# --- handlers, without the network around them


LOOP = asyncio.new_event_loop()  # of all inputs: a loop for each would be most of the time


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return LOOP.run_until_complete(call)


FIRST_VOTE = records.GateVote(run=RUN, commit=hash_of("commit"), rejects=True)
GATE_VOTES = {"votes": [sign(FIRST_VOTE, identity("a")).to_json()]}


def take_gate_votes(data: bytes) -> object:
    membership = Membership(CHAIN.spec, peer("me"))
    membership.observe(signed_bytes(HEARTBEAT.model_dump(mode="json")), now=NOW, claimed_by=peer("a"))
    of_no_use: Any = None  # to an answer
    votes = GateVotes(of_no_use, identity("me"), membership, of_no_use, lambda: CHAIN, lambda: None)
    run(votes._on_gate_vote(peer("b"), parse_json(data)))
    return votes.of(hash_of("commit"))


def gate_votes_bytes() -> st.SearchStrategy[bytes]:
    """A valid list with something changed; and a vote of changed contents, honestly signed."""

    def signed(payload: Any) -> bytes:
        data = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode(errors="replace")
        signature = identity("a").sign(records._SIGNATURE_DOMAIN + data)
        return encode({"votes": [Signed(peer("a"), data, signature).to_json()]})

    return messages(GATE_VOTES) | changed(FIRST_VOTE.model_dump(mode="json")).map(signed)


def take_vote(data: bytes) -> object:
    box = VoteBox()
    voter = SimpleNamespace(
        chain=CHAIN,
        _proposal=(peer("a"), READY_PROPOSAL),
        _voting=SimpleNamespace(expects=lambda _: False, add=box.add),
    )
    run(Agreement._on_vote(cast(Agreement, voter), peer("a"), parse_json(data)))
    box.certificate(COMMIT, {peer("a")}, CHAIN)
    return box.count(COMMIT, {peer("a")})


def take_figures(data: bytes) -> object:
    """Of three members, as a reducer tells them; what passes must give a plan, or no plan at all."""
    figures = np.frombuffer(data, dtype="<f8").reshape(3, 3)
    norms = [1.0, 2.0, None]
    if not figures_problem(figures, [None if n is None else n * n for n in norms]):
        plan = plan_of("centered_clipping", "norm_cosine", [1.0] * 3, norms, [figures])
        assert bool(np.isfinite(plan.weights).all())
    return figures


def figures_bytes() -> st.SearchStrategy[bytes]:
    near = st.sampled_from([1.0, 4.0, 2.0, -2.0, 0.0, float("nan"), float("inf")]) | st.floats()
    rows = st.lists(near, min_size=6, max_size=6)

    def matrix(v: list[float]) -> bytes:
        values = [1.0, v[0], v[1], v[0], 4.0, v[2], v[1], v[2], v[3]]
        return np.array(values, dtype="<f8").tobytes()

    return rows.map(matrix) | st.binary(min_size=72, max_size=72)


def take_frames(data: bytes) -> object:
    """All that a stream of these bytes gives, until it ends."""

    async def read() -> int:
        theirs, mine = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=mine)
        stream = FrameStream(peer("a"), reader, writer)
        theirs.setblocking(False)
        theirs.send(data[:50_000])
        theirs.close()
        try:
            async with asyncio.timeout(5.0):
                while True:
                    await stream.receive({1: 0, 2: 40, 3: 1000}, {2: memoryview(bytearray(40))})
        finally:
            stream.close()

    return run(read())


def frames_bytes() -> st.SearchStrategy[bytes]:
    def frame(kind: int, length: int, payload: bytes) -> bytes:
        return bytes([kind]) + length.to_bytes(4, "big") + payload

    lengths = st.sampled_from([0, 1, 40, 1000, 1001, 2**31, 2**32 - 1])
    whole = st.builds(lambda k, p: frame(k, len(p), p), st.integers(0, 4), st.binary(max_size=60))
    cut = st.builds(frame, st.integers(0, 255), lengths, st.binary(max_size=60))
    return st.lists(whole | cut, max_size=6).map(b"".join) | _bytes


def take_greeting(data: bytes) -> object:
    async def read() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await _read_greeting(reader)

    return run(read())


def evidence_bytes() -> st.SearchStrategy[bytes]:
    """Headers with something changed, and signed statements that are none."""
    data = to_bytes(EVIDENCE)
    start = 4 + int.from_bytes(data[:4], "big")
    header, blobs = json.loads(data[4:start]), data[start:]

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(4, "big") + text + blobs

    def of_statements(statements: list[bytes]) -> bytes:
        return to_bytes(Contradiction(peer("a"), tuple(statements)))

    def of_parts(statement: bytes, manifest: bytes, part: bytes) -> bytes:
        changed_evidence = dataclasses.replace(
            EVIDENCE, statements=(statement,), manifests=(manifest,), parts=(part,)
        )
        return to_bytes(changed_evidence)

    statements = changed(STATEMENT_VALUES).map(signed_bytes)
    return st.one_of(
        changed(header).map(encode).map(with_header),
        st.lists(statements, max_size=5).map(of_statements),
        st.builds(of_parts, statements, envelopes(MANIFEST_RECORD), st.binary(max_size=8)),
        _bytes,
    )


OWN = (RecordError,)
TARGETS: dict[str, Target] = {
    "json": Target(_bytes, parse_json, OWN),
    "peer record": Target(messages(HEARTBEAT.model_dump(mode="json")), parse_values(records.PeerRecord), OWN),
    "commit": Target(messages(COMMIT.model_dump(mode="json")), parse_values(records.Commit), OWN),
    "proposal": Target(messages(PROPOSAL_VALUES), parse_values(records.Proposal), OWN),
    "signed commit": Target(messages(SIGNED_COMMIT.model_dump(mode="json")), extend_chain, OWN),
    "signed peer record": Target(envelopes(HEARTBEAT), open_as(records.PeerRecord), OWN),
    "signed commit record": Target(envelopes(COMMIT), open_as(records.Commit), OWN),
    "envelope": Target(envelopes(HEARTBEAT), parse_envelope, OWN),
    "heartbeat": Target(envelopes(HEARTBEAT), observe, ()),
    "gate vote": Target(envelopes(GATE_VOTE), open_as(records.GateVote), OWN),
    "board entry": Target(board_entries(), validate, ()),
    "spec": Target(spec_texts(), lambda text: parse_spec(text, source="a peer"), (SpecError,)),
    "state manifest": Target(messages(STATE_VALUES), parse_state_manifest, (RecordError, ValueError)),
    "request": Target(messages({"method": "blob", "body": RANGE}), parse_request_of_range, OWN),
    "address": Target(_text | st.text("/ip46tcp2dns.:0123456789", max_size=40), is_entry_address, ()),
    "manifest": Target(envelopes(MANIFEST_RECORD), parse_manifest_record, OWN),
    "statement": Target(
        changed(STATEMENT_VALUES).map(signed_bytes) | messages(STATEMENT_VALUES), parse_statement, OWN
    ),
    "invite": Target(invite_texts(), take_invite, (AccessError,)),
    "what is said at the door": Target(messages(SHOWN), present, OWN),
    "revocations": Target(envelopes(REVOCATIONS), take_revocations, OWN),
    "encoded part": Target(encoded_parts(), decode, (ValueError,)),
    "a proposal to join": Target(messages(READY_PROPOSAL.model_dump(mode="json")), take_proposal, OWN),
    "a begin": Target(messages(BEGIN), take_begin, (RecordError, RoundError)),
    "an answer to a proposal": Target(messages(ANSWER), take_answer, OWN),
    "a page of a chain": Target(messages([SIGNED_COMMIT.model_dump(mode="json")]), take_page, OWN),
    "a list of gate votes": Target(gate_votes_bytes(), take_gate_votes, OWN),
    "a vote": Target(messages({"run": RUN, "commit": COMMIT.digest, "signature": "A" * 88}), take_vote, OWN),
    "figures": Target(figures_bytes(), take_figures, (ValueError,)),
    "frames of a stream": Target(frames_bytes(), take_frames, (StreamError,)),
    "a greeting": Target(frames_bytes(), take_greeting, (OSError, EOFError)),
    "evidence": Target(evidence_bytes(), take_evidence, (RecordError, NotConclusive, UnknownRoundError)),
}


def fuzz(target: Target, num_inputs: int) -> int:
    """How many inputs were tried."""
    tried = 0

    @settings(max_examples=num_inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def run(data: Any) -> None:
        nonlocal tried
        tried += 1
        try:
            target.parse(data)
        except target.errors:
            return

    run()
    return tried


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_projects_own_errors_come_out(name: str) -> None:
    fuzz(TARGETS[name], 120)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_only_the_projects_own_errors_come_out_of_a_hundred_thousand_inputs() -> None:
    each = NUM_INPUTS_SLOW // len(TARGETS) + 1
    assert sum(fuzz(target, each) for target in TARGETS.values()) >= NUM_INPUTS_SLOW


def test_what_is_valid_is_taken() -> None:
    """Else the targets would be fuzzed at their doors only."""
    assert parse_values(records.PeerRecord)(encode(HEARTBEAT.model_dump(mode="json")))
    assert parse_values(records.Commit)(encode(COMMIT.model_dump(mode="json")))
    assert parse_values(records.Proposal)(encode(PROPOSAL_VALUES))
    assert take_begin(encode(BEGIN)) == READY_PROPOSAL.attempt
    take_proposal(encode(READY_PROPOSAL.model_dump(mode="json")))
    take_answer(encode({"acceptance": ACCEPTANCES["a"]}))
    assert take_gate_votes(encode(GATE_VOTES)) == {peer("a"): True}
    signature = records.signature_text(COMMIT, identity("a"))
    vote = {"run": RUN, "commit": COMMIT.digest, "signature": signature}
    assert take_vote(encode(vote)) == {peer("a"): signature}
    take_figures(np.diag([1.0, 4.0, 9.0]).astype("<f8").tobytes())
    with pytest.raises(StreamError, match="ended"):  # after both frames
        take_frames(b"\x01" + bytes(4) + b"\x02" + (40).to_bytes(4, "big") + bytes(40))
    assert take_greeting(b"\x00" + (2).to_bytes(4, "big") + b"hi") == b"hi"
    assert take_page(encode([SIGNED_COMMIT.model_dump(mode="json")])) == COMMIT.hash
    assert from_bytes(to_bytes(EVIDENCE)) == EVIDENCE
    assert extend_chain(encode(SIGNED_COMMIT.model_dump(mode="json")))
    assert open_as(records.PeerRecord)(signed_bytes(HEARTBEAT.model_dump(mode="json")))
    assert observe(signed_bytes(HEARTBEAT.model_dump(mode="json")))
    value = msgpack.packb(signed_bytes(HEARTBEAT.model_dump(mode="json")))
    assert validate((msgpack.packb(peer("a")), value, NOW))
    assert parse_spec(make_spec().to_toml(), source="x").digest == RUN
    assert parse_state_manifest(encode(STATE_VALUES)) == STATE.state_hash
    assert take_invite(invite_text(encode(INVITE_VALUES)))
    assert present(encode(SHOWN))
    assert take_revocations(signed_bytes(REVOCATIONS.model_dump(mode="json")))
    assert parse_request_of_range(encode({"method": "blob", "body": RANGE})) == ("state/x", 0, 10)
    assert parse_manifest_record(signed_bytes(MANIFEST_RECORD.model_dump(mode="json")))
    assert parse_statement(signed_bytes(Statement.model_validate(STATEMENT_VALUES).model_dump(mode="json")))


@pytest.mark.parametrize(
    "error", [KeyError("x"), UnicodeEncodeError("utf-8", "x", 0, 1, "x"), RecursionError()]
)
def test_a_foreign_error_is_seen(error: Exception) -> None:
    def parse(data: bytes) -> None:
        if len(data) > 3:
            raise error

    with pytest.raises(type(error)):
        fuzz(Target(_bytes, parse, (RecordError,)), 200)
