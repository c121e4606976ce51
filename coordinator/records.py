"""What peers tell each other: typed, bounded, signed records, and how they look on the wire.

Everything that another peer sends is parsed here, by pydantic, strictly, after its size was
checked. A `Signed` envelope binds a record to the key of its author; nothing self-declared
(a round number, a weight) wins anything before the signatures of a commit are counted.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.about import AboutPeer
from coordinator.identity import Identity, is_signed_by
from coordinator.spec import Instant

MAX_RECORD_BYTES = 10_000  # what the DHT takes without harm, with room
MAX_MESSAGE_BYTES = 1024 * 1024  # a proposal of 256 members, 1 to 3 KB each; p2pd takes 2 MB
MAX_CLOCK_SKEW_SECONDS = 10.0
GENESIS = "0" * 64  # the hash of the commit before the first
MAX_MISSING_RANGES = 256  # per contribution
MAX_REASON_CHARS = 200
MAX_NAME_CHARS = 40
MAX_REVOKED = 128  # keys of a run that its organizer takes back: all of them fit into one record of the DHT

PeerIdText = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{40,64}$")]
HashText = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OptionalHash = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # empty: none
Reason = Annotated[str, Field(max_length=MAX_REASON_CHARS)]
_SOME = Field(min_length=1, max_length=1024)
Count = Annotated[int, Field(ge=0, le=2**53)]  # bounded, so that it converts to a float
SignatureText = Annotated[str, Field(max_length=88)]  # base64 of 64 bytes

Phase = Literal[
    "serving", "joining", "finetuning", "ready", "evaluating", "waiting", "paused", "done", "leaving"
]


class RecordError(ValueError):
    """A record from another peer that is malformed, badly signed, expired or too large."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def canonical(self) -> bytes:
        """The bytes that are signed and hashed: JSON with sorted keys."""
        return _canonical(self.model_dump(mode="json"))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]  # pydantic would keep what was computed of the old fields
        return copy


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Certificate(Record):
    """Whom the organizer of a private run lets in: the holder of a key, until an instant."""

    kind: Literal["certificate"] = "certificate"
    run: HashText
    role: Literal["peer", "invite"]  # the key is a peer's own, or an invite's, whose holder vouches for peers
    key: PeerIdText  # Ed25519, written as a peer id
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] = ""  # the organizer's note, for people
    expires_at: Instant


class Vouching(Record):
    """What the holder of an invite signs with the invite's key, once, for its own peer id."""

    kind: Literal["vouching"] = "vouching"
    run: HashText
    peer: PeerIdText


class Credential(Record):
    """What a peer of a private run shows: organizer -> key -> peer. Only that peer can use it: no secret."""

    certificate: Certificate
    signature: SignatureText  # of the organizer over the certificate
    vouching: SignatureText = ""  # of an invite's key; empty where the certified key is the peer's own


class Revocations(Record):
    """Which keys the organizer has taken back; the highest version counts."""

    kind: Literal["revocations"] = "revocations"
    run: HashText
    version: Annotated[int, Field(ge=1, le=2**53)]
    keys: Annotated[list[PeerIdText], Field(max_length=MAX_REVOKED)]  # of invites and of peers


class FirstCommit(Record):
    """What the starter of a run signs, once: the value of its first commit."""

    kind: Literal["first_commit"] = "first_commit"
    run: HashText
    commit: HashText


class Witness(Record):
    """That signature, as it is told on; see coordinator/beginning.py."""

    commit: HashText
    signature: SignatureText  # of the starter over the FirstCommit


class PeerRecord(Record):
    """A peer's heartbeat: where it stands. Its author is the signer of the envelope."""

    kind: Literal["peer"] = "peer"
    run: HashText
    phase: Phase
    round: Count  # the round of its committed state
    state_hash: HashText  # of its committed state
    commit: HashText  # hash of the commit of that state; GENESIS for round 0
    num_examples: Count = 0  # finetuned for the next round, once ready
    entered_at: Instant = 0.0  # when it began the next round
    addresses: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=8)] = []
    about: AboutPeer | None = None  # for people who watch; see coordinator/monitor.py
    resigned: OptionalHash = ""  # hash of the commit in whose next round it does not vote, whatever it does
    credential: Credential | None = None  # of a private run
    witness: Witness | None = None  # told on by all
    issued_at: Instant
    expires_at: Instant


PartRange = Annotated[tuple[Count, Count], Field(strict=False)]  # [first, stop) of global parts


class Contribution(Record):
    peer: PeerIdText
    num_examples: Count
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # what the spec makes of the signed examples
    norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of the whole delta, declared and checked
    factor: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = (
        1.0  # what rule and screening left of it
    )
    missing: Annotated[tuple[PartRange, ...], Field(strict=False, max_length=MAX_MISSING_RANGES)] = ()
    reason: Reason = ""  # why a part of it is missing, where it was not that it stopped coming


class Exclusion(Record):
    """Who was left out of a round for what it sent; in a roll-back, who is left out of the next ones."""

    peer: PeerIdText
    reason: Reason


class Commit(Record):
    """A round that happened: a fusion, whose signers hold `state_hash`, or the way back to the state before.

    The **value** of a commit is all of it but the attempt: a later attempt may have to sign the same value
    again (see ballot.py), and both certificates then stand for one tip.
    """

    kind: Literal["fuse", "rollback"] = "fuse"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    attempt: Count
    previous: HashText  # hash of the commit that this one follows
    state_hash: HashText
    group: HashText | None = None  # of the all-reduce that made the state; its reducers' statements name it
    contributors: Annotated[list[Contribution], Field(max_length=1024)]  # in the order of the group
    excluded: Annotated[list[Exclusion], Field(max_length=1024)] = []
    electorate: Annotated[list[PeerIdText], _SOME]  # more than half of these sign
    reason: Reason = ""  # of a roll-back
    committed_at: Instant  # DHT time at which the leader proposed it first

    @cached_property
    def hash(self) -> str:
        """Identity of the value: what the next commit and the heartbeats name."""
        value = self.model_dump(mode="json", exclude={"attempt"})
        return hashlib.sha256(_canonical(value)).hexdigest()

    @cached_property
    def digest(self) -> str:
        """Identity of what is signed: the value under this attempt."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def cohort(self) -> frozenset[str]:
        """Whose majority the next commit needs."""
        return frozenset(contribution.peer for contribution in self.contributors)

    def under(self, attempt: int) -> Commit:
        """The same value, to be signed in another attempt."""
        return self.model_copy(update={"attempt": attempt})


class SignedCommit(Record):
    commit: Commit
    signatures: Annotated[dict[PeerIdText, SignatureText], Field(max_length=1024)]
    witness: SignatureText = ""  # of the first commit only: the starter's

    @property
    def voters(self) -> set[str]:
        """Who of the electorate has signed this copy."""
        return set(self.commit.electorate) & self.signatures.keys()

    @cached_property
    def text(self) -> str:
        """As it travels. Kept: strangers ask for it, and 50 commits of 32 peers took 9.5 ms each time."""
        return self.canonical().decode()


class Proposal(Record):
    """A leader's call to fuse or to roll back: the members' own signed records say what each brings."""

    kind: Literal["proposal"] = "proposal"
    purpose: Literal["fuse", "rollback"] = "fuse"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    attempt: Count
    previous: HashText
    members: Annotated[list[dict[str, str]], _SOME]  # Signed PeerRecords, as JSON
    excluded: Annotated[list[Exclusion], Field(max_length=1024)] = []  # left out for what they sent
    electorate: Annotated[list[PeerIdText], _SOME]
    reason: Reason = ""  # of a roll-back
    proposed_at: Instant

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


class Acceptance(Record):
    """A member's answer to a proposal: it refuses lower attempts from now on; and what it signed so far."""

    kind: Literal["acceptance"] = "acceptance"
    run: HashText
    proposal: HashText
    lock: OptionalHash = ""  # value that it last signed in this round
    lock_attempt: Count = 0  # in which attempt; means nothing without a lock
    holds: bool = False  # whether it can hand out the state of that value


class GateVote(Record):
    """A member's judgment of a committed state: one bit, and no figure. Its author is the signer."""

    kind: Literal["gate_vote"] = "gate_vote"
    run: HashText
    commit: HashText  # value of the commit that made the state
    rejects: bool  # on its own held-out data the state before it was better, beyond noise


class Promise(Record):
    """What must survive a kill: what a peer accepted and signed in the round after `previous`."""

    kind: Literal["promise"] = "promise"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    previous: HashText
    attempt: Annotated[int, Field(ge=-1)] = -1  # refuses lower ones, to join and to sign; -1: accepted none
    proposal: OptionalHash = ""  # the one that it accepted in that attempt
    lock: Commit | None = None  # what it last signed in this round
    has_resigned: bool = False  # does not vote in this round
    signs_until: Instant = 0.0  # nobody signs in its attempt after that instant
    lock_until: Instant = 0.0  # nobody signs in the lock's attempt after that instant


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Signed:
    """A record's canonical bytes with their author and signature; not yet parsed."""

    peer_id: str  # the author, base58
    payload: bytes  # canonical JSON of the record
    signature: bytes  # 64 bytes over SIGNATURE_DOMAIN and payload

    def to_json(self) -> dict[str, str]:
        return {
            "peer_id": self.peer_id,
            "payload": self.payload.decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_json(), separators=(",", ":")).encode()


_SIGNATURE_DOMAIN = b"cold-fusion-peer-v1\n"  # a signature of ours means nothing elsewhere, and the reverse


def sign(record: Record, identity: Identity) -> Signed:
    payload = record.canonical()
    return Signed(
        peer_id=identity.peer_id, payload=payload, signature=identity.sign(_SIGNATURE_DOMAIN + payload)
    )


def signature_text(record: Record, identity: Identity) -> str:
    return base64.b64encode(sign(record, identity).signature).decode()


def is_signature_of(text: str, record: Record, peer_id: str) -> bool:
    return wrong_signer({peer_id: text}, record) is None


def wrong_signer(texts: Mapping[str, str], record: Record) -> str | None:
    """A peer whose signature of the record does not fit; None where all fit. `texts`: by peer.

    The record is written out once: of a long one that takes many times as long as a signature.
    """
    message = _SIGNATURE_DOMAIN + record.canonical()
    for peer_id, text in texts.items():
        try:
            signature = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return peer_id
        if not is_signed_by(peer_id, message, signature):
            return peer_id
    return None


def open_signed(data: bytes, record_type: type[R], *, max_bytes: int = MAX_RECORD_BYTES) -> tuple[str, R]:
    """Check size, signature and schema of bytes from another peer; returns (author, record).

    Raises RecordError with the reason.
    """
    return open_envelope(parse_json(data, max_bytes=max_bytes), record_type)


def open_envelope(envelope: object, record_type: type[R]) -> tuple[str, R]:
    if not isinstance(envelope, dict) or set(envelope) != {"peer_id", "payload", "signature"}:
        raise RecordError("not a signed record")
    if not all(isinstance(value, str) for value in envelope.values()):
        raise RecordError("not a signed record")
    payload = envelope["payload"].encode(errors="replace")
    try:
        signature = base64.b64decode(envelope["signature"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError("the signature is not base64") from error
    if not is_signed_by(envelope["peer_id"], _SIGNATURE_DOMAIN + payload, signature):
        raise RecordError("the signature does not fit")
    return envelope["peer_id"], parse_record(parse_json(payload, max_bytes=MAX_MESSAGE_BYTES), record_type)


def parse_record(value: object, record_type: type[R]) -> R:
    try:
        return record_type.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"])[:80]
        raise RecordError(f"malformed {record_type.__name__}: {where}: {problem['msg'][:160]}") from error


def parse_json(data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    if len(data) > max_bytes:
        raise RecordError(f"{len(data)} bytes where at most {max_bytes} are taken")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON") from error


def check_times(record: PeerRecord, *, now: float, lease_seconds: float) -> None:
    """Raises RecordError for a heartbeat that has expired or claims to come from the future."""
    if record.expires_at <= now:
        raise RecordError("expired")
    if record.issued_at > now + MAX_CLOCK_SKEW_SECONDS:
        raise RecordError(f"issued {record.issued_at - now:.0f} s in the future: is a clock wrong?")
    if record.expires_at > record.issued_at + lease_seconds + MAX_CLOCK_SKEW_SECONDS:
        raise RecordError("claims to live longer than the lease of the run")
