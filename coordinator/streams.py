"""How large binary messages travel between two peers: bounded frames on a raw stream of the p2p daemon.

hivemind's protobuf streams copy every message five times. These are its binary streams
(`P2P.add_binary_stream_handler`, `P2P.call_binary_stream_handler`, hivemind 1.1.12), read straight
from the socket into the buffer that the caller gets, with frames of our own:

    1 byte kind | 4 bytes length, big-endian | payload

Who opens a stream sends one frame, the greeting, and waits for an answer before it sends more. Every
receiver says which kinds it takes and how long each may be; anything else ends the stream.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from coordinator.errors import NetworkError
from coordinator.network import Network
from coordinator.outgoing import About, Recorder, ignore, report
from coordinator.throttle import UNLIMITED, Throttle, chunks_of

logger = logging.getLogger(__name__)

_HEADER = struct.Struct(">BI")
JOINED_BYTES = 16 * 1024  # of a payload that are copied behind the header: one write instead of two
SOCKET_BUFFER_BYTES = 1024 * 1024  # to and from the daemon: a part of 512 KB leaves in one call
MAX_GREETING_BYTES = 1024
GREETING_SECONDS = 5.0
NO_NAMES: Mapping[int, str] = {}  # of frames, for people
_GREETING = About(kind="greeting")


class StreamError(NetworkError):
    """A stream that broke, or a frame that is not what was agreed."""


@dataclass
class Traffic:
    """Bytes of frames, summed over streams that share it."""

    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    # When bytes of a payload came last: a frame that only says ALIVE has none. By time.monotonic().
    payload_at: float = 0.0


class FrameStream:
    """Frames to and from one authenticated peer, one reader and one writer at a time. To be closed.

    Of several chunks the last one may be large; those before it are copied.
    """

    def __init__(
        self,
        peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        greeting: bytes = b"",
        *,
        record: Recorder = ignore,
        frame_names: Mapping[int, str] = NO_NAMES,
        throttle: Throttle = UNLIMITED,
    ) -> None:
        """`record` is told of every frame that leaves, under its name."""
        self.peer_id, self._throttle = peer_id, throttle
        self._record, self._frame_names = record, frame_names
        self._about: About | None = None
        self._streams = (reader, writer)  # either one closes the transport when nobody holds it any more
        transport = cast(asyncio.Transport, writer.transport)
        self.greeting = greeting  # what its opener said first; empty at the opener
        self._transport = transport
        self._protocol = _FrameProtocol()
        transport.pause_reading()
        transport.set_protocol(self._protocol)
        self._protocol.transport = transport
        transport.set_write_buffer_limits(high=0)
        _enlarge_buffers(transport)

    @property
    def heard_at(self) -> float:
        """When bytes came last, of a frame that is not complete as well; by time.monotonic()."""
        return self._protocol.heard_at

    @property
    def traffic(self) -> Traffic:
        return self._protocol.traffic

    @traffic.setter
    def traffic(self, shared: Traffic) -> None:
        self._protocol.traffic = shared

    def describe(self, about: About) -> None:
        """Of the next frame, for the ledger."""
        self._about = about

    async def send(self, kind: int, *chunks: bytes | bytearray | memoryview) -> None:
        """Returns when the daemon has taken all of it: a silent peer blocks. Raises StreamError."""
        length = sum(len(chunk) for chunk in chunks)
        *small, large = chunks or (b"",)
        start = min(len(large), JOINED_BYTES)
        head = b"".join([_HEADER.pack(kind, length), *small, memoryview(large)[:start]])
        name = self._frame_names.get(kind, f"frame {kind}")
        report(self._record, name, "", self.peer_id, *chunks, about=self._about)
        self._about = None
        try:
            if self._throttle.is_on:
                await self._send_slowly(head, memoryview(large)[start:])
            else:
                self._transport.write(head)
                self._transport.write(memoryview(large)[start:])
                await self._protocol.drained()
        except (OSError, RuntimeError) as error:  # RuntimeError: the transport was closed meanwhile
            raise StreamError(f"the stream to {self.peer_id[-8:]} broke: {error}") from error
        self.traffic.num_bytes_sent += _HEADER.size + length

    async def _send_slowly(self, head: bytes, rest: memoryview) -> None:
        for chunk in (memoryview(head), *chunks_of(rest)):
            await self._throttle.wait_for(len(chunk))
            self._transport.write(chunk)
            await self._protocol.drained()

    async def receive(
        self, max_bytes: Mapping[int, int], into: Mapping[int, memoryview] | None = None
    ) -> tuple[int, bytearray | memoryview]:
        """The next frame: its kind, one of `max_bytes`, and its payload. Raises StreamError.

        `into`: for a kind whose frames are as long as a buffer, that buffer, which is filled and returned.
        """

        def room(kind: int, length: int) -> bytearray | memoryview | None:
            if length > max_bytes.get(kind, -1):
                return None
            payload = into.get(kind) if into else None
            return payload if payload is not None and len(payload) == length else bytearray(length)

        try:
            kind, length, payload = await self._protocol.read_frame(room)
        except (OSError, EOFError) as error:
            raise StreamError(f"the stream from {self.peer_id[-8:]} ended") from error
        if payload is None:
            self.close()
            raise StreamError(f"{self.peer_id[-8:]} sent a frame of kind {kind} with {length} bytes")
        self.traffic.num_bytes_received += _HEADER.size + length
        return kind, payload

    def close(self) -> None:
        """At once, also where the other one does not read: who sends or receives gets a StreamError.

        After a `send` that has returned, the daemon has all of it, and it still arrives. What is left in the
        buffer is of a frame that is cut off anyway, and a transport that is to flush it waits for the reader.
        """
        with suppress(OSError, RuntimeError):
            if self._transport.get_write_buffer_size() > 0:
                self._transport.abort()
            else:
                self._transport.close()
        self._protocol.end()


_Room = Callable[[int, int], bytearray | memoryview | None]  # for a kind and a length; None: not taken
_Frame = tuple[int, int, bytearray | memoryview | None]  # kind, length, payload


class _FrameProtocol(asyncio.BufferedProtocol):
    """Reads frames straight to where they are wanted. Of a frame that nobody waits for, the header alone.

    One future per frame, and the socket stays registered between frames: a future and two calls of epoll
    for each header as well took 40% of an exchange's time in Python.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._header = bytearray(_HEADER.size)
        self._payload: bytearray | memoryview | None = None  # None: the header comes first
        self._target, self._num_read = memoryview(self._header), 0
        self._room: _Room | None = None  # of who waits for a frame
        self._reading: asyncio.Future[_Frame] | None = None
        self._draining: asyncio.Future[None] | None = None
        self._is_paused = self._is_closed = False
        self.heard_at, self.traffic = time.monotonic(), Traffic()

    async def read_frame(self, room: _Room) -> _Frame:
        """The next one, read to what `room` gives. Raises EOFError when the stream ends before."""
        if self._reading is not None:
            raise RuntimeError("two readers of one stream")
        if self._is_closed or self.transport is None:
            raise EOFError
        self._room, self._reading = room, asyncio.get_running_loop().create_future()
        self._advance()
        if not self._reading.done():
            self.transport.resume_reading()
        try:
            return await self._reading
        finally:
            if self._reading.done() and not self._reading.cancelled():
                self._reading.exception()  # looked at, also where the reader was cancelled at that instant
            elif not self._is_closed:
                self.transport.pause_reading()
            self._room = self._reading = None

    async def drained(self) -> None:
        if self._is_closed or self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the stream is closed")
        if self._is_paused:
            self._draining = asyncio.get_running_loop().create_future()
            try:
                await self._draining
            finally:
                self._draining = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._num_read :]

    def buffer_updated(self, nbytes: int) -> None:
        self.heard_at = time.monotonic()
        if self._payload is not None:
            self.traffic.payload_at = self.heard_at
        self._num_read += nbytes
        self._advance()

    def _advance(self) -> None:
        """From a complete header to its payload, from a complete payload to the next header."""
        if self._num_read < len(self._target) or self.transport is None:
            return
        if self._room is None or self._reading is None or self._reading.done():
            self.transport.pause_reading()
            return
        kind, length = _HEADER.unpack(self._header)
        if self._payload is None:
            self._payload = self._room(kind, length)
            if self._payload is not None and length > 0:
                self._target, self._num_read = memoryview(self._payload), 0
                return
        frame = kind, length, self._payload
        self._payload, self._target, self._num_read = None, memoryview(self._header), 0
        self._reading.set_result(frame)

    def eof_received(self) -> bool:
        self._end(EOFError())
        return True  # the other direction stays open: what was sent still arrives

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or EOFError())
        _finish(self._draining, ConnectionResetError("the stream is closed"))

    def end(self) -> None:
        """Nobody waits for the transport any more."""
        self.connection_lost(None)

    def _end(self, why: Exception) -> None:
        self._is_closed = True
        if self._reading is not None and not self._reading.done():
            self._reading.set_exception(why)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        _finish(self._draining)


def _finish(future: asyncio.Future[None] | None, error: Exception | None = None) -> None:
    if future is not None and not future.done():
        future.set_result(None) if error is None else future.set_exception(error)


StreamHandler = Callable[[FrameStream], Awaitable[None]]


async def serve_streams(
    network: Network, name: str, handler: StreamHandler, frame_names: Mapping[int, str] = NO_NAMES
) -> None:
    """Give every stream that another peer opens under `name` to `handler`; it is closed afterwards."""

    async def on_stream(info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = str(info.peer_id)  # type: ignore[attr-defined]  # hivemind's StreamInfo
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                greeting = await _read_greeting(reader)
        except (OSError, EOFError) as error:
            logger.debug("no greeting from %s: %s", peer_id[-8:], error)
            writer.close()
            return
        stream = FrameStream(
            peer_id,
            reader,
            writer,
            greeting,
            record=network.record,
            frame_names=frame_names,
            throttle=network.throttle,
        )
        try:
            await handler(stream)
        except StreamError as error:
            logger.debug("%s", error)
        finally:
            stream.close()

    await network.p2p.add_binary_stream_handler(name, on_stream)


async def open_stream(
    network: Network,
    peer_id: str,
    name: str,
    greeting: bytes,
    *,
    timeout_seconds: float,
    frame_names: Mapping[int, str] = NO_NAMES,
) -> FrameStream:
    """Raises StreamError when the peer cannot be reached in time, or does not take such streams."""
    try:
        async with asyncio.timeout(timeout_seconds):
            _, reader, writer = await network.p2p.call_binary_stream_handler(
                PeerID.from_base58(peer_id), name
            )
    except (P2PDaemonError, P2PHandlerError, OSError, EOFError) as error:
        why = f"no answer within {timeout_seconds:.1f} s" if isinstance(error, TimeoutError) else str(error)
        raise StreamError(
            f"no stream to {peer_id[-8:]}: {why.splitlines()[0][:160] if why else ''}"
        ) from error
    stream = FrameStream(
        peer_id, reader, writer, record=network.record, frame_names=frame_names, throttle=network.throttle
    )
    stream.describe(_GREETING)
    try:
        await stream.send(0, greeting)
    except BaseException:  # a cancelled one as well: nobody else knows the stream
        stream.close()
        raise
    return stream


async def _read_greeting(reader: asyncio.StreamReader) -> bytes:
    """Raises OSError, EOFError."""
    _, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if length > MAX_GREETING_BYTES:
        raise OSError(f"a greeting of {length} bytes")
    return await reader.readexactly(length)


def _enlarge_buffers(transport: asyncio.Transport) -> None:
    raw = transport.get_extra_info("socket")
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
