"""Does an audit find every reducer that lied, convict nobody else, and convince those who were not there?"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agreement import Group
from coordinator.chain import Chain
from coordinator.identity import Identity
from coordinator.network import Network, PeerUnreachable
from coordinator.records import RecordError, SignedCommit, open_signed, sign
from coordinator.transfer import fetch_blob, serve_blobs
from peer import allreduce, audit, reduction
from peer.accusations import Docket, Published, RunRules
from peer.allreduce import Reduced, _Reducer
from peer.audit import AuditService, Evidence, NotConclusive, RoundRecord, from_bytes, judge, to_bytes
from peer.compression import CODECS
from peer.contradiction import Contradiction, StatementLog
from peer.manifest import (
    MAX_SIGNED_BYTES,
    Manifest,
    Outgoing,
    SenderReport,
    Statement,
    join_hashes,
    split_hashes,
)
from peer.parts import PartGrid
from tests.exchanges import NUM_PEERS, RUN, SIZE, Swarm, deltas, on_member, running_swarm
from tests.fakes import CALL_SECONDS, hash_of, identity, make_commit, make_spec

GRID = PartGrid(SIZE)
RULES = (("mean", "none"), ("median", "norm"), ("centered_clipping", "none"), ("mean", "norm_cosine"))
VICTIM = 1


@dataclasses.dataclass
class Audits:
    """One audit service for each peer of a swarm, and whom each has convicted."""

    swarm: Swarm
    services: list[AuditService]
    convicted: list[list[tuple[str, str, int]]]
    chain: list[Chain] = dataclasses.field(default_factory=lambda: [Chain(make_spec())])  # of all, the last
    slack: Callable[[str, int], float] = lambda _peer, _num_bytes: 0.0  # what links add to deadlines
    phases: dict[str, str] = dataclasses.field(default_factory=dict)  # of who is here, as all see it

    def commit(self, group: Group) -> None:
        """The next round of the chain that all services see: of this group. Nobody checks who signed."""
        chain = self.chain[-1]
        commit = make_commit(chain, ["a"], group=group.group_id.hex()).model_copy(
            update={"contributors": list(group.contributions)}
        )
        self.chain.append(Chain(chain.spec, (*chain.commits, SignedCommit(commit=commit, signatures={}))))

    def keep(
        self,
        results: Sequence[Reduced],
        outgoing: Sequence[Outgoing],
        rules: tuple[str, str],
        *,
        round: int = 1,
        residuals: Sequence[Mapping[int, torch.Tensor]] | None = None,
    ) -> list[RoundRecord]:
        """What every member keeps of a committed round; its auditors know that it is of these rules."""
        before = residuals or [{} for _ in results]
        records = [
            RoundRecord(round, *rules, own, result.statements, result.manifests, feedback, _group_in(result))
            for own, result, feedback in zip(outgoing, results, before, strict=True)
        ]
        for service, record in zip(self.services, records, strict=True):
            service._rules = run_rules(rules, record.outgoing.codec.name)
            service._record, service.traffic = None, type(service.traffic)()
            service.keep(record)
        return records

    def audit(self, index: int, num_parts: int = 100) -> None:
        """All parts of the others, unless told otherwise."""
        network, service = self.swarm.networks[index], self.services[index]
        network.run(service.audit(num_parts, random.Random(index)), timeout_seconds=CALL_SECONDS)

    def collect(self, index: int, record: RoundRecord, member: str, part: int) -> Evidence:
        statement = statement_in(record.statements[member])
        network = self.swarm.networks[index]
        return network.run(
            self.services[index]._collect(record, statement, member, part), timeout_seconds=CALL_SECONDS
        )

    def settle(self) -> None:
        """Until no accusation is on its way, and nobody checks one any more."""

        def is_announcing() -> bool:
            coroutines = [task.get_coro() for task in asyncio.all_tasks()]
            return any(getattr(c, "__name__", "") == AuditService._announce.__name__ for c in coroutines)

        async def checked(service: AuditService) -> None:
            while service._is_checking or is_announcing():
                await asyncio.sleep(0.01)

        for _ in range(2):  # what one announces, another one checks, and may announce in turn
            for network, service in zip(self.swarm.networks, self.services, strict=True):
                network.run(checked(service), timeout_seconds=CALL_SECONDS)

    def wait_for_convictions(self, indices: Sequence[int]) -> None:
        """An accusation is on its way to the others when the audit that makes it ends."""
        ends_at = time.monotonic() + CALL_SECONDS
        while time.monotonic() < ends_at and not all(self.convicted[index] for index in indices):
            time.sleep(0.01)
        self.settle()

    def forget(self) -> None:
        for service, convicted in zip(self.services, self.convicted, strict=True):
            service._record = None
            service._convicted.clear()
            service._guilty.clear()
            service._docket, service._published = Docket(), Published()
            service._groups.clear()
            service._strangers = (0, 0)
            service._statements = StatementLog()
            convicted.clear()
        del self.chain[1:]


def run_rules(rules: tuple[str, str] = ("mean", "none"), codec: str = "fp32") -> RunRules:
    return RunRules(*rules, codec, SIZE, NUM_PEERS)


def _group_in(result: Reduced) -> str:
    return statement_in(next(iter(result.statements.values()))).group


def statement_in(signed: bytes) -> Statement:
    return open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)[1]


@pytest.fixture(scope="module")
def started() -> Iterator[Audits]:
    with running_swarm() as swarm:
        convicted: list[list[tuple[str, str, int]]] = [[] for _ in swarm.networks]
        services: list[AuditService] = []
        audits = Audits(swarm, services, convicted)
        audits.phases.update(dict.fromkeys(swarm.peer_ids, "ready"))
        for network, guilty in zip(swarm.networks, convicted, strict=True):
            others = [peer for peer in swarm.peer_ids if peer != network.peer_id]
            service = AuditService(
                network,
                RUN,
                run_rules(),
                convict=_recorder(guilty),
                live_peers=others.copy,
                phase_of=audits.phases.get,
                chain=lambda: audits.chain[-1],
                slack=lambda peer, num_bytes: audits.slack(peer, num_bytes),
            )
            service.start()
            serve_blobs(network, RUN, _opener(service))
            services.append(service)
        yield audits


def _recorder(guilty: list[tuple[str, str, int]]) -> Callable[[str, str, int], None]:
    return lambda reducer, why, round_: guilty.append((reducer, why, round_))


def _opener(service: AuditService) -> Callable[[str], memoryview | None]:
    return lambda key: service.open_evidence(key.removeprefix("evidence/"))


@pytest.fixture
def audits(started: Audits) -> Iterator[Audits]:
    yield started
    started.settle()
    started.forget()
    started.swarm.settle()


def reduced(
    audits: Audits, codec: str, rules: tuple[str, str], values: Sequence[torch.Tensor] | None = None
) -> tuple[Group, list[Outgoing], list[Reduced]]:
    group, outgoing = audits.swarm.group(), audits.swarm.prepare(values or deltas(), codec)
    results = audits.swarm.reduce(group, outgoing, aggregation=rules[0], screening=rules[1])
    return group, outgoing, results


# Honest rounds.


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_an_honest_round_convicts_nobody(audits: Audits, rules: tuple[str, str], codec: str) -> None:
    values = deltas()
    values[2] = values[2] * 50.0  # left out, where there is screening
    _, outgoing, results = reduced(audits, codec, rules, values)
    audits.keep(results, outgoing, rules)
    audits.audit(0)
    traffic = audits.services[0].traffic
    owned = audits.swarm.owned(audits.swarm.group())
    num_others = GRID.num_parts - len(owned[audits.swarm.peer_ids[0]])
    assert (traffic.num_parts, traffic.num_not_conclusive) == (num_others, 0)
    assert traffic.num_bytes_received > 0
    audits.settle()
    assert audits.convicted == [[]] * NUM_PEERS


def test_a_sample_is_as_large_as_asked(audits: Audits) -> None:
    _, outgoing, results = reduced(audits, "fp32", ("mean", "none"))
    audits.keep(results, outgoing, ("mean", "none"))
    audits.audit(0, num_parts=2)
    assert audits.services[0].traffic.num_parts == 2
    assert audits.services[0].traffic.num_bytes_received <= 2 * 3 * 4096  # three of four parts travel
    sent = sum(service.traffic.num_bytes_sent for service in audits.services)
    assert sent == audits.services[0].traffic.num_bytes_received


def test_who_has_forgotten_audits_nothing_and_answers_nothing(
    audits: Audits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the window the parts are free; one who still asks gets no answer, and convicts nobody."""
    _, outgoing, results = reduced(audits, "fp32", ("mean", "none"))
    monkeypatch.setattr(audit, "WINDOW_FLOOR_SECONDS", 0.0)
    records = audits.keep(results, outgoing, ("mean", "none"))
    for index in range(NUM_PEERS):
        audits.audit(index, 0)  # the window of each begins with its own audit
    ends_at = time.monotonic() + CALL_SECONDS
    while any(service._record is not None for service in audits.services):
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    audits.audit(0)
    assert audits.services[0].traffic.num_not_conclusive == 0  # it did not ask
    monkeypatch.undo()
    audits.services[0].keep(records[0])
    audits.audit(0)
    assert audits.services[0].traffic.num_parts == 0
    assert audits.services[0].traffic.num_not_conclusive > 0
    assert audits.convicted == [[]] * NUM_PEERS


def test_deadlines_follow_from_size_and_link(audits: Audits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link on which 1000 bytes may take a second: a part of 4 kB more than the 10 s for the process."""
    _, outgoing, results = reduced(audits, "fp32", ("mean", "none"))
    audits.keep(results, outgoing, ("mean", "none"))
    monkeypatch.setattr(audits, "slack", lambda _, num_bytes: num_bytes / 1000)
    limits: list[float] = []
    stream = Network.stream

    def noted(self: Network, peer_id: str, method: str, body: object, *, timeout_seconds: float) -> Any:
        limits.append(timeout_seconds)
        return stream(self, peer_id, method, body, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(Network, "stream", noted)
    audits.audit(0, 1)
    part_bytes = outgoing[0].codec.size_bytes(GRID.part_values)
    assert set(limits) <= {10.0 + GRID.size(part) * 4 / 1000 for part in range(GRID.num_parts)}
    assert limits
    record = audits.services[0]._record
    assert record is not None
    assert audits.services[0]._window_seconds(record, 3) == 6.0 + 3 * part_bytes / 1000


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_rounds_with_error_feedback_can_be_audited(audits: Audits, codec: str) -> None:
    """The residual of each part comes from its reducer, and its statement of the round names it."""
    residuals: list[Mapping[int, torch.Tensor]] = [{} for _ in range(NUM_PEERS)]
    for round_ in (1, 2, 3):
        outgoing = prepared(audits, codec, round_)
        group = audits.swarm.group(round=round_)
        results = audits.swarm.reduce(group, outgoing, residuals=residuals)
        audits.commit(group)
        records = audits.keep(results, outgoing, ("mean", "none"), round=round_, residuals=residuals)
        audits.audit(0)
        traffic = audits.services[0].traffic
        assert traffic.num_not_conclusive == 0
        assert traffic.num_parts >= 7
        statement = statement_in(records[0].statements[audits.swarm.peer_ids[1]])
        assert (statement.residuals_before != "") == (round_ > 1)
        residuals = [result.residuals for result in results]
    audits.settle()
    assert audits.convicted == [[]] * NUM_PEERS


def prepared(audits: Audits, codec: str, round_: int) -> list[Outgoing]:
    """Contributions that start from the tip of the chain."""
    return audits.swarm.prepare(deltas(seed=round_), codec, round=round_, previous=audits.chain[-1].tip)


# Liars.


def test_a_reducer_that_invents_its_feedback_is_convicted_by_its_signatures(audits: Audits) -> None:
    """Its result of round 2 is what its parts and the feedback give that it names: no part shows the lie."""
    residuals: list[Mapping[int, torch.Tensor]] = [{} for _ in range(NUM_PEERS)]
    for round_ in (1, 2):
        outgoing = prepared(audits, "int8", round_)
        group = audits.swarm.group(round=round_)
        results = audits.swarm.reduce(group, outgoing, residuals=residuals)
        audits.commit(group)
        records = audits.keep(results, outgoing, ("mean", "none"), round=round_, residuals=residuals)
        if round_ == 1:
            for index in range(NUM_PEERS):
                audits.audit(index, num_parts=0)
            residuals = [dict(result.residuals) for result in results]
            residuals[2] = {}  # it has restarted without its checkpoint: that is honest
            part = min(residuals[VICTIM])
            residuals[VICTIM] = {**residuals[VICTIM], part: residuals[VICTIM][part] * 2.0}
    liar = group.members[VICTIM]
    assert judge(audits.collect(0, records[0], liar, part), RUN) == ""
    audits.audit(0, num_parts=0)
    audits.wait_for_convictions((0, 2, 3))
    for index in (0, 2, 3):
        [(reducer, why, round_)] = audits.convicted[index]
        assert (reducer, round_) == (liar, 2)
        assert why == f"its error feedback of part {part} is not what its last committed result left"
    assert all(not service._docket.liars for service in audits.services)


def test_statements_that_go_together_are_no_accusation(audits: Audits) -> None:
    """Who publishes them is not heard again; of a chain that nobody here has, it only is not believed."""
    _, _, results = reduced(audits, "fp32", ("mean", "none"))
    liar = audits.swarm.peer_ids[VICTIM]
    statement = results[0].statements[liar]
    accuse(audits, 3, to_bytes(Contradiction(liar, (statement,))))
    assert [bool(service._docket.liars) for service in audits.services] == [
        False
    ] * NUM_PEERS  # another chain
    assert [len(service._docket._pauses) for service in audits.services] == [1, 1, 1, 0]  # asks again later
    for service in audits.services:
        service._docket = Docket()
    signed = resigned(statement, audits.swarm.identities[VICTIM], previous=audits.chain[-1].tip)
    accuse(audits, 3, to_bytes(Contradiction(liar, (signed, signed))))
    assert [bool(service._docket.liars) for service in audits.services] == [True, True, True, False]
    other = resigned(signed, audits.swarm.identities[VICTIM], results=join_hashes(bytes(32 * 3)))
    accuse(audits, 2, to_bytes(Contradiction(liar, (signed, other))))
    assert audits.convicted[0] == [(liar, "it told two members different results", 1)]


def test_who_is_convinced_tells_the_others(audits: Audits) -> None:
    """Else one could convince half of them, who would want a roll-back to which the rest never agrees."""
    _, _, results = reduced(audits, "fp32", ("mean", "none"))
    liar, key = audits.swarm.peer_ids[VICTIM], audits.swarm.identities[VICTIM]
    signed = resigned(results[0].statements[liar], key, previous=audits.chain[-1].tip)
    other = resigned(signed, key, results=join_hashes(bytes(32 * 3)))
    accuse(audits, 2, to_bytes(Contradiction(liar, (signed, other))), audits.swarm.peer_ids[:1])
    verdict = [(liar, "it told two members different results", 1)]
    ends_at = time.monotonic() + CALL_SECONDS
    while any(found != verdict for found in audits.convicted[:3]):
        assert time.monotonic() < ends_at, audits.convicted
        time.sleep(0.05)


def test_evidence_of_too_many_statements_is_not_opened() -> None:
    with pytest.raises(RecordError, match="statements"):
        from_bytes(to_bytes(Contradiction("a", (b"1",) * 6)))


def resigned(signed: bytes, author: Identity, **changes: Any) -> bytes:
    return sign(Statement.model_validate({**statement_in(signed).model_dump(), **changes}), author).to_bytes()


def lie_about(monkeypatch: pytest.MonkeyPatch, peer_id: str, part: int) -> None:
    """A reducer that adds 1e-3 to one part before it is encoded, and signs what it sends."""
    encode = reduction.encode_result
    lying_threads: set[int] = set()  # each network has its own

    def reduce_part(original: Any, self: _Reducer, which: int) -> Any:
        if which == part:
            lying_threads.add(threading.get_ident())
        try:
            return original(self, which)
        finally:
            lying_threads.discard(threading.get_ident())

    def encode_lie(codec: Any, values: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return encode(codec, values + 1e-3 if threading.get_ident() in lying_threads else values, residual)

    monkeypatch.setattr(allreduce, "encode_result", encode_lie)
    on_member(monkeypatch, _Reducer, "_reduce_part", peer_id, reduce_part)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_lying_reducer_is_found_and_everybody_convinced(
    audits: Audits, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    group = audits.swarm.group()
    liar = group.members[VICTIM]
    part = audits.swarm.owned(group)[liar].start + 1
    lie_about(monkeypatch, liar, part)
    outgoing = audits.swarm.prepare(deltas(), codec)
    results = audits.swarm.reduce(group, outgoing)
    assert len({result.flat.numpy().tobytes() for result in results}) == 1  # so it was committed
    audits.keep(results, outgoing, ("mean", "none"))
    audits.audit(0)
    honest = [index for index in range(NUM_PEERS) if index != VICTIM]
    audits.wait_for_convictions(honest)
    for index in honest:
        [(reducer, why, round_)] = audits.convicted[index]
        assert (reducer, round_) == (liar, 1)
        assert f"the result of part {part} is not what its senders' parts give" in why
    assert all(not service._docket.liars for service in audits.services)


def test_one_lie_is_found_within_the_rounds_that_the_sample_predicts(
    audits: Audits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reducer lies in one of its parts, and each of the three others computes one part again."""
    group = audits.swarm.group()
    owned, liar = audits.swarm.owned(group), group.members[VICTIM]
    lie_about(monkeypatch, liar, owned[liar].start + 1)
    outgoing = audits.swarm.prepare(deltas(), "fp32")
    results = audits.swarm.reduce(group, outgoing)
    honest = [index for index in range(NUM_PEERS) if index != VICTIM]
    num_parts = sum(len(parts) for parts in owned.values())
    misses = [1 - 1 / (num_parts - len(owned[group.members[index]])) for index in honest]
    caught = 1 - math.prod(misses)  # in a round
    assert 0.1 < caught < 0.5
    limit = math.ceil(math.log(1e-9) / math.log(1 - caught))
    candidates = {
        index: [(m, p) for m in sorted(owned) if m != group.members[index] for p in owned[m]]
        for index in honest
    }
    for trial in range(6):
        for round_ in range(1, limit + 1):
            audits.keep(results, outgoing, ("mean", "none"))
            drawn = []
            for index in honest:
                seed = f"{trial} {round_} {index}"
                drawn += random.Random(seed).sample(candidates[index], 1)
                audit = audits.services[index].audit(1, random.Random(seed))
                audits.swarm.networks[index].run(audit, timeout_seconds=CALL_SECONDS)
                assert audits.services[index].traffic.num_parts <= 1
            is_drawn = (liar, owned[liar].start + 1) in drawn
            assert any(audits.convicted) == is_drawn  # when one of three draws that part, and not before
            if is_drawn:
                break
        else:
            pytest.fail(f"not found in {limit} rounds")
        audits.wait_for_convictions(honest)  # else one that is on its way would count in the next trial
        audits.forget()


def test_evidence_convinces_one_who_kept_nothing(audits: Audits, monkeypatch: pytest.MonkeyPatch) -> None:
    group = audits.swarm.group()
    liar = group.members[VICTIM]
    part = audits.swarm.owned(group)[liar].start
    lie_about(monkeypatch, liar, part)
    outgoing = audits.swarm.prepare(deltas())
    results = audits.swarm.reduce(group, outgoing)
    records = audits.keep(results, outgoing, ("mean", "none"))
    evidence = audits.collect(0, records[0], liar, part)
    received = from_bytes(to_bytes(evidence))
    assert isinstance(received, Evidence)
    assert "not what its senders' parts give" in judge(received, RUN)
    honest_part = part + 1
    assert judge(audits.collect(0, records[0], liar, honest_part), RUN) == ""


def accuse(
    audits: Audits, accuser: int, evidence: bytes, peer_ids: Sequence[str] | None = None, **changes: Any
) -> list[BaseException | None]:
    """Publish as evidence whatever it is; what each of the others, or of `peer_ids`, answered."""
    service, network = audits.services[accuser], audits.swarm.networks[accuser]
    body = {
        "run": RUN,
        "evidence": service._published.add(evidence),
        "size_bytes": len(evidence),
        "reducer": audits.swarm.peer_ids[VICTIM],
        "round": 1,
        **changes,
    }
    answers = [
        network.submit(network.call(peer, "accuse", body, timeout_seconds=CALL_SECONDS))
        for peer in peer_ids or audits.swarm.peer_ids
        if peer != network.peer_id
    ]
    errors = [answer.exception(CALL_SECONDS) for answer in answers]
    audits.settle()
    return errors


@pytest.mark.parametrize("kind", ["honest", "nonsense", "other rules", "other codec", "other model"])
def test_who_publishes_false_evidence_is_not_heard_again(
    audits: Audits, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    group = audits.swarm.group()
    liar = group.members[VICTIM]
    part = audits.swarm.owned(group)[liar].start
    lie_about(monkeypatch, liar, part)
    outgoing = audits.swarm.prepare(deltas())
    records = audits.keep(audits.swarm.reduce(group, outgoing), outgoing, ("mean", "none"))
    guilty = audits.collect(0, records[0], liar, part)
    false = {
        "honest": to_bytes(audits.collect(0, records[0], liar, part + 1)),
        "nonsense": b"nonsense",
        "other rules": to_bytes(dataclasses.replace(guilty, aggregation="median")),
        "other codec": to_bytes(dataclasses.replace(guilty, codec="int8")),
        "other model": to_bytes(dataclasses.replace(guilty, num_values=SIZE + 1)),
    }[kind]
    assert accuse(audits, 0, false) == [None] * 3
    assert all(
        set(audits.services[index]._docket.liars) == {group.members[0]} for index in range(1, NUM_PEERS)
    )
    assert all(isinstance(error, PeerUnreachable) for error in accuse(audits, 0, to_bytes(guilty)))
    assert audits.convicted == [[]] * NUM_PEERS
    assert accuse(audits, 2, to_bytes(guilty)) == [None] * 3  # somebody else is heard
    assert [reducer for reducer, _, _ in audits.convicted[3]] == [liar]


def told_two_things(author: Identity, chain: Chain, round_: int = 1, group: str = "any") -> bytes:
    """Two statements of no group that ever was: whoever has a key can make them."""
    sender = SenderReport(
        peer=author.peer_id, manifest=None, declared=1.0, is_planned=False, norm=0.0, num_parts=0
    )
    statements = tuple(
        sign(
            Statement(
                run=RUN,
                group=hash_of(group),
                round=round_,
                previous=Chain(chain.spec, chain.commits[: round_ - 1]).tip,
                first_part=0,
                senders=[sender],
                results=join_hashes(fill * 32),
            ),
            author,
        ).to_bytes()
        for fill in (b"a", b"b")
    )
    return to_bytes(Contradiction(author.peer_id, statements))


def verdicts(audits: Audits, index: int = 0) -> list[tuple[str, int]]:
    return [(reducer, round_) for reducer, _, round_ in audits.convicted[index]]


def test_who_never_took_part_cannot_be_convicted(audits: Audits) -> None:
    """Each key would be kept for ever by everybody, with evidence of a megabyte, and told on to all."""
    stranger = identity("stranger")
    evidence = told_two_things(stranger, audits.chain[-1])
    errors = accuse(audits, 3, evidence, reducer=stranger.peer_id)
    assert all("took no part" in str(error) for error in errors)
    audits.phases[stranger.peer_id] = "serving"  # is here, and contributes nothing
    try:
        assert all(accuse(audits, 3, evidence, reducer=stranger.peer_id))
        assert audits.convicted == [[]] * NUM_PEERS
        assert all(not len(service._published._data) for service in audits.services[:3])
        audits.phases[stranger.peer_id] = "ready"
        assert accuse(audits, 3, evidence, reducer=stranger.peer_id) == [None] * 3
        assert verdicts(audits) == [(stranger.peer_id, 1)]
    finally:
        del audits.phases[stranger.peer_id]


def test_so_many_newcomers_can_be_convicted_between_two_commits(audits: Audits) -> None:
    names = [f"stranger {number}" for number in range(NUM_PEERS + 1)]
    audits.phases.update({identity(name).peer_id: "ready" for name in names})
    try:
        for name in names:
            evidence = told_two_things(identity(name), audits.chain[-1])
            accuse(audits, 3, evidence, audits.swarm.peer_ids[:1], reducer=identity(name).peer_id)
        assert verdicts(audits) == [(identity(name).peer_id, 1) for name in names[:-1]]
    finally:
        for name in names:
            del audits.phases[identity(name).peer_id]


def test_who_left_is_convicted_if_it_was_in_a_round_or_in_an_attempt_that_i_saw(audits: Audits) -> None:
    """The attempt may have failed: then no commit names it."""
    peer_ids, stranger = audits.swarm.peer_ids, identity("stranger")
    evidence = told_two_things(stranger, audits.chain[-1])
    audits.services[0].saw(1, (*peer_ids, stranger.peer_id))
    accuse(audits, 3, evidence, reducer=stranger.peer_id)
    assert [verdicts(audits, index) for index in range(3)] == [[(stranger.peer_id, 1)], [], []]
    audits.commit(audits.swarm.group(num_peers=2))
    audits.commit(audits.swarm.group(num_peers=1))
    member = audits.swarm.identities[VICTIM]
    gone = audits.phases.pop(member.peer_id)
    try:  # it made round 1; the lie is of round 2, without it
        late = told_two_things(member, audits.chain[-1], round_=2)
        assert accuse(audits, 3, late, round=2) == [None] * 3
        assert verdicts(audits, 2) == [(member.peer_id, 2)]
    finally:
        audits.phases[member.peer_id] = gone


def test_who_is_out_already_is_convicted_of_what_may_be_undone_only(audits: Audits) -> None:
    """Else it could sign two statements about each round there ever was."""
    liar = audits.swarm.identities[VICTIM]
    for _ in range(3):
        audits.commit(audits.swarm.group())
    chain, target = audits.chain[-1], audits.swarm.peer_ids[:1]
    for round_ in (1, 2, 4, 3):
        accuse(audits, 3, told_two_things(liar, chain, round_), target, round=round_)
    assert verdicts(audits) == [(liar.peer_id, 1), (liar.peer_id, 3)]


def test_only_members_accuse(audits: Audits) -> None:
    liar, accuser = audits.swarm.identities[VICTIM], audits.swarm.peer_ids[3]
    evidence = told_two_things(liar, audits.chain[-1])
    phase = audits.phases.pop(accuser)
    try:
        assert all("only members" in str(error) for error in accuse(audits, 3, evidence))
        audits.commit(audits.swarm.group())  # a member of the last round, whose heartbeat did not come
        assert accuse(audits, 3, evidence) == [None] * 3
        assert verdicts(audits) == [(liar.peer_id, 1)]
    finally:
        audits.phases[accuser] = phase


def test_who_announces_one_thing_and_hands_out_another_has_lied(
    audits: Audits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one could make everybody download 64 MB again and again."""
    evidence = told_two_things(audits.swarm.identities[VICTIM], audits.chain[-1])
    published = audits.services[3]._published
    monkeypatch.setattr(published, "get", lambda _: evidence)
    assert accuse(audits, 3, evidence + b"other") == [None] * 3
    assert not len(audits.services[0]._docket.liars)  # one byte less: a stream that was cut looks like that
    for service in audits.services:
        service._docket = Docket()
    monkeypatch.setattr(published, "get", lambda _: evidence[:-1] + b"x")
    assert accuse(audits, 3, evidence) == [None] * 3
    assert set(audits.services[0]._docket.liars) == {audits.swarm.peer_ids[3]}
    monkeypatch.setattr(audits.services[2]._published, "get", lambda _: evidence)
    assert accuse(audits, 2, evidence, audits.swarm.peer_ids[:1], round=2) == [None]
    assert audits.swarm.peer_ids[2] in audits.services[0]._docket.liars  # of another round than it said
    assert audits.convicted == [[]] * NUM_PEERS


def test_evidence_that_does_not_come_makes_a_pause(audits: Audits, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = told_two_things(audits.swarm.identities[VICTIM], audits.chain[-1])
    monkeypatch.setattr(audits.services[3]._published, "get", lambda _: None)
    assert accuse(audits, 3, evidence) == [None] * 3
    errors = accuse(audits, 3, evidence)
    assert all("not listening to you now" in str(error) for error in errors)
    assert not len(audits.services[0]._docket.liars)
    monkeypatch.undo()
    monkeypatch.setattr("peer.audit.time.monotonic", lambda: time.perf_counter() + 1e6)
    assert accuse(audits, 3, evidence) == [None] * 3
    assert [reducer for reducer, _ in verdicts(audits)] == [audits.swarm.peer_ids[VICTIM]]


def test_one_accusation_is_checked_at_a_time(audits: Audits, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    async def slowly(network: Network, *args: Any) -> bytearray:
        nonlocal running, most
        if network is not audits.swarm.networks[0]:
            return await fetch_blob(network, *args)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        return await fetch_blob(network, *args)

    monkeypatch.setattr(audit, "fetch_blob", slowly)
    target = audits.swarm.peer_ids[:1]
    liars = {2: audits.swarm.identities[VICTIM], 3: audits.swarm.identities[2], 1: audits.swarm.identities[3]}
    calls = []
    for accuser, liar in liars.items():
        evidence = told_two_things(liar, audits.chain[-1])
        digest = audits.services[accuser]._published.add(evidence)
        body = {
            "run": RUN,
            "evidence": digest,
            "size_bytes": len(evidence),
            "reducer": liar.peer_id,
            "round": 1,
        }
        network = audits.swarm.networks[accuser]
        calls.append(network.submit(network.call(target[0], "accuse", body, timeout_seconds=CALL_SECONDS)))
    assert [call.exception(CALL_SECONDS) for call in calls] == [None] * 3
    audits.settle()
    assert most == 1
    assert len(audits.convicted[0]) == 3


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {"run": RUN},
        {"run": hash_of("other"), "evidence": hash_of("x"), "size_bytes": 10},
        {"run": RUN, "evidence": "x", "size_bytes": 10},
        {"run": RUN, "evidence": hash_of("x"), "size_bytes": 0},
        {"run": RUN, "evidence": hash_of("x"), "size_bytes": 10**12},
    ],
    ids=str,
)
def test_accusations_that_are_none(audits: Audits, body: Any) -> None:
    network, peer = audits.swarm.networks[0], audits.swarm.peer_ids[1]
    with pytest.raises(PeerUnreachable):
        network.run(
            network.call(peer, "accuse", body, timeout_seconds=CALL_SECONDS), timeout_seconds=CALL_SECONDS
        )
    assert not audits.services[1]._is_checking


@pytest.mark.parametrize(
    "change",
    [
        {"run": hash_of("other")},
        {"round": 2},
        {"part": 10},
        {"part": -1},
        {"part": True},
        {"part": "0"},
        {"what": "delta"},
        {"what": "residual"},
    ],
    ids=str,
)
def test_questions_that_are_not_answered(audits: Audits, change: dict[str, Any]) -> None:
    _, outgoing, results = reduced(audits, "fp32", ("mean", "none"))
    audits.keep(results, outgoing, ("mean", "none"))
    network = audits.swarm.networks[0]

    async def ask(body: dict[str, Any]) -> bytes:
        stream = network.stream(audits.swarm.peer_ids[1], "audit", body, timeout_seconds=CALL_SECONDS)
        return b"".join([part async for part in stream])

    body = {"run": RUN, "round": 1, "part": 0, "what": "part"}
    assert network.run(ask(body), timeout_seconds=CALL_SECONDS) == bytes(outgoing[1].parts[0])
    with pytest.raises(PeerUnreachable):
        network.run(ask({**body, **change}), timeout_seconds=CALL_SECONDS)


# Judgments, without a network.


@pytest.fixture(scope="module", params=[("fp32", RULES[0]), ("int8", RULES[2]), ("topk", RULES[3])], ids=str)
def case(started: Audits, request: pytest.FixtureRequest) -> tuple[Evidence, Swarm]:
    """Honest evidence of the second of two rounds, so that there is error feedback."""
    codec, rules = request.param
    swarm = started.swarm
    options = {"aggregation": rules[0], "screening": rules[1]}
    first = swarm.reduce(swarm.group(), swarm.prepare(deltas(), codec), **options)
    residuals = [result.residuals for result in first]
    outgoing = swarm.prepare(deltas(seed=2), codec)
    group = swarm.group()
    results = swarm.reduce(group, outgoing, residuals=residuals, **options)
    records = started.keep(results, outgoing, rules, residuals=residuals)
    liar = group.members[VICTIM]
    evidence = started.collect(0, records[0], liar, swarm.owned(group)[liar].start)
    started.forget()
    swarm.settle()
    return evidence, swarm


def restated(case: tuple[Evidence, Swarm], change: Callable[[dict[str, Any]], Any]) -> Evidence:
    """The evidence, had the reducer signed something else."""
    evidence, swarm = case
    statements = []
    for signed in evidence.statements:
        author, statement = open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)
        if author == evidence.reducer:
            fields = statement.model_dump()
            change(fields)
            signed = sign(Statement.model_validate(fields), swarm.identities[VICTIM]).to_bytes()
        statements.append(signed)
    return dataclasses.replace(evidence, statements=tuple(statements))


def test_honest_evidence_acquits(case: tuple[Evidence, Swarm]) -> None:
    assert judge(case[0], RUN) == ""
    assert judge(restated(case, lambda _: None), RUN) == ""


def _without_hashes(field: str) -> Callable[[dict[str, Any]], Any]:
    """As many hashes as there are results, all zero."""
    return lambda statement: statement.update(
        {field: join_hashes(bytes(32 * len(split_hashes(statement["results"]))))}
    )


def test_a_changed_result_convicts(case: tuple[Evidence, Swarm]) -> None:
    assert "the result of part" in judge(restated(case, _without_hashes("results")), RUN)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s["senders"][0].update(weight=s["senders"][0]["weight"] * 2), "the weights"),
        (lambda s: s["senders"][0].update(factor=0.5), "the factors"),
        (lambda s: s["senders"][0].update(weight=0.0, num_parts=0), "the weights"),
    ],
)
def test_changed_weights_convict(case: tuple[Evidence, Swarm], change: Any, why: str) -> None:
    assert why in judge(restated(case, change), RUN)


def test_a_changed_residual_convicts(case: tuple[Evidence, Swarm]) -> None:
    evidence, _ = case
    lie = restated(case, _without_hashes("residuals_after"))
    if CODECS[evidence.codec].is_lossy:
        assert "the error feedback of part" in judge(lie, RUN)
    else:
        assert judge(lie, RUN) == ""  # it has none, whatever it says


def test_no_residual_where_there_was_one_changes_the_result(case: tuple[Evidence, Swarm]) -> None:
    evidence, _ = case
    if CODECS[evidence.codec].is_lossy:
        assert "the result of part" in judge(restated(case, lambda s: s.update(residuals_before="")), RUN)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: dataclasses.replace(e, part=e.part + 5),
        lambda e: dataclasses.replace(e, part=-1),
        lambda e: dataclasses.replace(e, part=10**30),
        lambda e: dataclasses.replace(e, codec="fp64"),
        lambda e: dataclasses.replace(e, codec="bf16"),
        lambda e: dataclasses.replace(e, num_values=SIZE + 1),
        lambda e: dataclasses.replace(e, num_values=10**18),
        lambda e: dataclasses.replace(e, num_values=-1),
        lambda e: dataclasses.replace(e, aggregation="nonsense"),
        lambda e: dataclasses.replace(e, reducer="nobody"),
        lambda e: dataclasses.replace(e, statements=()),
        lambda e: dataclasses.replace(e, statements=e.statements * 2),
        lambda e: dataclasses.replace(e, statements=(b"{}", *e.statements)),
        lambda e: dataclasses.replace(e, manifests=()),
        lambda e: dataclasses.replace(e, manifests=e.manifests[1:]),
        lambda e: dataclasses.replace(e, parts=e.parts[1:]),
        lambda e: dataclasses.replace(e, parts=e.parts[::-1]),
        lambda e: dataclasses.replace(e, parts=(bytes(len(e.parts[0])), *e.parts[1:])),
        lambda e: dataclasses.replace(e, residual=e.residual + bytes(4)) if e.residual else None,
        lambda e: dataclasses.replace(e, residual=bytes(len(e.residual))) if e.residual else None,
        lambda e: dataclasses.replace(e, residual=b"") if e.residual else None,
    ],
)
def test_evidence_that_does_not_hold_together(case: tuple[Evidence, Swarm], change: Any) -> None:
    changed = change(case[0])
    if changed is not None:  # None: this codec has no residual to change
        with pytest.raises(NotConclusive):
            judge(changed, RUN)


def test_evidence_of_another_run(case: tuple[Evidence, Swarm]) -> None:
    with pytest.raises(NotConclusive, match="another run"):
        judge(case[0], hash_of("other"))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(group=hash_of("other")),
        lambda s: s.update(first_part=s["first_part"] + 1),
        lambda s: s.update(results=join_hashes(bytes(32))),
        lambda s: s.update(results=""),
        lambda s: s["senders"].pop(),
        lambda s: s["senders"][0].update(declared=5.0),
        lambda s: s["senders"][0].update(manifest=hash_of("other")),
    ],
)
def test_statements_that_do_not_hold_together(case: tuple[Evidence, Swarm], change: Any) -> None:
    """None of them is a proof: a member would not have taken it, so it may be of another making."""
    with pytest.raises(NotConclusive):
        judge(restated(case, change), RUN)


def test_an_accuser_cannot_choose_the_figures(case: tuple[Evidence, Swarm]) -> None:
    """It is a reducer, too: with other figures of its own, or none, the honest weights would look wrong."""
    evidence, swarm = case
    author = swarm.identities[0]
    others, own = [], None
    for signed in evidence.statements:
        peer_id, statement = open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)
        if peer_id == author.peer_id:
            own = statement
        else:
            others.append(signed)
    assert own is not None
    if not own.figures:
        assert judge(dataclasses.replace(evidence, statements=tuple(others)), RUN) == ""  # nobody needs it
        return
    figures = [None if value is None else value * (2.0 + index) for index, value in enumerate(own.figures)]
    changed = sign(own.model_copy(update={"figures": tuple(figures)}), author).to_bytes()
    for statements in ((*others, changed), tuple(others)):
        with pytest.raises(NotConclusive, match="figures"):
            judge(dataclasses.replace(evidence, statements=statements), RUN)


def test_a_manifest_of_somebody_else_is_no_manifest(case: tuple[Evidence, Swarm]) -> None:
    """The same content, signed by another: the statement's sender never promised it."""
    evidence, _ = case
    manifests = [open_signed(data, Manifest, max_bytes=MAX_SIGNED_BYTES)[1] for data in evidence.manifests]
    signed = tuple(sign(manifest, identity("stranger")).to_bytes() for manifest in manifests)
    with pytest.raises(NotConclusive):
        judge(dataclasses.replace(evidence, manifests=signed), RUN)


# The wire.


def test_evidence_through_the_wire(case: tuple[Evidence, Swarm]) -> None:
    assert from_bytes(to_bytes(case[0])) == case[0]


def test_every_cut_is_refused() -> None:
    evidence = Evidence(
        "mean", "none", "fp32", 10, 0, "a", (b"12", b"3"), (b"45",), (b"6789", b""), b"residual"
    )
    data = to_bytes(evidence)
    assert from_bytes(data) == evidence
    contradiction = Contradiction("a", (b"12", b"3"))
    assert from_bytes(to_bytes(contradiction)) == contradiction
    with pytest.raises(RecordError):
        from_bytes(to_bytes(contradiction)[:-1])
    for length in range(len(data)):
        with pytest.raises(RecordError):
            from_bytes(data[:length])
    with pytest.raises(RecordError):
        from_bytes(data + b"\0")


def test_every_cut_of_real_evidence_is_refused(case: tuple[Evidence, Swarm]) -> None:
    """At each byte of the header, and at some of what follows, which is only counted."""
    data = to_bytes(case[0])
    header = 4 + int.from_bytes(data[:4], "big")
    for length in (*range(header + 2), *range(header, len(data), 997), len(data) - 1):
        with pytest.raises(RecordError):
            from_bytes(data[:length])


@given(st.binary(max_size=300))
def test_bytes_that_are_no_evidence(data: bytes) -> None:
    with pytest.raises(RecordError):
        from_bytes(data)


@given(st.data())
def test_a_changed_byte_is_never_a_crash(data: st.DataObject) -> None:
    evidence = to_bytes(Evidence("mean", "none", "fp32", 10, 0, "a", (b"{}",), (b"{}",), (b"6789",), b""))
    changed = bytearray(evidence)
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = from_bytes(bytes(changed))
    except RecordError:
        return
    assert isinstance(parsed, Evidence)
    with pytest.raises(NotConclusive):
        judge(parsed, RUN)
