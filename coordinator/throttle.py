"""How fast may this peer send? A token bucket over what it hands to the p2p daemon (`--max-upload-mbps`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

CHUNK_BYTES = 16 * 1024  # of a long message: each of many receivers hears of it often enough


class Throttle:
    """Bulk waits for its turn; small messages only count, since votes must not wait behind the weights.

    Not held back are hivemind's own DHT messages and what libp2p sends for itself: a few KB per minute.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        """None: as fast as the line takes it."""
        self._rate = bytes_per_second
        self._turn = asyncio.Lock()
        self._level, self._at = 0.0, time.monotonic()  # bytes that may leave now; negative: a debt

    @property
    def is_on(self) -> bool:
        return self._rate is not None

    def count(self, num_bytes: int) -> None:
        """Of a message that leaves at once."""
        if self._rate is not None:
            self._refill(self._rate)
            self._level -= num_bytes

    async def wait_for(self, num_bytes: int) -> None:
        """Until so many bytes may leave. At most a chunk's worth is saved up while nothing is sent."""
        if self._rate is None:
            return
        async with self._turn:  # who came first goes first: else a stream may seem silent by bad luck
            self._refill(self._rate)
            while self._level < 0:
                await asyncio.sleep(-self._level / self._rate)
                self._refill(self._rate)
            self._level -= num_bytes

    def _refill(self, rate: float) -> None:
        now = time.monotonic()
        self._level = min(float(CHUNK_BYTES), self._level + (now - self._at) * rate)
        self._at = now


UNLIMITED = Throttle(None)


def chunks_of(data: memoryview) -> Iterator[memoryview]:
    """Of at most CHUNK_BYTES; none of an empty message."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]
