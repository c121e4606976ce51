"""How a peer reaches the others: hivemind's P2P and DHTNode in one asyncio thread of our own process.

Everything of hivemind's networking that the project relies on is here (hivemind 1.1.12):
`P2P.create/_terminate/get_visible_maddrs`, `P2P._client.connect` (to dial each entry point by itself,
so that a dead one can be named), `DHTNode.create/store/get/shutdown`, `ServicerBase` handlers and
stubs, and the fact that an asyncio event loop starts the p2p daemon through its `subprocess_exec`.
Above this module messages are bytes, peers are base58 strings, and every call has a time limit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, AsyncIterator, TypeVar  # noqa: UP035 (hivemind reads the hint by its name in typing)

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.node import DHTNode
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from coordinator.errors import NetworkError, UsageError
from coordinator.identity import Identity
from coordinator.records import MAX_MESSAGE_BYTES, RecordError, parse_json

logger = logging.getLogger(__name__)
T = TypeVar("T")

RPC_NAMESPACE = "cold-fusion-1"
STREAM_PART_BYTES = 256 * 1024  # measured best on p2pd streams, 64 to 256 KB (docs/experiments.md)
MAX_REPLY_BYTES = 1024 * 1024  # a unary reply; p2pd takes at most 2 MB
DIAL_TIMEOUT_SECONDS = 15.0
SHUTDOWN_TIMEOUT_SECONDS = 10.0
DHT_TIMEOUT_SECONDS = 8.0  # one store or get; hivemind gives up on a silent node after 3
POLL_SECONDS = 0.2

UnaryHandler = Callable[[str, Any], Awaitable[bytes]]  # (authenticated peer id, JSON body) -> reply
StreamHandler = Callable[[str, Any], AsyncIterator[bytes]]

_LOOPBACK = ("/ip4/127.", "/ip6/::1/")
_TRANSPORT_ERRORS = (P2PDaemonError, P2PHandlerError, OSError, EOFError, TimeoutError)
# What hivemind raises when the other side does not speak its protocol: bytes that are no such message.
_CALL_ERRORS = (*_TRANSPORT_ERRORS, DecodeError, TypeError, ValueError)


class PeerUnreachable(NetworkError):
    """A call to one peer failed: it is gone, too slow, or refused."""

    def __init__(self, peer_id: str, why: str) -> None:
        super().__init__(f"peer {peer_id[-8:]}: {why}")
        self.peer_id = peer_id


@dataclass(frozen=True)
class NetworkConfig:
    identity: Identity
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)  # where to listen
    announce_maddrs: tuple[str, ...] = ()  # addresses to tell others, where they differ (NAT, containers)
    initial_peers: tuple[str, ...] = ()  # entry points; empty: begin a swarm
    remembered_peers: tuple[
        str, ...
    ] = ()  # met earlier: dialled as well, and nothing is wrong if none answers
    startup_timeout_seconds: float = 60.0  # p2pd needs up to 15 s on a loaded machine


class _DaemonInItsOwnSession(asyncio.SelectorEventLoop):
    """Starts children in their own session: Ctrl-C in a terminal must not kill p2pd before our goodbye."""

    def __init__(self) -> None:
        super().__init__()
        self._children: list[asyncio.SubprocessTransport] = []

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().subprocess_exec(*args, start_new_session=True, **kwargs)
        self._children.append(transport)
        return transport, protocol

    async def end_children(self, timeout_seconds: float) -> None:
        """By SIGTERM; by SIGKILL those that do not follow in time (one may be frozen)."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            ends_at = self.time() + timeout_seconds
            for child in self._children:
                if child.get_returncode() is None:
                    with contextlib.suppress(ProcessLookupError):
                        child.send_signal(number)
            while any(child.get_returncode() is None for child in self._children) and self.time() < ends_at:
                await asyncio.sleep(0.01)
        for child in self._children:
            child.close()


class _PeerRpc(ServicerBase):
    """One unary and one streaming call, both told apart by a method name in a JSON request."""

    def __init__(self, unary: dict[str, UnaryHandler], streams: dict[str, StreamHandler]) -> None:
        self._unary, self._streams = unary, streams

    async def rpc_call(self, request: BytesValue, context: P2PContext) -> BytesValue:
        method, body = _parse_request(request.value)
        reply = await self._unary[method](str(context.remote_id), body)
        return BytesValue(value=reply)

    async def rpc_stream(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        method, body = _parse_request(request.value)
        async for part in self._streams[method](str(context.remote_id), body):
            yield BytesValue(value=part)


class Network:
    """The asyncio thread with p2p daemon and DHT node. A context manager: leaving it leaves no process."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._reached: list[str] = []  # entry points that answered
        self._unary: dict[str, UnaryHandler] = {}
        self._streams: dict[str, StreamHandler] = {}
        self._loop = _DaemonInItsOwnSession()
        self._thread = threading.Thread(target=self._run_loop, name="network", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself keeps no strong reference
        self._p2p: P2P | None = None
        self._node: DHTNode | None = None

    # for any thread

    def __enter__(self) -> Network:
        self._thread.start()
        try:
            self.run(self._start(), timeout_seconds=2 * self._config.startup_timeout_seconds)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            try:
                self.run(self._stop(), timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS)
            except (NetworkError, *_TRANSPORT_ERRORS) as error:
                logger.warning("the network did not stop in order: %s", error)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=SHUTDOWN_TIMEOUT_SECONDS)
        if not self._thread.is_alive() and not self._loop.is_closed():
            self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        timeout_seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> T:
        """Run in the network's thread and wait. Raises NetworkError when time is up.

        `check` is called while waiting and may raise, so that a long download ends with Ctrl-C.
        """
        future = self.submit(coroutine)
        ends_at = time.monotonic() + timeout_seconds
        try:
            while not future.done() and (left := ends_at - time.monotonic()) > 0:
                concurrent.futures.wait([future], min(left, POLL_SECONDS))
                check()
            return future.result(0)
        except TimeoutError as error:
            if future.done():
                raise NetworkError(f"timed out: {error}") from error
            raise NetworkError(f"no answer within {timeout_seconds:.0f} s") from error
        finally:
            future.cancel()

    @property
    def peer_id(self) -> str:
        return self._config.identity.peer_id

    @property
    def p2p(self) -> P2P:
        if self._p2p is None:
            raise NetworkError("the network is not running")
        return self._p2p

    @staticmethod
    def now() -> float:
        """DHT time: seconds since 1970."""
        return float(get_dht_time())

    def is_daemon_alive(self) -> bool:
        child = self._p2p._child if self._p2p else None
        return child is not None and child.returncode is None

    # for the network's own thread

    def on_call(self, method: str, handler: UnaryHandler) -> None:
        self._unary[method] = handler

    def on_stream(self, method: str, handler: StreamHandler) -> None:
        self._streams[method] = handler

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    async def call(self, peer_id: str, method: str, body: object, *, timeout_seconds: float) -> bytes:
        """One request, one reply. Raises PeerUnreachable."""
        stub = _PeerRpc.get_stub(self.p2p, PeerID.from_base58(peer_id), namespace=RPC_NAMESPACE)
        request = BytesValue(value=_make_request(method, body))
        try:
            reply = await asyncio.wait_for(stub.rpc_call(request), timeout_seconds)
        except _CALL_ERRORS as error:
            raise PeerUnreachable(peer_id, _reason(error, timeout_seconds)) from error
        if len(reply.value) > MAX_REPLY_BYTES:
            raise PeerUnreachable(peer_id, f"replied with {len(reply.value)} bytes")
        return bytes(reply.value)

    async def stream(
        self, peer_id: str, method: str, body: object, *, timeout_seconds: float
    ) -> AsyncIterator[bytes]:
        """One request, many parts; the limit counts between two parts. Raises PeerUnreachable."""
        stub = _PeerRpc.get_stub(self.p2p, PeerID.from_base58(peer_id), namespace=RPC_NAMESPACE)
        request = BytesValue(value=_make_request(method, body))
        try:
            parts = await asyncio.wait_for(stub.rpc_stream(request), timeout_seconds)
            while True:
                part = await asyncio.wait_for(anext(parts, None), timeout_seconds)
                if part is None:
                    return
                yield bytes(part.value)
        except _CALL_ERRORS as error:
            raise PeerUnreachable(peer_id, _reason(error, timeout_seconds)) from error

    async def addresses(self) -> list[str]:
        """Multiaddresses under which others reach this peer, loopback ones last."""
        try:
            found = [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        except (*_TRANSPORT_ERRORS, ValueError) as error:
            raise NetworkError(f"this peer has no address: {_first_line(error)}") from error
        return sorted(found, key=lambda address: "/127.0.0.1/" in address or "/::1/" in address)

    async def start_dht(self, validator: RecordValidatorBase) -> None:
        """Become a node of the DHT of the entry points; `validator` guards what it stores and reads."""
        self._node = await DHTNode.create(
            p2p=self._p2p,
            initial_peers=self._reached,
            record_validator=validator,
            ensure_bootstrap_success=False,
            strict=False,
        )

    @property
    def entry_points(self) -> list[str]:
        """Peer ids of the entry points that answered."""
        return list(dict.fromkeys(str(Multiaddr(address)["p2p"]) for address in self._reached))

    async def dht_store(self, key: str, subkey: str, value: bytes, *, expires_at: float) -> bool:
        """Raises NetworkError, within a bounded time."""
        if self._node is None:
            raise NetworkError("the DHT is not running")
        store = self._node.store(key, value, expiration_time=expires_at, subkey=subkey)
        return bool(await _bounded(store, "the DHT did not store a record"))

    async def dht_get(self, key: str) -> dict[str, bytes]:
        """All subkeys of a dictionary with their values, as bytes; anything else is left out.

        Raises NetworkError, within a bounded time.
        """
        if self._node is None:
            raise NetworkError("the DHT is not running")
        found = await _bounded(self._node.get(key, latest=True), "the DHT did not answer")
        if found is None or not isinstance(found.value, dict):
            return {}
        entries = {}
        for subkey, entry in found.value.items():
            if isinstance(subkey, str) and isinstance(entry.value, bytes):
                entries[subkey] = entry.value
        return entries

    # helpers

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> None:
        config = self._config
        for address in config.initial_peers:
            _check_address(address, is_entry_point=True)
        for address in config.host_maddrs:
            _check_address(address)
        for address in config.announce_maddrs:
            _check_address(address)
            if f"{address}/".endswith("/tcp/0/") or "/tcp/0/" in address:
                raise UsageError(f"{address!r}: announce an address with its port; 0 means any")
        on_loopback = all(address.startswith(_LOOPBACK) for address in config.host_maddrs)
        try:
            self._p2p = await P2P.create(
                host_maddrs=list(config.host_maddrs),
                announce_maddrs=list(config.announce_maddrs) or None,
                identity_path=str(config.identity.path),
                check_if_identity_free=False,
                nat_port_map=not on_loopback,  # both would send packets beyond this machine
                auto_nat=not on_loopback,
                startup_timeout=config.startup_timeout_seconds,
            )
        except (P2PDaemonError, OSError) as error:
            raise NetworkError(f"the p2p daemon did not start: {_first_line(error)}") from error
        self._reached = await self._dial_entry_points()
        await _PeerRpc(self._unary, self._streams).add_p2p_handlers(self._p2p, namespace=RPC_NAMESPACE)

    async def _dial_entry_points(self) -> list[str]:
        """Those entry points that answer. Raises NetworkError that names each when none does."""
        given = self._config.initial_peers
        remembered = [a for a in self._config.remembered_peers if a not in given and is_entry_address(a)]
        results = await asyncio.gather(*(self._dial(address) for address in (*given, *remembered)))
        reached = [a for a, why in zip((*given, *remembered), results, strict=True) if why is None]
        failures = {a: why for a, why in zip(given, results, strict=False) if why is not None}
        for address, why in failures.items():
            logger.warning("entry point %s does not answer: %s", address, why)
        if given and not reached:
            listed = "".join(f"\n  {address}: {why}" for address, why in failures.items())
            raise NetworkError(
                f"none of the entry points answers:{listed}\n"
                "Check the address, and that the peer there still runs; any other peer's address will do."
            )
        return reached

    async def _dial(self, address: str) -> str | None:
        maddr = Multiaddr(address)
        peer_id = maddr["p2p"]
        if peer_id == self.peer_id:
            return "this is my own identity: two peers cannot share an identity file"
        transport = maddr.decapsulate(Multiaddr(f"/p2p/{peer_id}"))
        try:
            await asyncio.wait_for(
                self.p2p._client.connect(PeerID.from_base58(peer_id), [transport]), DIAL_TIMEOUT_SECONDS
            )
        except _TRANSPORT_ERRORS as error:
            return _reason(error, DIAL_TIMEOUT_SECONDS)
        return None

    async def _stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._node is not None:
                await asyncio.wait_for(self._node.shutdown(), SHUTDOWN_TIMEOUT_SECONDS / 4)
        except _TRANSPORT_ERRORS as error:
            logger.debug("the DHT node did not stop in order: %s", error)
        if self._p2p is not None:
            self._p2p._terminate()
        await self._loop.end_children(SHUTDOWN_TIMEOUT_SECONDS / 4)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in leftover:
            task.cancel()
        await asyncio.wait(leftover, timeout=2.0) if leftover else None

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a background task of the network failed", exc_info=task.exception())


def is_entry_address(address: str) -> bool:
    """Whether one can be dialled at `address`; it may come from another peer's record."""
    try:
        _check_address(address, is_entry_point=True)
    except UsageError:
        return False
    return True


async def _bounded(operation: Awaitable[T], what: str) -> T:
    try:
        return await asyncio.wait_for(operation, DHT_TIMEOUT_SECONDS)
    except _TRANSPORT_ERRORS as error:
        raise NetworkError(f"{what}: {_reason(error, DHT_TIMEOUT_SECONDS)}") from error


def _check_address(address: str, *, is_entry_point: bool = False) -> None:
    try:
        maddr = Multiaddr(address)
        protocols = {protocol.name for protocol in maddr.protocols()}
    except ValueError as error:
        raise UsageError(
            f"{address!r} is not a multiaddress such as /ip4/127.0.0.1/tcp/4001: {error}"
        ) from error
    if is_entry_point and "p2p" not in protocols:
        raise UsageError(
            f"{address!r} does not end in /p2p/PEER_ID: give the whole address that the peer printed"
        )


def _make_request(method: str, body: object) -> bytes:
    return json.dumps({"method": method, "body": body}, separators=(",", ":")).encode()


def _parse_request(data: bytes) -> tuple[str, Any]:
    request = parse_json(data, max_bytes=MAX_MESSAGE_BYTES)
    if not isinstance(request, dict) or set(request) != {"method", "body"}:
        raise RecordError("a request holds method and body")
    return str(request["method"]), request["body"]


def _reason(error: BaseException, timeout_seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_seconds:.0f} s"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if "connection refused" in text:
        return "connection refused"
    return text.splitlines()[0][:200] if text else type(error).__name__
