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
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.identity import Identity, is_signed_by

MAX_RECORD_BYTES = 10_000  # what the DHT takes without harm, with room
MAX_MESSAGE_BYTES = 256 * 1024  # a proposal or a commit: a few hundred bytes per member
MAX_CLOCK_SKEW_SECONDS = 10.0
GENESIS = "0" * 64  # the hash of the commit before the first

PeerIdText = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{40,64}$")]
HashText = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Instant = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # DHT time, seconds since 1970
_SOME = Field(min_length=1, max_length=1024)
Count = Annotated[int, Field(ge=0, le=2**53)]  # bounded, so that it converts to a float
SignatureText = Annotated[str, Field(max_length=88)]  # base64 of 64 bytes

Phase = Literal["serving", "joining", "finetuning", "ready", "evaluating", "waiting", "done", "leaving"]


class RecordError(ValueError):
    """A record from another peer that is malformed, badly signed, expired or too large."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def canonical(self) -> bytes:
        """The bytes that are signed and hashed: JSON with sorted keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


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
    issued_at: Instant
    expires_at: Instant


class Contribution(Record):
    peer: PeerIdText
    num_examples: Count
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # what the spec makes of the signed examples


class Commit(Record):
    """A round that happened: all its signers hold `state_hash`."""

    kind: Literal["commit"] = "commit"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    attempt: Count
    previous: HashText  # hash of the commit that this one follows
    state_hash: HashText
    contributors: Annotated[list[Contribution], _SOME]  # in the order of the group
    electorate: Annotated[list[PeerIdText], _SOME]  # more than half of these sign
    committed_at: Instant  # DHT time at which the leader proposed it

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def cohort(self) -> frozenset[str]:
        """Whose majority the next commit needs."""
        return frozenset(contribution.peer for contribution in self.contributors)


class SignedCommit(Record):
    commit: Commit
    signatures: Annotated[dict[PeerIdText, SignatureText], Field(max_length=1024)]


class Proposal(Record):
    """A leader's call to fuse: the members' own signed records say what each brings."""

    kind: Literal["proposal"] = "proposal"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    attempt: Count
    previous: HashText
    members: Annotated[list[dict[str, str]], _SOME]  # Signed PeerRecords, as JSON
    electorate: Annotated[list[PeerIdText], _SOME]
    proposed_at: Instant

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


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
    try:
        signature = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return is_signed_by(peer_id, _SIGNATURE_DOMAIN + record.canonical(), signature)


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
