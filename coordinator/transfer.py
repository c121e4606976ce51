"""How bytes with known hashes come from several donors: piece by piece, each checked on arrival.

Nothing is used before all of it fits. A donor that sends one wrong piece is left; so is one that takes
much longer than its own measured rate predicts, but it is asked again when nobody else is left.
Its piece alone is fetched again, from another. When no piece is left to begin, an idle donor fetches a
piece that another has had for too long; the first to bring it counts.

The donor's side: each peer gets a few streams at one time and waits for more. All of them share one
connection per peer, so the machine's uplink is shared by peers, as TCP does it, not by requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.errors import NetworkError
from coordinator.network import STREAM_PART_BYTES, Network, PeerUnreachable
from coordinator.outgoing import About, describe
from coordinator.records import RecordError

logger = logging.getLogger(__name__)

UNMEASURED_BYTES_PER_SECOND = 125_000.0  # 1 Mbit/s: the slowest link that is meant to work
DEADLINE_FACTOR = 4.0  # times what the rate predicts
DEADLINE_GRACE_SECONDS = 2.0  # a busy machine, a lost packet
MAX_PIECE_SECONDS = 600.0  # whatever the rate predicts
RATE_MEMORY = 0.5  # how much of the rate so far stays when a piece is done
LOOK_SECONDS = 0.25  # an idle donor looks for a late piece
MAX_DONORS = 4  # at one time
MAX_STREAMS_PER_PEER = 4  # served at one time
MAX_RANGE_BYTES = 64 * 1024 * 1024  # the largest model file; pieces of a state have 1 MB
MAX_KEY_LENGTH = 256


@dataclass(frozen=True)
class Piece:
    start: int  # byte offset
    size_bytes: int
    sha256: str  # hex


class WrongPiece(PeerUnreachable):
    """As long as it should be, and something else. The cause of the NetworkError, where it was the last."""


class DonorTooSlow(PeerUnreachable):
    """Not a lie: it may be asked again when nobody is faster."""


def deadline_seconds(
    num_bytes: int, own_rate: float | None, best_rate: float | None, maximum: float
) -> float:
    """How long a donor may take. Rates in bytes/s, as measured: its own, and of the best other donor.

    A rate below the slowest that is meant to work counts as that one: it was measured on a stalled piece.
    """
    rate = max(own_rate or best_rate or 0.0, UNMEASURED_BYTES_PER_SECOND)
    return min(maximum, DEADLINE_FACTOR * num_bytes / rate + DEADLINE_GRACE_SECONDS)


def serve_blobs(
    network: Network,
    run_digest: str,
    open_blob: Callable[[str], memoryview | None],
    about: Callable[[str, int, int], About] = lambda key, start, stop: About(kind="blob", of=key),
) -> None:
    """Answer requests for byte ranges; `open_blob(key)` gives the bytes of a key, None if not held.

    It is called in other threads than the network's: it may have to read and to hash them first.
    `about` is asked after that: what these bytes of a key are.
    """
    turns = _Turns(MAX_STREAMS_PER_PEER)

    async def blob(peer_id: str, body: Any) -> AsyncIterator[bytes]:
        key, start, stop = parse_range(body, run_digest)
        await turns.take(peer_id)
        try:
            data = await asyncio.to_thread(open_blob, key)
            if data is None or stop > len(data):
                raise RecordError("not held here")
            describe(replace(about(key, start, stop), data=data[start:stop]))
            for offset in range(start, stop, STREAM_PART_BYTES):
                yield bytes(data[offset : min(offset + STREAM_PART_BYTES, stop)])
        finally:
            turns.give(peer_id)

    network.on_stream("blob", blob)


async def fetch_blob(
    network: Network,
    run_digest: str,
    key: str,
    pieces: Sequence[Piece],
    donors: Sequence[str],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
    max_piece_seconds: float = MAX_PIECE_SECONDS,
) -> bytearray:
    """All bytes of `key`, every piece checked. Raises NetworkError when no donor is left."""
    return await _Download(network, run_digest, key, pieces, on_progress, max_piece_seconds).run(donors)


@dataclass
class _Fetch:
    """One donor's attempt at one piece."""

    donor: str
    piece: Piece
    started_at: float  # of the loop's clock
    task: asyncio.Task[bytes] = field(init=False)


class _Download:
    def __init__(
        self,
        network: Network,
        run_digest: str,
        key: str,
        pieces: Sequence[Piece],
        on_progress: Callable[[int], None],
        max_piece_seconds: float,
    ) -> None:
        self._network, self._run_digest, self._key = network, run_digest, key
        self._on_progress, self._max_piece_seconds = on_progress, max_piece_seconds
        self._result = bytearray(sum(piece.size_bytes for piece in pieces))
        self._to_begin = list(reversed(pieces))
        self._missing = set(pieces)
        self._fetches: list[_Fetch] = []
        self._rates: dict[str, float] = {}  # bytes/s of each donor
        self._given_up: set[str] = set()  # for slowness; each is asked once more
        self._num_bytes_done = 0

    async def run(self, donors: Sequence[str]) -> bytearray:
        waiting = list(dict.fromkeys(donors))
        slow: list[str] = []
        workers: dict[asyncio.Task[PeerUnreachable | None], str] = {}
        last_error: PeerUnreachable | None = None
        try:
            while self._missing:
                if not waiting and not workers:
                    waiting, slow = slow, []  # better than nobody
                while waiting and len(workers) < MAX_DONORS:
                    donor = waiting.pop(0)
                    workers[asyncio.ensure_future(self._work(donor))] = donor
                if not workers:
                    raise NetworkError(
                        f"download failed: none of {len(donors)} peers gave "
                        f"the remaining {len(self._missing)} pieces"
                    ) from last_error
                ended, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    donor, error = workers.pop(task), task.result()
                    last_error = error or last_error
                    if isinstance(error, DonorTooSlow) and donor not in self._given_up:
                        slow.append(donor)
                        self._given_up.add(donor)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return self._result

    async def _work(self, donor: str) -> PeerUnreachable | None:
        """Fetch pieces until none is missing; returns why the donor was left."""
        while self._missing:
            piece = self._next_piece(donor)
            if piece is None:
                await asyncio.sleep(LOOK_SECONDS)
                continue
            try:
                data = await self._fetch(donor, piece)
            except PeerUnreachable as error:
                logger.warning("download: left a donor: %s", error)
                return error
            if data is not None:
                self._take(piece, data)
        return None

    def _next_piece(self, donor: str) -> Piece | None:
        while self._to_begin:
            piece = self._to_begin.pop()
            if piece in self._missing:
                return piece
        return self._late_piece(donor)

    def _late_piece(self, donor: str) -> Piece | None:
        """Of the pieces that one other donor fetches: the one it has had longest, if I had it by now."""
        rate = self._rates.get(donor) or self._best_rate(donor)
        if rate is None:
            return None
        now = asyncio.get_running_loop().time()
        for fetch in sorted(self._fetches, key=lambda fetch: fetch.started_at):
            num_fetches = sum(other.piece == fetch.piece for other in self._fetches)
            is_late = now - fetch.started_at > LOOK_SECONDS + fetch.piece.size_bytes / rate
            if num_fetches == 1 and fetch.donor != donor and is_late:
                return fetch.piece
        return None

    async def _fetch(self, donor: str, piece: Piece) -> bytes | None:
        """None when another donor was faster. Raises PeerUnreachable."""
        loop = asyncio.get_running_loop()
        fetch = _Fetch(donor, piece, loop.time())
        fetch.task = asyncio.ensure_future(self._receive(donor, piece))
        self._fetches.append(fetch)
        try:
            await asyncio.wait([fetch.task])
            if fetch.task.cancelled():
                return None
            data = fetch.task.result()
            self._measure(donor, len(data), loop.time() - fetch.started_at)
            return data
        finally:
            fetch.task.cancel()
            self._fetches.remove(fetch)
            if piece in self._missing and not any(other.piece == piece for other in self._fetches):
                self._to_begin.append(piece)

    def _take(self, piece: Piece, data: bytes) -> None:
        if piece not in self._missing:
            return
        self._missing.discard(piece)
        self._result[piece.start : piece.start + piece.size_bytes] = data
        for fetch in self._fetches:
            if fetch.piece == piece:
                fetch.task.cancel()
        self._num_bytes_done += piece.size_bytes
        self._on_progress(self._num_bytes_done)

    async def _receive(self, donor: str, piece: Piece) -> bytes:
        stop = piece.start + piece.size_bytes
        body = {"run": self._run_digest, "key": self._key, "start": piece.start, "stop": stop}
        loop, data = asyncio.get_running_loop(), bytearray()
        started_at = loop.time()
        limit_seconds = self._deadline(donor, piece.size_bytes)
        stall_seconds = self._deadline(donor, min(STREAM_PART_BYTES, piece.size_bytes))
        try:
            async with asyncio.timeout(limit_seconds):
                async for part in self._network.stream(donor, "blob", body, timeout_seconds=stall_seconds):
                    data += part
                    if len(data) > piece.size_bytes:
                        break
        except (TimeoutError, PeerUnreachable) as error:
            if isinstance(error, PeerUnreachable) and not isinstance(error.__cause__, TimeoutError):
                raise
            self._measure(donor, len(data), loop.time() - started_at)
            why = f"is too slow: {len(data)} bytes in {loop.time() - started_at:.1f} s"
            raise DonorTooSlow(donor, why) from error
        if len(data) < piece.size_bytes:  # a stream that broke ends like any other
            raise PeerUnreachable(donor, f"sent {len(data)} bytes of a piece at byte {piece.start}")
        if len(data) > piece.size_bytes or hashlib.sha256(data).hexdigest() != piece.sha256:
            raise WrongPiece(donor, f"sent a wrong piece at byte {piece.start}")
        return bytes(data)

    def _deadline(self, donor: str, num_bytes: int) -> float:
        is_last_resort = donor in self._given_up
        best = None if is_last_resort else self._best_rate(donor)
        return deadline_seconds(num_bytes, self._rates.get(donor), best, self._max_piece_seconds)

    def _best_rate(self, donor: str) -> float | None:
        return max((rate for other, rate in self._rates.items() if other != donor), default=None)

    def _measure(self, donor: str, num_bytes: int, seconds: float) -> None:
        if num_bytes == 0:
            return
        rate, known = num_bytes / max(seconds, 1e-4), self._rates.get(donor)
        self._rates[donor] = rate if known is None else RATE_MEMORY * known + (1 - RATE_MEMORY) * rate


class _Turns:
    """At most so many at one time for each peer; the others wait in their order."""

    def __init__(self, num_each: int) -> None:
        self._num_each = num_each
        self._semaphores: dict[str, tuple[asyncio.Semaphore, list[int]]] = {}  # and how many use it

    async def take(self, peer_id: str) -> None:
        semaphore, users = self._semaphores.setdefault(peer_id, (asyncio.Semaphore(self._num_each), [0]))
        users[0] += 1
        try:
            await semaphore.acquire()
        except asyncio.CancelledError:
            self._drop(peer_id, users)
            raise

    def give(self, peer_id: str) -> None:
        semaphore, users = self._semaphores[peer_id]
        semaphore.release()
        self._drop(peer_id, users)

    def _drop(self, peer_id: str, users: list[int]) -> None:
        users[0] -= 1
        if not users[0]:
            del self._semaphores[peer_id]


def parse_range(body: Any, run_digest: str) -> tuple[str, int, int]:
    """Key, start and stop of a request from another peer. Raises RecordError."""
    if not isinstance(body, dict) or body.get("run") != run_digest:
        raise RecordError("of another run")
    key, start, stop = body.get("key"), body.get("start"), body.get("stop")
    if not isinstance(key, str) or type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise RecordError("a range holds key, start and stop")
    if len(key) > MAX_KEY_LENGTH or stop - start > MAX_RANGE_BYTES:
        raise RecordError("a range is too long")
    return key, start, stop
