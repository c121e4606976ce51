"""What does a real peer give to the p2p daemon? Every byte that it writes to the sockets of the daemon.

    python -m tests.capture FILE -- peer.join --initial-peers ... (its flags)

The bytes are taken where asyncio writes to a socket, below hivemind and above the encryption, which
is the daemon's. Beside them stand only notes that say what a connection is for: which peer, which
protocol, which request is answered. `read_capture` makes of FILE what the ledger should hold; `compare` holds
both against each other. Heads are dumped to FILE.heads whenever a delta is about to leave.
"""

from __future__ import annotations

import asyncio.selector_events
import base64
import bisect
import hashlib
import importlib
import itertools
import json
import struct
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.proto import dht_pb2, p2pd_pb2
from safetensors.torch import save_file

from coordinator.outgoing import DHT
from peer import session
from peer.allreduce import FRAME_NAMES
from peer.ledger_file import joined_hash

RPC, DOOR, ALLREDUCE = "::_PeerRpc.", "::Door.rpc_present", "/allreduce"
_FRAME = struct.Struct(">BI")
_MESSAGE = struct.Struct(">B8s")  # hivemind's marker and length
_TENSOR_KINDS = ("delta part", "result part", "state chunk", "audit part", "audit residual")


# --- in the peer


class Tap:
    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._ids, self._lock = itertools.count(), threading.Lock()
        self._connections: dict[int, int] = {}  # by the id of their readers

    def note(self, **what: Any) -> None:
        with self._lock:
            self._file.write(json.dumps(what).encode() + b"\n")

    def wrote(self, transport: Any, data: bytes) -> None:
        if len(data):
            self.note(conn=self._id(transport), data=base64.b64encode(data).decode())

    def _id(self, transport: Any) -> int:
        if not hasattr(transport, "_tap_id"):
            transport._tap_id = next(self._ids)
        return int(transport._tap_id)

    def opened(self, info: Any, reader: Any, writer: Any) -> None:
        connection = self._id(writer.transport)
        self._connections[id(reader)] = connection
        self.note(conn=connection, peer=str(info.peer_id), proto=str(info.proto))

    def asked(self, reader: Any, request: BytesValue) -> None:
        if id(reader) in self._connections:
            self.note(conn=self._connections[id(reader)], request=request.value.decode())


def install(path: Path) -> None:
    tap = Tap(path)
    _tap_sockets(tap)
    _tap_notes(tap)
    encode = session.Session._encode

    def encode_and_dump(self: Any, delta: Any, log: Any) -> Any:
        heads = path.with_suffix(".heads")
        heads.mkdir(exist_ok=True)
        head = {name: tensor.contiguous() for name, tensor in self._learner.head_state().items()}
        save_file(head, heads / f"{log.round}.safetensors")
        return encode(self, delta, log)

    session.Session._encode = encode_and_dump  # type: ignore[method-assign]


def _tap_sockets(tap: Tap) -> None:
    transport_type: Any = asyncio.selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
    write = transport_type.write

    def write_and_tell(self: Any, data: Any) -> None:
        tap.wrote(self, bytes(data))  # also where the other side has just closed: it was handed over
        write(self, data)

    transport_type.write = write_and_tell
    transport_type.writelines = lambda self, chunks: self.write(b"".join(chunks))


def _tap_notes(tap: Tap) -> None:
    stream_handler, receive = control.ControlClient.stream_handler, P2P.receive_protobuf
    read, store = control.read_pbmsg_safe, DHTNode.store

    async def add_handler(self: Any, proto: str, handler_cb: Any, balanced: bool = False) -> None:
        async def handle(info: Any, reader: Any, writer: Any) -> None:
            tap.opened(info, reader, writer)
            await handler_cb(info, reader, writer)

        await stream_handler(self, proto, handle, balanced)

    async def receive_and_note(kind: Any, reader: Any) -> Any:
        message, error = await receive(kind, reader)
        if isinstance(message, BytesValue):
            tap.asked(reader, message)
        return message, error

    async def read_and_note(reader: Any, message: Any) -> None:
        await read(reader, message)
        if isinstance(message, p2pd_pb2.PersistentConnectionResponse) and message.HasField("requestHandling"):
            asked = message.requestHandling
            peer_id = control.PeerID(asked.peer).to_base58()
            request = BytesValue.FromString(asked.data).value.decode() if RPC in asked.proto else ""
            tap.note(call=message.callId.hex(), peer=peer_id, proto=asked.proto, request=request)

    async def store_and_note(self: Any, key: Any, value: bytes, *args: Any, **options: Any) -> Any:
        tap.note(stored=base64.b64encode(value).decode(), key=key)
        return await store(self, key, value, *args, **options)

    control.ControlClient.stream_handler = add_handler
    P2P.receive_protobuf = staticmethod(receive_and_note)
    control.read_pbmsg_safe = read_and_note
    DHTNode.store = store_and_note


def main(arguments: Sequence[str]) -> int:
    install(Path(arguments[0]))
    module, *flags = arguments[2:]
    return int(importlib.import_module(module).main(flags))


# --- in the test


@dataclass(frozen=True)
class Message:
    """One of ours, as the ledger should have it."""

    kind: str
    name: str
    of: str
    peer_id: str
    payload: bytes

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Messages that may be summed in one line."""
        return self.kind, self.name, self.of, self.peer_id if self.kind in _TENSOR_KINDS else ""


@dataclass(frozen=True)
class Capture:
    messages: Sequence[Message]  # in the order in which the last byte of each left
    relayed: Sequence[bytes]  # values of DHT records in calls to other nodes
    all_bytes: Sequence[bytes]  # of each connection


class _Connection:
    def __init__(self) -> None:
        self.data = bytearray()
        self.ends: list[tuple[int, int]] = []  # number of bytes so far, and the time (a line number)
        self.note: dict[str, Any] = {}

    def time_of(self, num_bytes: int) -> int:
        return self.ends[bisect.bisect_left(self.ends, (num_bytes, 0))][1]


def read_capture(path: Path) -> Capture:
    connections: dict[int, _Connection] = defaultdict(_Connection)
    calls: dict[str, dict[str, Any]] = {}
    timed: list[tuple[int, Message]] = []
    for at, line in enumerate(path.read_text().splitlines()):
        entry = json.loads(line)
        if "data" in entry:
            connection = connections[entry["conn"]]
            connection.data += base64.b64decode(entry["data"])
            connection.ends.append((len(connection.data), at))
        elif "conn" in entry:
            connections[entry["conn"]].note.update(entry)
        elif "call" in entry:
            calls[entry["call"]] = entry
        else:
            name = entry["key"].rpartition("/")[2]
            timed.append((at, Message("record", name, "", DHT, base64.b64decode(entry["stored"]))))
    relayed: list[bytes] = []
    for connection in connections.values():
        timed += _messages(connection, calls, relayed)
    timed.sort(key=lambda item: item[0])
    return Capture([message for _, message in timed], relayed, [bytes(c.data) for c in connections.values()])


def _messages(
    connection: _Connection, calls: Mapping[str, Mapping[str, Any]], relayed: list[bytes]
) -> list[tuple[int, Message]]:
    note, data = connection.note, bytes(connection.data)
    offset, peer_id, proto = 0, note.get("peer", ""), note.get("proto", "")
    if not peer_id:  # opened by us: it begins with what we want of the daemon
        size, offset = _varint(data, 0)
        wanted = p2pd_pb2.Request.FromString(data[offset : offset + size])
        offset += size
        if wanted.type == p2pd_pb2.Request.PERSISTENT_CONN_UPGRADE:
            return _unary(connection, offset, calls, relayed)
        if wanted.type != p2pd_pb2.Request.STREAM_OPEN:
            assert offset == len(data), "more than a question to the daemon"
            return []
        peer_id = control.PeerID(wanted.streamOpen.peer).to_base58()
        proto = wanted.streamOpen.proto[0]
    if proto.endswith(ALLREDUCE):
        return _frames(connection, offset, peer_id, is_opener="peer" not in note)
    if RPC in proto:
        return _rpc_stream(connection, offset, peer_id)
    assert proto.rpartition("::")[2].startswith("DHTProtocol."), proto
    return []


def _unary(
    connection: _Connection, offset: int, calls: Mapping[str, Mapping[str, Any]], relayed: list[bytes]
) -> list[tuple[int, Message]]:
    data, found = bytes(connection.data), []
    while offset < len(data):
        size, offset = _varint(data, offset)
        if offset + size > len(data):
            break  # killed in the middle of it
        message = p2pd_pb2.PersistentConnectionRequest.FromString(data[offset : offset + size])
        offset += size
        at = connection.time_of(offset)
        if message.HasField("callUnary"):
            call = message.callUnary
            peer_id = control.PeerID(call.peer).to_base58()
            if RPC in call.proto or call.proto.endswith(DOOR):
                payload = BytesValue.FromString(call.data).value
                name = "present" if call.proto.endswith(DOOR) else _method(payload)
                found.append((at, Message("call", name, "", peer_id, payload)))
            elif call.proto.endswith("rpc_store"):
                relayed += dht_pb2.StoreRequest.FromString(call.data).values
        elif message.HasField("unaryResponse"):
            asked, reply = calls[message.callId.hex()], message.unaryResponse
            if reply.HasField("error"):
                name = asked["proto"].rpartition("::")[2]
                found.append((at, Message("refusal", name, "", asked["peer"], reply.error)))
            elif RPC in asked["proto"] or asked["proto"].endswith(DOOR):
                payload = BytesValue.FromString(reply.response).value
                name = "present" if asked["proto"].endswith(DOOR) else _method(asked["request"].encode())
                found.append((at, Message("reply", name, "", asked["peer"], payload)))
    return found


def _frames(
    connection: _Connection, offset: int, peer_id: str, *, is_opener: bool
) -> list[tuple[int, Message]]:
    data, found = bytes(connection.data), []
    while offset < len(data):
        start = offset
        if offset + _FRAME.size > len(data):
            break  # killed in the middle of it
        kind, length = _FRAME.unpack_from(data, offset)
        offset += _FRAME.size + length
        name = "greeting" if is_opener and kind == 0 else FRAME_NAMES[kind]
        payload = data[start + _FRAME.size : offset]
        # A frame is reported before its first byte; ours are small enough to leave at once.
        found.append((connection.time_of(start + 1), Message(name, "", "", peer_id, payload)))
    return found


def _rpc_stream(connection: _Connection, offset: int, peer_id: str) -> list[tuple[int, Message]]:
    """A call, or all parts of an answer as one message."""
    data, request = bytes(connection.data), connection.note.get("request")
    parts, found = [], []
    while offset + _MESSAGE.size <= len(data):
        marker, size = _MESSAGE.unpack_from(data, offset)
        length = int.from_bytes(size, P2P.BYTEORDER)
        content = data[offset + _MESSAGE.size :][:length]
        offset += _MESSAGE.size + length
        if offset > len(data):
            break  # killed in the middle of it
        at = connection.time_of(offset)
        if bytes([marker]) == P2P.MESSAGE_MARKER:
            parts.append((at, BytesValue.FromString(content).value))
        elif length:
            why = p2pd_pb2.RPCError.FromString(content).message.encode()
            found.append((at, Message("refusal", _method((request or "").encode()), "", peer_id, why)))
    payload = b"".join(part for _, part in parts)
    if parts and request is None:
        found.append((parts[-1][0], Message("call", _method(payload), "", peer_id, payload)))
    elif parts and request is not None:
        kind, of = _answered(json.loads(request))
        found.append((parts[-1][0], Message(kind, _method(request.encode()), of, peer_id, payload)))
    return found


def _answered(request: Mapping[str, Any]) -> tuple[str, str]:
    body = request["body"]
    if request["method"] == "audit":
        return f"audit {body['what']}", ""
    kind, _, name = body["key"].partition("/")
    return {"state": "state chunk", "file": "model file"}.get(kind, kind), name


def _method(request: bytes) -> str:
    return str(json.loads(request)["method"]) if request else ""


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset


def compare(messages: Sequence[Message], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was sent and is not in the ledger, and the reverse: nothing, when all is well."""
    waiting: dict[tuple[str, str, str, str], deque[Message]] = defaultdict(deque)
    for message in messages:
        waiting[message.key].append(message)
    problems = []
    # A line that ended early stands before one that had begun earlier.
    for line in sorted((line for line in lines if "peers" in line), key=lambda line: line["time"]):
        peer_id = next(iter(line["peers"])) if line["kind"] in _TENSOR_KINDS else ""
        queue = waiting[line["kind"], line.get("name", ""), line.get("of", ""), peer_id]
        taken = [queue.popleft() for _ in range(min(line["num"], len(queue)))]
        sums: dict[str, int] = defaultdict(int)
        for message in taken:
            sums[message.peer_id] += len(message.payload)
        hashes = b"".join(hashlib.sha256(message.payload).digest() for message in taken)
        expected = hashes.hex() if line["num"] == 1 else joined_hash(hashes)
        if sums != line["peers"] or len(taken) != line["num"] or expected != line["sha256"]:
            problems.append(f"line {line['n']} is not what was sent: {line}, but {len(taken)}: {dict(sums)}")
    problems += [f"not in the ledger: {len(queue)} of {key}" for key, queue in waiting.items() if queue]
    return problems


def occurs(secret: bytes, capture: Capture) -> bool:
    return any(secret in data for data in capture.all_bytes)


def record_values(capture: Capture) -> set[bytes]:
    """Of records that went to other nodes of the DHT, those of others included."""
    values = set()
    for packed in capture.relayed:
        value = msgpack.unpackb(packed)
        if isinstance(value, bytes):
            values.add(value)
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
