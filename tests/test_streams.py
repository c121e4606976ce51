"""Do frames arrive as they were sent, and does everything else end the stream?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from coordinator.network import Network
from coordinator.streams import FrameStream, StreamError, open_stream, serve_streams
from tests.fakes import CALL_SECONDS, new_directory, running_networks

ECHO, LONG = 1, 2
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
