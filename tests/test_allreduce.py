"""Is the result exact, the same bytes for all, and does every fault cost what it may, and name its cause?"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.agreement import Group, GroupFailed
from coordinator.errors import RoundError
from coordinator.network import PeerUnreachable
from coordinator.records import open_signed, parse_json, sign
from coordinator.streams import FrameStream, StreamError, open_stream
from peer import allreduce
from peer import manifest as manifest_module
from peer.aggregate import needs_gram
from peer.allreduce import AllReduceService, Reduced, _Exchange, _joined, _Patience, _Reducer
from peer.compression import CODECS
from peer.fusion import Member, fuse
from peer.manifest import MAX_SIGNED_BYTES, Outgoing, Statement, join_hashes, part_hash
from peer.parts import PartGrid
from tests.exchanges import (
    NUM_PEERS,
    RUN,
    SIZE,
    Swarm,
    decoded_rows,
    deltas,
    forged,
    on_member,
    running_swarm,
)
from tests.fakes import CALL_SECONDS, hash_of, identity
from tests.test_aggregate import reference

GRID = PartGrid(SIZE)
RULES = ("mean", "clipped_mean", "trimmed_mean", "median", "disjoint_mean", "centered_clipping")
VICTIM = 1  # the member that fails, where one does
_SMALL = 0.002  # per coordinate; of deltas with a standard deviation of 0.05


PLACES = ("before the manifest", "part", "result", "statement", "all is lost")  # where a stream is cut


def _some_fast(cases: Iterable[tuple[Any, ...]], fast: set[Any]) -> list[Any]:
    """All of them, those that add little to the fast ones for the long run."""
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def started() -> Iterator[Swarm]:
    """asyncio logs each exception of a task or future that nobody looked at: there must be none."""
    gc.collect()  # what other tests of this process left is not of this swarm
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage()[:300])  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(handler)
    with running_swarm() as swarm:
        yield swarm
    gc.collect()
    logging.getLogger("asyncio").removeHandler(handler)
    # Python 3.11 logs each cancelled handler of a stream server, as when the network closes.
    assert [text for text in logged if "StreamReaderProtocol.connection_made" not in text] == []


@pytest.fixture
def swarm(started: Swarm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swarm]:
    """After each test nothing runs any more; what a test patches stays so until then."""
    yield started
    started.settle()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "STALL_FLOOR_SECONDS": 1.0,
        "GROUP_WAIT_SECONDS": 3.0,  # not for a fault, but for who begins late on a busy machine
        "RECONNECT_SECONDS": 0.5,
        "ALIVE_SECONDS": 0.2,
    }.items():
        monkeypatch.setattr(allreduce, name, seconds)


def assert_same(results: Sequence[Reduced]) -> None:
    """One hash, one record, one set of statements on all members."""
    assert len({result.flat.numpy().tobytes() for result in results}) == 1
    assert len({result.contributions for result in results}) == 1
    assert len({tuple(sorted(result.statements.items())) for result in results}) == 1


def assert_mean_of_recorded(group: Group, results: Sequence[Reduced], outgoing: Sequence[Outgoing]) -> None:
    """Part by part, against float64: the weighted mean of those that the record names."""
    assert_same(results)
    rows = decoded_rows(outgoing)
    for part in range(GRID.num_parts):
        weights = [
            0.0 if any(first <= part < stop for first, stop in c.missing) else c.weight
            for c in results[0].contributions
        ]
        part_of = slice(*GRID.bounds(part))
        expected = np.average(rows[:, part_of], axis=0, weights=weights)
        np.testing.assert_allclose(results[0].flat.numpy()[part_of], expected, rtol=0, atol=1e-7)
    assert [c.peer for c in results[0].contributions] == list(group.members)


def assert_next_round_is_exact(swarm: Swarm) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas(seed=8))
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    assert all(c.missing == () for c in results[0].contributions)


def missing_of(results: Sequence[Reduced], index: int) -> tuple[tuple[int, int], ...]:
    return results[0].contributions[index].missing


def slices_of_others(swarm: Swarm, group: Group, index: int) -> list[range]:
    owned = swarm.owned(group)
    return [parts for member, parts in sorted(owned.items()) if member != group.members[index]]


# Exactness.


def test_by_hand(swarm: Swarm) -> None:
    """Five values are one part: two of the three members reduce nothing."""
    values = [torch.full((5,), value) for value in (1.0, 2.0, 6.0)]
    results = swarm.reduce(swarm.group(3), swarm.prepare(values))
    assert [result.flat.tolist() for result in results] == [[3.0] * 5] * 3
    assert [c.norm for c in results[0].contributions] == pytest.approx(
        [math.sqrt(5.0), math.sqrt(20.0), math.sqrt(180.0)]
    )
    results = swarm.reduce(swarm.group(3, weights=[1.0, 1.0, 2.0]), swarm.prepare(values))
    assert [result.flat.tolist() for result in results] == [[3.75] * 5] * 3  # (1 + 2 + 12) / 4


@pytest.mark.parametrize(
    ("num_peers", "size"),
    _some_fast(
        itertools.product((1, 2, 3, 4), (1, 1024, 1025, 3000)), {(1, 1), (2, 1), (3, 1025), (4, 3000)}
    ),
)
def test_any_size_and_number_of_members(swarm: Swarm, num_peers: int, size: int) -> None:
    outgoing = swarm.prepare(deltas(num_peers, size))
    results = swarm.reduce(swarm.group(num_peers), outgoing)
    assert_same(results)
    expected = decoded_rows(outgoing).mean(axis=0)
    np.testing.assert_allclose(results[0].flat.numpy(), expected, rtol=0, atol=1e-7)
    assert all(c.missing == () and c.factor == 1.0 for c in results[0].contributions)


@pytest.mark.parametrize(
    ("rule", "codec"),
    _some_fast(
        itertools.product(RULES, sorted(CODECS)),
        {*((rule, "int8") for rule in RULES), *(("mean", codec) for codec in CODECS)},
    ),
)
def test_every_rule_with_every_codec(swarm: Swarm, rule: str, codec: str) -> None:
    """Bit for bit what `fuse` makes without a network; against float64 within the steps of the codec."""
    weights = [0.5, 1.0, 4.0, 0.01]
    group, outgoing = swarm.group(weights=weights), swarm.prepare(deltas(), codec)
    results = swarm.reduce(group, outgoing, aggregation=rule)
    assert_same(results)
    members = [
        Member(peer, weight, own) for peer, weight, own in zip(group.members, weights, outgoing, strict=True)
    ]
    alone = fuse(members, aggregation=rule).delta(GRID, CODECS[codec])
    assert results[0].flat.numpy().tobytes() == alone.numpy().tobytes()
    expected = reference(rule, decoded_rows(outgoing), weights)
    for part in range(GRID.num_parts):
        part_of = slice(*GRID.bounds(part))
        error = np.abs(results[0].flat.numpy()[part_of] - expected[part_of]).max()
        assert error <= step(codec, expected[part_of])
    residuals = {part for result in results for part in result.residuals}
    assert residuals == (set(range(GRID.num_parts)) if CODECS[codec].is_lossy else set())


def step(codec: str, values: np.ndarray) -> float:
    """What encoding one part may change in a value; 1e-7 for the sums."""
    largest = np.abs(values).max()
    kept = -(-len(values) // 16)
    return (
        1e-7
        + {
            "fp32": 0.0,
            "fp16": largest * 2.0**-11,
            "bf16": largest * 2.0**-8,
            "int8": largest / 127 * 0.51,  # scales are rounded up by up to 1 %
            "int4": largest / 7 * 0.51,
            "topk": np.sort(np.abs(values))[-kept] + largest * 2.0**-11,
        }[codec]
    )


def test_the_record_of_clipped_contributions(swarm: Swarm) -> None:
    """Norms as sent, factors as the rule says: the median of 1, 2, 4 and 8 times a norm is the second."""
    base = deltas(1)[0]
    outgoing = swarm.prepare([base, base * 2, base * 4, base * 8])
    results = swarm.reduce(swarm.group(), outgoing, aggregation="clipped_mean")
    assert_same(results)
    norm = float(base.double().norm())
    assert [c.norm for c in results[0].contributions] == pytest.approx(
        [norm, 2 * norm, 4 * norm, 8 * norm], rel=1e-5
    )
    assert [c.factor for c in results[0].contributions] == pytest.approx([1.0, 1.0, 0.5, 0.25], rel=1e-5)
    np.testing.assert_allclose(
        results[0].flat.numpy(), base.numpy() * 7 / 4, rtol=1e-5
    )  # (1 + 2 + 2 + 2) / 4


@pytest.mark.parametrize("rule", ["mean", "centered_clipping"])
def test_who_is_screened_is_in_no_part(swarm: Swarm, rule: str) -> None:
    group, values = swarm.group(), deltas()
    values[VICTIM] = values[VICTIM] * 100.0
    outgoing = swarm.prepare(values)
    results = swarm.reduce(group, outgoing, aggregation=rule, screening="norm_cosine")
    assert_same(results)
    screened = results[0].contributions[VICTIM]
    assert (screened.factor, screened.missing) == (0.0, ((0, GRID.num_parts),))
    assert "times the median" in screened.reason
    others = [index for index in range(NUM_PEERS) if index != VICTIM]
    assert all(results[0].contributions[index].missing == () for index in others)
    expected = reference(rule, decoded_rows([outgoing[index] for index in others]), [1.0] * 3)
    np.testing.assert_allclose(results[0].flat.numpy(), expected, rtol=0, atol=1e-7)


def test_bytes_are_counted(swarm: Swarm) -> None:
    """Each part goes to its reducer n - 1 times and comes back as often; 4 KB a stream are for the rest."""
    results = swarm.reduce(swarm.group(), swarm.prepare(deltas()))
    swarm.settle()
    sent = sum(result.traffic.num_bytes_sent for result in results)
    assert sent == sum(result.traffic.num_bytes_received for result in results)
    values = 2 * (NUM_PEERS - 1) * SIZE * 4
    assert values < sent < values + NUM_PEERS * (NUM_PEERS - 1) * 4096


def test_patience_follows_from_the_link(swarm: Swarm) -> None:
    """Four times what the bytes take at the measured rate, and twice what opening a stream took."""
    service = AllReduceService(swarm.networks[0], identity("a"), RUN)
    assert service.slack_seconds("b", 125_000) == 4.0  # nothing measured: as on the slowest link, 1 Mbit/s
    service.measured("b", 1_000_000.0)
    service.opened("b", 0.25)
    assert service.slack_seconds("b", 125_000) == 0.5 + 0.5
    assert service.slack_seconds("b", 0) == 0.5
    assert service.slack_seconds("c", 0) == 0.0  # of one link only


def test_ranges_of_missing_parts() -> None:
    assert _joined([]) == ()
    assert _joined([(5, 10), (0, 5), (12, 13)]) == ((0, 10), (12, 13))
    many = _joined([(2 * index, 2 * index + 1) for index in range(300)])
    assert (len(many), many[0], many[-1]) == (256, (0, 1), (510, 599))


# Senders that fail.


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("num_sent", [0, 1, 2])
def test_a_sender_that_stops(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, num_sent: int
) -> None:
    """It loses what it had not sent of each slice, and nothing else; as a reducer it goes on."""
    group, outgoing = swarm.group(weights=[1.0, 2.0, 3.0, 4.0]), swarm.prepare(deltas())

    async def stop(original: Any, self: _Exchange, stream: FrameStream, member: str, _: int) -> None:
        parts = self._owned[member]
        await stream.send(allreduce._MANIFEST, self.outgoing.signed)
        for part in parts[:num_sent]:
            await self._send_part(stream, part)
        await _never()

    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], stop)
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    expected = [
        (parts.start + num_sent, parts.stop)
        for parts in slices_of_others(swarm, group, VICTIM)
        if num_sent < len(parts)
    ]
    assert missing_of(results, VICTIM) == _joined(expected)
    assert len(expected) > 0
    assert results[0].contributions[VICTIM].reason == ""


def test_of_two_phases_who_is_not_complete_is_out_everywhere(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    last = slices_of_others(swarm, group, VICTIM)[0].stop - 1

    async def stop(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if part == last:
            await _never()
        await original(self, stream, part)

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], stop)
    results = swarm.reduce(group, outgoing, aggregation="centered_clipping")
    assert_same(results)
    assert missing_of(results, VICTIM) == ((0, GRID.num_parts),)
    others = [own for index, own in enumerate(outgoing) if index != VICTIM]
    expected = reference("centered_clipping", decoded_rows(others), [1.0] * 3)
    np.testing.assert_allclose(results[0].flat.numpy(), expected, rtol=0, atol=1e-7)


def _foreign_part(swarm: Swarm, group: Group) -> tuple[int, range]:
    """A part in the middle of the longest slice that the victim does not reduce, and that slice."""
    parts = max(slices_of_others(swarm, group, VICTIM), key=len)
    return parts.start + 1, parts


def assert_cut_off(results: Sequence[Reduced], part: int, parts: range) -> None:
    """From the bad part on; or of the whole slice, when it came before the weights were decided."""
    assert missing_of(results, VICTIM) in (((part, parts.stop),), ((parts.start, parts.stop),))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(swarm: Swarm, value: float) -> None:
    """Under a manifest that names that very part: consistent, and still refused."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    part, parts = _foreign_part(swarm, group)
    values = np.full(GRID.size(part), value, dtype="<f4")
    lying = list(outgoing)
    lying[VICTIM] = forged(outgoing[VICTIM], swarm.identities[VICTIM], parts={part: values.tobytes()})
    results = swarm.reduce(group, lying)
    assert_mean_of_recorded(group, results, outgoing)
    assert_cut_off(results, part, parts)
    assert f"part {part} holds values that are not finite" in results[0].contributions[VICTIM].reason


def test_a_delta_that_is_not_finite_is_not_even_encoded(swarm: Swarm) -> None:
    for codec in sorted(CODECS):
        with pytest.raises(ValueError, match="not finite"):
            swarm.prepare([torch.tensor([1.0, math.nan])], codec)


def test_a_part_that_cannot_be_decoded(swarm: Swarm) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas(), "int8")
    part, parts = _foreign_part(swarm, group)
    data = b"\xff" * len(outgoing[VICTIM].parts[part])  # scales that are NaN
    lying = list(outgoing)
    lying[VICTIM] = forged(outgoing[VICTIM], swarm.identities[VICTIM], parts={part: data})
    results = swarm.reduce(group, lying)
    assert_same(results)
    assert_cut_off(results, part, parts)
    assert f"part {part} cannot be decoded" in results[0].contributions[VICTIM].reason


def test_a_norm_that_is_not_what_the_manifest_says(swarm: Swarm) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    part, parts = _foreign_part(swarm, group)
    shorter = outgoing[VICTIM].manifest.squared_norms[part] / 4
    lying = list(outgoing)
    lying[VICTIM] = forged(outgoing[VICTIM], swarm.identities[VICTIM], squared_norms={part: shorter})
    results = swarm.reduce(group, lying)
    assert_mean_of_recorded(group, results, outgoing)
    assert_cut_off(results, part, parts)
    assert "its manifest says" in results[0].contributions[VICTIM].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: bytes(data[:-4]) + b"\0\0\0\1", "is not the one that its manifest names"),
        (lambda data: bytes(data[:-4]), "a wrong shape"),
        (lambda data: b"", "a wrong shape"),
    ],
    ids=["hash", "size", "empty"],
)
def test_a_part_that_is_not_the_promised_one(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], reason: str
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    wrong, parts = _foreign_part(swarm, group)

    async def send(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if part != wrong:
            await original(self, stream, part)
        else:
            await stream.send(allreduce._PART, change(bytes(self.outgoing.parts[part])))

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], send)
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    assert_cut_off(results, wrong, parts)
    assert reason in results[0].contributions[VICTIM].reason


def test_frames_that_are_too_long(swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream ends, again and again; after that its sender is out, and the others go on."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    wrong, parts = _foreign_part(swarm, group)

    async def send(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if part != wrong:
            await original(self, stream, part)
        else:
            await stream.send(allreduce._PART, bytes(1 << 20))

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], send)
    futures = swarm.start(group, outgoing)
    results = [future.result(CALL_SECONDS) for index, future in enumerate(futures) if index != VICTIM]
    assert_mean_of_recorded(group, results, outgoing)
    assert_cut_off(results, wrong, parts)
    futures[VICTIM].exception(CALL_SECONDS)  # it may have its results before its next stream breaks


def _with_manifest(outgoing: Outgoing, signed: bytes) -> Outgoing:
    return Outgoing(outgoing.grid, outgoing.codec, outgoing.parts, outgoing.manifest, signed)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda own, me: sign(own.manifest, identity("stranger")).to_bytes(), "signed by somebody else"),
        (lambda own, me: forged(own, me, round=2).signed, "of another round"),
        (lambda own, me: forged(own, me, previous=hash_of("other")).signed, "of another round"),
        (lambda own, me: forged(own, me, run=hash_of("other")).signed, "of another round"),
        (lambda own, me: forged(own, me, codec="int8").signed, "as 'int8'"),
        (lambda own, me: forged(own, me, num_values=SIZE + 1).signed, f"of {SIZE + 1} values"),
        (lambda own, me: b"{}", "not a signed record"),
        (lambda own, me: b"\xff\0nonsense", "not JSON"),
    ],
    ids=["author", "round", "previous", "run", "codec", "size", "empty", "nonsense"],
)
def test_a_manifest_that_is_not_of_this_sender_and_round(
    swarm: Swarm, make: Callable[[Outgoing, Any], bytes], reason: str
) -> None:
    """It counts in its own slice alone, which nobody else can check."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    signed = make(outgoing[VICTIM], swarm.identities[VICTIM])
    lying = list(outgoing)
    lying[VICTIM] = _with_manifest(outgoing[VICTIM], signed)
    results = swarm.reduce(group, lying)
    assert reason in results[0].contributions[VICTIM].reason
    expected = _joined([(parts.start, parts.stop) for parts in slices_of_others(swarm, group, VICTIM)])
    assert missing_of(results, VICTIM) == expected
    assert_mean_of_recorded(group, results, outgoing)


def test_a_norm_that_no_delta_has(swarm: Swarm, impatient: None) -> None:
    """Of its own slice, where nobody can check it; its square is what float32 can just hold."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    part = swarm.owned(group)[group.members[VICTIM]].start
    lying = list(outgoing)
    lying[VICTIM] = forged(outgoing[VICTIM], swarm.identities[VICTIM], squared_norms={part: 1e39})
    results = swarm.reduce(group, lying)
    assert_mean_of_recorded(group, results, outgoing)
    assert missing_of(results, VICTIM) == ((0, GRID.num_parts),)
    assert "is no length of a delta" in results[0].contributions[VICTIM].reason


@pytest.mark.parametrize("is_other", [True, False])
def test_two_manifests_on_one_stream(is_other: bool, swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    other = forged(outgoing[VICTIM], swarm.identities[VICTIM], squared_norms={0: 1.0})

    async def send(original: Any, self: _Exchange, stream: FrameStream, member: str, next_part: int) -> None:
        await stream.send(allreduce._MANIFEST, self.outgoing.signed)
        await stream.send(allreduce._MANIFEST, other.signed if is_other else self.outgoing.signed)
        await original(self, stream, member, max(0, next_part))

    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], send)
    results = swarm.reduce(group, outgoing)
    assert "sent two manifests" in results[0].contributions[VICTIM].reason
    assert_mean_of_recorded(group, results, outgoing)


def test_a_manifest_for_each_reducer(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statements name them, so every member sees that there are two, and whose they are."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    deceived = group.members[2]
    own_part = swarm.owned(group)[group.members[VICTIM]].start
    other = forged(outgoing[VICTIM], swarm.identities[VICTIM], squared_norms={own_part: 1e-3})

    async def send(original: Any, self: _Exchange, stream: FrameStream, member: str, next_part: int) -> None:
        if member == deceived:
            await stream.send(allreduce._MANIFEST, other.signed)
            next_part = 0
        await original(self, stream, member, next_part)

    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], send)
    errors = swarm.errors(group, outgoing)
    del errors[VICTIM]
    assert_all_name(errors, group.members[VICTIM], "different manifests")


def test_who_never_comes_is_in_no_part(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts among four members: one that reduces nothing may be missing, and the round goes on."""
    size = 2048
    group = swarm.group()
    absent = next(
        index for index, peer in enumerate(group.members) if not len(swarm.owned(group, size)[peer])
    )
    outgoing: list[Outgoing | None] = list(swarm.prepare(deltas(size=size)))
    outgoing[absent] = None
    results = [future.result(CALL_SECONDS) for future in swarm.start(group, outgoing)]
    assert_same(results)
    contribution = results[0].contributions[absent]
    assert (contribution.missing, contribution.norm, contribution.factor) == (((0, 2),), 0.0, 0.0)
    expected = decoded_rows([own for own in outgoing if own is not None]).mean(axis=0)
    np.testing.assert_allclose(results[0].flat.numpy(), expected, rtol=0, atol=1e-7)


# Streams that break.


@pytest.mark.parametrize(
    ("where", "codec"),
    _some_fast(
        itertools.product(PLACES, ("fp32", "int8")), {("result", "int8"), *((p, "fp32") for p in PLACES)}
    ),
)
def test_a_stream_that_is_cut_goes_on(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, where: str, codec: str
) -> None:
    """Every stream of one member is cut once, at the same place; nothing is lost, nothing counts twice."""
    group, outgoing = swarm.group(), swarm.prepare(deltas(), codec)
    cut: set[str] = set()

    def cut_once(stream: FrameStream) -> None:
        if stream.peer_id not in cut:
            cut.add(stream.peer_id)
            stream.close()

    async def send_parts(original: Any, self: _Exchange, stream: FrameStream, *args: Any) -> None:
        cut_once(stream)
        await original(self, stream, *args)

    async def send_part(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if part in {parts.start + 1 for parts in self._owned.values()}:
            cut_once(stream)
        await original(self, stream, part)

    async def send_result(original: Any, self: _Reducer, stream: FrameStream, index: int) -> None:
        if index == 1:
            cut_once(stream)
        await original(self, stream, index)

    async def send_results(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        while not self._statement:
            await asyncio.sleep(0.01)
        cut_once(stream)
        await original(self, stream, next_result)

    async def lose_results(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        if stream.peer_id in cut:
            await original(self, stream, next_result)
            return
        while not self._statement:
            await asyncio.sleep(0.01)
        cut_once(stream)  # and all seems sent: the daemon had taken it, and the connection broke behind it

    cuts: dict[str, tuple[type, str, Callable[..., Any]]] = {
        "before the manifest": (_Exchange, "_send_parts", send_parts),
        "part": (_Exchange, "_send_part", send_part),
        "result": (_Reducer, "_send_result", send_result),
        "statement": (_Reducer, "_send_results", send_results),
        "all is lost": (_Reducer, "_send_results", lose_results),
    }
    owner, method, replacement = cuts[where]
    on_member(monkeypatch, owner, method, group.members[VICTIM], replacement)
    results = swarm.reduce(group, outgoing)
    assert len(cut) == NUM_PEERS - 1
    assert_same(results)
    assert all(c.missing == () for c in results[0].contributions)
    members = [Member(peer, 1.0, own) for peer, own in zip(group.members, outgoing, strict=True)]
    alone = fuse(members, aggregation="mean").delta(GRID, CODECS[codec])
    assert results[0].flat.numpy().tobytes() == alone.numpy().tobytes()


def test_a_second_stream_replaces_the_first(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that opens a new stream while its old one still works: no part is taken twice."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    is_first = [True]

    async def converse(original: Any, self: _Exchange, member: str) -> None:
        if is_first[0]:
            is_first[0] = False
            both = await asyncio.gather(
                original(self, member), original(self, member), return_exceptions=True
            )
            if all(isinstance(outcome, StreamError) for outcome in both):
                raise StreamError("both broke")
            return
        await original(self, member)

    on_member(monkeypatch, _Exchange, "_converse", group.members[VICTIM], converse)
    monkeypatch.setattr(_Exchange, "_room_for_result", lambda self, member, scratch: {})
    futures = swarm.start(group, outgoing)
    results = [f.result(CALL_SECONDS) for index, f in enumerate(futures) if index != VICTIM]
    assert_mean_of_recorded(group, results, outgoing)
    assert missing_of(results, VICTIM) == ()
    futures[VICTIM].exception(CALL_SECONDS)


# Reducers that fail.


def assert_all_name(errors: Sequence[BaseException | None], culprit: str, why: str) -> None:
    for error in errors:
        assert isinstance(error, GroupFailed), error
        assert error.culprit == culprit
        assert why in error.why


def errors_of_others(
    swarm: Swarm, group: Group, outgoing: Sequence[Outgoing], **options: Any
) -> list[BaseException | None]:
    errors = swarm.errors(group, outgoing, **options)
    return [error for index, error in enumerate(errors) if index != VICTIM]


@pytest.mark.parametrize("num_results", [0, 1])
def test_a_reducer_that_fails(swarm: Swarm, monkeypatch: pytest.MonkeyPatch, num_results: int) -> None:
    """It is refused when it is asked again: the others know at once, whatever the limits are."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    def fail(original: Any, self: _Reducer, part: int) -> Any:
        if len(self._results) == num_results:
            raise RoundError("broke")
        return original(self, part)

    on_member(monkeypatch, _Reducer, "_reduce_part", group.members[VICTIM], fail)
    began = time.monotonic()
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "")
    assert time.monotonic() - began < 5.0
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


@pytest.mark.parametrize("num_results", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_reducer_that_is_killed(monkeypatch: pytest.MonkeyPatch, num_results: int) -> None:
    """Its daemon goes with it, in the middle of an exchange: all others name it within a few seconds."""
    with running_swarm(3) as swarm:
        group, outgoing = swarm.group(3), swarm.prepare(deltas(3))
        reached = threading.Event()

        async def hang(original: Any, self: _Reducer, stream: FrameStream, index: int) -> None:
            if index == num_results:
                reached.set()
                await _never()
            await original(self, stream, index)

        on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], hang)
        futures = swarm.start(group, outgoing)
        assert reached.wait(CALL_SECONDS)
        futures[VICTIM].cancel()
        swarm.networks[VICTIM].close()
        began = time.monotonic()
        errors = [f.exception(CALL_SECONDS) for index, f in enumerate(futures) if index != VICTIM]
        assert_all_name(errors, group.members[VICTIM], "")
        assert time.monotonic() - began < 8.0


def test_a_reducer_that_is_silent(swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection lives, but nothing comes: not even that it waits for others."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], _never)
    began = time.monotonic()
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "is silent")
    assert time.monotonic() - began < 5.0


async def _only_alive(_original: Any, _self: Any, stream: FrameStream, _next_result: int) -> None:
    while True:
        await stream.send(allreduce._ALIVE)
        await asyncio.sleep(0.1)


@pytest.fixture
def very_impatient(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what one says who is alive: waiting for other senders is what an honest one does meanwhile."""
    for name, value in {"GROUP_WAIT_SECONDS": 1.0, "STRAGGLER_FACTOR": 5.0}.items():
        monkeypatch.setattr(allreduce, name, value)


@pytest.mark.parametrize("rule", ["mean", "centered_clipping"])
def test_a_reducer_that_only_says_that_it_is_alive(
    swarm: Swarm, very_impatient: None, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """In two phases it keeps back its figures, too, so that nobody else can tell a result."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], _only_alive)
    errors = errors_of_others(swarm, group, outgoing, aggregation=rule, limit_seconds=2 * CALL_SECONDS)
    assert_all_name(errors, group.members[VICTIM], "far behind")
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


def test_a_reducer_that_answers_only_some(
    swarm: Swarm, very_impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    deceived = group.members[2]

    async def answer_others(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        if stream.peer_id == deceived:
            await _only_alive(original, self, stream, next_result)
        else:
            await original(self, stream, next_result)

    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], answer_others)
    futures = swarm.start(group, outgoing, limit_seconds=2 * CALL_SECONDS)
    assert_all_name([futures[2].exception(3 * CALL_SECONDS)], group.members[VICTIM], "far behind")
    results = [future.result(CALL_SECONDS) for index, future in enumerate(futures) if index != 2]
    assert_mean_of_recorded(group, results, outgoing)


def test_the_only_reducer_says_only_that_it_is_alive(
    swarm: Swarm, very_impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other one to compare it with: it has the parts, and no wait for senders is that long."""
    group, outgoing = swarm.group(), swarm.prepare(deltas(size=1000))
    reducer = next(index for index, peer in enumerate(group.members) if swarm.owned(group, 1000)[peer])
    on_member(monkeypatch, _Reducer, "_send_results", group.members[reducer], _only_alive)
    errors = swarm.errors(group, outgoing, limit_seconds=2 * CALL_SECONDS)
    del errors[reducer]
    assert_all_name(errors, group.members[reducer], "tells nothing new")


def test_at_the_limit_who_is_furthest_behind_is_named(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that is shorter than the patience with a straggler; else the next group would be the same."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], _only_alive)
    errors = errors_of_others(swarm, group, outgoing, limit_seconds=3.0)
    assert_all_name(errors, group.members[VICTIM], "took longer than 3 s, waiting for its results")


def test_a_reducer_that_waits_for_one_sender_is_not_to_blame(
    swarm: Swarm, very_impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender stops at one reducer only: there, and nowhere else, it is out; and nobody fails for it."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    waiting = group.members[2]

    async def stop(original: Any, self: _Exchange, stream: FrameStream, member: str, next_part: int) -> None:
        if member != waiting:
            await original(self, stream, member, next_part)
            return
        await stream.send(allreduce._MANIFEST, self.outgoing.signed)
        await _never()

    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], stop)
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    parts = swarm.owned(group)[waiting]
    assert missing_of(results, VICTIM) == ((parts.start, parts.stop),)


def test_a_sender_that_trickles_to_one_reducer_does_not_make_it_late(
    swarm: Swarm, very_impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent for long, and nobody can get ahead of it; but other reducers were done long ago."""
    monkeypatch.setattr(allreduce, "WINDOW_PARTS", 1)
    monkeypatch.setattr(allreduce, "STRAGGLER_FACTOR", 2.0)
    size = 80 * 1024
    group, outgoing = swarm.group(), swarm.prepare(deltas(size=size))
    waiting = group.members[2]
    parts = swarm.owned(group, size)[waiting]

    async def trickle(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if part in parts:
            await asyncio.sleep(0.3)
        await original(self, stream, part)

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], trickle)
    began = time.monotonic()
    results = swarm.reduce(group, outgoing, limit_seconds=CALL_SECONDS)
    assert_same(results)
    (missing,) = missing_of(results, VICTIM)
    assert parts.start < missing[0] < missing[1] == parts.stop
    assert time.monotonic() - began < 0.3 * len(parts)


def test_nobody_waits_for_the_last_word(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reducer that reads nothing more after its statement: what it made is here."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    send = FrameStream.send

    async def send_all_but_done(self: FrameStream, kind: int, *chunks: Any) -> None:
        await (_never() if kind == allreduce._DONE else send(self, kind, *chunks))

    monkeypatch.setattr(FrameStream, "send", send_all_but_done)
    assert_mean_of_recorded(group, swarm.reduce(group, outgoing), outgoing)


def test_a_slow_reducer_says_that_it_is_alive(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits twice as long for somebody as others would wait for it."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    async def wait(original: Any, self: _Reducer, has_it: Any) -> None:
        await asyncio.sleep(2.0)
        await original(self, has_it)

    async def once(original: Any, self: _Reducer) -> None:
        await asyncio.sleep(2.0)
        await original(self)

    on_member(monkeypatch, _Reducer, "run", group.members[VICTIM], once)
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    assert missing_of(results, VICTIM) == ()


def test_parts_behind_results_on_a_slow_link_are_not_missing(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of the same peer come meanwhile, on the same connection: it is not silent."""
    monkeypatch.setattr(allreduce, "UNMEASURED_BYTES_PER_SECOND", 20_000.0)
    monkeypatch.setattr(allreduce, "STRAGGLER_FACTOR", 1e6)  # as if all links were as slow
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    deceived = group.members[2]
    size = outgoing[0].codec.size_bytes(GRID.part_values)
    swarm.services[2]._rates.clear()
    swarm.services[VICTIM]._rates.clear()
    silence = 1.0 + allreduce.STALL_FACTOR * size / 20_000  # and a link that opens at once
    assert silence + 1.5 < 1.0 + allreduce.TRICKLE_FACTOR * size / 20_000

    async def pause(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        if stream.peer_id == deceived and part == swarm.owned(group)[deceived][1]:
            await asyncio.sleep(silence + 1.0)
        await original(self, stream, part)

    async def slowly(original: Any, self: _Reducer, stream: FrameStream, index: int) -> None:
        if stream.peer_id == deceived:
            await asyncio.sleep((silence + 1.5) / len(self._parts))
        await original(self, stream, index)

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], pause)
    on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], slowly)
    results = swarm.reduce(group, outgoing)
    assert_mean_of_recorded(group, results, outgoing)
    assert missing_of(results, VICTIM) == ()


def test_a_frame_that_trickles_in() -> None:
    """Silence is no matter here, so the limit of the whole frame ends it."""

    async def wait() -> None:
        async with asyncio.timeout(None) as limit:
            patience = _Patience(time.monotonic, limit)  # bytes come all the time
            patience.begin(0.02, 0.2)
            await _never()

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert 0.2 <= time.monotonic() - began < CALL_SECONDS


def test_frames_in_time_put_off_the_limit() -> None:
    async def wait() -> float:
        async with asyncio.timeout(None) as limit:
            patience = _Patience(time.monotonic, limit)  # bytes come all the time
            patience.begin(0.02, 0.02)
            patience.end()
            await asyncio.sleep(0.1)  # nobody waits for a frame
            patience.begin(CALL_SECONDS, CALL_SECONDS)
            await asyncio.sleep(0.1)
            patience.close()
        return limit.when() or 0.0

    assert asyncio.run(wait()) == 0.0


def test_a_limit_that_shrinks_counts_from_the_next_frame() -> None:
    """What was set for a link of which nothing is known must not outlast its first measurement."""

    async def wait() -> None:
        async with asyncio.timeout(None) as limit:
            patience = _Patience(lambda: 0.0, limit)
            patience.begin(10 * CALL_SECONDS, 20 * CALL_SECONDS)
            patience.end()
            patience.begin(0.05, 0.1)
            await _never()

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert 0.05 <= time.monotonic() - began < CALL_SECONDS


def _nan_result(original: Any, self: _Reducer, stream: FrameStream, index: int) -> Any:
    return stream.send(allreduce._RESULT, np.full(len(self._results[index]) // 4, np.nan, "<f4").tobytes())


def _short_result(original: Any, self: _Reducer, stream: FrameStream, index: int) -> Any:
    return stream.send(allreduce._RESULT, bytes(self._results[index])[:-4])


async def _two_results(original: Any, self: _Reducer, stream: FrameStream, index: int) -> None:
    await original(self, stream, index)
    if index == len(self._results) - 1:
        await original(self, stream, index)


def _swapped_results(original: Any, self: _Reducer, stream: FrameStream, index: int) -> Any:
    return stream.send(allreduce._RESULT, self._results[index ^ 1 if index < 2 else index])


def _changed_result(original: Any, self: _Reducer, stream: FrameStream, index: int) -> Any:
    values = np.frombuffer(self._results[index], "<f4") + np.float32(1e-3)
    return stream.send(allreduce._RESULT, values.tobytes())


@pytest.mark.parametrize(
    ("send", "why"),
    [
        (_nan_result, "not finite"),
        (_short_result, "cannot be decoded"),
        (_two_results, "more results than it has parts"),
        (_swapped_results, "other results than it sent"),
        (_changed_result, "other results than it sent"),
    ],
)
def test_results_that_are_wrong(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, send: Callable[..., Any], why: str
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    async def wait_for_all(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        while not self._statement:
            await asyncio.sleep(0.01)
        await original(self, stream, next_result)

    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], wait_for_all)
    on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], send)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], why)
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


def test_a_result_that_cannot_be_decoded(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas(), "int4")

    def garbage(original: Any, self: _Reducer, stream: FrameStream, index: int) -> Any:
        return stream.send(allreduce._RESULT, b"\xff" * len(self._results[index]))

    on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], garbage)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "cannot be decoded")


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_results_that_are_larger_than_what_they_were_made_of(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Four times the length of all contributions together; it signs that, so nothing else is wrong."""
    group, outgoing = swarm.group(), swarm.prepare(deltas(), codec)

    def enlarge(original: Any, self: _Reducer, part: int) -> Any:
        values = CODECS[codec].decode(original(self, part), GRID.size(part))
        return CODECS[codec].encode(values * 16.0)  # of four nearly orthogonal ones the mean has a quarter

    on_member(monkeypatch, _Reducer, "_reduce_part", group.members[VICTIM], enlarge)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "larger than")


def _a_thousand(original: Any, self: _Reducer, part: int) -> memoryview:
    original(self, part)
    return memoryview(np.full(GRID.size(part), 1000.0, "<f4").tobytes())


def test_who_keeps_its_manifest_back_is_held_to_the_norm_cap(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as the longest that is known: without all manifests nothing was checked once."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], _never)
    on_member(monkeypatch, _Reducer, "_reduce_part", group.members[VICTIM], _a_thousand)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "larger than")


def test_who_keeps_a_long_manifest_from_some_makes_no_reducer_a_liar(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member gets the parts of a delta 200 times as long as the others, of which two never hear."""
    group, values = swarm.group(), deltas()
    values[VICTIM] = values[VICTIM] * 200.0
    outgoing = swarm.prepare(values)

    async def send(original: Any, self: _Exchange, stream: FrameStream, member: str, next_part: int) -> None:
        await (original(self, stream, member, next_part) if member == group.members[2] else _never())

    on_member(monkeypatch, _Exchange, "_send_parts", group.members[VICTIM], send)
    results = swarm.reduce(group, outgoing)
    assert_same(results)
    assert float(results[0].flat.norm()) > 10 * float(outgoing[0].manifest.norm)
    parts = swarm.owned(group)
    kept_from = (group.members[0], group.members[3])
    assert missing_of(results, VICTIM) == _joined([(parts[m].start, parts[m].stop) for m in kept_from])


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "clipped_mean", "centered_clipping"])
def test_a_length_declared_for_the_own_slice_frees_no_liar(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Where nobody can check it. The rules that bound a liar's contribution bound its results, too."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    parts = swarm.owned(group)[group.members[VICTIM]]
    lie = dict.fromkeys(parts, 1e12)
    outgoing[VICTIM] = forged(outgoing[VICTIM], swarm.identities[VICTIM], squared_norms=lie)

    tell_it = _changed_figures(_set(VICTIM, VICTIM, 1e12 * len(parts)))
    on_member(monkeypatch, _Reducer, "_tell_figures", group.members[VICTIM], tell_it)
    on_member(monkeypatch, _Reducer, "_reduce_part", group.members[VICTIM], _a_thousand)
    errors = errors_of_others(swarm, group, outgoing, aggregation=rule)
    assert_all_name(errors, group.members[VICTIM], "larger than")


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_feedback_of_much_larger_deltas_makes_nobody_a_liar(swarm: Swarm, codec: str) -> None:
    """Left from earlier rounds, a thousand times as long as what is sent now: it is dropped, not added."""
    group, outgoing = swarm.group(), swarm.prepare(deltas(), codec)
    large = {part: torch.full((GRID.size(part),), 50.0) for part in range(GRID.num_parts)}
    assert_feedback_is_dropped(swarm, group, outgoing, large)
    assert all((large[part] == 50.0).all() for part in large)  # the attempt may come to nothing


@pytest.mark.parametrize("num_values", [512, 1])
def test_feedback_of_parts_of_another_size_is_dropped(swarm: Swarm, num_values: int) -> None:
    """From a checkpoint of a version that cut the vector elsewhere."""
    group, outgoing = swarm.group(), swarm.prepare(deltas(), "int8")
    smaller = {part: torch.full((num_values,), 1e-3) for part in range(GRID.num_parts)}
    assert_feedback_is_dropped(swarm, group, outgoing, smaller)


def assert_feedback_is_dropped(
    swarm: Swarm, group: Group, outgoing: list[Outgoing], feedback: dict[int, torch.Tensor]
) -> None:
    """What all members get is what they would without it, in one process as well; statements name none."""
    results = swarm.reduce(group, outgoing, residuals=[feedback] * NUM_PEERS)
    assert_same(results)
    members = [Member(peer, 1.0, own) for peer, own in zip(group.members, outgoing, strict=True)]
    for residuals in ({}, feedback):
        alone = fuse(members, aggregation="mean", residuals=residuals).delta(GRID, outgoing[0].codec)
        assert results[0].flat.numpy().tobytes() == alone.numpy().tobytes()
    assert all(
        statement_of(result, peer).residuals_before == "" for result in results for peer in group.members
    )


def statement_of(result: Reduced, peer_id: str) -> Statement:
    return open_signed(result.statements[peer_id], Statement, max_bytes=MAX_SIGNED_BYTES)[1]


def resigned(signed: bytes, author: Any, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A statement after `change` of its fields, signed again."""
    fields = open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)[1].model_dump()
    change(fields)
    return sign(Statement.model_validate(fields), author).to_bytes()


def _changed_sender(index: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda statement: statement["senders"][index].update(fields)


def lie_in_statement(
    monkeypatch: pytest.MonkeyPatch, peer_id: str, author: Any, change: Callable[[dict[str, Any]], Any]
) -> None:
    """A liar does not check itself."""

    def lie(original: Any, self: _Reducer) -> bytes:
        return resigned(original(self), author, change)

    def take(original: Any, self: _Exchange, member: str, signed: bytes) -> None:
        if member != self.own:
            original(self, member, signed)

    on_member(monkeypatch, _Reducer, "_make_statement", peer_id, lie)
    on_member(monkeypatch, _Exchange, "take_statement", peer_id, take)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.update(group=hash_of("other")), "another group"),
        (lambda s: s.update(run=hash_of("other")), "another group"),
        (lambda s: s.update(first_part=s["first_part"] + 1), "not about parts"),
        (lambda s: s.update(results=join_hashes(bytes(32))), "not about parts"),
        (lambda s: s.update(results="nonsense!"), "not base64"),
        (lambda s: s["senders"].pop(), "other senders or weights"),
        (lambda s: s["senders"].reverse(), "other senders or weights"),
        (_changed_sender(0, declared=2.0), "other senders or weights"),
        (_changed_sender(0, num_parts=9), "more parts than there are"),
        (_changed_sender(0, weight=0.0), "it left out"),
        (_changed_sender(0, manifest=None), "without a manifest"),
        (_changed_sender(0, norm=3.0), "a norm that is not in the manifest"),
        (lambda s: s.update(figures=[1.0] * 16), "other figures than it told"),
        (lambda s: s.update(told=join_hashes(bytes(32))), "figures of every reducer"),
        (lambda s: s.update(told="!!!"), "not base64"),
    ],
)
def test_a_statement_that_does_not_fit(
    swarm: Swarm,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], Any],
    why: str,
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    lie_in_statement(monkeypatch, group.members[VICTIM], swarm.identities[VICTIM], change)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], why)


def test_a_statement_that_only_the_last_look_cannot_read_blames_its_author(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    victim = group.members[VICTIM]
    lie_in_statement(monkeypatch, victim, swarm.identities[VICTIM], lambda s: s.update(told="!!!"))
    split = manifest_module.split_hashes
    monkeypatch.setattr(manifest_module, "split_hashes", lambda text: [] if text == "!!!" else split(text))
    assert_all_name(errors_of_others(swarm, group, outgoing), victim, "cannot be read")


def test_a_statement_that_names_a_manifest_that_its_sender_never_signed(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender itself knows who lies; the others know of two manifests, and cannot tell."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    change = _changed_sender(0, manifest=hash_of("other"))
    lie_in_statement(monkeypatch, group.members[VICTIM], swarm.identities[VICTIM], change)
    errors = swarm.errors(group, outgoing)
    assert_all_name(errors[:1], group.members[VICTIM], "not mine")
    assert_all_name(errors[2:], group.members[0], "different manifests")


def test_a_statement_of_somebody_else(swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    lie_in_statement(monkeypatch, group.members[VICTIM], identity("stranger"), lambda _: None)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "another reducer")


# Figures of two phases.


def _changed_figures(change: Callable[[np.ndarray], Any]) -> Callable[..., Any]:
    """A reducer that tells other figures than it knows; to all the same."""

    async def tell(original: Any, self: _Reducer) -> None:
        take = self._exchange.take_figures

        async def take_changed(member: str, payload: bytes) -> None:
            if member == self._exchange.own:
                figures = np.frombuffer(payload, "<f8").copy().reshape(NUM_PEERS, NUM_PEERS)
                change(figures)
                self._figures = payload = figures.tobytes()
            await take(member, payload)

        self._exchange.take_figures = take_changed  # type: ignore[method-assign,assignment]
        await original(self)

    return tell


def _set(row: int, column: int, value: float) -> Callable[[np.ndarray], Any]:
    return lambda figures: figures.__setitem__((row, column), value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set(0, 0, 1e30), "not the norm that its manifest says"),
        (_set(2, 2, -1.0), "negative"),
        (_set(3, 0, 1e30), "larger than the lengths"),
        (_set(0, 3, math.nan), "larger than the lengths"),
        (_set(3, 2, math.inf), "larger than the lengths"),
    ],
)
def test_figures_that_cannot_be(
    swarm: Swarm,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[np.ndarray], Any],
    why: str,
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    on_member(monkeypatch, _Reducer, "_tell_figures", group.members[VICTIM], _changed_figures(change))
    on_member(monkeypatch, _Exchange, "check_figures", group.members[VICTIM], lambda *_: None)
    errors = errors_of_others(swarm, group, outgoing, aggregation="centered_clipping")
    assert_all_name(errors, group.members[VICTIM], why)


def test_who_sees_it_late_does_not_blame_who_saw_it_early(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members fail at once; they stay until the third has seen for itself who lies."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    victim, late = group.members[VICTIM], group.members[2]

    async def send_late(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        if stream.peer_id == late:
            await asyncio.sleep(0.6)
        await original(self, stream, next_result)

    on_member(monkeypatch, _Reducer, "_send_results", victim, send_late)
    on_member(monkeypatch, _Reducer, "_tell_figures", victim, _changed_figures(_set(0, 0, 1e30)))
    on_member(monkeypatch, _Exchange, "check_figures", victim, lambda *_: None)
    errors = errors_of_others(swarm, group, outgoing, aggregation="centered_clipping")
    assert_all_name(errors, victim, "figures that cannot be")


def _send_figures(change: Callable[[Any, FrameStream, bytes], bytes | None]) -> Callable[..., Any]:
    """A reducer whose FIGURES frame is another one, or none, for one who asks."""

    async def send_results(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        send = stream.send

        async def send_changed(kind: int, *chunks: bytes) -> None:
            if kind == allreduce._FIGURES:
                changed = change(self, stream, bytes(chunks[0]))
                if changed is None:
                    return
                chunks = (changed,)
            await send(kind, *chunks)

        stream.send = send_changed  # type: ignore[method-assign,assignment]
        await original(self, stream, next_result)

    return send_results


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda self, stream, data: data[:-8], "figures of another size"),
        (lambda self, stream, data: None, "without figures"),
        (lambda self, stream, data: _nudged(data), "other figures than it told"),
    ],
    ids=["size", "none", "others"],
)
def test_figures_that_are_not_those_of_the_statement(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, change: Any, why: str
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    victim = group.members[VICTIM]
    on_member(monkeypatch, _Reducer, "_send_results", victim, _send_figures(change))
    if "without" in why:  # else it would wait for others, which wait for it
        on_member(monkeypatch, _Reducer, "_tell_figures", victim, _only_own_figures)
    errors = errors_of_others(swarm, group, outgoing, aggregation="centered_clipping", limit_seconds=5.0)
    assert_all_name(errors, victim, why)


async def _only_own_figures(original: Any, self: _Reducer) -> None:
    """Goes on as if it had everybody's."""
    own = np.eye(NUM_PEERS)
    self._exchange.figures = dict.fromkeys(self._exchange._owned, own)
    self._figures = own.tobytes()


def _nudged(data: bytes) -> bytes:
    figures = np.frombuffer(data, "<f8").copy()
    figures[4] *= 1 + 1e-9
    return figures.tobytes()


def test_a_reducer_that_tells_one_member_other_figures(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights would differ, and an audit would find an honest reducer guilty of it."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    victim, deceived = group.members[VICTIM], group.members[2]

    def change(self: Any, stream: FrameStream, data: bytes) -> bytes:
        return _nudged(data) if stream.peer_id == deceived else data

    on_member(monkeypatch, _Reducer, "_send_results", victim, _send_figures(change))
    errors = errors_of_others(swarm, group, outgoing, aggregation="centered_clipping")
    assert_all_name(errors, victim, "figures")


def test_figures_that_nobody_needs(swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    async def send_results(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        await stream.send(allreduce._FIGURES, bytes(8 * NUM_PEERS**2))
        await original(self, stream, next_result)

    on_member(monkeypatch, _Reducer, "_send_results", group.members[VICTIM], send_results)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "")


def test_a_rule_that_does_not_exist_fails_the_attempt(swarm: Swarm) -> None:
    errors = swarm.errors(swarm.group(), swarm.prepare(deltas()), aggregation="nonsense")
    assert all(isinstance(error, RoundError) for error in errors)
    assert any("unknown rule" in str(error) for error in errors)


def test_two_phases_are_for_small_groups(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allreduce, "MAX_GRAM_MEMBERS", 3)
    errors = swarm.errors(swarm.group(), swarm.prepare(deltas()), aggregation="centered_clipping")
    assert all(isinstance(error, RoundError) and "up to 3" in str(error) for error in errors)
    assert swarm.reduce(swarm.group(3), swarm.prepare(deltas(3)), aggregation="centered_clipping")


# A reducer that tells one member something else: found when the next attempt begins.


def test_two_statements_of_one_reducer_are_a_proof(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    group, outgoing = swarm.group(round=1), swarm.prepare(deltas())
    victim, deceived = group.members[VICTIM], group.members[2]

    async def send_results(original: Any, self: _Reducer, stream: FrameStream, next_result: int) -> None:
        if stream.peer_id != deceived:
            await original(self, stream, next_result)
            return
        while not self._statement:
            await asyncio.sleep(0.01)
        values = np.frombuffer(self._results[0], "<f4") + np.float32(1e-4)
        lie = [values.tobytes(), *self._results[1:]]
        hashes = join_hashes(b"".join(map(part_hash, lie)))
        for data in lie:
            await stream.send(allreduce._RESULT, data)
        change = lambda statement: statement.update(results=hashes)  # noqa: E731
        signed = resigned(self._statement, swarm.identities[VICTIM], change)
        await stream.send(allreduce._STATEMENT, signed)

    on_member(monkeypatch, _Reducer, "_send_results", victim, send_results)
    results = swarm.reduce(group, outgoing)
    assert len({result.flat.numpy().tobytes() for result in results}) == 2  # so no majority signs
    monkeypatch.undo()
    errors = errors_of_others(swarm, swarm.group(round=1), outgoing)
    assert_all_name(errors, victim, "told two members different results")
    assert all(error.is_proven for error in errors if isinstance(error, GroupFailed))
    group = swarm.group(round=2)  # of another round there is nothing to compare
    assert_mean_of_recorded(group, swarm.reduce(group, outgoing), outgoing)


def test_statements_are_for_members_of_the_group_and_hashed_once(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 ms for those of 32 reducers, in the network's thread, for whoever asks."""
    group = swarm.group(3)
    swarm.reduce(group, swarm.prepare(deltas(3)))
    body = {"run": RUN, "group": group.group_id.hex()}

    def ask(asking: int, **more: str) -> bytes:
        network = swarm.networks[asking]
        call = network.call(group.members[0], "statements", {**body, **more}, timeout_seconds=CALL_SECONDS)
        return network.run(call, timeout_seconds=CALL_SECONDS)

    digests = ask(1)
    assert json.loads(digests).keys() == set(group.members)
    for more in ({}, {"reducer": group.members[0]}):
        with pytest.raises(PeerUnreachable, match="not in this group"):
            ask(3, **more)
    monkeypatch.setattr(Statement, "digest", property(lambda _: pytest.fail("hashed again")))
    assert json.loads(ask(2)) == json.loads(digests)


def test_a_failed_attempt_is_followed_by_another(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same round, from the same encoded parts, with nobody accused."""
    group, outgoing = swarm.group(round=1), swarm.prepare(deltas())
    on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], _nan_result)
    assert_all_name(errors_of_others(swarm, group, outgoing), group.members[VICTIM], "not finite")
    monkeypatch.undo()
    group = swarm.group(round=1)
    assert_mean_of_recorded(group, swarm.reduce(group, outgoing), outgoing)


def test_who_compares_statements_slowly_is_in_the_attempt_all_the_same(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member answers another too late, for longer than others wait for it to begin."""
    monkeypatch.setattr(allreduce, "GROUP_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(AllReduceService, "_answer_seconds", lambda self, member: 2.5)
    victim, asked, told = swarm.peer_ids[VICTIM], threading.Event(), []
    outgoing = swarm.prepare(deltas())
    swarm.reduce(swarm.group(round=1), outgoing)
    service = swarm.services[2]

    async def answer_late(peer_id: str, body: Any) -> bytes:
        if peer_id == victim:
            asked.set()
            await _never()
        return await service._on_statements(peer_id, body)

    async def remember(original: Any, self: _Reducer, stream: FrameStream, index: int) -> None:
        told.append(self._exchange.comparing.done())
        await original(self, stream, index)

    on_member(monkeypatch, _Reducer, "_send_result", victim, remember)
    swarm.networks[2].on_call("statements", answer_late)
    try:
        group = swarm.group(round=1)
        assert_mean_of_recorded(group, swarm.reduce(group, outgoing), outgoing)
    finally:
        swarm.networks[2].on_call("statements", service._on_statements)
    assert asked.is_set()
    assert len(told) > 0
    assert all(told)  # none of its results has left before


def test_who_begins_late_still_learns_what_others_were_told(swarm: Swarm) -> None:
    """They have begun the next attempt already, and remember the one before."""
    outgoing = swarm.prepare(deltas())
    first, second = swarm.group(round=1), swarm.group(round=1)
    told = swarm.reduce(first, outgoing)[0].statements
    swarm.reduce(second, outgoing)

    async def ask(group: Group) -> set[str]:
        body = {"run": RUN, "group": group.group_id.hex()}
        return set(parse_json(await swarm.services[0]._ask_statements(swarm.peer_ids[1], body)))

    for group in (first, second):
        assert swarm.networks[0].run(ask(group), timeout_seconds=CALL_SECONDS) == set(told)


# Who asks without being asked, and limits.


async def _ask(swarm: Swarm, asking: int, hello: bytes, asked: int = 0) -> tuple[int, bytes]:
    service = swarm.services[asking]
    stream = await open_stream(
        service.network, swarm.peer_ids[asked], service.name, hello, timeout_seconds=CALL_SECONDS
    )
    try:
        async with asyncio.timeout(CALL_SECONDS):
            kind, payload = await stream.receive({allreduce._REFUSED: 200, allreduce._WELCOME: 4})
            return kind, bytes(payload)
    finally:
        stream.close()


@pytest.mark.parametrize(
    ("make_hello", "why"),
    [
        (lambda group: group.group_id, b"you are not in this group"),
        (lambda group: group.group_id + b"\xff" * 900, b"you are not in this group"),
        (lambda group: hash_of("other").encode()[:32], b"no such group here"),
        (lambda group: b"", b"no such group here"),
    ],
    ids=["stranger", "stranger and more", "wrong group", "nothing"],
)
def test_strangers_are_refused(
    swarm: Swarm, impatient: None, make_hello: Callable[[Group], bytes], why: bytes
) -> None:
    """The fourth peer is not in the group of three, and talks to a member all the same."""
    group, outgoing = swarm.group(3), swarm.prepare(deltas(3))
    first = swarm.start(group, outgoing[:1])
    network = swarm.networks[3]
    asked = network.submit(_ask(swarm, 3, make_hello(group)))
    others = swarm.start(group, [None, *outgoing[1:]])
    assert asked.result(CALL_SECONDS) == (allreduce._REFUSED, why)
    results = [future.result(CALL_SECONDS) for future in (*first, *others)]
    assert_same(results)
    expected = decoded_rows(outgoing).mean(axis=0)
    np.testing.assert_allclose(results[0].flat.numpy(), expected, rtol=0, atol=1e-7)


def test_a_member_that_comes_with_another_group_is_named_with_that(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams are refused, so it is in its own slice alone."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    async def converse(original: Any, self: _Exchange, member: str) -> None:
        await _ask(swarm, VICTIM, bytes(32) + allreduce._U32.pack(0), swarm.peer_ids.index(member))
        await _never()

    on_member(monkeypatch, _Exchange, "_converse", group.members[VICTIM], converse)
    futures = swarm.start(group, outgoing)
    results = [future.result(CALL_SECONDS) for index, future in enumerate(futures) if index != VICTIM]
    futures[VICTIM].cancel()
    assert_mean_of_recorded(group, results, outgoing)
    reason = results[0].contributions[VICTIM].reason
    assert [f"it came with another group (says {peer[-8:]})" in reason for peer in sorted(group.members)] == [
        peer != group.members[VICTIM] for peer in sorted(group.members)
    ]


def test_who_claims_results_that_there_are_not_is_refused(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that asks from result 7 on: it once made its reducer spin for ever."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())

    async def converse(original: Any, self: _Exchange, member: str) -> None:
        if member == group.members[0]:
            refusal = await _ask(swarm, VICTIM, group.group_id + allreduce._U32.pack(7))
            assert refusal == (allreduce._REFUSED, b"there are not so many results")
        await original(self, member)

    on_member(monkeypatch, _Exchange, "_converse", group.members[VICTIM], converse)
    assert_mean_of_recorded(group, swarm.reduce(group, outgoing), outgoing)


def test_nobody_else_starts(swarm: Swarm, impatient: None) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    began = time.monotonic()
    errors = swarm.errors(group, [outgoing[0], None, None, None])
    assert isinstance(errors[0], GroupFailed)
    assert "no such group" in errors[0].why
    assert time.monotonic() - began < allreduce.GROUP_WAIT_SECONDS + allreduce.OPEN_SECONDS


def test_the_limit_of_the_whole_exchange(swarm: Swarm) -> None:
    """Shorter than every other one: it decides."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    began = time.monotonic()
    errors = swarm.errors(group, [outgoing[0], None, None, None], limit_seconds=0.5)
    assert isinstance(errors[0], RoundError)
    assert "took longer than" in str(errors[0])
    assert time.monotonic() - began < 3.0
    assert_next_round_is_exact(swarm)


def test_a_member_that_is_cancelled(swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on as a reducer: a failure of its own need not be theirs. What it had not sent is missing."""
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    sent = threading.Event()

    async def stop(original: Any, self: _Exchange, stream: FrameStream, part: int) -> None:
        sent.set()
        await _never()

    on_member(monkeypatch, _Exchange, "_send_part", group.members[VICTIM], stop)
    futures = swarm.start(group, outgoing)
    assert sent.wait(CALL_SECONDS)
    futures[VICTIM].cancel()
    results = [future.result(CALL_SECONDS) for index, future in enumerate(futures) if index != VICTIM]
    assert_mean_of_recorded(group, results, outgoing)
    expected = [(parts.start, parts.stop) for parts in slices_of_others(swarm, group, VICTIM)]
    assert missing_of(results, VICTIM) == _joined(expected)


# What is left behind.


def _exchange_tasks(swarm: Swarm) -> list[str]:
    async def names() -> list[str]:
        coroutines = [str(task.get_coro()) for task in asyncio.all_tasks()]
        return [name for name in coroutines if "_Exchange" in name or "_Reducer" in name or "_finish" in name]

    return [name for network in swarm.networks for name in network.run(names(), timeout_seconds=CALL_SECONDS)]


def _num_left(exchanges: Sequence[weakref.ref[_Exchange]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in exchanges)


@pytest.mark.parametrize(
    ("outcome", "rule"),
    _some_fast(
        itertools.product(("success", "failure", "cancelled"), ("mean", "centered_clipping")),
        {("success", "mean"), ("failure", "mean"), ("cancelled", "centered_clipping")},
    ),
)
def test_nothing_is_left_of_an_exchange(
    swarm: Swarm, impatient: None, monkeypatch: pytest.MonkeyPatch, outcome: str, rule: str
) -> None:
    group, outgoing = swarm.group(), swarm.prepare(deltas())
    exchanges: list[weakref.ref[_Exchange]] = []
    streams: list[FrameStream] = []
    make, use = _Exchange.__init__, _Exchange._using

    def remember(self: _Exchange, *args: Any) -> None:
        make(self, *args)
        exchanges.append(weakref.ref(self))

    def remember_stream(self: _Exchange, stream: FrameStream) -> Any:
        streams.append(stream)
        return use(self, stream)

    monkeypatch.setattr(_Exchange, "__init__", remember)
    monkeypatch.setattr(_Exchange, "_using", remember_stream)
    if outcome == "failure":
        on_member(monkeypatch, _Reducer, "_send_result", group.members[VICTIM], _short_result)
    elif outcome == "cancelled":
        on_member(monkeypatch, _Reducer, "_collected", group.members[VICTIM], _never)
    futures = swarm.start(group, outgoing, aggregation=rule, limit_seconds=4.0)
    if outcome == "cancelled":
        assert all(future.cancel() for future in futures)
    else:
        num_failed = sum(future.exception(CALL_SECONDS) is not None for future in futures)
        assert (num_failed > 0) == (outcome == "failure")
    swarm.settle()
    del futures
    gc.collect()
    assert len(exchanges) in ([NUM_PEERS] if outcome != "cancelled" else range(NUM_PEERS + 1))
    ends_at = time.monotonic() + 5.0
    while _num_left(exchanges) or _exchange_tasks(swarm):  # cancelled tasks end with the next turn of a loop
        assert time.monotonic() < ends_at, f"{_num_left(exchanges)} exchanges, {_exchange_tasks(swarm)}"
    assert all(stream._transport.is_closing() for stream in streams)
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


def test_two_rounds_at_one_time_do_not_mix(swarm: Swarm, impatient: None) -> None:
    """A member that begins the next group ends what is left of the one before."""
    first, second = swarm.group(), swarm.group()
    outgoing = swarm.prepare(deltas())
    waiting = swarm.start(first, [*outgoing[:3], None])
    results = swarm.reduce(second, outgoing)
    assert_mean_of_recorded(second, results, outgoing)
    assert all(isinstance(future.exception(CALL_SECONDS), RoundError) for future in waiting)


def test_which_rules_have_two_phases() -> None:
    assert [rule for rule in RULES if needs_gram(rule, "none")] == ["centered_clipping"]
