"""Did a reducer lie? Others compute parts again after the commit; a lie is published with its proof.

A reducer signs what it made of which parts (`peer.manifest.Statement`), and each sender signs the hashes
of its parts before the first one travels. So whoever holds both can ask the senders for one part,
compute the result again (`peer.reduction`) and compare hashes. Which parts, every member draws for itself,
in secret: no reducer can know.

Some lies show in signed statements alone (`peer.contradiction`): those are looked for in every round.

The evidence holds everything that is needed to check it, so nobody has to believe the accuser. One who
publishes false evidence is not listened to again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, AsyncIterator, Literal  # noqa: UP035 (hivemind reads this hint by its name in typing)

import torch
from pydantic import Field

from coordinator.chain import Chain
from coordinator.errors import NetworkError, RoundError
from coordinator.limits import Recent
from coordinator.membership import TRAINING_PHASES
from coordinator.network import STREAM_PART_BYTES, Network, PeerUnreachable
from coordinator.outgoing import About, describe
from coordinator.records import Record, RecordError, open_signed, parse_json, parse_record
from coordinator.transfer import Piece, WrongPiece, fetch_blob
from peer.accusations import MAX_REMEMBERED, Accusation, Docket, Published, RunRules
from peer.aggregate import needs_gram
from peer.compression import CODECS
from peer.contradiction import (
    MAX_STATEMENTS,
    Contradiction,
    StatementLog,
    UnknownRoundError,
    judge_statements,
)
from peer.manifest import (
    MAX_SIGNED_BYTES,
    Manifest,
    Outgoing,
    Statement,
    figures_hash,
    figures_of,
    split_hashes,
)
from peer.parts import PartGrid
from peer.reduction import BadPartError, checked_part, encode_result, plan_of, reduce_values, residual_hash

logger = logging.getLogger(__name__)

MAX_MEMBERS = 1024  # of a group; to open a signed record takes half a millisecond
# Floors for the process at the other end, which scores the new state meanwhile; size and link come on top.
CALL_FLOOR_SECONDS = 10.0
WINDOW_FLOOR_SECONDS = 6.0  # after a commit: members commit within a second, an audit takes less than that
NUM_ATTEMPTS = 2  # to get one part, or one piece of evidence, from one peer
MAX_GROUPS = 16  # that are remembered: attempts of the last rounds, also those that came to nothing
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class RoundRecord:
    """What a member keeps of a committed round until the audit is over."""

    round: int
    aggregation: str
    screening: str
    outgoing: Outgoing  # my own parts, for those who audit others
    statements: Mapping[str, bytes]  # signed, by reducer
    manifests: Mapping[str, bytes]  # signed, by sender
    residuals_before: Mapping[int, torch.Tensor]  # my error feedback as a reducer, by part
    group: str = ""  # of the attempt that these statements are of


@dataclass(frozen=True)
class Evidence:
    """One part of one reducer, with everything that its result was made of."""

    aggregation: str
    screening: str
    codec: str
    num_values: int
    part: int
    reducer: str
    statements: tuple[bytes, ...]  # signed, of all reducers: the plan needs the figures of each
    manifests: tuple[bytes, ...]  # signed, of all senders that gave one
    parts: tuple[bytes, ...]  # encoded, of the senders that the statement names, in its order
    residual: bytes  # float32, little-endian; empty when there was none


class NotConclusive(Exception):
    """Something is missing, or does not belong together: no judgment."""


def judge(evidence: Evidence, run_digest: str) -> str:
    """Why the reducer lied; empty when it did not. Raises NotConclusive when the evidence is none.

    Pure: the same answer on every peer.
    """
    try:
        return _judge(evidence, run_digest)
    except (RecordError, BadPartError, ValueError, KeyError, IndexError) as error:
        raise NotConclusive(f"the evidence does not hold together: {error}") from error


def _judge(evidence: Evidence, run_digest: str) -> str:
    grid, codec = PartGrid(evidence.num_values), CODECS[evidence.codec]
    statements = _open_statements(evidence, run_digest)
    statement = statements[evidence.reducer]
    manifests = _open_manifests(evidence, run_digest)
    if any((m.round, m.previous) != (statement.round, statement.previous) for m in manifests.values()):
        raise NotConclusive("the manifests are of another round than the statements")
    index = evidence.part - statement.first_part
    results = split_hashes(statement.results)
    _check_completeness(statements, statement, grid, needs_gram(evidence.aggregation, evidence.screening))
    if not 0 <= index < len(results):
        raise NotConclusive("the part is not one of this reducer")
    plan = plan_of(
        evidence.aggregation,
        evidence.screening,
        [report.declared for report in statement.senders],
        [
            manifests[report.peer, report.manifest].norm if report.manifest and report.is_planned else None
            for report in statement.senders
        ],
        [figures for _, s in sorted(statements.items()) if (figures := figures_of(s)) is not None],
    )
    if [report.weight for report in statement.senders] != list(plan.weights):
        return f"the weights of part {evidence.part} are not those of the rule"
    if [report.factor for report in statement.senders] != list(plan.factors):
        return f"the factors of part {evidence.part} are not those of the rule"
    present = [report for report in statement.senders if report.num_parts > index and report.weight != 0]
    if len(present) != len(evidence.parts):
        raise NotConclusive("not the parts of the senders that the statement names")
    values = [
        _sent_part(manifests[report.peer, report.manifest or ""], evidence.part, data, grid)
        for report, data in zip(present, evidence.parts, strict=True)
    ]
    residual = _residual_before(evidence, statement, index)
    result = reduce_values(
        evidence.aggregation,
        values,
        [report.weight for report in present],
        grid.size(evidence.part),
    )
    encoded, after = encode_result(codec, result, residual)
    if hashlib.sha256(encoded).digest() != results[index]:
        return f"the result of part {evidence.part} is not what its senders' parts give"
    claimed = split_hashes(statement.residuals_after)
    if codec.is_lossy and (not claimed or claimed[index] != residual_hash(after)):
        return f"the error feedback of part {evidence.part} is not what its result leaves"
    return ""


def _open_statements(evidence: Evidence, run_digest: str) -> dict[str, Statement]:
    opened = [open_signed(data, Statement, max_bytes=MAX_SIGNED_BYTES) for data in evidence.statements]
    statements = dict(opened)
    origins = {(s.group, s.round, s.previous) for s in statements.values()}
    if len(origins) != 1 or len(statements) != len(opened):
        raise NotConclusive("the statements are of several groups")
    if any(statement.run != run_digest for statement in statements.values()):
        raise NotConclusive("a statement of another run")
    return statements


def _check_completeness(
    statements: Mapping[str, Statement], statement: Statement, grid: PartGrid, is_two_phase: bool
) -> None:
    """Are these all reducers of one group, with the figures that the accused had? Else weights look wrong."""
    senders = [(report.peer, report.declared) for report in statement.senders]
    if any([(r.peer, r.declared) for r in s.senders] != senders for s in statements.values()):
        raise NotConclusive("the statements are about different senders")
    owned = grid.owned([peer for peer, _ in senders])
    if any(
        peer not in owned or range(s.first_part, s.first_part + len(split_hashes(s.results))) != owned[peer]
        for peer, s in statements.items()
    ):
        raise NotConclusive("a statement is not about the parts of its reducer")
    if not is_two_phase:
        return
    told = [figures_hash(s.figures) for _, s in sorted(statements.items())]
    num_reducers = sum(len(parts) > 0 for parts in owned.values())
    if len(told) != num_reducers or split_hashes(statement.told) != told:
        raise NotConclusive("the figures are not those that the reducer was told")


def _open_manifests(evidence: Evidence, run_digest: str) -> dict[tuple[str, str], Manifest]:
    """By author and digest, which the statement names."""
    opened = [open_signed(data, Manifest, max_bytes=MAX_SIGNED_BYTES) for data in evidence.manifests]
    manifests = [manifest for _, manifest in opened]
    if len({(m.round, m.previous) for m in manifests}) != 1:
        raise NotConclusive("the manifests are of several rounds")
    if any(
        (m.run, m.codec, m.num_values) != (run_digest, evidence.codec, evidence.num_values) for m in manifests
    ):
        raise NotConclusive("a manifest of another run")
    return {(author, manifest.digest): manifest for author, manifest in opened}


def _sent_part(manifest: Manifest, part: int, data: bytes, grid: PartGrid) -> torch.Tensor:
    return checked_part(CODECS[manifest.codec], grid, manifest, manifest.part_hashes()[part], part, data)


def _residual_before(evidence: Evidence, statement: Statement, index: int) -> torch.Tensor | None:
    claimed = split_hashes(statement.residuals_before)
    if not claimed or claimed[index] == residual_hash(None):
        return None
    residual = torch.frombuffer(bytearray(evidence.residual), dtype=torch.float32)
    if residual_hash(residual) != claimed[index]:
        raise NotConclusive("the error feedback is not the one that the statement names")
    return residual


# the wire


def to_bytes(evidence: Evidence | Contradiction) -> bytes:
    """A JSON header with its length, then the binary parts one after another."""
    if isinstance(evidence, Contradiction):
        lengths = [len(blob) for blob in evidence.statements]
        return _packed(
            {"kind": "statements", "reducer": evidence.reducer, "statements": lengths}, evidence.statements
        )
    blobs = [*evidence.statements, *evidence.manifests, *evidence.parts, evidence.residual]
    header = {
        "aggregation": evidence.aggregation,
        "screening": evidence.screening,
        "codec": evidence.codec,
        "num_values": evidence.num_values,
        "part": evidence.part,
        "reducer": evidence.reducer,
        "statements": [len(blob) for blob in evidence.statements],
        "manifests": [len(blob) for blob in evidence.manifests],
        "parts": [len(blob) for blob in evidence.parts],
        "residual": len(evidence.residual),
    }
    return _packed(header, blobs)


def _packed(header: Mapping[str, Any], blobs: Sequence[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


class _Header(Record):
    aggregation: str
    screening: str
    codec: str
    num_values: int
    part: int
    reducer: str
    statements: Annotated[list[int], Field(max_length=MAX_MEMBERS)]
    manifests: Annotated[list[int], Field(max_length=MAX_MEMBERS)]
    parts: Annotated[list[int], Field(max_length=MAX_MEMBERS)]
    residual: int


_Length = Annotated[int, Field(ge=0, le=MAX_SIGNED_BYTES)]  # of a signed statement


class _StatementsHeader(Record):
    kind: Literal["statements"]
    reducer: str
    statements: Annotated[list[_Length], Field(max_length=MAX_STATEMENTS)]


def from_bytes(data: bytes | bytearray) -> Evidence | Contradiction:
    """Inverse of `to_bytes`. Raises RecordError."""
    if len(data) < _LENGTH.size:
        raise RecordError("the evidence is cut short")
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    fields = parse_json(bytes(data[_LENGTH.size : start]), max_bytes=MAX_SIGNED_BYTES)
    if isinstance(fields, dict) and "kind" in fields:
        short = parse_record(fields, _StatementsHeader)
        return Contradiction(short.reducer, tuple(_unpacked(data, start, short.statements)))
    header = parse_record(fields, _Header)
    lengths = [*header.statements, *header.manifests, *header.parts, header.residual]
    blobs = _unpacked(data, start, lengths)
    first, second = len(header.statements), len(header.statements) + len(header.manifests)
    return Evidence(
        aggregation=header.aggregation,
        screening=header.screening,
        codec=header.codec,
        num_values=header.num_values,
        part=header.part,
        reducer=header.reducer,
        statements=tuple(blobs[:first]),
        manifests=tuple(blobs[first:second]),
        parts=tuple(blobs[second:-1]),
        residual=blobs[-1],
    )


def _unpacked(data: bytes | bytearray, start: int, lengths: Sequence[int]) -> list[bytes]:
    if any(length < 0 for length in lengths) or start + sum(lengths) != len(data):
        raise RecordError("the evidence is not as long as it says")
    blobs = []
    for length in lengths:
        blobs.append(bytes(data[start : start + length]))
        start += length
    return blobs


# the service


Slack = Callable[[str, int], float]  # seconds that so many bytes may take to or from a peer, as measured
Convict = Callable[[str, str, int], None]  # reducer, why, round: once for each pair, in the network's thread


@dataclass
class AuditTraffic:
    """Counted apart from the all-reduce."""

    num_bytes_received: int = 0
    num_bytes_sent: int = 0
    num_parts: int = 0
    num_not_conclusive: int = 0


class AuditService:
    """Answers auditors, audits others, and checks what others publish."""

    def __init__(
        self,
        network: Network,
        run_digest: str,
        rules: RunRules,
        *,
        convict: Convict,
        live_peers: Callable[[], Sequence[str]],
        phase_of: Callable[[str], str | None],
        chain: Callable[[], Chain],
        slack: Slack,
    ) -> None:
        """`phase_of`: what a peer is doing, None when it is not here.

        `slack`: what the link to a peer adds to every deadline, for a number of bytes.
        """
        self._network, self._run_digest, self._rules = network, run_digest, rules
        self._slack = slack
        self._convict, self._live_peers, self._chain = convict, live_peers, chain
        self._phase_of = phase_of
        self._statements = StatementLog()
        self._record: RoundRecord | None = None
        self._published, self._docket = Published(), Docket()
        self._is_checking = False
        self._groups: deque[tuple[int, frozenset[str]]] = deque(maxlen=MAX_GROUPS)  # round, members
        self._convicted: Recent[tuple[str, int]] = Recent(MAX_REMEMBERED)  # reducers, and their rounds
        self._guilty: Recent[str] = Recent(MAX_REMEMBERED)  # the same reducers
        self._strangers = (0, 0)  # after which commit, and how many of no commit were convicted since
        self.traffic = AuditTraffic()

    def start(self) -> None:
        self._network.on_stream("audit", self._on_audit)
        self._network.on_call("accuse", self._on_accuse)

    def saw(self, round_: int, members: Sequence[str]) -> None:
        """A group of which I am, whatever comes of it."""
        self._groups.append((round_, frozenset(members)))

    def keep(self, record: RoundRecord) -> None:
        """Of the round that was just committed; answers auditors until a while after the own `audit`."""
        self._record = record
        self.traffic = AuditTraffic()

    def _window_seconds(self, record: RoundRecord, num_parts: int) -> float:
        """How long to answer auditors: as long as the slowest of them may need for what it asks of me."""
        num_bytes = num_parts * record.outgoing.codec.size_bytes(record.outgoing.grid.part_values)
        others = {*record.statements, *record.manifests} - {self._network.peer_id}
        return WINDOW_FLOOR_SECONDS + max((self._slack(peer, num_bytes) for peer in others), default=0.0)

    async def _forget_later(self, record: RoundRecord, num_parts: int) -> None:
        await asyncio.sleep(self._window_seconds(record, num_parts))
        if self._record is record:
            self.forget()

    def forget(self) -> None:
        """Frees the parts: the next finetuning needs the memory."""
        self._record = None

    def open_evidence(self, key: str) -> memoryview | None:
        data = self._published.get(key)
        return None if data is None else memoryview(data)

    async def accuse(self, contradiction: Contradiction) -> None:
        """Publish two or more statements that do not go together; nothing happens where they do."""
        try:
            why, round_ = judge_statements(contradiction, self._run_digest, self._chain())
        except (UnknownRoundError, RecordError) as error:
            logger.info("statements of %s not judged: %s", contradiction.reducer[-8:], error)
            return
        if why:
            self._found_guilty(contradiction, why, round_)

    def know(self, reducer: str) -> None:
        """It was convicted before a restart: its accusations are not heard."""
        self._guilty.add(reducer)

    async def audit(self, num_parts: int, rng: random.Random) -> None:
        """Compute `num_parts` parts of others again; whoever lied is published and convicted."""
        record = self._record
        if record is None:
            return
        self._network.create_task(self._forget_later(record, num_parts))
        await self._audit_statements(record)
        own = self._network.peer_id
        statements = {
            m: open_signed(s, Statement, max_bytes=MAX_SIGNED_BYTES)[1] for m, s in record.statements.items()
        }
        candidates = [
            (member, part)
            for member, statement in sorted(statements.items())
            if member != own
            for part in range(
                statement.first_part, statement.first_part + len(split_hashes(statement.results))
            )
        ]
        for member, part in rng.sample(candidates, min(num_parts, len(candidates))):
            await self._audit_part(record, statements[member], member, part)

    async def _audit_statements(self, record: RoundRecord) -> None:
        """Whether the error feedback of every part is what the reducer's last committed statement left."""
        for member, signed in sorted(record.statements.items()):
            if member != self._network.peer_id:
                found = self._statements.contradiction(member, signed, self._run_digest, self._chain())
                if found is not None:
                    await self.accuse(found)
        self._statements.keep(record.group, record.statements)

    async def _audit_part(self, record: RoundRecord, statement: Statement, member: str, part: int) -> None:
        try:
            evidence = await self._collect(record, statement, member, part)
            why = judge(evidence, self._run_digest)
        except (NotConclusive, PeerUnreachable) as error:
            self.traffic.num_not_conclusive += 1
            logger.info("audit of %s, part %d: %s", member[-8:], part, error)
            return
        self.traffic.num_parts += 1
        if why:
            self._found_guilty(evidence, why, record.round)

    async def _collect(self, record: RoundRecord, statement: Statement, member: str, part: int) -> Evidence:
        index = part - statement.first_part
        present = [r for r in statement.senders if r.num_parts > index and r.weight != 0]
        parts = [await self._part_of(record, report.peer, part, "part") for report in present]
        before = split_hashes(statement.residuals_before)
        has_residual = bool(before) and before[index] != residual_hash(None)
        residual = await self._part_of(record, member, part, "residual") if has_residual else b""
        return Evidence(
            aggregation=record.aggregation,
            screening=record.screening,
            codec=record.outgoing.codec.name,
            num_values=record.outgoing.grid.num_values,
            part=part,
            reducer=member,
            statements=tuple(record.statements.values()),
            manifests=tuple(record.manifests.values()),
            parts=tuple(parts),
            residual=residual,
        )

    async def _part_of(self, record: RoundRecord, peer_id: str, part: int, what: str) -> bytes:
        if peer_id == self._network.peer_id:
            return self._own(record, part, what)
        body = {"run": self._run_digest, "round": record.round, "part": part, "what": what}
        num_values = record.outgoing.grid.size(part)
        num_bytes = record.outgoing.codec.size_bytes(num_values) if what == "part" else 4 * num_values
        data = b""
        for _ in range(NUM_ATTEMPTS):  # one stream in a thousand ends before its first byte, without an error
            if len(data) != num_bytes:
                data = await self._ask(peer_id, body, num_bytes)
        return data

    async def _ask(self, peer_id: str, body: dict[str, Any], max_bytes: int) -> bytes:
        data = bytearray()
        limit = CALL_FLOOR_SECONDS + self._slack(peer_id, min(max_bytes, STREAM_PART_BYTES))
        async for chunk in self._network.stream(peer_id, "audit", body, timeout_seconds=limit):
            data += chunk
            if len(data) > max_bytes:
                raise NotConclusive(f"{peer_id[-8:]} sent more than a part")
        self.traffic.num_bytes_received += len(data)
        return bytes(data)

    def _own(self, record: RoundRecord, part: int, what: str) -> bytes:
        if what == "part":
            return bytes(record.outgoing.parts[part])
        residual = record.residuals_before.get(part)
        if residual is None:
            raise RecordError("no such error feedback here")
        return residual.numpy().tobytes()

    async def _on_audit(self, _peer_id: str, body: Any) -> AsyncIterator[bytes]:
        record = self._record
        if not isinstance(body, dict) or record is None or body.get("run") != self._run_digest:
            raise RecordError("nothing to audit here now")
        part, what = body.get("part"), body.get("what")
        if body.get("round") != record.round or type(part) is not int or what not in ("part", "residual"):
            raise RecordError("not held here")
        if not 0 <= part < record.outgoing.grid.num_parts:
            raise RecordError("there is no such part")
        data = self._own(record, part, what)
        bounds = record.outgoing.grid.bounds(part)
        describe(About(kind=f"audit {what}", round=record.round, values=bounds))
        self.traffic.num_bytes_sent += len(data)
        for start in range(0, len(data), STREAM_PART_BYTES):
            yield data[start : start + STREAM_PART_BYTES]

    # accusations

    def _publish(self, evidence: Evidence | Contradiction, round_: int) -> None:
        """By whoever was convinced, so that nobody can show it to some members only."""
        data = to_bytes(evidence)
        accusation = Accusation(
            run=self._run_digest,
            evidence=self._published.add(data),
            size_bytes=len(data),
            reducer=evidence.reducer,
            round=round_,
        )
        for peer_id in self._live_peers():
            self._network.create_task(self._announce(peer_id, accusation))

    async def _announce(self, peer_id: str, accusation: Accusation) -> None:
        body = accusation.model_dump(mode="json")
        limit = CALL_FLOOR_SECONDS + self._slack(peer_id, 0)
        try:
            await self._network.call(peer_id, "accuse", body, timeout_seconds=limit)
        except PeerUnreachable as error:
            logger.info("evidence not announced: %s", error)

    async def _on_accuse(self, peer_id: str, body: Any) -> bytes:
        accusation = parse_record(body, Accusation)
        size_is_right = 0 < accusation.size_bytes <= self._rules.max_evidence_bytes
        if accusation.run != self._run_digest or not size_is_right:
            raise RecordError("of another run, or too large")
        if (accusation.reducer, accusation.round) in self._convicted:
            return b"{}"
        is_in_cohort = peer_id in self._chain().cohort
        if peer_id in self._guilty or not (is_in_cohort or self._phase_of(peer_id)):
            raise RecordError("only members accuse")
        if not self._can_be_convicted(accusation.reducer, accusation.round):
            raise RecordError("the accused took no part here")
        self._docket.add(peer_id, accusation, comes_first=is_in_cohort, now=time.monotonic())
        if not self._is_checking:
            self._check_next()
        return b"{}"

    def _can_be_convicted(self, reducer: str, round_: int) -> bool:
        """Whether a verdict on this one could matter: anybody can make keys, and statements signed by them.

        A failed attempt leaves no commit. I may have been in its group; who was not still has to exclude
        whom the others exclude, if it counts that peer: a member of an earlier round, or one that trains now.
        Who is out already is out: then only the round counts that might be undone because of it.
        """
        chain = self._chain()
        commits = chain.commits[max(0, round_ - 1) : round_]
        took_part = any(reducer in signed.commit.cohort for signed in commits) or any(
            round_ == seen and reducer in members for seen, members in self._groups
        )
        if reducer in self._guilty:
            return took_part and round_ >= chain.round
        return took_part or reducer in chain.members or self._is_new_trainer(reducer)

    def _is_new_trainer(self, reducer: str) -> bool:
        """Of those, as many are convicted between two commits as a round has members."""
        in_round, num_convicted = self._strangers
        is_full = in_round == self._chain().round and num_convicted >= self._rules.max_peers
        return self._phase_of(reducer) in TRAINING_PHASES and not is_full

    def _check_next(self) -> None:
        """One after another: the evidence of one accuser at a time is in memory."""
        waiting = self._docket.take()
        self._is_checking = waiting is not None
        if waiting is not None:
            task = self._network.create_task(self._check(*waiting))
            task.add_done_callback(lambda task: None if task.cancelled() else self._check_next())

    async def _check(self, accuser: str, accusation: Accusation) -> None:
        if (accusation.reducer, accusation.round) in self._convicted:
            return  # somebody else has shown it meanwhile
        try:
            evidence, why = await self._judged(accusation, await self._fetch(accuser, accusation))
        except (NotConclusive, RecordError) as error:
            self._docket.lied(accuser)
            logger.warning("%s published false evidence: %s; not listening to it again", accuser[-8:], error)
        except UnknownRoundError as error:
            self._docket.failed(accuser, time.monotonic())
            logger.info("evidence of %s not judged: %s", accuser[-8:], error)
        except (NetworkError, RoundError, TimeoutError) as error:
            self._docket.failed(accuser, time.monotonic())
            logger.warning("evidence of %s not to be had: %s", accuser[-8:], str(error) or "too slow")
        else:
            if self._can_be_convicted(accusation.reducer, accusation.round):
                self._found_guilty(evidence, why, accusation.round)

    async def _fetch(self, accuser: str, accusation: Accusation) -> bytearray:
        """Raises NotConclusive where it is not what was announced, NetworkError or TimeoutError where it does
        not come.
        """
        limit = CALL_FLOOR_SECONDS + self._slack(accuser, accusation.size_bytes)
        async with asyncio.timeout(limit):  # other accusations wait meanwhile
            return await self._fetch_evidence(accuser, accusation, NUM_ATTEMPTS)

    async def _fetch_evidence(self, accuser: str, accusation: Accusation, num_attempts: int) -> bytearray:
        piece = Piece(0, accusation.size_bytes, accusation.evidence)
        try:
            key = f"evidence/{accusation.evidence}"
            return await fetch_blob(self._network, self._run_digest, key, [piece], [accuser])
        except NetworkError as error:
            if isinstance(error.__cause__, WrongPiece):
                raise NotConclusive("the evidence is not what was announced") from error
            if num_attempts == 1:
                raise
        return await self._fetch_evidence(accuser, accusation, num_attempts - 1)

    async def _judged(self, accusation: Accusation, data: bytearray) -> tuple[Evidence | Contradiction, str]:
        """In another thread: the others' votes must not wait. Raises NotConclusive where nobody lied."""
        chain = self._chain()
        evidence, why, round_ = await asyncio.to_thread(_judged, data, self._rules, self._run_digest, chain)
        if not why:
            raise NotConclusive("the reducer did what it says")
        if (evidence.reducer, round_) != (accusation.reducer, accusation.round):
            raise NotConclusive("the evidence is about another reducer or round than was announced")
        return evidence, why

    def _found_guilty(self, evidence: Evidence | Contradiction, why: str, round_: int) -> None:
        reducer = evidence.reducer
        if (reducer, round_) not in self._convicted:
            self._count_stranger(reducer)
            self._convicted.add((reducer, round_))
            self._guilty.add(reducer)
            logger.warning("reducer %s lied: %s", reducer[-8:], why)
            self._publish(evidence, round_)
            self._convict(reducer, why, round_)

    def _count_stranger(self, reducer: str) -> None:
        chain, (in_round, num_convicted) = self._chain(), self._strangers
        if reducer not in chain.members:
            self._strangers = chain.round, 1 + (num_convicted if in_round == chain.round else 0)


def _judged(
    data: bytearray, rules: RunRules, run_digest: str, chain: Chain
) -> tuple[Evidence | Contradiction, str, int]:
    """What it is, why it convicts ("" when it does not), and of which round."""
    evidence = from_bytes(data)
    if isinstance(evidence, Contradiction):
        why, round_ = judge_statements(evidence, run_digest, chain)
        return evidence, why, round_
    found = (evidence.aggregation, evidence.screening, evidence.codec, evidence.num_values)
    if found != (rules.aggregation, rules.screening, rules.codec, rules.num_values):
        raise NotConclusive("the evidence is of another rule, codec or model")
    why = judge(evidence, run_digest)
    return evidence, why, _open_statements(evidence, run_digest)[evidence.reducer].round
