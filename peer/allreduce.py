"""How one flat vector per peer becomes one for all: hivemind's butterfly all-reduce, made exact and bounded.

The only module that subclasses hivemind's averaging (1.1.12). It relies on `AllReduceRunner.__init__`,
`run`, `rpc_aggregate_part` and `finalize`, replaces `_communicate_with_peer`, `_generate_input_for_peer`,
`_accumulate_parts_streaming` and `_ban_sender`, and relies on how `TensorPartContainer` cuts parts and on
the members of `TensorPartReducer` that the runner touches; a test pins their signatures.

What is different from the stock runner, and why (measured in docs/experiments.md):
- Reducers send the encoded result, not differences, and decode their own bytes too: the stock
  runner leaves three peers with three hashes.
- A reducer waits for all parts of a slice and applies a rule of `peer.aggregate` in the order of
  the group; weights come from signed records, never from the message.
- Parts of a wrong shape or with values that are not finite fail the attempt and name their sender.
- Whoever stops sending, on either side, fails the attempt at once; stock peers stall, or "succeed"
  with their own old values. The result is used only when it is complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, AsyncIterator  # noqa: UP035 (hivemind reads this hint by its name in typing)

import torch
from google.protobuf.message import DecodeError
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.compression import CompressionBase, CompressionInfo, Float16Compression, NoCompression
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import achain, aiter_with_timeout, as_aiter

from coordinator.agreement import Group, GroupFailed
from coordinator.errors import RoundError
from peer.aggregate import RULES, Rule

logger = logging.getLogger(__name__)

PART_SIZE_BYTES = 256 * 1024
STALL_TIMEOUT_SECONDS = 10.0  # between two parts from one peer; each part is a quarter of a megabyte
SLOWEST_BYTES_PER_SECOND = 125_000  # 1 Mbit/s: what the whole exchange may take at the most
GROUP_WAIT_SECONDS = 5.0  # a sender may be ahead of our own start
CODECS: dict[str, CompressionBase] = {"fp32": NoCompression(), "fp16": Float16Compression()}
_EXCHANGE_ERRORS = (
    *(RoundError, P2PDaemonError, P2PHandlerError, OSError, EOFError, TimeoutError),
    *(DecodeError, TypeError, ValueError),  # from hivemind, for bytes that are no such message
)
_BYTES_PER_VALUE = {NoCompression: 4, Float16Compression: 2}


@dataclass(frozen=True)
class Reduced:
    flat: torch.Tensor  # (num_values,) float32, the same bytes on every member
    bytes_sent: int  # tensor parts that left this peer
    bytes_received: int


class AllReduceService(ServicerBase):
    """The permanent RPC handler of a peer: hands each incoming stream to the runner of its group."""

    def __init__(self, p2p: P2P, namespace: str) -> None:
        self._p2p, self._namespace = p2p, namespace
        self._runners: dict[bytes, BackboneAllReduce] = {}
        self._ended: deque[bytes] = deque(maxlen=64)  # groups that are over: who comes late is told at once
        self._changed = asyncio.Event()  # set, and replaced, whenever a group begins

    async def start(self) -> None:
        await self.add_p2p_handlers(self._p2p, namespace=self._namespace)

    async def reduce(self, group: Group, flat: torch.Tensor, *, rule: str, codec: str) -> Reduced:
        """Average `flat` (num_values,) with the members of `group`, within a bounded time.

        Every member gets the same bytes, or RoundError is raised (GroupFailed when one peer is the
        cause). `flat` is not changed.
        """
        runner = BackboneAllReduce(
            p2p=self._p2p,
            namespace=self._namespace,
            group=group,
            flat=flat,
            rule=RULES[rule],
            codec=CODECS[codec],
        )
        limit = 2 * STALL_TIMEOUT_SECONDS + 2 * flat.numel() * flat.element_size() / SLOWEST_BYTES_PER_SECOND
        async with self._registered(group.group_id, runner):
            return await runner.collect(limit_seconds=limit)

    @asynccontextmanager
    async def _registered(self, group_id: bytes, runner: BackboneAllReduce) -> AsyncIterator[None]:
        self._runners[group_id] = runner
        self._changed.set()  # wakes who waits for this group now,
        self._changed = asyncio.Event()  # and the next ones wait for the next
        try:
            yield
        finally:
            del self._runners[group_id]
            self._ended.append(group_id)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        try:
            first = await asyncio.wait_for(anext(stream), GROUP_WAIT_SECONDS)
        except (TimeoutError, StopAsyncIteration):
            return
        runner = await self._runner_of(first.group_id)
        if runner is None:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        if context.remote_id not in runner:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for message in runner.rpc_aggregate_part(achain(as_aiter(first), stream), context):
            yield message

    async def _runner_of(self, group_id: bytes) -> BackboneAllReduce | None:
        """Of a group that is running here, or begins here soon; None for any other."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GROUP_WAIT_SECONDS):
                while group_id not in self._runners and group_id not in self._ended:
                    await self._changed.wait()
        return self._runners.get(group_id)


class BackboneAllReduce(AllReduceRunner):
    """One all-reduce of one flat vector in a known group. Either complete on this peer, or failed."""

    tensor_part_reducer: Any  # hivemind's until __init__ replaces it

    def __init__(
        self,
        *,
        p2p: P2P,
        namespace: str,
        group: Group,
        flat: torch.Tensor,
        rule: Rule,
        codec: CompressionBase,
    ) -> None:
        ordered = tuple(PeerID.from_base58(peer) for peer in group.members)
        super().__init__(
            p2p=p2p,
            servicer_type=AllReduceService,
            prefix=namespace,
            group_id=group.group_id,
            tensors=(flat,),
            weight=1.0,
            ordered_peer_ids=ordered,
            peer_fractions=(1.0 / len(ordered),) * len(ordered),
            sender_timeout=STALL_TIMEOUT_SECONDS,
            reducer_timeout=2 * STALL_TIMEOUT_SECONDS,
            compression=codec,
            part_size_bytes=PART_SIZE_BYTES,
        )
        self.tensor_part_container.return_deltas = False
        parts_by_peer = self.tensor_part_container._input_parts_by_peer
        self._parts_by_peer = [[part for part, _ in parts] for parts in parts_by_peer]
        self._part_sizes = [[part.numel() for part in parts] for parts in self._parts_by_peer]
        weights = [contribution.weight for contribution in group.contributions]
        self.tensor_part_reducer.finished.set()  # the stock one is not used; this keeps it from complaining
        self.tensor_part_reducer = _RuleReducer(
            [p.shape for p in self.parts_for_local_averaging], weights, rule
        )
        self._codec = codec
        self._encoded: dict[int, runtime_pb2.Tensor] = {}  # part index -> result, until all members have it
        self._num_encoded_uses: dict[int, int] = {}
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._bytes_sent = self._bytes_received = 0

    async def collect(self, *, limit_seconds: float) -> Reduced:
        """Run to the end. Raises RoundError, within the limit, when any part is missing."""
        outputs = asyncio.ensure_future(self._run_to_end())
        either: set[asyncio.Future[Any]] = {outputs, self._failure}
        try:
            await asyncio.wait(either, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            if not outputs.done():
                raise RoundError(f"the all-reduce took longer than {limit_seconds:.0f} s")
            return Reduced(outputs.result(), self._bytes_sent, self._bytes_received)
        finally:
            if not self._failure.done():
                self._failure.cancel()
            outputs.cancel()
            await asyncio.wait({outputs}, timeout=1.0)
            for future in (outputs, self._future):  # looked at, so that asyncio does not log them as lost
                if future.done() and not future.cancelled():
                    future.exception()

    async def _run_to_end(self) -> torch.Tensor:
        result = None
        async for tensor in self.run():
            result = tensor
        if result is None or not bool(torch.isfinite(result).all()):
            raise RoundError("the average holds values that are not finite")
        return result

    def _fail(self, error: RoundError) -> None:
        logger.debug("%s of %s", error, self.peer_id)
        if not self._failure.done():
            self._failure.set_exception(error)

    def _fail_because_of(self, peer_id: PeerID, error: _BadPart) -> None:
        """Blame a peer: what it sent is wrong."""
        self._fail(GroupFailed(str(peer_id), str(error)))

    def _fail_at(self, peer_id: PeerID, why: str) -> None:
        """Blame nobody: whoever breaks off may do so because of a third peer. The next proposal finds out."""
        self._fail(RoundError(f"the exchange with {str(peer_id)[-8:]} ended early: {why[:160]}"))

    # as a member: send parts, take results

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        peer_index = self.ordered_peer_ids.index(peer_id)
        try:
            if peer_id == self.peer_id:
                await self._reduce_own_parts(peer_index)
            else:
                await self._exchange_parts(peer_id, peer_index)
        except _BadPart as error:
            self._fail_because_of(peer_id, error)
        except _EXCHANGE_ERRORS as error:
            self._fail_at(peer_id, str(error) or type(error).__name__)

    async def _reduce_own_parts(self, peer_index: int) -> None:
        for part_index, part in enumerate(self.parts_for_local_averaging):
            average = await self.tensor_part_reducer.accumulate_part(peer_index, part_index, part)
            encoded = await self._encode_once(part_index, average)
            decoded = _decode(self._codec, encoded, part.numel())
            self.tensor_part_container.register_processed_part(peer_index, part_index, decoded)

    async def _exchange_parts(self, peer_id: PeerID, peer_index: int) -> None:
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(
            self._generate_input_for_peer(peer_index)
        )
        sizes = self._part_sizes[peer_index]
        num_received = 0
        async with aclosing(stream):
            async for message in aiter_with_timeout(stream, self.reducer_timeout):
                if message.code != averaging_pb2.AVERAGED_PART:
                    raise RoundError(f"it answered {averaging_pb2.MessageCode.Name(message.code)}")
                part = _decode(self._codec, message.tensor_part, _size_of(sizes, num_received))
                self._bytes_received += len(message.tensor_part.buffer)
                self.tensor_part_container.register_processed_part(peer_index, num_received, part)
                num_received += 1
        if num_received != len(sizes):
            raise RoundError(f"it sent {num_received} of {len(sizes)} averaged parts")

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        for part in self._parts_by_peer[peer_index]:
            message = averaging_pb2.AveragingData(
                code=averaging_pb2.PART_FOR_AVERAGING,
                group_id=self.group_id,
                tensor_part=_encode(self._codec, part),
            )
            self._bytes_sent += len(message.tensor_part.buffer)
            yield message

    # as a reducer: take parts, send the result

    async def _accumulate_parts_streaming(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender_index: int
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        sender, part_index = self.sender_peer_ids[sender_index], 0
        sizes = [part.numel() for part in self.parts_for_local_averaging]
        try:
            async for message in stream:
                part = _decode(self._codec, message.tensor_part, _size_of(sizes, part_index))
                self._bytes_received += len(message.tensor_part.buffer)
                average = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, part)
                encoded = await self._encode_once(part_index, average)
                self._bytes_sent += len(encoded.buffer)
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=encoded)
                part_index += 1
        except _BadPart as error:
            self._fail_because_of(sender, error)
            raise
        if part_index != self.tensor_part_reducer.num_parts:
            self._fail_at(sender, f"it sent {part_index} of {self.tensor_part_reducer.num_parts} parts")

    async def _encode_once(self, part_index: int, average: torch.Tensor) -> runtime_pb2.Tensor:
        """The bytes of a result: encoded for the first member that asks, the same object for the others."""
        if part_index not in self._encoded:
            self._encoded[part_index] = _encode(self._codec, average)
        encoded = self._encoded[part_index]
        uses = self._num_encoded_uses[part_index] = self._num_encoded_uses.get(part_index, 0) + 1
        if uses == self.group_size:
            del self._encoded[part_index]
        return encoded

    async def _ban_sender(self, peer_id: PeerID) -> None:
        """Called by the stock runner for a sender that is silent or breaks off."""
        self._fail_at(peer_id, "it stopped sending its parts")


class _BadPart(Exception):
    """A part from another peer that cannot be used."""


class _RuleReducer:
    """Collects one part of all members, applies the rule, and hands every caller the same result.

    Stands in for hivemind's TensorPartReducer, which adds parts up in the order of their arrival.
    """

    def __init__(self, part_shapes: Sequence[torch.Size], weights: Sequence[float], rule: Rule) -> None:
        self.part_shapes, self.num_parts = part_shapes, len(part_shapes)
        self.finished = asyncio.Event()
        self._weights, self._rule = weights, rule
        self._parts: dict[int, dict[int, torch.Tensor]] = {}
        self._results: dict[int, asyncio.Future[torch.Tensor]] = {}

    async def accumulate_part(self, sender_index: int, part_index: int, part: torch.Tensor) -> torch.Tensor:
        if self.finished.is_set():
            raise RoundError("the all-reduce has ended")
        if part_index >= self.num_parts or part.shape != self.part_shapes[part_index]:
            raise _BadPart(f"sent part {part_index} with a wrong shape or number")
        if not bool(torch.isfinite(part).all()):
            raise _BadPart(f"sent values that are not finite in part {part_index}")
        parts = self._parts.setdefault(part_index, {})
        result = self._results.setdefault(part_index, asyncio.get_running_loop().create_future())
        parts[sender_index] = part.to(torch.float32)
        if len(parts) == len(self._weights):
            ordered = [parts[index] for index in range(len(self._weights))]
            del self._parts[part_index], self._results[part_index]
            result.set_result(self._rule(ordered, self._weights))
        return await asyncio.shield(result)

    def finalize(self) -> None:
        self.finished.set()
        for result in self._results.values():
            result.cancel()
        self._parts.clear()


def _size_of(sizes: Sequence[int], index: int) -> int:
    """Of the part that is expected next. Raises _BadPart when there is none."""
    if index >= len(sizes):
        raise _BadPart(f"sent more than {len(sizes)} parts")
    return sizes[index]


def _encode(codec: CompressionBase, tensor: torch.Tensor) -> runtime_pb2.Tensor:
    return codec.compress(tensor, CompressionInfo.from_tensor(tensor))


def _decode(codec: CompressionBase, message: runtime_pb2.Tensor, num_values: int) -> torch.Tensor:
    """(num_values,) float32. Raises _BadPart for anything but the codec of the run and the expected size."""
    if message.compression != codec.compression_type or message.dtype != "float32":
        raise _BadPart(f"sent a part as {message.dtype[:20]!r} with another compression than the run's")
    if (
        list(message.size) != [num_values]
        or len(message.buffer) != num_values * _BYTES_PER_VALUE[type(codec)]
    ):
        raise _BadPart(f"sent a part of a wrong size: {list(message.size)[:4]} for [{num_values}]")
    tensor: torch.Tensor = codec.extract(message)
    return tensor.to(torch.float32)
