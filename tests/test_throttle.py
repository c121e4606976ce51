"""Does the limit on what is sent hold, over real streams, and for bulk only?"""

from __future__ import annotations

import asyncio
import time

import pytest

from coordinator.throttle import CHUNK_BYTES, Throttle, chunks_of


def test_bulk_waits_for_its_turn() -> None:
    async def send() -> float:
        throttle = Throttle(1e6)
        started = time.monotonic()
        await asyncio.gather(*(throttle.wait_for(50_000) for _ in range(9)))
        return time.monotonic() - started

    # 450 kB at 1 MB/s; the first chunk starts at once, and the last is paid for by who comes next.
    assert asyncio.run(send()) >= 0.39


def test_small_messages_do_not_wait_but_count() -> None:
    async def send() -> float:
        throttle = Throttle(1e5)
        throttle.count(30_000)
        started = time.monotonic()
        await throttle.wait_for(1)
        return time.monotonic() - started

    assert asyncio.run(send()) >= 0.29


def test_without_a_limit_nobody_waits() -> None:
    throttle = Throttle(None)
    assert not throttle.is_on
    throttle.count(10**12)
    asyncio.run(asyncio.wait_for(throttle.wait_for(10**12), 1.0))


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_are_the_message(length: int) -> None:
    data = bytes(i % 251 for i in range(length))
    chunks = [bytes(chunk) for chunk in chunks_of(memoryview(data))]
    assert b"".join(chunks) == data
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
