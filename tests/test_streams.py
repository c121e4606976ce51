"""Do frames arrive as they were sent, and does everything else end the stream?"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator

import pytest

from coordinator.network import Network
from coordinator.streams import FrameStream, StreamError, Traffic, open_stream, serve_streams
from tests.fakes import CALL_SECONDS, new_directory, running_networks

ECHO, LONG = 1, 2
FRAME_BYTES, NUM_FRAMES = 1 << 20, 64  # more than all buffers between two peers of one machine hold
LIMITS = {ECHO: 1 << 20, LONG: 8}


@pytest.fixture(scope="module")
def networks() -> Iterator[list[Network]]:
    async def echo(stream: FrameStream) -> None:
        await stream.send(ECHO, stream.greeting)
        while True:
            kind, payload = await stream.receive(LIMITS)
            await stream.send(kind, payload)

    with running_networks(2, new_directory()) as started:
        started[0].run(serve_streams(started[0], "echo", echo), timeout_seconds=CALL_SECONDS)
        yield started


async def _exchange(network: Network, peer_id: str, kind: int, *chunks: bytes) -> tuple[int, bytes]:
    stream = await open_stream(network, peer_id, "echo", b"hello", timeout_seconds=CALL_SECONDS)
    try:
        kind_of_greeting, greeting = await stream.receive(LIMITS)
        assert (kind_of_greeting, bytes(greeting)) == (ECHO, b"hello")
        await stream.send(kind, *chunks)
        async with asyncio.timeout(CALL_SECONDS):
            kind_of_reply, reply = await stream.receive(LIMITS)
            return kind_of_reply, bytes(reply)
    finally:
        stream.close()


def test_a_large_frame_comes_back_as_it_was(networks: list[Network]) -> None:
    payload = bytes(range(256)) * 2048
    reply = networks[1].run(
        _exchange(networks[1], networks[0].peer_id, ECHO, payload[:1000], payload[1000:]),
        timeout_seconds=CALL_SECONDS,
    )
    assert reply == (ECHO, payload)


@pytest.mark.parametrize(("kind", "payload"), [(LONG, b"123456789"), (77, b""), (ECHO, b"x" * (1 << 21))])
def test_a_frame_that_is_too_long_or_unknown_ends_the_stream(
    networks: list[Network], kind: int, payload: bytes
) -> None:
    with pytest.raises(StreamError, match=r"ended|broke"):
        networks[1].run(
            _exchange(networks[1], networks[0].peer_id, kind, payload), timeout_seconds=CALL_SECONDS
        )


def test_bytes_are_counted_with_their_headers(networks: list[Network]) -> None:
    async def count() -> tuple[int, int]:
        stream = await open_stream(
            networks[1], networks[0].peer_id, "echo", b"", timeout_seconds=CALL_SECONDS
        )
        await stream.receive(LIMITS)
        await stream.send(ECHO, b"abc")
        await stream.receive(LIMITS)
        stream.close()
        return stream.traffic.num_bytes_sent, stream.traffic.num_bytes_received

    assert networks[1].run(count(), timeout_seconds=CALL_SECONDS) == (
        5 + 8,
        5 + 8,
    )  # the greeting's frames hold nothing


def test_only_payloads_tell_that_the_link_is_in_use(networks: list[Network]) -> None:
    """A frame without one is heard, and moves nothing."""

    async def heard() -> list[float]:
        stream = await open_stream(
            networks[1], networks[0].peer_id, "echo", b"", timeout_seconds=CALL_SECONDS
        )
        stream.traffic, instants = Traffic(), []
        await stream.receive(LIMITS)
        for payload in (b"", b"abc"):
            await stream.send(ECHO, payload)
            await stream.receive(LIMITS)
            instants.append(stream.traffic.payload_at)
        stream.close()
        return [instants[0], instants[1] - stream.heard_at]

    assert networks[1].run(heard(), timeout_seconds=CALL_SECONDS) == [0.0, 0.0]


def test_a_reader_that_gives_up_loses_no_frame(networks: list[Network]) -> None:
    """Frames come while nobody waits, while a reader is cancelled, and into a buffer of the reader's."""

    async def talk() -> list[bytes]:
        stream = await open_stream(
            networks[1], networks[0].peer_id, "echo", b"hello", timeout_seconds=CALL_SECONDS
        )
        await stream.receive(LIMITS)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.receive(LIMITS)
        sent = [b"", b"one", bytes(300_000), b"", b"four"]
        for payload in sent:
            await stream.send(ECHO, payload)
        buffer, replies = memoryview(bytearray(4)), []
        async with asyncio.timeout(CALL_SECONDS):
            for _ in sent:
                kind, reply = await stream.receive(LIMITS, {ECHO: buffer})
                assert kind == ECHO
                assert (reply is buffer) == (len(reply) == 4)
                replies.append(bytes(reply))
        stream.close()
        assert replies == sent
        return replies

    assert len(networks[1].run(talk(), timeout_seconds=CALL_SECONDS)) == 5


def test_who_is_gone_or_does_not_take_such_streams(networks: list[Network]) -> None:
    unknown = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    for peer_id, name in ((unknown, "echo"), (networks[0].peer_id, "nothing")):
        with pytest.raises(StreamError, match="no stream to"):
            networks[1].run(
                open_stream(networks[1], peer_id, name, b"", timeout_seconds=5.0),
                timeout_seconds=CALL_SECONDS,
            )


async def _ends(task: asyncio.Task[None]) -> BaseException | None:
    done, _ = await asyncio.wait({task}, timeout=CALL_SECONDS)
    assert done, "it still waits for who does not read"
    return task.exception()


async def _send_much(stream: FrameStream) -> None:
    for _ in range(NUM_FRAMES):
        await stream.send(ECHO, bytes(FRAME_BYTES))


async def _receive_one(stream: FrameStream) -> None:
    await stream.receive(LIMITS)


def test_to_close_ends_who_waits_for_a_reader_that_stopped(networks: list[Network]) -> None:
    """At both ends of it: a sender whose frame nobody takes, and a receiver to whom nobody sends."""

    async def fill(stream: FrameStream) -> None:
        sending = asyncio.ensure_future(_send_much(stream))
        receiving = asyncio.ensure_future(_receive_one(stream))
        while stream._transport.get_write_buffer_size() == 0:  # all buffers on the way are full
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert stream._transport.get_write_buffer_size() > 0
        stream.close()
        ended.set_result([await _ends(sending), await _ends(receiving)])

    ended: concurrent.futures.Future[list[BaseException | None]] = concurrent.futures.Future()
    networks[0].run(serve_streams(networks[0], "fill", fill), timeout_seconds=CALL_SECONDS)
    stream = networks[1].run(
        open_stream(networks[1], networks[0].peer_id, "fill", b"", timeout_seconds=CALL_SECONDS),
        timeout_seconds=CALL_SECONDS,
    )
    try:
        errors = ended.result(2 * CALL_SECONDS)  # while nobody reads, and the other end is open
    finally:
        networks[1].run(_close(stream), timeout_seconds=CALL_SECONDS)
    assert all(isinstance(error, StreamError) for error in errors), errors


def test_what_was_sent_before_the_close_arrives(networks: list[Network]) -> None:
    """All of it, also to who reads late."""

    async def send_and_leave(stream: FrameStream) -> None:
        for index in range(8):
            await stream.send(ECHO, bytes([index]) * FRAME_BYTES)

    async def read_late() -> list[bytes]:
        name = "send-and-leave"
        stream = await open_stream(networks[1], networks[0].peer_id, name, b"", timeout_seconds=CALL_SECONDS)
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await asyncio.sleep(0.3)
                return [bytes((await stream.receive(LIMITS))[1]) for _ in range(8)]
        finally:
            stream.close()

    networks[0].run(
        serve_streams(networks[0], "send-and-leave", send_and_leave), timeout_seconds=CALL_SECONDS
    )
    frames = networks[1].run(read_late(), timeout_seconds=2 * CALL_SECONDS)
    assert [frame == bytes([index]) * FRAME_BYTES for index, frame in enumerate(frames)] == [True] * 8


def test_a_greeting_that_cannot_be_sent_leaves_no_stream(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[FrameStream] = []

    async def fail(self: FrameStream, kind: int, *chunks: bytes) -> None:
        opened.append(self)
        raise StreamError("broke")

    monkeypatch.setattr(FrameStream, "send", fail)
    with pytest.raises(StreamError, match="broke"):
        networks[1].run(
            open_stream(networks[1], networks[0].peer_id, "echo", b"", timeout_seconds=CALL_SECONDS),
            timeout_seconds=CALL_SECONDS,
        )
    assert [stream._transport.is_closing() for stream in opened] == [True]


async def _close(stream: FrameStream) -> None:
    stream.close()
