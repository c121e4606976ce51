"""Does the limit on what is sent hold, over real streams, and for bulk only?"""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import pytest

from coordinator.throttle import CHUNK_BYTES, Throttle, chunks_of
from coordinator.transfer import Piece, fetch_blob, serve_blobs
from peer import allreduce
from peer.join import _parse, make_config
from tests import exchanges
from tests.fakes import hash_of, new_directory, running_networks


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_peer_that_sends_slowly_loses_no_part_and_fails_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its six streams share half of what one link is expected to give: a part takes longer than a silence."""
    size, rate = 64 * 16_384, 125_000.0
    monkeypatch.setattr(allreduce, "STALL_FLOOR_SECONDS", 1.0)
    monkeypatch.setattr(allreduce, "UNMEASURED_BYTES_PER_SECOND", 2 * rate)
    with exchanges.running_swarm() as members:
        members.networks[0].throttle = Throttle(rate)
        outgoing = members.prepare(exchanges.deltas(size=size))
        futures = members.start(members.group(), outgoing, limit_seconds=200.0)
        results = [future.result(250.0) for future in futures]
    assert [c.missing for result in results for c in result.contributions] == [()] * 16
    assert len({result.flat.numpy().tobytes() for result in results}) == 1


def test_a_state_is_served_no_faster_than_the_limit() -> None:
    """Whatever the number of streams: three pieces are asked for, one after another, by each of two peers."""
    size, rate, run = 300_000, 600_000.0, hash_of("run")
    data = bytes(i % 251 for i in range(3 * size))
    pieces = [
        Piece(start, size, hashlib.sha256(data[start : start + size]).hexdigest())
        for start in range(0, len(data), size)
    ]
    with running_networks(3, new_directory()) as (donor, *receivers):
        serve_blobs(donor, run, {"state": memoryview(data)}.get)
        seconds = {}
        for limit in (None, rate):
            donor.throttle = donor._rpc._throttle = Throttle(limit)
            started = time.monotonic()
            futures = [
                receiver.submit(fetch_blob(receiver, run, "state", pieces, [donor.peer_id]))
                for receiver in receivers
            ]
            assert [future.result(60.0) == data for future in futures] == [True, True]
            seconds[limit] = time.monotonic() - started
    # What comes last, a part of each stream, is paid for by who comes next; the first chunk is saved up.
    unpaid = 2 * (size - 256 * 1024) + CHUNK_BYTES
    assert seconds[rate] >= (2 * len(data) - unpaid) / rate
    assert seconds[None] < seconds[rate]


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--max-upload-mbps", "8"], 1e6)])
def test_the_flag_is_in_megabits(tmp_path: Path, flags: list[str], expected: float | None) -> None:
    config = make_config(_parse(["--data", "x.csv", "--output-dir", str(tmp_path), *flags]))
    assert config.max_upload_bytes_per_second == expected
