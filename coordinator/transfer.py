"""How bytes with known hashes come from several donors: piece by piece, each checked on arrival.

Nothing is used before all of it fits; a donor that dies, stalls or sends one wrong piece is left,
and the others go on with the pieces that are missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.errors import NetworkError
from coordinator.network import STREAM_PART_BYTES, Network, PeerUnreachable
from coordinator.records import RecordError

logger = logging.getLogger(__name__)

STALL_TIMEOUT_SECONDS = 10.0  # between two parts of a stream
SLOWEST_BYTES_PER_SECOND = 125_000  # 1 Mbit/s; a donor slower than that is left
MAX_DONORS = 4


@dataclass(frozen=True)
class Piece:
    start: int  # byte offset
    size_bytes: int
    sha256: str  # hex


def serve_blobs(network: Network, run_digest: str, open_blob: Callable[[str], memoryview | None]) -> None:
    """Answer requests for byte ranges; `open_blob(key)` gives the bytes of a key, None if not held."""

    async def blob(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
        key, start, stop = _parse_range(body, run_digest)
        data = open_blob(key)
        if data is None or stop > len(data):
            raise RecordError("not held here")
        for offset in range(start, stop, STREAM_PART_BYTES):
            yield bytes(data[offset : min(offset + STREAM_PART_BYTES, stop)])

    network.on_stream("blob", blob)


async def fetch_blob(
    network: Network,
    run_digest: str,
    key: str,
    pieces: Sequence[Piece],
    donors: Sequence[str],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
) -> bytearray:
    """All bytes of `key`, every piece checked. Raises NetworkError when no donor is left."""
    result = bytearray(sum(piece.size_bytes for piece in pieces))
    missing = list(reversed(pieces))
    done = 0

    async def work(donor: str) -> str | None:
        """Fetch pieces until none is missing; returns the donor when it is of no use."""
        nonlocal done
        while missing:
            piece = missing.pop()
            try:
                result[piece.start : piece.start + piece.size_bytes] = await _fetch_piece(
                    network, run_digest, key, piece, donor
                )
            except PeerUnreachable as error:
                missing.append(piece)
                logger.warning("download: left a donor: %s", error)
                return donor
            except asyncio.CancelledError:
                missing.append(piece)
                raise
            done += piece.size_bytes
            on_progress(done)
        return None

    useful = list(dict.fromkeys(donors))
    while missing and useful:
        tasks = [asyncio.ensure_future(work(donor)) for donor in useful[:MAX_DONORS]]
        try:
            left = set(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        useful = [donor for donor in useful if donor not in left]
    if missing:
        raise NetworkError(
            f"download failed: none of {len(donors)} peers gave the remaining {len(missing)} pieces"
        )
    return result


async def _fetch_piece(network: Network, run_digest: str, key: str, piece: Piece, donor: str) -> bytes:
    body = {"run": run_digest, "key": key, "start": piece.start, "stop": piece.start + piece.size_bytes}
    data = bytearray()
    limit_seconds = STALL_TIMEOUT_SECONDS + piece.size_bytes / SLOWEST_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(limit_seconds):
            async for part in network.stream(donor, "blob", body, timeout_seconds=STALL_TIMEOUT_SECONDS):
                data += part
                if len(data) > piece.size_bytes:
                    break
    except TimeoutError as error:
        raise PeerUnreachable(donor, f"is too slow: {len(data)} bytes in {limit_seconds:.0f} s") from error
    if len(data) != piece.size_bytes or hashlib.sha256(data).hexdigest() != piece.sha256:
        raise PeerUnreachable(donor, f"sent a wrong piece at byte {piece.start}")
    return bytes(data)


def _parse_range(body: Any, run_digest: str) -> tuple[str, int, int]:
    if not isinstance(body, dict) or body.get("run") != run_digest:
        raise RecordError("of another run")
    key, start, stop = body.get("key"), body.get("start"), body.get("stop")
    if not isinstance(key, str) or type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        raise RecordError("a range holds key, start and stop")
    return key, start, stop
