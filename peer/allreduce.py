"""How one flat vector per peer becomes one for all: a butterfly all-reduce, exact and bounded.

Every member reduces a run of parts (`peer.parts`). It opens one stream to each other reducer, sends its
manifest and its parts there, and gets the results and a signed statement back on the same stream:

    sender   HELLO  MANIFEST  PART PART ...                          DONE
    reducer  WELCOME  [FIGURES]  RESULT RESULT ... STATEMENT      (ALIVE while it waits for others)

- A reducer applies the rule to a part when all senders that are still in have sent it, encodes the result
  once, and everybody, itself included, decodes those bytes: the states are equal bit for bit.
- A sender that stops, or sends what does not fit its signed manifest, loses its remaining parts of that
  reducer, not the round for all. The statement says so, and with it the record of the round.
- A reducer that is gone fails the attempt on every member: there is no result for its parts. The next
  attempt starts from the same encoded parts.
- A stream that is cut is opened again and goes on where it was.
- Rules that need cosines of whole contributions take two phases: each reducer tells all others the Gram
  matrix of its parts (FIGURES) before the first result.

Why not hivemind's `AllReduceRunner`: ARCHITECTURE.md has the figures.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from coordinator.agreement import Group, GroupFailed
from coordinator.errors import RoundError
from coordinator.identity import Identity
from coordinator.network import Network, PeerUnreachable
from coordinator.outgoing import About
from coordinator.records import MAX_MISSING_RANGES, Contribution, RecordError, parse_json, sign
from coordinator.streams import FrameStream, StreamError, Traffic, open_stream, serve_streams
from peer.aggregate import Plan, needs_gram
from peer.layout import flat_bytes
from peer.manifest import (
    MAX_GRAM_MEMBERS,
    MAX_SIGNED_BYTES,
    Manifest,
    Outgoing,
    SenderReport,
    Statement,
    figures_hash,
    figures_of,
    figures_to_json,
    join_hashes,
    open_manifest,
    open_statement,
    part_hash,
    split_hashes,
    squared_norm,
)
from peer.reduction import (
    BadPartError,
    checked_part,
    decoded,
    encode_result,
    figures_problem,
    gram_matrix,
    is_usable,
    plan_of,
    reduce_values,
    residual_hashes,
    squared_bound,
)

logger = logging.getLogger(__name__)

# The floors below are for the process at the other end, not for the link, so they follow from no round trip:
# a process that is stopped for 2 s costs all 2 s and loses no part (`fault_matrix`, freeze-2); with less than
# 3 s of patience it would. What size and link take comes on top.
STALL_FLOOR_SECONDS = 3.0  # silence of a live process on a busy machine
STALL_FACTOR = 4.0  # times what the measured rate of the link predicts
OPENING_FACTOR = 2.0  # times what opening a stream to that peer took: several round trips
UNMEASURED_BYTES_PER_SECOND = 125_000.0  # 1 Mbit/s: the slowest link that is meant to work
STRAGGLER_FACTOR = 20.0  # times what the median sender or reducer took, for the slowest one
TRICKLE_FACTOR = 20.0  # times what the rate predicts, for a part of which bytes come all the time
ALIVE_SECONDS = 0.5  # a reducer that waits for others says so this often
GROUP_WAIT_SECONDS = 5.0  # a sender may be ahead of our own start
OPEN_SECONDS = 5.0  # one attempt to open a stream; of a slow link more, once it has shown how slow
PAUSES_SECONDS = (0.05, 0.3, 0.6)  # before opening a broken stream again; then its peer counts as gone
RECONNECT_SECONDS = 2.0  # a reducer waits so long for a sender whose stream broke
SERVED_POLL_SECONDS = 0.1
WINDOW_PARTS = 8  # that a sender may be ahead of the slowest
NORM_CAP = 3.0  # a result longer than that times its ingredients is a lie

_WELCOME, _REFUSED, _MANIFEST, _PART, _FIGURES, _RESULT, _STATEMENT, _ALIVE, _DONE = range(1, 10)
FRAME_NAMES = {
    _WELCOME: "signal",
    _REFUSED: "refusal",
    _MANIFEST: "delta manifest",
    _PART: "delta part",
    _FIGURES: "figures",
    _RESULT: "result part",
    _STATEMENT: "statement",
    _ALIVE: "signal",
    _DONE: "signal",
}
_U32 = struct.Struct(">I")
_GROUP_ID_BYTES = 32
_MAX_TEXT_BYTES = 200


@dataclass(frozen=True)
class Rules:
    """What of the spec decides a result."""

    aggregation: str
    screening: str
    limit_seconds: float  # of the whole exchange
    has_gram: bool = False  # whether statements tell inner products that no rule needs: for the gate


@dataclass(frozen=True)
class Reduced:
    """The outcome of one attempt, the same on every member but for the byte counts."""

    flat: torch.Tensor  # (num_values,) float32
    contributions: tuple[Contribution, ...]  # in the order of the group, with norm, factor and missing parts
    statements: Mapping[str, bytes]  # signed, by reducer
    manifests: Mapping[str, bytes]  # signed, by sender: those that this member has seen as a reducer
    residuals: Mapping[int, torch.Tensor]  # by part: the own error feedback as a reducer, once committed
    traffic: Traffic  # goes on while slower members take the rest of the results
    # (n, n) float64 inner products of what came; NaN for who did not count anywhere
    gram: np.ndarray | None = None


class ToldTwoThings(GroupFailed):
    """A reducer signed two statements of one attempt; both are the proof."""

    def __init__(self, culprit: str, statements: tuple[bytes, bytes]) -> None:
        super().__init__(culprit, "told two members different results", is_proven=True)
        self.statements = statements


class AllReduceService:
    """What a peer needs for all its all-reduces: a handler of incoming streams, and what links were like."""

    def __init__(self, network: Network, identity: Identity, run_digest: str) -> None:
        self.network, self.identity, self.run_digest = network, identity, run_digest
        self.name = f"cold-fusion-3/{run_digest[:16]}/allreduce"
        self._exchanges: dict[bytes, _Exchange] = {}
        self._ended: deque[bytes] = deque(maxlen=64)  # groups that are over: who comes late is told at once
        self._changed = asyncio.Event()  # set, and replaced, whenever a group begins
        self._rates: dict[str, float] = {}  # bytes per second to and from each peer, of the last exchange
        self._openings: dict[str, float] = {}  # seconds that opening a stream to each peer took last
        self._last: _Told | None = None  # in the last attempt, complete or not
        self._before_last: _Told | None = None

    async def start(self) -> None:
        self.network.on_call("statements", self._on_statements)
        await serve_streams(self.network, self.name, self._on_stream, FRAME_NAMES)

    async def reduce(
        self, group: Group, outgoing: Outgoing, rules: Rules, *, residuals: Mapping[int, torch.Tensor]
    ) -> Reduced:
        """Combine `outgoing` with the other members' of `group`, within `rules.limit_seconds`.

        `residuals`: the own error feedback as a reducer, by part. Every member gets the same bytes, or
        RoundError is raised (GroupFailed when one peer is the cause).
        """
        for earlier in list(self._exchanges.values()):
            earlier.close()  # the group has moved on
        if needs_gram(rules.aggregation, rules.screening) and len(group.members) > MAX_GRAM_MEMBERS:
            raise RoundError(f"this rule is for groups of up to {MAX_GRAM_MEMBERS}")
        comparing = asyncio.ensure_future(self._compare_attempts(self._last, group))
        exchange = _Exchange(self, group, outgoing, rules, residuals, comparing)
        self._last, self._before_last = exchange.told, self._last
        self._exchanges[group.group_id] = exchange
        self._changed.set()  # wakes who waits for this group now,
        self._changed = asyncio.Event()  # and the next ones wait for the next
        try:
            async with asyncio.timeout(rules.limit_seconds):
                return await exchange.run()
        except TimeoutError as error:
            why = f"the all-reduce took longer than {rules.limit_seconds:.0f} s"
            raise exchange.blame(why) from error
        finally:
            self.network.create_task(self._finish(group.group_id, exchange))

    def rate(self, peer_id: str) -> float:
        return self._rates.get(peer_id, UNMEASURED_BYTES_PER_SECOND)

    def slack_seconds(self, peer_id: str, num_bytes: int) -> float:
        """What the link adds to the patience that a process needs, for so many bytes: as it was measured."""
        return self.link_seconds(peer_id) + STALL_FACTOR * num_bytes / self.rate(peer_id)

    def link_seconds(self, peer_id: str) -> float:
        """What a slow link adds to every patience with a peer; 0 before the first stream to it."""
        return OPENING_FACTOR * self._openings.get(peer_id, 0.0)

    def opened(self, peer_id: str, seconds: float) -> None:
        self._openings[peer_id] = seconds

    def measured(self, peer_id: str, bytes_per_second: float) -> None:
        self._rates[peer_id] = bytes_per_second

    async def compare_statements(self, members: Sequence[str]) -> None:
        """Did a reducer tell different members different things in the last attempt, committed or not?

        Raises ToldTwoThings when one did.
        """
        if self._last is not None:
            await self._compare(self._last, members)

    async def _compare_attempts(self, last: _Told | None, group: Group) -> None:
        """Was the attempt before this one, of the same round, spoilt by one who told two things?"""
        if last is not None and last.group.round == group.round:
            await self._compare(last, group.members)

    async def _compare(self, last: _Told, members: Sequence[str]) -> None:
        others = [member for member in members if member != self.identity.peer_id]
        await asyncio.gather(*(self._compare_in_time(last, member) for member in others))

    async def _compare_in_time(self, last: _Told, member: str) -> None:
        """All questions to one member together: one who answers slowly must not hold up the round."""
        try:
            async with asyncio.timeout(self._answer_seconds(member)):
                await self._compare_statements(last, member)
        except TimeoutError:
            logger.info("statements of %s not compared in time", member[-8:])

    async def _compare_statements(self, last: _Told, member: str) -> None:
        body = {"run": self.run_digest, "group": last.group.group_id.hex()}
        try:
            digests = parse_json(await self._ask_statements(member, body))
            for reducer, mine in last.digests().items():
                theirs = digests.get(reducer) if isinstance(digests, dict) else None
                if theirs is not None and theirs != mine:
                    signed = await self._ask_statements(member, {**body, "reducer": reducer})
                    last.check_second(reducer, signed)
        except (PeerUnreachable, RecordError) as error:
            logger.info("statements of %s not compared: %s", member[-8:], error)

    async def _ask_statements(self, member: str, body: dict[str, str]) -> bytes:
        limit = self._answer_seconds(member)
        return await self.network.call(member, "statements", body, timeout_seconds=limit)

    def _answer_seconds(self, member: str) -> float:
        return STALL_FLOOR_SECONDS + self.link_seconds(member)

    async def _on_statements(self, peer_id: str, body: Any) -> bytes:
        group = body.get("group") if isinstance(body, dict) else None
        recent = (self._last, self._before_last)  # who asks may have begun the next attempt later than I
        last = next((t for t in recent if t is not None and t.group.group_id.hex() == group), None)
        if last is None:
            raise RecordError("not of the last group here")
        if peer_id not in last.group.members:
            raise RecordError("you are not in this group")
        reducer = body.get("reducer")
        if reducer is None:
            return json.dumps(last.digests()).encode()
        return last.signed(str(reducer))

    async def _finish(self, group_id: bytes, exchange: _Exchange) -> None:
        """Go on serving as a reducer until everybody has everything: a failure of mine need not be theirs."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(exchange.rules.limit_seconds):
                    await exchange.served()
        finally:
            exchange.close()
            del self._exchanges[group_id]
            self._ended.append(group_id)

    async def _on_stream(self, stream: FrameStream) -> None:
        hello = stream.greeting
        group_id, next_result = hello[:_GROUP_ID_BYTES], int.from_bytes(hello[_GROUP_ID_BYTES:], "big")
        for running in [e for known, e in self._exchanges.items() if known != group_id]:
            running.came_elsewhere(stream.peer_id)
        exchange = await self._exchange_of(group_id)
        if exchange is None or not exchange.is_served(stream.peer_id):
            why = "no such group here" if exchange is None else "you are not in this group"
            logger.warning("refused a stream of %s: %s", stream.peer_id[-8:], why)
            await stream.send(_REFUSED, why.encode())
            return
        await exchange.serve(stream, next_result)

    async def _exchange_of(self, group_id: bytes) -> _Exchange | None:
        """The one that is running here, or begins here soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GROUP_WAIT_SECONDS):
                while group_id not in self._exchanges and group_id not in self._ended:
                    await self._changed.wait()
        return self._exchanges.get(group_id)


@dataclass(frozen=True)
class _Told:
    """What the reducers of one attempt have told this member; kept until the next attempt."""

    group: Group
    owned: Mapping[str, range]  # parts by reducer
    run_digest: str
    promised: Manifest  # my own: it names the round and the commit before
    statements: dict[str, tuple[Statement, bytes]] = field(default_factory=dict)  # by reducer, and as signed
    _digests: dict[str, str] = field(default_factory=dict)  # 0.7 ms each, for all who ask

    def digests(self) -> dict[str, str]:
        for member in self.statements.keys() - self._digests.keys():
            self._digests[member] = self.statements[member][0].digest
        return self._digests

    def signed(self, reducer: str) -> bytes:
        if reducer not in self.statements:
            raise RecordError("no statement of that reducer here")
        return self.statements[reducer][1]

    def check_second(self, reducer: str, signed: bytes) -> None:
        """Raises GroupFailed when a reducer signed this, too; RecordError when it did not."""
        statement = self.open(reducer, signed)
        if statement.digest != self.statements[reducer][0].digest:
            raise ToldTwoThings(reducer, (self.statements[reducer][1], signed))

    def open(self, reducer: str, signed: bytes) -> Statement:
        """Raises RecordError."""
        return open_statement(
            signed,
            reducer=reducer,
            run=self.run_digest,
            group=self.group.group_id.hex(),
            round=self.promised.round,
            previous=self.promised.previous,
            parts=self.owned[reducer],
        )


class _Exchange:
    """One attempt, seen from one member: it sends to every reducer, and is one itself."""

    def __init__(
        self,
        service: AllReduceService,
        group: Group,
        outgoing: Outgoing,
        rules: Rules,
        residuals: Mapping[int, torch.Tensor],
        comparing: asyncio.Future[None],
    ) -> None:
        """`comparing`: who lied in the attempt before; until that is known, nobody gets a result of mine."""
        self.comparing = comparing
        self.service, self.group, self.outgoing, self.rules = service, group, outgoing, rules
        self.grid, self.codec = outgoing.grid, outgoing.codec
        self._part_hashes = outgoing.manifest.part_hashes()
        self.own = service.identity.peer_id
        self.is_two_phase = needs_gram(rules.aggregation, rules.screening)
        # Of one phase they are added up beside the results and told at the end, so nothing waits for them.
        self.has_late_gram = (
            rules.has_gram and not self.is_two_phase and len(group.members) <= MAX_GRAM_MEMBERS
        )
        self._owned = self.grid.owned(group.members)
        self.reducers = {member for member, parts in self._owned.items() if len(parts) > 0}
        self.result = torch.empty(self.grid.num_values, dtype=torch.float32)
        self._result_bytes = flat_bytes(self.result)
        self.figures: dict[str, np.ndarray] = {}  # by reducer: (n, n) float64, NaN for who is incomplete
        self.told = _Told(group, self._owned, service.run_digest, outgoing.manifest)
        self._hashes: dict[str, list[bytes]] = {member: [] for member in self._owned}  # of results taken
        self._squared_norms = dict.fromkeys(self._owned, 0.0)  # of results taken
        self._streams: set[FrameStream] = set()
        self.traffic = Traffic()
        self._plans: dict[tuple[float | None, ...], tuple[float, ...]] = {}  # weights by norms
        self._began = time.monotonic()
        self._figures_at: dict[str, float] = {}  # by reducer: when it told them
        self._statement_at: dict[str, float] = {}  # by reducer: when it was done
        self._told_at: dict[str, float] = {}  # by reducer: since when it has told nothing new
        self.changed = asyncio.Condition()  # something came from another member
        self.made = asyncio.Condition()  # there is something for the senders: a result, figures, a statement
        self.reducer = _Reducer(self, self._owned[self.own], residuals)
        self._reducing = asyncio.ensure_future(self.reducer.run())

    async def run(self) -> Reduced:
        others = sorted(self.reducers - {self.own})
        exchanging = [asyncio.ensure_future(self._exchange_with(member)) for member in others]
        reducing = asyncio.shield(self._reducing)  # which goes on for the others when this fails
        comparing = asyncio.shield(self.comparing)  # which that waits for
        try:
            for done in asyncio.as_completed([*exchanging, reducing, comparing]):
                await done
        except asyncio.CancelledError as error:
            is_closed = self._reducing.cancelled() or self.comparing.cancelled()
            if _is_being_cancelled() or not is_closed:
                raise
            raise RoundError("another attempt has begun meanwhile") from error
        finally:
            for task in (*exchanging, reducing, comparing):
                task.cancel()
            await asyncio.gather(*exchanging, reducing, comparing, return_exceptions=True)
            if self.is_two_phase and not self.figures.keys() >= self.reducers:
                self._reducing.cancel()  # the rest of the figures will never come
        self._check_results()
        return self._reduced()

    async def served(self) -> None:
        """Until everybody who asked for the own results has them, or is gone."""
        failed_at = None
        while not self.reducer.is_served(time.monotonic()):
            if self._reducing.done() and not self._has_results():
                failed_at = failed_at or time.monotonic()
                if time.monotonic() > failed_at + self._linger_seconds():
                    return  # the end of their streams tells the others
            await asyncio.sleep(SERVED_POLL_SECONDS)

    def _has_results(self) -> bool:
        return not self._reducing.cancelled() and self._reducing.exception() is None

    def _linger_seconds(self) -> float:
        """How long to say ALIVE though there will be no results.

        Where another one is to blame, the others will see that for themselves; if I left before, they
        would blame me.
        """
        error = None if self._reducing.cancelled() else self._reducing.exception()
        if error is None or (isinstance(error, GroupFailed) and error.culprit != self.own):
            return GROUP_WAIT_SECONDS
        if isinstance(error, RoundError):
            return 0.0
        raise error

    def close(self) -> None:
        self._reducing.cancel()
        self.comparing.cancel()
        self.reducer.is_closed = True
        for stream in list(self._streams):
            stream.close()

    def is_served(self, peer_id: str) -> bool:
        return peer_id in self._owned and peer_id != self.own

    def came_elsewhere(self, peer_id: str) -> None:
        if self.is_served(peer_id):
            self.reducer.refused(peer_id, "it came with another group")

    async def serve(self, stream: FrameStream, next_result: int) -> None:
        """As a reducer: one sender's stream, up to its end."""
        with self._using(stream):
            await self.reducer.serve(stream, next_result)

    @contextmanager
    def _using(self, stream: FrameStream) -> Iterator[None]:
        self._streams.add(stream)
        stream.traffic = self.traffic
        try:
            yield
        finally:
            stream.close()
            self._streams.discard(stream)

    def heard_at(self, stream: FrameStream) -> float:
        """When its peer had its last chance to be heard: silence counts from when my own link is idle.

        All streams share that, and the results and parts of one peer even a connection: on a slow link many
        of one come before the next of another, and no limit for a single part foresees that. That limit,
        `part_limit`, still holds.
        """
        return max(stream.heard_at, self.traffic.payload_at)

    def stall_limit(self, peer_id: str, num_bytes: int) -> float:
        """Seconds in which the next `num_bytes` from a peer must come, from what its link has shown."""
        limit = STALL_FLOOR_SECONDS + self.service.slack_seconds(peer_id, num_bytes)
        return min(limit, self.rules.limit_seconds)

    def part_limit(self, peer_id: str, num_bytes: int) -> float:
        """Seconds in which `num_bytes` must be here in full, though some of them come all the time.

        A peer shares its link among all of its streams, so a part may take many times what the rate of the
        whole link predicts (`--max-upload-mbps`); but bytes that trickle in must not hold up a round.
        """
        slack = (TRICKLE_FACTOR - STALL_FACTOR) * num_bytes / self.service.rate(peer_id)
        return min(self.stall_limit(peer_id, num_bytes) + slack, self.rules.limit_seconds)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def notify_made(self) -> None:
        async with self.made:
            self.made.notify_all()

    # which reducer is late

    def median_ends_at(self, factor: float) -> float:
        """Instant at which `factor` times what the median reducer took is over; infinite before it is done.

        The lower one of an even number. A slow link holds up every reducer, because its peer sends to all of
        them: so it is in this median.
        """
        since, done_at = self._stage()
        middle, done = (len(self.reducers) - 1) // 2, sorted(done_at.values())
        return since + factor * max(0.0, done[middle] - since) if middle < len(done) else math.inf

    def late_at(self, reducer: str) -> float:
        """Instant from which a reducer that goes on saying ALIVE is to blame.

        It may have to wait for a sender longer than all the others, which is not its fault. While the median
        reducer is not done, nobody knows how long this exchange takes, but each wait for senders has an end,
        for the manifest and for a part, and a result comes of it.
        """
        if reducer in self._stage()[1]:
            return math.inf
        by_median = self.median_ends_at(STRAGGLER_FACTOR)
        if by_median < math.inf:
            return by_median + STALL_FLOOR_SECONDS + self._sender_seconds(STALL_FACTOR)
        if self._lacks_figures():
            return math.inf  # a whole slice comes before there is something to tell
        return self._told_at.get(reducer, math.inf) + 2 * self._sender_seconds(TRICKLE_FACTOR)

    def _stage(self) -> tuple[float, Mapping[str, float]]:
        """Since when reducers owe what comes next, and when those told it who have."""
        if self._lacks_figures():
            return self._began, self._figures_at
        return max([self._began, *self._figures_at.values()]), self._statement_at

    def _lacks_figures(self) -> bool:
        return self.is_two_phase and not self.figures.keys() >= self.reducers

    def _sender_seconds(self, factor: float) -> float:
        """How long a reducer may wait for one who has stopped; of links I know my own ones only."""
        num_bytes = self.codec.size_bytes(self.grid.part_values)
        link_seconds = (
            self.service.link_seconds(member)
            + factor * num_bytes / min(self.service.rate(member), UNMEASURED_BYTES_PER_SECOND)
            for member in self.group.members
        )
        return GROUP_WAIT_SECONDS + STALL_FLOOR_SECONDS + max(link_seconds)

    def blame(self, why: str) -> RoundError:
        """When all of it takes too long: who is furthest behind must not be in the next attempt."""
        done = self._stage()[1]
        if self.own in self.reducers and self.own not in done:
            sender = self.reducer.furthest_behind()
            return RoundError(why) if sender is None else GroupFailed(sender, f"{why}, waiting for its parts")
        late = sorted(self.reducers - done.keys() - {self.own}, key=lambda r: (len(self._hashes[r]), r))
        return GroupFailed(late[0], f"{why}, waiting for its results") if late else RoundError(why)

    # as a member: send parts, take results

    async def _exchange_with(self, member: str) -> None:
        """Until all results of one reducer are here. Raises GroupFailed when it is gone."""
        pauses = iter(PAUSES_SECONDS)
        num_results = -1
        while True:
            try:
                await self._converse(member)
                return
            except (StreamError, TimeoutError) as error:
                if len(self._hashes[member]) > num_results:  # it gave something since the last break
                    num_results = len(self._hashes[member])
                    pauses = iter(PAUSES_SECONDS)
                pause = next(pauses, None)
                if pause is None or isinstance(error, TimeoutError):
                    raise GroupFailed(member, str(error) or "is silent in the all-reduce") from error
                await asyncio.sleep(pause)

    async def _converse(self, member: str) -> None:
        hello = self.group.group_id + _U32.pack(len(self._hashes[member]))
        opening_since = time.monotonic()
        stream = await open_stream(
            self.service.network,
            member,
            self.service.name,
            hello,
            timeout_seconds=OPEN_SECONDS + self.service.link_seconds(member),
            frame_names=FRAME_NAMES,
        )
        self.service.opened(member, time.monotonic() - opening_since)
        with self._using(stream):
            next_part = await self._greet(stream, member)
            started = time.monotonic()
            sending = asyncio.ensure_future(self._send_parts(stream, member, next_part))
            try:
                await self._take_results(stream, member)
                if sending.done():  # else it wants none of the rest, and a frame is under way
                    await self._say_done(stream, member)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            self.service.measured(member, self._num_bytes_with(member) / (time.monotonic() - started))

    async def _say_done(self, stream: FrameStream, member: str) -> None:
        """Everything of this reducer is here: whether it hears that, is no matter for the round."""
        with suppress(StreamError, TimeoutError):
            async with asyncio.timeout(self.stall_limit(member, 0)):
                await stream.send(_DONE)

    def _num_bytes_with(self, member: str) -> int:
        return 2 * len(self._owned[member]) * self.codec.size_bytes(self.grid.part_values)

    async def _greet(self, stream: FrameStream, member: str) -> int:
        """Which of my parts the reducer wants next; -1: the manifest as well, and all parts."""
        async with asyncio.timeout(GROUP_WAIT_SECONDS + self.stall_limit(member, 0)):
            kind, payload = await stream.receive({_WELCOME: _U32.size, _REFUSED: _MAX_TEXT_BYTES})
        if kind == _REFUSED:
            text = bytes(payload).decode(errors="replace")
            raise GroupFailed(member, f"refused the all-reduce: {text}")
        return int.from_bytes(payload, "big", signed=True)

    async def _send_parts(self, stream: FrameStream, member: str, next_part: int) -> None:
        parts = self._owned[member]
        if next_part < 0:
            await stream.send(_MANIFEST, self.outgoing.signed)
            next_part = parts.start
        for part in range(max(next_part, parts.start), parts.stop):
            await self._send_part(stream, part)
        self._told_at.setdefault(member, time.monotonic())  # from now on it is its turn

    async def _send_part(self, stream: FrameStream, part: int) -> None:
        norm = self.outgoing.manifest.squared_norms[part]
        stream.describe(self.about_part(part, self._part_hashes[part], norm))
        await stream.send(_PART, self.outgoing.parts[part])

    def about_part(self, part: int, sha256: bytes, squared_norm: float | None = None) -> About:
        """For the ledger; all of it is known already."""
        return About(
            round=self.outgoing.manifest.round,
            values=self.grid.bounds(part),
            squared_norm=squared_norm,
            sha256=sha256,
        )

    async def _take_results(self, stream: FrameStream, member: str) -> None:
        """Raises TimeoutError when nothing comes for too long, or not all of a frame."""
        num_bytes = self.codec.size_bytes(self.grid.part_values)
        scratch = memoryview(bytearray(num_bytes if self.codec.is_lossy else 0))  # decoded at once
        accepted = {
            _ALIVE: 0,
            _FIGURES: 8 * len(self.group.members) ** 2 if self.is_two_phase else -1,
            _RESULT: num_bytes,
            _STATEMENT: MAX_SIGNED_BYTES,
        }
        async with asyncio.timeout(None) as limit:
            patience = _Patience(lambda: self.heard_at(stream), limit)
            try:
                while True:
                    patience.begin(self.stall_limit(member, num_bytes), self.part_limit(member, num_bytes))
                    kind, payload = await stream.receive(accepted, self._room_for_result(member, scratch))
                    patience.end()
                    if time.monotonic() > self.late_at(member):
                        raise GroupFailed(member, "is far behind the other reducers, or tells nothing new")
                    if kind == _RESULT:
                        self.take_result(member, payload)
                    elif kind == _FIGURES:
                        await self.take_figures(member, payload)
                    elif kind == _STATEMENT:
                        self.take_statement(member, bytes(payload))
                        return
            finally:
                patience.close()

    def _room_for_result(self, member: str, scratch: memoryview) -> dict[int, memoryview]:
        """Where the next result can be read to: of a lossless codec its place, without a copy."""
        part = self._owned[member].start + len(self._hashes[member])
        if self.codec.is_lossy:
            return {_RESULT: scratch}
        if part >= self._owned[member].stop:
            return {}
        start, stop = self.grid.bounds(part)
        return {_RESULT: self._result_bytes[4 * start : 4 * stop]}

    def take_result(self, member: str, data: bytes | bytearray | memoryview) -> None:
        """The encoded result of the next part of its reducer; the own ones come this way as well."""
        part = self._owned[member].start + len(self._hashes[member])
        if part >= self._owned[member].stop:
            raise GroupFailed(member, "sent more results than it has parts")
        start, stop = self.grid.bounds(part)
        values = self.result[start:stop]
        try:
            self._decode_into(values, data)
        except ValueError as error:
            raise GroupFailed(member, f"sent a result that cannot be decoded: {error}") from error
        squared = squared_norm(values)
        if not math.isfinite(squared):
            raise GroupFailed(member, f"sent a result that is not finite, part {part}")
        self._hashes[member].append(part_hash(data))
        self._squared_norms[member] += squared
        self._told_at[member] = time.monotonic()

    def result_hashes(self, member: str) -> Sequence[bytes]:
        """Of the results taken, in the order of its parts."""
        return self._hashes[member]

    def _decode_into(self, values: torch.Tensor, data: bytes | bytearray | memoryview) -> None:
        if self.codec.is_lossy:
            self.codec.decode(data, values.numel(), out=values)
        elif len(data) != 4 * values.numel():
            raise ValueError(f"{len(data)} bytes for {values.numel()} values")
        elif not isinstance(data, memoryview) or data.obj is not self._result_bytes.obj:
            flat_bytes(values)[:] = data  # else it was read to its place already

    async def take_figures(self, member: str, payload: bytes | bytearray | memoryview) -> None:
        size = len(self.group.members)
        if len(payload) != 8 * size * size:
            raise GroupFailed(member, "sent figures of another size")
        figures = np.frombuffer(payload, dtype="<f8").reshape(size, size)
        if not np.array_equal(figures, self.figures.setdefault(member, figures), equal_nan=True):
            raise GroupFailed(member, "sent other figures than before")
        self.check_figures(member)
        self._figures_at.setdefault(member, time.monotonic())
        await self.notify()

    def check_figures(self, member: str) -> None:
        """A reducer's Gram matrix against the manifests that are here. Raises GroupFailed."""
        squared_norms = self.reducer.squared_norms(self._owned[member])
        if problem := figures_problem(self.figures[member], squared_norms):
            raise GroupFailed(member, f"sent figures that cannot be: {problem}")

    def take_statement(self, member: str, signed: bytes) -> None:
        try:
            statement = self.told.open(member, signed)
        except RecordError as error:
            raise GroupFailed(member, str(error)) from error
        told = [(report.peer, report.declared) for report in statement.senders]
        if told != [(c.peer, c.weight) for c in self.group.contributions]:
            raise GroupFailed(member, "its statement is about other senders or weights")
        if split_hashes(statement.results) != self._hashes[member]:
            raise GroupFailed(member, "its statement names other results than it sent")
        if self.is_two_phase and member not in self.figures:
            raise GroupFailed(member, "sent a statement without figures")
        if self.has_late_gram and len(statement.figures) != len(self.group.members) ** 2:
            raise GroupFailed(member, "sent a statement without inner products")
        self.told.statements[member] = (statement, signed)
        self._statement_at.setdefault(member, time.monotonic())

    # when everything is here

    def _check_results(self) -> None:
        for member, (statement, _) in self.told.statements.items():
            try:
                self._check_manifests(member, statement)
                self._check_figures(member, statement)
                self._check_norm(member, statement)
            except RecordError as error:  # else nobody is blamed, and the next attempt fails the same way
                raise GroupFailed(member, f"its statement cannot be read: {error}") from error

    def _check_manifests(self, member: str, statement: Statement) -> None:
        """Two reducers that hold different manifests of one sender were lied to, or one of them lies."""
        for report in statement.senders:
            seen = self.reducer.manifest_of(report.peer)
            if seen is None or report.manifest is None:
                continue
            if seen.digest != report.manifest:
                if report.peer == self.own:
                    raise GroupFailed(member, "its statement names a manifest that is not mine")
                raise GroupFailed(report.peer, f"sent {member[-8:]} and me different manifests")
            if seen.norm != report.norm:
                raise GroupFailed(member, "its statement names a norm that is not in the manifest")

    def _check_figures(self, member: str, statement: Statement) -> None:
        if self.has_late_gram:
            self._check_late_gram(member, statement)
            return
        own = figures_to_json(self.figures.get(member))
        if own != statement.figures:
            raise GroupFailed(member, "its statement names other figures than it told")
        told, mine = split_hashes(statement.told), split_hashes(self.figures_told())
        if len(told) != len(mine):
            raise GroupFailed(member, "its statement does not name the figures of every reducer")
        for reducer, theirs, here in zip(sorted(self.figures), told, mine, strict=True):
            if theirs != here:  # one of the two lies; about my own figures I know who
                culprit = member if reducer == self.own else reducer
                raise GroupFailed(culprit, f"told {member[-8:]} and me different figures")

    def _check_late_gram(self, member: str, statement: Statement) -> None:
        """Lengths as the manifests promise, of the parts that came, and products that such vectors can have.

        Raises GroupFailed.
        """
        figures, parts = figures_of(statement), self._owned[member]
        squared_norms = [
            self.reducer.squared_norm(index, parts[: report.num_parts])
            for index, report in enumerate(statement.senders)
        ]
        if figures is not None and not np.isfinite(figures).all():
            raise GroupFailed(member, "told inner products that are no numbers")
        if figures is not None and (problem := figures_problem(figures, squared_norms)):
            raise GroupFailed(member, f"told inner products that cannot be: {problem}")

    def figures_told(self) -> str:
        """The hashes of all figures, by reducer: what a plan was made from."""
        return join_hashes(
            b"".join(figures_hash(figures_to_json(f)) for _, f in sorted(self.figures.items()))
        )

    def _check_norm(self, member: str, statement: Statement) -> None:
        """The norm cap: what a lying reducer can do is bounded by what honest senders sent."""
        weights = self._planned_weights(statement)
        bounds = [
            squared_bound(
                self.rules.aggregation,
                squared_norms,
                [
                    weight if report.num_parts > index else 0.0
                    for weight, report in zip(weights, statement.senders, strict=True)
                ],
            )
            for index, squared_norms in enumerate(self._squared_norms_by_part(self._owned[member]))
        ]
        if self._squared_norms[member] > NORM_CAP**2 * math.fsum(bounds) + 1e-12:
            raise GroupFailed(member, "its results are larger than what they were made of")

    def _planned_weights(self, statement: Statement) -> Sequence[float]:
        """What the rule makes of the norms, whatever weights the reducer claims; an audit compares them."""
        norms = tuple(report.norm if report.is_planned else None for report in statement.senders)
        if norms not in self._plans:  # mostly all reducers have the same
            declared = [contribution.weight for contribution in self.group.contributions]
            figures = [figures for _, figures in sorted(self.figures.items())]
            try:
                plan = plan_of(self.rules.aggregation, self.rules.screening, declared, norms, figures)
                self._plans[norms] = plan.weights
            except ValueError:
                self._plans[norms] = (0.0,) * len(norms)
        return self._plans[norms]

    def _squared_norms_by_part(self, parts: range) -> Iterator[list[float]]:
        """Of each member, in the order of the group.

        Who keeps its manifest from me counts as the longest that I know, or as long as any reducer says: to
        take it for shorter would blame honest reducers, and to leave it out would free a lying one.
        """
        manifests = [self.reducer.manifest_of(contribution.peer) for contribution in self.group.contributions]
        told = [
            max(statement.senders[index].norm for statement, _ in self.told.statements.values())
            for index in range(len(manifests))
        ]
        for part in parts:
            longest = max(m.squared_norms[part] for m in manifests if m is not None)
            yield [
                m.squared_norms[part] if m is not None else max(longest, norm * norm / len(parts))
                for m, norm in zip(manifests, told, strict=True)
            ]

    def _reduced(self) -> Reduced:
        statements = {member: statement for member, (statement, _) in self.told.statements.items()}
        return Reduced(
            flat=self.result,
            contributions=self._contributions(statements),
            statements={member: signed for member, (_, signed) in self.told.statements.items()},
            manifests=self.reducer.signed_manifests(),
            residuals=self.reducer.new_residuals,
            traffic=self.traffic,
            gram=self._gram(statements),
        )

    def _gram(self, statements: Mapping[str, Statement]) -> np.ndarray | None:
        """From what all members were told, in one order: the same bits for all."""
        if not (self.is_two_phase or self.has_late_gram):
            return None
        size = len(self.group.members)
        total = np.zeros((size, size))
        for _, statement in sorted(statements.items()):
            figures = figures_of(statement)
            total = total + (np.full((size, size), np.nan) if figures is None else figures)
        # By the reducers' weights: a record's factor is the lowest, 0 also for who counted at most of them.
        weights = [[s.senders[index].weight for s in statements.values()] for index in range(size)]
        uncounted = [index for index in range(size) if not any(weights[index])]
        total[uncounted, :] = total[:, uncounted] = np.nan
        return total

    def _contributions(self, statements: Mapping[str, Statement]) -> tuple[Contribution, ...]:
        """What the statements say of each sender; the same on every member, since the statements are."""
        result = []
        for index, contribution in enumerate(self.group.contributions):
            reports = {member: s.senders[index] for member, s in sorted(statements.items())}
            missing = [
                (self._owned[member].start + report.num_parts, self._owned[member].stop)
                for member, report in reports.items()
                if report.num_parts < len(self._owned[member])
            ]
            reasons = [f"{r.reason} (says {member[-8:]})" for member, r in reports.items() if r.reason]
            result.append(
                contribution.model_copy(
                    update={
                        "norm": max(report.norm for report in reports.values()),
                        "factor": min(report.factor for report in reports.values()),
                        "missing": _joined(missing),
                        "reason": "; ".join(reasons)[:_MAX_TEXT_BYTES],
                    }
                )
            )
        return tuple(result)


class _Patience:
    """Lets a timeout expire when the frame that is waited for does not come, or not all of it.

    One timer that puts itself off: with a task and a timer for each frame, receiving one took 39 us of
    Python, with this 8, 260 times an exchange.
    """

    def __init__(self, heard_at: Callable[[], float], limit: asyncio.Timeout) -> None:
        self._heard_at, self._limit = heard_at, limit
        self._since: float | None = None  # instant from which a frame is waited for; None: none is
        self._silence_seconds = self._frame_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, silence_seconds: float, frame_seconds: float) -> None:
        self._since = time.monotonic()
        self._silence_seconds, self._frame_seconds = silence_seconds, frame_seconds
        # The limits shrink when a link turns out to be fast: the timer that is set may be seconds too late.
        if self._timer is None or self._timer.when() > asyncio.get_running_loop().time() + silence_seconds:
            self.close()
            self._look()

    def end(self) -> None:
        self._since = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        loop, left = asyncio.get_running_loop(), self._seconds_left()
        if left > 0:
            self._timer = loop.call_later(left, self._look)
        else:
            self._limit.reschedule(loop.time())

    def _seconds_left(self) -> float:
        if self._since is None:
            return self._silence_seconds  # a wait that begins from now on ends later than that
        silent_at = max(self._since, self._heard_at()) + self._silence_seconds
        return min(silent_at, self._since + self._frame_seconds) - time.monotonic()


def _is_being_cancelled() -> bool:
    """Whether it is this task that somebody cancels, and not only one that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint ranges, those that touch as one; of more than a record takes, the last ones as one."""
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if joined and (joined[-1][1] == first or len(joined) == MAX_MISSING_RANGES):
            first = joined.pop()[0]
        joined.append((first, stop))
    return tuple(joined)


@dataclass
class _Sender:
    """One member, as its reducer sees it."""

    peer_id: str
    next_part: int
    manifest: Manifest | None = None
    signed_manifest: bytes = b""
    hashes: Sequence[bytes] = ()
    is_in: bool = True  # False: what it sends from now on does not count
    reason: str = ""  # why not, where it sent something wrong
    refusal: str = ""  # why a stream of it was not taken; no reason to wait less, but one to tell
    changed_at: float = field(default_factory=time.monotonic)  # last instant at which something came
    started_at: float = 0.0  # when its manifest came
    finished_at: float | None = None
    stream: FrameStream | None = None
    has_results: bool = False


class _Reducer:
    """Collects parts of all members, applies the rule, and keeps every result for whoever asks."""

    def __init__(self, exchange: _Exchange, parts: range, residuals: Mapping[int, torch.Tensor]) -> None:
        self._exchange, self._parts = exchange, parts
        self._grid, self._codec, self._rules = exchange.grid, exchange.codec, exchange.rules
        self._residuals = dict(residuals)
        self.new_residuals: dict[int, torch.Tensor] = {}
        self._senders = [_Sender(member, parts.start) for member in exchange.group.members]
        self._inbox: dict[int, dict[int, bytes | bytearray | memoryview | torch.Tensor]] = {
            part: {} for part in parts
        }
        self._results: list[bytes | memoryview] = []
        self._figures: bytes = b""
        size = len(exchange.group.members)
        self._late_gram = np.zeros((size, size)) if exchange.has_late_gram else None
        self._statement: bytes = b""
        self.is_closed = False
        self._take_own()

    def manifest_of(self, peer_id: str) -> Manifest | None:
        return next(s.manifest for s in self._senders if s.peer_id == peer_id)

    def squared_norms(self, parts: range) -> list[float | None]:
        """Of these parts, of each member, in the order of the group; None where no manifest is here."""
        return [self.squared_norm(index, parts) for index in range(len(self._senders))]

    def squared_norm(self, index: int, parts: range) -> float | None:
        manifest = self._senders[index].manifest
        return None if manifest is None else math.fsum(manifest.squared_norms[part] for part in parts)

    def signed_manifests(self) -> dict[str, bytes]:
        return {s.peer_id: s.signed_manifest for s in self._senders if s.manifest is not None}

    def _take_own(self) -> None:
        sender = next(s for s in self._senders if s.peer_id == self._exchange.own)
        outgoing = self._exchange.outgoing
        sender.manifest, sender.signed_manifest = outgoing.manifest, outgoing.signed
        sender.next_part, sender.has_results = self._parts.stop, True
        index = self._senders.index(sender)
        for part in self._parts:
            self._inbox[part][index] = outgoing.parts[part]

    # results

    async def run(self) -> None:
        """Every part, in order; then the statement. Ends when all results are made, not when all are sent."""
        if len(self._parts) == 0:
            return
        await self._collected(lambda sender: sender.manifest is not None)
        await asyncio.shield(self._exchange.comparing)
        if self._exchange.is_two_phase:
            await self._collected(lambda sender: sender.next_part >= self._parts.stop)
            await self._tell_figures()
        self._plan = self._make_plan()
        for part in self._parts:
            await self._collected(lambda sender, part=part: sender.next_part > part)  # type: ignore[misc]
            data = self._reduce_part(part)
            self._results.append(data)
            self._exchange.take_result(self._exchange.own, data)
            await self._exchange.notify_made()
            await asyncio.sleep(0)  # in two phases all parts are here, and nothing else would ever run
        self._statement = self._make_statement()
        self._exchange.take_statement(self._exchange.own, self._statement)
        await self._exchange.notify_made()

    async def _collected(self, has_it: Callable[[_Sender], bool]) -> None:
        """Wait until every sender that is in has it; who does not give it in time is out."""
        waiting_since = time.monotonic()
        num_bytes = self._codec.size_bytes(self._grid.part_values)
        while waiting := [s for s in self._senders if s.is_in and not has_it(s)]:
            now = time.monotonic()
            for sender in waiting:
                if now >= self._deadline(sender, waiting_since, num_bytes):
                    await self._drop(sender, sender.refusal if sender.manifest is None else "")
            ends_at = min(
                (self._deadline(s, waiting_since, num_bytes) for s in waiting if s.is_in), default=now
            )
            connected = [s for s in waiting if s.stream is not None]

            def has_news() -> bool:  # all have it, or one is cut off, which has another deadline
                is_cut_off = any(s.stream is None for s in connected)  # noqa: B023
                return is_cut_off or not any(s.is_in and not has_it(s) for s in self._senders)

            async with self._exchange.changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, min(ends_at - now, 1.0))):
                        await self._exchange.changed.wait_for(has_news)

    def _deadline(self, sender: _Sender, waiting_since: float, num_bytes: int) -> float:
        """Instant at which a sender that we wait for is out: silent, cut off, or far behind the median."""
        since = max(sender.changed_at, waiting_since)
        if sender.stream is None:
            return since + self._grace(sender)
        heard_at = max(since, self._exchange.heard_at(sender.stream))
        heard = heard_at + self._exchange.stall_limit(sender.peer_id, num_bytes)
        silent = min(heard, since + self._exchange.part_limit(sender.peer_id, num_bytes))
        took = sorted(s.finished_at - s.started_at for s in self._senders if s.finished_at is not None)
        ends_at = min(silent, self._exchange.median_ends_at(STRAGGLER_FACTOR) + STALL_FLOOR_SECONDS)
        if not took or sender.manifest is None:
            return ends_at
        return min(ends_at, sender.started_at + STALL_FLOOR_SECONDS + STRAGGLER_FACTOR * took[len(took) // 2])

    def furthest_behind(self) -> str | None:
        """Of the senders that are waited for; None when none is."""
        waiting = [s for s in self._senders if s.is_in and s.next_part < self._parts.stop]
        return min(waiting, key=lambda s: (s.manifest is not None, s.next_part)).peer_id if waiting else None

    async def _drop(self, sender: _Sender, reason: str) -> None:
        sender.is_in, sender.reason = False, reason[:_MAX_TEXT_BYTES]
        done = sender.next_part - self._parts.start
        logger.warning(
            "%s is out of %d of %d parts: %s",
            sender.peer_id[-8:],
            len(self._parts) - done,
            len(self._parts),
            reason or "it stopped sending",
        )
        await self._exchange.notify()

    async def _tell_figures(self) -> None:
        """The Gram matrix of my parts, told to all; then wait for everybody else's."""
        size = len(self._senders)
        figures = np.full((size, size), np.nan)
        complete = [i for i, s in enumerate(self._senders) if s.next_part >= self._parts.stop]
        total = np.zeros((len(complete), len(complete)))
        for part in self._parts:
            total += gram_matrix([self._values(part, i) for i in complete])
            await asyncio.sleep(0)  # ALIVE must be said meanwhile
        figures[np.ix_(complete, complete)] = total
        self._figures = figures.astype("<f8").tobytes()
        await self._exchange.notify_made()
        await self._exchange.take_figures(self._exchange.own, self._figures)
        reducers = self._exchange.reducers
        async with self._exchange.changed:
            await self._exchange.changed.wait_for(lambda: self._exchange.figures.keys() >= reducers)
        for reducer in sorted(reducers):  # some may have come before the manifests
            self._exchange.check_figures(reducer)

    def _make_plan(self) -> Plan:
        self._norms = [s.manifest.norm if s.manifest is not None and s.is_in else None for s in self._senders]
        figures = [figures for _, figures in sorted(self._exchange.figures.items())]
        weights = [contribution.weight for contribution in self._exchange.group.contributions]
        try:
            return plan_of(self._rules.aggregation, self._rules.screening, weights, self._norms, figures)
        except ValueError as error:
            raise RoundError(f"no weights follow from what was sent: {error}") from error

    def _reduce_part(self, part: int) -> bytes | memoryview:
        """The encoded result, with the own error feedback. Raises RoundError."""
        plan = self._plan
        present = [i for i, s in enumerate(self._senders) if s.next_part > part and plan.weights[i] != 0]
        try:
            values = [self._values(part, i) for i in present]
            self._add_to_gram(present, values)
            result = reduce_values(
                self._rules.aggregation,
                values,
                [plan.weights[i] for i in present],
                self._grid.size(part),
            )
            data, residual = encode_result(self._codec, result, self._feedback(part, result, present))
        except ValueError as error:
            raise RoundError(f"part {part} cannot be averaged: {error}") from error
        del self._inbox[part]
        if residual is not None:
            self.new_residuals[part] = residual
        return data

    def _add_to_gram(self, present: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        """Of what came: else to keep back one part would hide what is in all the others from the gate."""
        if self._late_gram is not None:
            self._late_gram[np.ix_(present, present)] += gram_matrix(values)

    def _feedback(self, part: int, result: torch.Tensor, present: Sequence[int]) -> torch.Tensor | None:
        """What earlier results of this part left; nothing where the norm cap would make a liar of me.

        It would when deltas have become far shorter than those that left it.
        """
        residual = self._residuals.get(part)
        if residual is None:
            return None
        squared_norms = [0.0 if s.manifest is None else s.manifest.squared_norms[part] for s in self._senders]
        weights = [weight if i in present else 0.0 for i, weight in enumerate(self._plan.weights)]
        if is_usable(residual, result, squared_bound(self._rules.aggregation, squared_norms, weights)):
            return residual
        del self._residuals[part]
        return None

    def _values(self, part: int, index: int) -> torch.Tensor:
        held = self._inbox[part][index]
        if isinstance(held, torch.Tensor):
            return held
        return decoded(self._codec, held, self._grid.size(part))

    def _make_statement(self) -> bytes:
        own_figures = self._exchange.figures.get(self._exchange.own, self._late_gram)
        statement = Statement(
            run=self._exchange.service.run_digest,
            group=self._exchange.group.group_id.hex(),
            round=self._exchange.outgoing.manifest.round,
            previous=self._exchange.outgoing.manifest.previous,
            first_part=self._parts.start,
            senders=[
                SenderReport(
                    peer=s.peer_id,
                    manifest=None if s.manifest is None else s.manifest.digest,
                    declared=self._exchange.group.contributions[i].weight,
                    is_planned=self._norms[i] is not None,
                    norm=0.0 if s.manifest is None else s.manifest.norm,
                    num_parts=0 if self._plan.weights[i] == 0 else s.next_part - self._parts.start,
                    reason=s.reason or self._plan.reasons[i],
                    weight=self._plan.weights[i],
                    factor=self._plan.factors[i],
                )
                for i, s in enumerate(self._senders)
            ],
            results=join_hashes(b"".join(self._exchange.result_hashes(self._exchange.own))),
            figures=figures_to_json(own_figures),
            told=self._exchange.figures_told(),
            residuals_before=residual_hashes(self._residuals, self._parts),
            residuals_after=residual_hashes(self.new_residuals, self._parts),
        )
        return sign(statement, self._exchange.service.identity).to_bytes()

    # one sender's stream

    def refused(self, peer_id: str, why: str) -> None:
        next(s for s in self._senders if s.peer_id == peer_id).refusal = why

    async def serve(self, stream: FrameStream, next_result: int) -> None:
        if next_result > len(self._results):
            self.refused(stream.peer_id, "it asked for results that there are not")
            await stream.send(_REFUSED, b"there are not so many results")
            return
        sender = next(s for s in self._senders if s.peer_id == stream.peer_id)
        if sender.stream is not None:  # it opened a new one: the old one is broken, whether we know or not
            sender.stream.close()
        sender.stream, sender.changed_at = stream, time.monotonic()
        wanted = sender.next_part if sender.manifest is not None else -1
        await stream.send(_WELCOME, wanted.to_bytes(4, "big", signed=True))
        reading = asyncio.ensure_future(self._read(stream, sender))
        try:
            await self._send_results(stream, next_result)
            await asyncio.wait({reading}, timeout=self._exchange.stall_limit(stream.peer_id, 0))  # it closes
        finally:
            reading.cancel()
            if sender.stream is stream:
                sender.stream, sender.changed_at = None, time.monotonic()
            await self._exchange.notify()

    def is_served(self, now: float) -> bool:
        """Whether no stream is open any more, and nobody whose stream broke may still come back."""
        if self.is_closed or len(self._parts) == 0:
            return True
        return all(
            s.stream is None and (s.has_results or now > s.changed_at + self._grace(s)) for s in self._senders
        )

    def _grace(self, sender: _Sender) -> float:
        """Seconds in which a sender without a stream may come, or come back."""
        floor = RECONNECT_SECONDS if sender.manifest is not None else GROUP_WAIT_SECONDS
        return floor + self._exchange.service.link_seconds(sender.peer_id)

    async def _read(self, stream: FrameStream, sender: _Sender) -> None:
        frames = {
            _MANIFEST: MAX_SIGNED_BYTES,
            _PART: self._codec.size_bytes(self._grid.part_values),
        }
        is_kept = self._exchange.is_two_phase or not self._codec.is_lossy  # else it is decoded at once
        into = {} if is_kept else {_PART: memoryview(bytearray(frames[_PART]))}
        try:
            while sender.is_in and sender.next_part < self._parts.stop:
                await self._in_window(sender)
                kind, payload = await stream.receive(frames, into)
                if sender.stream is not stream:
                    return  # its newer stream begins with the same part
                if sender.is_in:
                    await self._take(sender, kind, payload)
            while not sender.has_results:  # what it may still send does not count, and must not block it
                kind, _ = await stream.receive({**frames, _DONE: 0})
                sender.has_results = kind == _DONE
        except StreamError:
            if sender.stream is stream:  # it may open another one
                sender.stream, sender.changed_at = None, time.monotonic()
                await self._exchange.notify()

    async def _take(self, sender: _Sender, kind: int, payload: bytearray | memoryview) -> None:
        try:
            if kind == _MANIFEST:
                self._take_manifest(sender, payload)
            else:
                self._take_part(sender, payload)
        except BadPartError as error:
            await self._drop(sender, str(error))
        sender.changed_at = time.monotonic()
        if sender.next_part == self._parts.stop:
            sender.finished_at = sender.changed_at
        await self._exchange.notify()

    async def _in_window(self, sender: _Sender) -> None:
        if self._exchange.is_two_phase:
            return
        is_open = lambda: sender.next_part < self._parts.start + len(self._results) + WINDOW_PARTS  # noqa: E731
        if not is_open():
            async with self._exchange.made:
                await self._exchange.made.wait_for(is_open)

    def _take_manifest(self, sender: _Sender, payload: bytes | bytearray | memoryview) -> None:
        if (
            sender.manifest is not None
        ):  # nobody needs to: the same one, again and again, would be a sign of life
            raise BadPartError("sent two manifests")
        own = self._exchange.outgoing.manifest
        try:
            manifest = open_manifest(
                bytes(payload),
                sender=sender.peer_id,
                run=own.run,
                round=own.round,
                previous=own.previous,
                codec=own.codec,
                grid=self._grid,
            )
        except RecordError as error:
            raise BadPartError(str(error)) from error
        sender.manifest, sender.signed_manifest = manifest, bytes(payload)
        sender.hashes, sender.started_at = manifest.part_hashes(), time.monotonic()

    def _take_part(self, sender: _Sender, data: bytearray | memoryview) -> None:
        part = sender.next_part
        if sender.manifest is None:
            raise BadPartError("sent a part before its manifest")
        values = checked_part(self._codec, self._grid, sender.manifest, sender.hashes[part], part, data)
        # Of two phases the encoded bytes are kept: a whole slice of each sender would be four times as large.
        self._inbox[part][self._senders.index(sender)] = data if self._exchange.is_two_phase else values
        sender.next_part = part + 1

    async def _send_results(self, stream: FrameStream, next_result: int) -> None:
        has_told = False

        def has_more() -> bool:
            has_figures = bool(self._figures) and not has_told
            return has_figures or next_result < len(self._results) or bool(self._statement)

        while True:
            if not has_more() and not await self._made_in_time(has_more):
                await stream.send(_ALIVE)
            if self._figures and not has_told:
                await stream.send(_FIGURES, self._figures)
                has_told = True
            while next_result < len(self._results):
                await self._send_result(stream, next_result)
                next_result += 1
            if self._statement:
                await stream.send(_STATEMENT, self._statement)
                return

    async def _made_in_time(self, has_more: Callable[[], bool]) -> bool:
        """Wait until there is something to send; False: it is time to say ALIVE first."""
        async with self._exchange.made:
            with suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_SECONDS):
                    await self._exchange.made.wait_for(has_more)
        return has_more()

    async def _send_result(self, stream: FrameStream, index: int) -> None:
        sha256 = self._exchange.result_hashes(self._exchange.own)[index]
        stream.describe(self._exchange.about_part(self._parts.start + index, sha256))
        await stream.send(_RESULT, self._results[index])
