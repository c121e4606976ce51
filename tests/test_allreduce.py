"""Is the average exact, the same bytes for all, and does every failure end soon and name its cause?"""

from __future__ import annotations

import concurrent.futures
import gc
import hashlib
import inspect
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import TensorPartContainer, TensorPartReducer
from hivemind.compression import CompressionBase
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.proto import averaging_pb2

from coordinator.agreement import Group, GroupFailed
from coordinator.errors import RoundError
from coordinator.network import Network
from coordinator.records import Contribution
from peer import allreduce
from peer.aggregate import RULES
from peer.allreduce import CODECS, AllReduceService, Reduced, _encode
from tests.fakes import CALL_SECONDS, new_directory, running_networks

NUM_PEERS = 4
SIZE = 10_000  # with parts of 4 KB of fp32: ten parts, of which no peer has the same number
NAMESPACE = "test"


@dataclass
class Swarm:
    networks: list[Network]
    services: list[AllReduceService]
    num_groups: int = 0

    def group(self, num_peers: int = NUM_PEERS, weights: Sequence[float] | None = None) -> Group:
        self.num_groups += 1
        members = tuple(network.peer_id for network in self.networks[:num_peers])
        contributions = tuple(
            Contribution(peer=member, num_examples=1, weight=weight)
            for member, weight in zip(members, weights or [1.0] * num_peers, strict=True)
        )
        group_id = hashlib.sha256(str(self.num_groups).encode()).digest()
        return Group(1, self.num_groups, members, contributions, members, 0.0, group_id)

    def start(
        self, group: Group, flats: Sequence[torch.Tensor | None], *, rule: str = "mean", codec: str = "fp32"
    ) -> list[concurrent.futures.Future[Reduced]]:
        """One all-reduce per vector; None: that member never starts."""
        return [
            network.submit(service.reduce(group, flat, rule=rule, codec=codec))
            for network, service, flat in zip(self.networks, self.services, flats, strict=False)
            if flat is not None
        ]

    def reduce(self, group: Group, flats: Sequence[torch.Tensor], **options: str) -> list[Reduced]:
        return [future.result(CALL_SECONDS) for future in self.start(group, flats, **options)]

    def errors(self, group: Group, flats: Sequence[torch.Tensor | None]) -> list[BaseException | None]:
        return [future.exception(CALL_SECONDS) for future in self.start(group, flats)]


@pytest.fixture(scope="module")
def started() -> Iterator[Swarm]:
    with running_networks(NUM_PEERS, new_directory()) as networks:
        services = [AllReduceService(network.p2p, NAMESPACE) for network in networks]
        for network, service in zip(networks, services, strict=True):
            network.run(service.start(), timeout_seconds=CALL_SECONDS)
        yield Swarm(networks, services)


@pytest.fixture
def swarm(started: Swarm, monkeypatch: pytest.MonkeyPatch) -> Swarm:
    monkeypatch.setattr(allreduce, "PART_SIZE_BYTES", 4096)
    return started


def vectors(num_peers: int = NUM_PEERS, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator) for _ in range(num_peers)]


def float64_mean(flats: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = sum(
        (flat.double() * weight for flat, weight in zip(flats, weights, strict=True)), torch.zeros(())
    )
    return total / sum(weights)


def assert_same_bytes(results: Sequence[Reduced]) -> None:
    assert len({result.flat.numpy().tobytes() for result in results}) == 1


def test_by_hand(swarm: Swarm) -> None:
    flats = [torch.full((5,), value) for value in (1.0, 2.0, 6.0)]
    results = swarm.reduce(swarm.group(3), flats)
    assert [result.flat.tolist() for result in results] == [[3.0] * 5] * 3
    results = swarm.reduce(swarm.group(3, weights=[1.0, 1.0, 2.0]), flats)
    assert [result.flat.tolist() for result in results] == [[3.75] * 5] * 3  # (1 + 2 + 12) / 4


@pytest.mark.parametrize("num_peers", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 1024, 1025, SIZE])
def test_exact_and_the_same_bytes_for_all(swarm: Swarm, num_peers: int, size: int) -> None:
    flats = vectors(num_peers, size)
    before = [flat.clone() for flat in flats]
    results = swarm.reduce(swarm.group(num_peers), flats)
    assert_same_bytes(results)
    error = (results[0].flat.double() - float64_mean(flats, [1.0] * num_peers)).abs().max().item()
    assert error <= 1e-6  # a few roundings of values of at most 5
    assert results[0].flat.tolist() == RULES["mean"](flats, [1.0] * num_peers).tolist()  # an audit's bits
    assert all(torch.equal(flat, copy) for flat, copy in zip(flats, before, strict=True))


def test_weights_are_the_groups(swarm: Swarm) -> None:
    flats, weights = vectors(), [0.5, 1.0, 4.0, 0.01]
    results = swarm.reduce(swarm.group(weights=weights), flats)
    assert_same_bytes(results)
    torch.testing.assert_close(results[0].flat.double(), float64_mean(flats, weights), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rules(swarm: Swarm, rule: str) -> None:
    flats = vectors()
    results = swarm.reduce(swarm.group(), flats, rule=rule)
    assert_same_bytes(results)
    assert results[0].flat.tolist() == RULES[rule](flats, [1.0] * NUM_PEERS).tolist()


def test_fp16(swarm: Swarm) -> None:
    """Half the bytes; off by half a step of fp16 when sent and half a step when the average is sent."""
    flats = [flat.clamp(-4.0, 4.0) * 0.25 for flat in vectors()]  # at most 1: a step is at most 2**-11
    before = [flat.clone() for flat in flats]
    group = swarm.group()
    results = swarm.reduce(group, flats, codec="fp16")
    assert_same_bytes(results)
    error = (results[0].flat.double() - float64_mean(flats, [1.0] * NUM_PEERS)).abs().max().item()
    assert 0 < error <= 2.0**-11
    assert torch.equal(results[0].flat, results[0].flat.half().float())
    assert all(torch.equal(flat, copy) for flat, copy in zip(flats, before, strict=True))
    full = swarm.reduce(swarm.group(), flats)
    assert sum(r.bytes_sent for r in results) * 2 == sum(r.bytes_sent for r in full)


def test_bytes_are_counted(swarm: Swarm) -> None:
    """Of n peers each sends what it does not reduce, and to n - 1 what it does: 2 (n - 1) / n in the mean."""
    results = swarm.reduce(swarm.group(), vectors())
    total = 2 * (NUM_PEERS - 1) * SIZE * 4
    assert sum(r.bytes_sent for r in results) == sum(r.bytes_received for r in results) == total


def culprits(errors: Sequence[BaseException | None]) -> set[str]:
    return {error.culprit for error in errors if isinstance(error, GroupFailed)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", [0, SIZE // 2, SIZE - 1])
def test_who_sends_values_that_are_not_finite_is_named(swarm: Swarm, value: float, index: int) -> None:
    flats = vectors()
    flats[1][index] = value
    errors = swarm.errors(swarm.group(), flats)
    assert all(isinstance(error, RoundError) for error in errors)
    assert culprits(errors) == {swarm.networks[1].peer_id}
    assert_next_round_is_exact(swarm)


def test_who_sends_a_wrong_shape_is_named(swarm: Swarm) -> None:
    flats = vectors()
    flats[2] = torch.zeros(SIZE - 7)
    errors = swarm.errors(swarm.group(), flats)
    assert all(isinstance(error, RoundError) for error in errors[:2] + errors[3:])
    assert swarm.networks[2].peer_id in culprits(errors[:2] + errors[3:])
    assert_next_round_is_exact(swarm)


def test_who_sends_with_another_compression_is_named(swarm: Swarm) -> None:
    group, flats = swarm.group(), vectors()
    futures = [
        network.submit(service.reduce(group, flat, rule="mean", codec="fp16" if index == 3 else "fp32"))
        for index, (network, service, flat) in enumerate(
            zip(swarm.networks, swarm.services, flats, strict=True)
        )
    ]
    errors = [future.exception(CALL_SECONDS) for future in futures]
    assert all(isinstance(error, RoundError) for error in errors)
    assert swarm.networks[3].peer_id in culprits(errors[:3])


def test_a_member_that_never_starts(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allreduce, "STALL_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(allreduce, "GROUP_WAIT_SECONDS", 1.0)
    flats: list[torch.Tensor | None] = [*vectors()]
    flats[3] = None
    started = time.monotonic()
    errors = swarm.errors(swarm.group(), flats)
    assert time.monotonic() - started < 10.0
    assert len(errors) == 3
    assert all(isinstance(error, RoundError) for error in errors)
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


def test_a_member_that_stops_midway(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    group, flats = swarm.group(), vectors()
    sent = allreduce.BackboneAllReduce._generate_input_for_peer
    victim = swarm.networks[1].peer_id

    async def two_parts(self: Any, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        num_sent = 0
        async for message in sent(self, peer_index):
            if str(self.peer_id) == victim and num_sent == 1:
                return
            num_sent += 1
            yield message

    monkeypatch.setattr(allreduce.BackboneAllReduce, "_generate_input_for_peer", two_parts)
    started = time.monotonic()
    errors = swarm.errors(group, flats)
    assert time.monotonic() - started < 10.0
    assert all(isinstance(error, RoundError) for error in errors)
    monkeypatch.undo()
    assert_next_round_is_exact(swarm)


def test_a_cancelled_member_takes_nobody_with_it_for_long(swarm: Swarm) -> None:
    group, flats = swarm.group(), vectors()
    futures = swarm.start(group, [*flats[:3], None])  # waiting for the fourth
    futures[0].cancel()
    last = swarm.networks[3].submit(swarm.services[3].reduce(group, flats[3], rule="mean", codec="fp32"))
    errors = [future.exception(CALL_SECONDS) for future in (*futures[1:], last)]
    assert all(isinstance(error, RoundError) for error in errors)
    assert_next_round_is_exact(swarm)


def test_nothing_is_held_after_a_round(swarm: Swarm) -> None:
    swarm.reduce(swarm.group(), vectors())
    assert all(not service._runners for service in swarm.services)
    swarm.errors(swarm.group(), [torch.full((SIZE,), float("nan")), *vectors()[1:]])
    assert all(not service._runners for service in swarm.services)


@pytest.mark.parametrize("kind", ["unknown group", "foreigner", "nothing", "no tensor"])
def test_streams_of_strangers_harm_nobody(swarm: Swarm, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The fourth peer is not in the group of three, and talks to its members all the same."""
    monkeypatch.setattr(allreduce, "GROUP_WAIT_SECONDS", 2.0)
    group, flats = swarm.group(3), vectors(3)
    group_id = b"unknown" if kind == "unknown group" else group.group_id
    part = averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=group_id, weight=1e30)
    if kind != "no tensor":
        part.tensor_part.CopyFrom(_encode(CODECS["fp32"], torch.ones(1024)))

    async def send() -> AsyncIterator[averaging_pb2.AveragingData]:
        if kind != "nothing":
            yield part

    async def intrude() -> list[int]:
        network = swarm.networks[3]
        stub = AllReduceService.get_stub(
            network.p2p, PeerID.from_base58(swarm.networks[0].peer_id), namespace=NAMESPACE
        )
        return [message.code async for message in await stub.rpc_aggregate_part(send())]

    intrusion = swarm.networks[3].submit(intrude())
    futures = swarm.start(group, flats)
    refusals = (averaging_pb2.BAD_GROUP_ID, averaging_pb2.PROTOCOL_VIOLATION)
    assert all(code in refusals for code in intrusion.result(CALL_SECONDS))
    results = [future.result(CALL_SECONDS) for future in futures]
    assert_same_bytes(results)
    assert results[0].flat.tolist() == RULES["mean"](flats, [1.0] * 3).tolist()


def assert_next_round_is_exact(swarm: Swarm) -> None:
    flats = vectors()
    results = swarm.reduce(swarm.group(), flats)
    assert_same_bytes(results)
    assert results[0].flat.tolist() == RULES["mean"](flats, [1.0] * NUM_PEERS).tolist()


def test_failed_rounds_leave_no_errors_that_nobody_took(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio logs a traceback for each exception of a task or future that is never looked at."""
    for _ in range(2):
        swarm.errors(swarm.group(), [torch.full((SIZE,), float("nan")), *vectors()[1:]])
    gc.collect()
    assert_next_round_is_exact(swarm)
    assert [r.getMessage()[:300] for r in caplog.records if r.name == "asyncio"] == []


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_relied_on_of_hivemind() -> None:
    """A new release that changes one of these needs another look at peer/allreduce.py."""
    runner = AllReduceRunner
    assert parameters(runner.__init__) == [
        *("self", "p2p", "servicer_type", "prefix", "group_id", "tensors", "weight", "ordered_peer_ids"),
        *("peer_fractions", "modes", "sender_timeout", "reducer_timeout", "kwargs"),
    ]
    assert parameters(runner.run) == ["self"]
    assert inspect.isasyncgenfunction(runner.run)
    assert parameters(runner._communicate_with_peer) == ["self", "peer_id"]
    assert parameters(runner._generate_input_for_peer) == ["self", "peer_index"]
    assert inspect.isasyncgenfunction(runner._generate_input_for_peer)
    assert parameters(runner.rpc_aggregate_part) == ["self", "stream", "context"]
    assert inspect.isasyncgenfunction(runner.rpc_aggregate_part)
    assert parameters(runner._accumulate_parts_streaming) == ["self", "stream", "sender_index"]
    assert inspect.isasyncgenfunction(runner._accumulate_parts_streaming)
    assert parameters(runner._ban_sender) == ["self", "peer_id"]
    assert inspect.iscoroutinefunction(runner._ban_sender)
    assert parameters(runner._get_peer_stub) == ["self", "peer"]
    assert parameters(runner.finalize) == ["self", "cancel", "exception"]
    container = TensorPartContainer
    assert parameters(container.__init__) == [
        *("self", "tensors", "peer_fractions", "compression", "part_size_bytes", "tensor_infos"),
        *("return_deltas", "prefetch"),
    ]
    assert parameters(container.register_processed_part) == ["self", "peer_index", "part_index", "part"]
    assert parameters(container.get_raw_input_parts) == ["self", "peer_index"]
    assert parameters(TensorPartReducer.__init__) == ["self", "part_shapes", "num_senders"]
    assert parameters(CompressionBase.compress)[:3] == ["self", "tensor", "info"]
    assert parameters(CompressionBase.extract) == ["self", "serialized_tensor"]
    assert parameters(ServicerBase.get_stub)[:2] == ["p2p", "peer"]
    assert "namespace" in parameters(ServicerBase.add_p2p_handlers)
    assert parameters(P2P.shutdown) == ["self"]


def test_the_members_of_the_reducer_that_the_runner_touches() -> None:
    """All that `_RuleReducer` stands in for; `on_sender_failed` only in `_ban_sender`, which is replaced."""
    touched = set(re.findall(r"tensor_part_reducer\.([\w.]+)", inspect.getsource(AllReduceRunner)))
    assert touched == {"accumulate_part", "finished.wait", "finalize", "num_parts", "on_sender_failed"}
