"""Which of hivemind's own ways in are bounded, before anything of a message is parsed?

hivemind 1.1.12 serves whoever calls, as often and as much as it likes. Here every call and every stream
passes a budget of its sender first (`coordinator.limits`), DHT calls included, and four names of
hivemind are replaced or wrapped; `tests/test_network.py` pins them:

- `P2P.receive_raw_data` believed an 8-byte length from the other side; it is bounded.
- `ControlClient._handle_persistent_request` is the one place through which all unary calls come in;
  hivemind also kept an entry for ever of each call that its sender cancelled.
- `DictionaryDHTValue.store` took any number of entries, and an old entry, stored again, made the newer
  one expire with it.
- `DHTProtocol.call_find` believed any expiration, so an empty answer could end a search.

A refused call is answered with an error and costs 0.1 ms; who goes on all the same is disconnected.

In a private run this is also the one place where outsiders are kept out: of every call and every stream that
comes in, whatever it is for, the door's excepted; and what goes out waits until the other side has shown its
credential (`coordinator.door`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import p2pd_pb2
from hivemind.utils import get_dht_time

from coordinator.admission import NOT_ADMITTED, Admission, NotAdmittedError
from coordinator.door import DOOR_HANDLER, Door
from coordinator.limits import Budget, Limiter, OpenStreams, Rate, Refusal
from coordinator.records import MAX_MESSAGE_BYTES, MAX_RECORD_BYTES, RecordError

logger = logging.getLogger(__name__)

MAX_STREAM_MESSAGE_BYTES = 1024 * 1024 + 1024  # one message of a protobuf stream; ours have 256 KB
MAX_CALL_BYTES = MAX_MESSAGE_BYTES + 1024  # one unary request of ours, with its wrapping
MAX_DHT_CALL_BYTES = 4 * 1024 * 1024  # a node that joins gets the whole board in one
MAX_DHT_ENTRIES = 1024  # of one key; a run has at most so many peers
MAX_DHT_VALUE_BYTES = 3 * 1024 * 1024  # of one key: an answer must stay below the daemon's 4 MB
MAX_DHT_LIFETIME_SECONDS = 4000.0
MAX_STREAMS_PER_PEER = 64
MAX_STREAMS = 768  # one descriptor each, of the 1024 that a process has by default
TOKEN_BYTES = 64 * 1024  # a call costs one token, and one for each of these, in either direction
DHT_TOKEN_BYTES = 4 * 1024  # DHT records are verified one by one: 4 KB are two or three signatures
DHT_REPLY_TOKEN_BYTES = 64 * 1024  # a board of 1000 peers has 1.5 MB, and all of them read it every 2 s

# A member of the demo makes less than ten calls a second of another; a download opens a stream per megabyte.
# A call costs some 3 ms of a core, daemon included (AMD EPYC): at 100 a second a flood took a third of it.
CALLS = Budget(
    per_peer=Rate(per_second=20, burst=200, max_delay_seconds=1.0),
    total=Rate(per_second=2000, burst=4000, max_delay_seconds=0.5),
    max_refused=200,
)
DHT_CALLS = Budget(
    per_peer=Rate(per_second=50, burst=200, max_delay_seconds=1.0),
    total=Rate(per_second=1000, burst=2000, max_delay_seconds=0.5),
    max_refused=500,
)
STREAMS = Budget(
    per_peer=Rate(per_second=100, burst=200, max_delay_seconds=1.0),
    total=Rate(per_second=1000, burst=2000, max_delay_seconds=0.5),
    max_refused=200,
)
# A peer presents itself once to each other; a stranger's signatures cost 0.3 ms.
DOOR_CALLS = Budget(
    per_peer=Rate(per_second=2, burst=20, max_delay_seconds=1.0),
    total=Rate(per_second=200, burst=1000, max_delay_seconds=0.5),
    max_refused=200,
)
# Of all that is asked by those who are not let in: their flood must not cost the members their budget.
OUTSIDERS = Budget(
    per_peer=Rate(per_second=20, burst=100, max_delay_seconds=1.0),
    total=Rate(per_second=500, burst=1000, max_delay_seconds=0.5),
    max_refused=200,
)
DISCONNECT_SECONDS = 2.0
_NUM_DISCONNECTS = 2  # at one time
_LOG_SECONDS = 60.0
_NOISY_LOGGERS = (
    "hivemind.p2p.p2p_daemon",
    "hivemind.p2p.p2p_daemon_bindings.control",
    "hivemind.dht.protocol",
)

StreamHandler = Callable[[Any, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class MessageTooLargeError(ValueError):
    """The other side announced more than is taken."""


class Guard:
    """The budgets of all who call; outlives the P2P object, so that a restart gives nobody a fresh one."""

    def __init__(self, now: Callable[[], float] = time.monotonic, admission: Admission | None = None) -> None:
        """`admission`: of a private run."""
        self._now, self._admission = now, admission
        self._calls, self._dht, self._opened, self._door, self._outsiders = (
            Limiter(budget, now()) for budget in (CALLS, DHT_CALLS, STREAMS, DOOR_CALLS, OUTSIDERS)
        )
        self.open_streams = OpenStreams(MAX_STREAMS_PER_PEER, MAX_STREAMS)
        self.num_refused = 0
        self.num_disconnects = 0
        self.stream_handlers: dict[
            str, StreamHandler
        ] = {}  # raw ones, to be registered again after a restart
        self._disconnecting: set[str] = set()
        # (peer id, handler, text) of each error that a caller is told
        self.on_refusal: Callable[[str, str, bytes], None] = lambda peer_id, name, why: None

    async def pass_call(self, p2p: P2P, peer_id: str, handler_name: str, num_bytes: int) -> None:
        """Returns when the call may be served. Raises RecordError when it is refused."""
        is_dht, is_door = _is_dht(handler_name), self._is_door(handler_name)
        if num_bytes > (MAX_DHT_CALL_BYTES if is_dht else MAX_CALL_BYTES):
            raise RecordError(f"a request of {num_bytes} bytes")
        unit = DHT_TOKEN_BYTES if is_dht else TOKEN_BYTES
        limiter = self._limiter(peer_id, handler_name)
        verdict = limiter.admit(peer_id, self._now(), 1.0 + num_bytes // unit)
        if isinstance(verdict, Refusal):
            self._refused(p2p, peer_id, "calls", verdict)
            raise RecordError("too many calls: slow down")
        if self._admission is not None and not is_door:
            self._admission.require(peer_id)
        if verdict > 0.0:
            await asyncio.sleep(verdict)
            if limiter.is_overdrawn(peer_id, self._now()):  # by answers to those before it
                self.num_refused += 1
                raise RecordError("too many calls: slow down")

    def count_reply(self, peer_id: str, handler_name: str, num_bytes: int) -> None:
        """Of a call that was served: few bytes can ask for a megabyte."""
        unit = DHT_REPLY_TOKEN_BYTES if _is_dht(handler_name) else TOKEN_BYTES
        self._limiter(peer_id, handler_name).charge(peer_id, self._now(), num_bytes // unit)

    def _limiter(self, peer_id: str, handler_name: str) -> Limiter:
        if self._is_door(handler_name):
            return self._door
        if not self._is_in(peer_id):  # what it asks in vain must not cost the members their budget
            return self._outsiders
        return self._dht if _is_dht(handler_name) else self._calls

    def _is_door(self, handler_name: str) -> bool:
        return self._admission is not None and handler_name == DOOR_HANDLER

    async def pass_stream(self, p2p: P2P, peer_id: str) -> bool:
        """Whether the stream may be served; then `open_streams.close` must follow."""
        limiter = self._opened if self._is_in(peer_id) else self._outsiders
        verdict = limiter.admit(peer_id, self._now())
        if isinstance(verdict, Refusal):
            self._refused(p2p, peer_id, "streams", verdict)
            return False
        if not self._lets_in(peer_id):
            self.num_refused += 1
            return False
        if not self.open_streams.open(peer_id):
            self.num_refused += 1
            logger.debug("peer %s has too many streams open", peer_id[-8:])
            return False
        if verdict > 0.0:
            await asyncio.sleep(verdict)
        return True

    def disconnect(self, p2p: P2P, peer_id: str) -> None:
        """Whom the organizer has revoked: its open streams end with the connection."""
        if peer_id not in self._disconnecting:
            self._disconnecting.add(peer_id)
            asyncio.create_task(self._disconnect(p2p, peer_id))  # noqa: RUF006 (the loop keeps its tasks)

    def _is_in(self, peer_id: str) -> bool:
        return self._admission is None or self._admission.is_admitted(peer_id)

    def _lets_in(self, peer_id: str) -> bool:
        if self._admission is None:
            return True
        try:
            self._admission.require(peer_id)
        except NotAdmittedError:
            return False
        return True

    def _refused(self, p2p: P2P, peer_id: str, what: str, refusal: Refusal) -> None:
        self.num_refused += 1
        if refusal.num_unlogged:
            logger.warning("refused %d %s of peer %s: too many", refusal.num_unlogged, what, peer_id[-8:])
        if (
            refusal.is_cut_off
            and len(self._disconnecting) < _NUM_DISCONNECTS
            and peer_id not in self._disconnecting
        ):
            self._disconnecting.add(peer_id)
            asyncio.create_task(self._disconnect(p2p, peer_id))  # noqa: RUF006 (the loop keeps its tasks)

    async def _disconnect(self, p2p: P2P, peer_id: str) -> None:
        self.num_disconnects += 1
        try:
            async with asyncio.timeout(DISCONNECT_SECONDS):
                await p2p._client.disconnect(PeerID.from_base58(peer_id))
        except (P2PDaemonError, OSError, EOFError) as error:
            logger.debug("could not disconnect %s: %s", peer_id[-8:], error)
        finally:
            self._disconnecting.discard(peer_id)


class _PendingCalls(dict[Any, "asyncio.Future[bytes]"]):
    """Calls that wait for an answer; one that was cancelled does not.

    hivemind sets the result of whatever it finds here. If a caller gave up in the same turn of the loop, that
    raised, the only reader of answers ended, and with it every later unary call of this peer.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


class GuardedP2P(P2P):
    """hivemind's P2P behind a guard; `guarded` makes one."""

    guard: Guard
    door: Door | None  # of a private run

    @classmethod
    async def guarded(
        cls, guard: Guard, socket_folder: Path, door: Door | None = None, **options: Any
    ) -> GuardedP2P:
        """`socket_folder`: where the sockets between daemon and process lie; hivemind's are in /tmp."""
        values = {"guard": guard, "door": door, "_UNIX_SOCKET_PREFIX": f"/unix{socket_folder}/"}
        p2p: GuardedP2P = await type("GuardedP2P", (cls,), values).create(**options)  # type: ignore[attr-defined]
        control: ControlClient = p2p._client.control

        async def handle(call_id: Any, request: Any) -> None:
            await _handle_unary(p2p, control, call_id, request)

        control._handle_persistent_request, control._handler_tasks = handle, _RunningCalls()
        control._pending_calls = _PendingCalls(control._pending_calls)
        # When the daemon dies this ends with an error that nobody waits for; the network's watch tells it.
        control._read_task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return p2p

    async def add_binary_stream_handler(
        self, name: str, handler: StreamHandler, balanced: bool = False
    ) -> None:
        async def guarded(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer_id = str(info.peer_id)
            if not await self.guard.pass_stream(self, peer_id):
                writer.close()
                return
            try:
                await handler(info, reader, writer)
            finally:
                self.guard.open_streams.close(peer_id)
                writer.close()

        await super().add_binary_stream_handler(name, guarded, balanced)
        self.guard.stream_handlers[name] = handler

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, request: Any, output_protobuf_type: Any
    ) -> Any:
        """Every unary call that goes out, those of the DHT included."""
        call = super()._call_unary_protobuf_handler
        door = self.door
        if door is None or door.is_own(handle_name):
            return await call(peer_id, handle_name, request, output_protobuf_type)
        meeting = await door.meet(self, peer_id)
        try:
            return await call(peer_id, handle_name, request, output_protobuf_type)
        except P2PHandlerError as error:
            if NOT_ADMITTED not in str(error):
                raise
        door.forget(str(peer_id), meeting)  # it was started anew; what it refused it has not served
        await door.meet(self, peer_id)
        return await call(peer_id, handle_name, request, output_protobuf_type)

    async def call_binary_stream_handler(self, peer_id: PeerID, handler_name: str) -> Any:
        """Every stream that goes out."""
        if self.door is not None:
            await self.door.meet(self, peer_id)
        return await super().call_binary_stream_handler(peer_id, handler_name)

    async def remove_binary_stream_handler(self, name: str) -> None:
        self.guard.stream_handlers.pop(name, None)
        await super().remove_binary_stream_handler(name)

    def fail_pending_calls(self) -> None:
        """Of a daemon that is gone: hivemind would let them wait until their time is over."""
        for future in list(self._client.control._pending_calls.values()):
            if not future.done():
                future.set_exception(P2PDaemonError("the p2p daemon is gone"))


def guard_dht(node: DHTNode) -> None:
    """Answers of other nodes: none lives for ever, and an empty dictionary is no answer."""
    protocol = node.protocol
    find = protocol.call_find

    async def call_find(peer: PeerID, keys: Any) -> Any:
        output = await find(peer, keys)
        latest = get_dht_time() + MAX_DHT_LIFETIME_SECONDS
        for key, (value, nearest) in (output or {}).items():
            is_empty = (
                value is not None and isinstance(value.value, DictionaryDHTValue) and not value.value.data
            )
            if value is not None and (is_empty or not value.expiration_time <= latest):
                output[key] = None, nearest
        return output

    protocol.call_find = call_find


class _RunningCalls(dict[Any, "asyncio.Task[None]"]):
    """Calls of others that are being served; each goes when it ends, also one that was cancelled."""

    def __setitem__(self, call_id: Any, task: asyncio.Task[None]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


async def _handle_unary(p2p: GuardedP2P, control: ControlClient, call_id: Any, request: Any) -> None:
    """In the place of hivemind's: the budget is asked first."""
    handler = control.unary_handlers.get(request.proto)
    if handler is None:
        return
    remote_id = PeerID(request.peer)
    peer_id, name = str(remote_id), _handler_name(request.proto)
    try:
        await p2p.guard.pass_call(p2p, peer_id, name, len(request.data))
        response = await handler(request.data, remote_id)
        p2p.guard.count_reply(peer_id, name, len(response))
        reply = p2pd_pb2.CallUnaryResponse(response=response)
    except Exception as error:  # whatever a handler raises is its caller's answer
        logger.debug("a call of %s failed", request.proto, exc_info=True)
        reply = p2pd_pb2.CallUnaryResponse(
            error=f"{type(error).__name__}: {error}"[:500].encode(errors="replace")
        )
    message = p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, unaryResponse=reply)
    if message.ByteSize() > control.persistent_conn_max_msg_size:
        error_reply = p2pd_pb2.CallUnaryResponse(error=b"the reply is too large")
        message = p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, unaryResponse=error_reply)
    if message.unaryResponse.HasField("error"):
        p2p.guard.on_refusal(peer_id, name, message.unaryResponse.error)
    await control._pending_messages.put(message)


def _is_dht(handler_name: str) -> bool:
    return handler_name.startswith("DHTProtocol.")


def _handler_name(proto: str) -> str:
    """Without its namespace."""
    return proto.rpartition("::")[2]


async def _receive_raw_data(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if length > MAX_STREAM_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"a message of {length} bytes where at most {MAX_STREAM_MESSAGE_BYTES} are taken"
        )
    return await reader.readexactly(length)


_store_any = DictionaryDHTValue.store


def _store_bounded(self: DictionaryDHTValue, key: Any, value: Any, expiration_time: float) -> bool:
    known = self.get(key)
    if known is not None and not known.expiration_time < expiration_time:
        return False
    others = len(self) - (known is not None)
    if others >= MAX_DHT_ENTRIES:
        return False
    if (others + 1) * MAX_RECORD_BYTES > MAX_DHT_VALUE_BYTES:  # it may be too large: count
        num_bytes = sum(len(entry.value) for entry in self.data.values())  # what is replaced included
        if num_bytes + len(value) > MAX_DHT_VALUE_BYTES:
            return False
    return bool(_store_any(self, key, value, expiration_time))


class _OncePerMinute(logging.Filter):
    """hivemind logs a traceback for every stream that another peer breaks."""

    def __init__(self) -> None:
        super().__init__()
        self._told_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        if record.exc_info and isinstance(record.exc_info[1], RecordError):
            return False  # a refusal: the other side is told, and it is no failure here
        now, text = time.monotonic(), str(record.msg)[:100]
        if now < self._told_at.get(text, float("-inf")) + _LOG_SECONDS:
            return False
        if len(self._told_at) > 100:
            self._told_at.clear()
        self._told_at[text] = now
        return True


P2P.receive_raw_data = staticmethod(_receive_raw_data)
DictionaryDHTValue.store = _store_bounded
for _name in _NOISY_LOGGERS:
    logging.getLogger(_name).addFilter(_OncePerMinute())
