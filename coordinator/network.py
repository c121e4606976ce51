"""How a peer reaches the others: hivemind's P2P and DHTNode in one asyncio thread of our own process.

What of hivemind's networking the project relies on is here and in `coordinator.guard` (hivemind 1.1.12):
`P2P.create/_terminate/get_visible_maddrs/list_peers`, `P2P._client.connect/identify` (to dial each entry
point by itself, so that a dead one can be named), `DHTNode.create/store/get/shutdown`, `ServicerBase`
handlers and stubs, and the fact that an asyncio event loop starts the p2p daemon through its
`subprocess_exec`.
Above this module messages are bytes, peers are base58 strings, and every call has a time limit.

A daemon that dies, or is frozen, is replaced in place: same identity, same port where it is free,
handlers and DHT node as before. Calls fail in between. When that does not work either, `is_daemon_alive`
says so.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, AsyncIterator, Literal, TypeVar  # noqa: UP035 (hivemind reads the hint by its name in typing)

import base58
from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.node import DHTNode
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from coordinator.admission import NOT_ADMITTED, Admission
from coordinator.door import Door
from coordinator.errors import NetworkError, UsageError
from coordinator.guard import Guard, GuardedP2P, guard_dht
from coordinator.identity import Identity
from coordinator.janitor import DaemonLoop, Janitor
from coordinator.outgoing import DHT, Answer, Recorder, begin_answer, ignore, report
from coordinator.records import MAX_MESSAGE_BYTES, RecordError, parse_json
from coordinator.throttle import Throttle

logger = logging.getLogger(__name__)
T = TypeVar("T")

RPC_NAMESPACE = "cold-fusion-1"
STREAM_PART_BYTES = 256 * 1024  # measured best on p2pd streams, 64 to 256 KB (docs/experiments.md)
MAX_REPLY_BYTES = 1024 * 1024  # a unary reply; p2pd takes at most 2 MB
DIAL_TIMEOUT_SECONDS = 15.0
SHUTDOWN_TIMEOUT_SECONDS = 10.0
DHT_TIMEOUT_SECONDS = 8.0  # one store or get; hivemind gives up on a silent node after 3
POLL_SECONDS = 0.2
RETRY_SECONDS = 0.5  # before a broken call is made again; longer each time
PING_SECONDS = 2.0  # between two looks whether the daemon answers; its end is seen at once
PING_TIMEOUT_SECONDS = 5.0  # it takes a millisecond; two in a row without an answer mean frozen
RESTART_PAUSES_SECONDS = (0.0, 1.0, 3.0)  # before each attempt to replace a daemon
MAX_RESTARTS = 5  # within RESTART_WINDOW_SECONDS; then something is wrong that no restart mends
RESTART_WINDOW_SECONDS = 600.0
MAX_KNOWN_PEERS = 1024  # whose addresses are kept, to be dialled again
MAX_KNOWN_ADDRESSES_DIALLED = 64
REACH_SECONDS = 5.0  # between two looks for peers that were lost
MAX_REACHED_AT_ONCE = 8
FORGET_PEER_SECONDS = 6 * 3600.0  # the longest partition that heals by itself
MAX_REACH_PAUSE_SECONDS = 60.0  # between two attempts at one peer: a partition heals that much later
MIN_DESCRIPTORS = 4096  # asked for where the machine allows it: a stream needs one

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


class PeerRefuses(PeerUnreachable):
    """It is there, in a private run, and does not let this peer in; or this peer does not let it in."""


@dataclass(frozen=True)
class NetworkConfig:
    identity: Identity
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)  # where to listen
    announce_maddrs: tuple[str, ...] = ()  # addresses to tell others, where they differ (NAT, containers)
    initial_peers: tuple[str, ...] = ()  # entry points; empty: begin a swarm
    remembered_peers: tuple[
        str, ...
    ] = ()  # met earlier: dialled as well, and nothing is wrong if none answers
    listens: bool = True  # False: takes no connections, only makes them
    is_dht_client: bool = False  # asks the DHT, and stores and answers nothing for others
    # "public": others can dial this peer, and it relays for those that cannot be dialled;
    # "private": they cannot (NAT, firewall), so it asks its entry points to relay for it.
    reachability: Literal["unknown", "public", "private"] = "unknown"
    max_upload_bytes_per_second: float | None = None  # None: as fast as the line takes it
    startup_timeout_seconds: float = 60.0  # p2pd needs up to 15 s on a loaded machine
    admission: Admission | None = None  # of a private run; its own to this network


@dataclass
class _KnownPeer:
    addresses: tuple[str, ...]  # where it says it is
    pause_seconds: float  # before the next attempt to reach it, should it be lost
    next_try: float  # by time.monotonic()
    heard_at: float  # by time.monotonic()


class _PeerRpc(ServicerBase):
    """One unary and one streaming call, both told apart by a method name in a JSON request."""

    def __init__(
        self,
        unary: dict[str, UnaryHandler],
        streams: dict[str, StreamHandler],
        record: Recorder,
        throttle: Throttle,
    ) -> None:
        self._unary, self._streams, self._record = unary, streams, record
        self._throttle = throttle
        self._answers: set[Answer] = set()  # under way

    async def rpc_call(self, request: BytesValue, context: P2PContext) -> BytesValue:
        method, body = _parse_request(request.value)
        peer_id = str(context.remote_id)
        reply = await self._unary[method](peer_id, body)
        self._throttle.count(len(reply))
        report(self._record, "reply", method, peer_id, reply)
        return BytesValue(value=reply)

    async def rpc_stream(self, request: BytesValue, context: P2PContext) -> AsyncIterator[BytesValue]:
        peer_id, method = str(context.remote_id), ""
        answer = None
        try:
            method, body = _parse_request(request.value)
            answer = Answer(self._record, method, peer_id)
            self._answers.add(answer)
            begin_answer(answer)
            async for part in self._streams[method](peer_id, body):
                await self._throttle.wait_for(len(part))
                answer.add(part)
                yield BytesValue(value=part)
        except Exception as error:  # hivemind tells it to the caller
            known = method if method in self._streams else ""  # else its name is the caller's invention
            report(self._record, "refusal", known, peer_id, str(error).encode())
            raise
        finally:
            if answer is not None:
                answer.end()
                self._answers.discard(answer)

    def end_answers(self) -> None:
        """Those that were cut off this moment count as well."""
        for answer in list(self._answers):
            answer.end()


class Network:
    """The asyncio thread with p2p daemon and DHT node. A context manager: leaving it leaves no process."""

    def __init__(self, config: NetworkConfig, record: Recorder = ignore) -> None:
        """`record` is told of every message that leaves, in the network's own thread."""
        self._config, self.record = config, record
        self.throttle = Throttle(config.max_upload_bytes_per_second)
        self._reached: list[str] = []  # entry points that answered
        self._unary: dict[str, UnaryHandler] = {}
        self._streams: dict[str, StreamHandler] = {}
        self._janitor = Janitor()
        self._loop = DaemonLoop(self._janitor)
        self._thread = threading.Thread(target=self._run_loop, name="network", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself keeps no strong reference
        self.admission = config.admission
        self._door = None if self.admission is None else Door(self.admission, RPC_NAMESPACE, record)
        self._guard = Guard(admission=self.admission)
        self._guard.on_refusal = self._refused
        if self.admission is not None:
            self.admission.on_revoked(self._disconnect)
        self._rpc = _PeerRpc(self._unary, self._streams, record, self.throttle)
        self._p2p: GuardedP2P | None = None
        self._node: DHTNode | None = None
        self._validator: RecordValidatorBase | None = None
        self._known: dict[str, _KnownPeer] = {}  # by peer id
        self._port: str | None = None  # on which this peer listens, to be had again after a restart
        self._restarted_at: list[float] = []
        self._on_restart: list[Callable[[], Awaitable[None]]] = []
        self._failure: str | None = None  # why there is no daemon any more

    # for any thread

    def __enter__(self) -> Network:
        _raise_descriptor_limit()
        self._thread.start()
        try:
            self._janitor.start()
            self.run(self._start(), timeout_seconds=2 * self._config.startup_timeout_seconds)
        except OSError as error:
            self.close()
            raise NetworkError(f"no room for the sockets of the p2p daemon: {error}") from error
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
        self._janitor.close(SHUTDOWN_TIMEOUT_SECONDS)
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
    def p2p(self) -> GuardedP2P:
        """Another one after a restart of the daemon; stream handlers added to it are carried over."""
        if self._p2p is None:
            raise NetworkError("the network is not running")
        return self._p2p

    @staticmethod
    def now() -> float:
        """DHT time: seconds since 1970."""
        return float(get_dht_time())

    def is_daemon_alive(self) -> bool:
        """False when it has died for good; while it is being replaced it counts as alive."""
        return self._p2p is not None and self._failure is None

    @property
    def num_refused(self) -> int:
        """Calls and streams of others that were refused because there were too many."""
        return self._guard.num_refused

    def remember(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Where a peer says it is: who lost all connections finds the others again."""
        known = self._known.pop(peer_id, None)
        pause_seconds, next_try = (known.pause_seconds, known.next_try) if known else (REACH_SECONDS, 0.0)
        self._known[peer_id] = _KnownPeer(tuple(addresses)[:8], pause_seconds, next_try, time.monotonic())
        if len(self._known) > MAX_KNOWN_PEERS:
            del self._known[next(iter(self._known))]

    # for the network's own thread

    def on_call(self, method: str, handler: UnaryHandler) -> None:
        self._unary[method] = handler

    def on_stream(self, method: str, handler: StreamHandler) -> None:
        self._streams[method] = handler

    def on_restart(self, callback: Callable[[], Awaitable[None]]) -> None:
        """To be awaited after a new daemon has taken the place of the old one; handlers are there already."""
        self._on_restart.append(callback)

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    async def call(
        self, peer_id: str, method: str, body: object, *, timeout_seconds: float, num_attempts: int = 1
    ) -> bytes:
        """One request, one reply. Raises PeerUnreachable.

        `num_attempts`: for what may be asked twice, how often, should the connection break; a refusal
        and a silence are answers. The limit counts for each.
        """
        for attempt in range(num_attempts - 1):
            try:
                return await self._call_once(peer_id, method, body, timeout_seconds)
            except PeerUnreachable as error:
                if not isinstance(error.__cause__, P2PDaemonError | ConnectionError | EOFError):
                    raise
                logger.info("asking again: %s", error)
                await asyncio.sleep(RETRY_SECONDS * (attempt + 1))
        return await self._call_once(peer_id, method, body, timeout_seconds)

    async def _call_once(self, peer_id: str, method: str, body: object, timeout_seconds: float) -> bytes:
        stub = _PeerRpc.get_stub(self.p2p, PeerID.from_base58(peer_id), namespace=RPC_NAMESPACE)
        request = BytesValue(value=_make_request(method, body))
        self.throttle.count(len(request.value))
        report(self.record, "call", method, peer_id, request.value)
        try:
            reply = await asyncio.wait_for(stub.rpc_call(request), timeout_seconds)
        except _CALL_ERRORS as error:
            raise _unreachable(peer_id, error, timeout_seconds) from error
        if len(reply.value) > MAX_REPLY_BYTES:
            raise PeerUnreachable(peer_id, f"replied with {len(reply.value)} bytes")
        return bytes(reply.value)

    async def stream(
        self, peer_id: str, method: str, body: object, *, timeout_seconds: float
    ) -> AsyncIterator[bytes]:
        """One request, many parts; the limit counts between two parts. Raises PeerUnreachable."""
        stub = _PeerRpc.get_stub(self.p2p, PeerID.from_base58(peer_id), namespace=RPC_NAMESPACE)
        request = BytesValue(value=_make_request(method, body))

        async def requests() -> AsyncIterator[BytesValue]:  # asked for once the stream is open
            report(self.record, "call", method, peer_id, request.value)
            yield request

        try:
            parts = await asyncio.wait_for(stub.rpc_stream(requests()), timeout_seconds)
            while True:
                part = await asyncio.wait_for(anext(parts, None), timeout_seconds)
                if part is None:
                    return
                yield bytes(part.value)
        except _CALL_ERRORS as error:
            raise _unreachable(peer_id, error, timeout_seconds) from error

    async def addresses(self) -> list[str]:
        """Multiaddresses under which others reach this peer, loopback ones last."""
        try:
            found = [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        except (*_TRANSPORT_ERRORS, ValueError) as error:
            raise NetworkError(f"this peer has no address: {_first_line(error)}") from error
        return sorted(found, key=lambda address: "/127.0.0.1/" in address or "/::1/" in address)

    async def connected(self) -> frozenset[str]:
        """Who has a connection with this peer at this moment. Raises NetworkError."""
        return frozenset(str(info.peer_id) for info in await self._connections())

    async def remote_hosts(self, peer_id: str) -> list[str]:
        """IP addresses at which a peer that is connected here is seen, relays aside. Raises NetworkError."""
        infos = [info for info in await self._connections() if str(info.peer_id) == peer_id]
        seen = [str(address).split("/") for info in infos for address in info.addrs]
        direct = [parts for parts in seen if len(parts) > 2 and "p2p-circuit" not in parts]
        return list(dict.fromkeys(parts[2] for parts in direct if parts[1] in ("ip4", "ip6")))

    async def _connections(self) -> Sequence[PeerInfo]:
        """As the daemon knows them, within a bounded time. Raises NetworkError."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_SECONDS):
                return await self.p2p.list_peers()
        except _TRANSPORT_ERRORS as error:
            raise NetworkError(f"the p2p daemon does not answer: {_first_line(error)}") from error

    async def start_dht(self, validator: RecordValidatorBase) -> None:
        """Become a node of the DHT of the entry points; `validator` guards what it stores and reads."""
        self._validator = validator
        self._node = await DHTNode.create(
            p2p=self._p2p,
            node_id=self._node.node_id if self._node else None,
            initial_peers=self._reached,
            record_validator=validator,
            ensure_bootstrap_success=False,
            strict=False,
            client_mode=self._config.is_dht_client,
        )
        guard_dht(self._node)

    @property
    def entry_points(self) -> list[str]:
        """Peer ids of the entry points that answered."""
        return list(dict.fromkeys(_split_address(address)[1] for address in self._reached))

    async def dht_store(self, key: str, subkey: str, value: bytes, *, expires_at: float) -> bool:
        """Raises NetworkError, within a bounded time."""
        if self._node is None:
            raise NetworkError("the DHT is not running")
        report(self.record, "record", key.rpartition("/")[2], DHT, value)
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
        self._p2p = await self._start_daemon(config.host_maddrs)
        self._reached = await self._dial_entry_points()
        for address in self._reached:
            self.remember(_split_address(address)[1], [address])
        await self._add_handlers()
        self._port = await self._listening_port()
        self.create_task(self._watch_daemon())
        self.create_task(self._keep_reaching())

    async def _add_handlers(self) -> None:
        await self._rpc.add_p2p_handlers(self.p2p, namespace=RPC_NAMESPACE)
        if self._door is not None:
            await self._door.open(self.p2p)

    async def _start_daemon(self, host_maddrs: Sequence[str]) -> GuardedP2P:
        """Raises NetworkError."""
        config, folder = self._config, self._janitor.folder
        if folder is None:
            raise NetworkError("the network is closed")
        if not config.identity.path.is_file():  # hivemind would write another one there
            raise NetworkError(f"{config.identity.path}: the identity is gone")
        on_loopback = all(address.startswith(_LOOPBACK) for address in host_maddrs)
        try:
            return await GuardedP2P.guarded(
                self._guard,
                folder,
                self._door,
                host_maddrs=list(host_maddrs),
                announce_maddrs=list(config.announce_maddrs) or None,
                identity_path=str(config.identity.path),
                check_if_identity_free=False,
                nat_port_map=not on_loopback,  # both would send packets beyond this machine
                auto_nat=not on_loopback,
                startup_timeout=config.startup_timeout_seconds,
                **_reachability_options(config),
            )
        except _TRANSPORT_ERRORS as error:
            raise NetworkError(f"the p2p daemon did not start: {_first_line(error)}") from error

    async def _listening_port(self) -> str | None:
        """Where others find this peer; None when it cannot be told from what is announced."""
        if self._config.announce_maddrs:
            return None
        try:
            _, found = await self.p2p._client.identify()
        except _TRANSPORT_ERRORS:
            return None
        ports = {address["tcp"] for address in found if "tcp" in {p.name for p in address.protocols()}}
        return ports.pop() if len(ports) == 1 else None

    # a partition that heals

    async def _keep_reaching(self) -> None:
        """Ping known peers that the DHT has lost: by itself it never asks them again, and stays in halves."""
        while True:
            await asyncio.sleep(REACH_SECONDS)
            now = time.monotonic()
            self._known = {
                peer_id: known
                for peer_id, known in self._known.items()
                if now - known.heard_at < FORGET_PEER_SECONDS
            }
            lost = [p for p, known in self._known.items() if known.next_try <= now and not self._is_in_dht(p)]
            lost.sort(key=lambda peer_id: self._known[peer_id].next_try)
            await asyncio.gather(*(self._reach(peer_id) for peer_id in lost[:MAX_REACHED_AT_ONCE]))

    def _is_in_dht(self, peer_id: str) -> bool:
        if self._node is None or peer_id == self.peer_id:
            return True
        return self._node.protocol.routing_table.get(peer_id=PeerID.from_base58(peer_id)) is not None

    async def _reach(self, peer_id: str) -> None:
        known = self._known.get(peer_id)
        if known is None:
            return
        own = [a for a in known.addresses if is_entry_address(a) and _split_address(a)[1] == peer_id]
        for address in own:
            if await self._dial(address, timeout_seconds=REACH_SECONDS) is None:
                break
        is_reached = self._node is not None and await _is_pinged(self._node, peer_id)
        known.pause_seconds = (
            REACH_SECONDS if is_reached else min(MAX_REACH_PAUSE_SECONDS, 2 * known.pause_seconds)
        )
        known.next_try = time.monotonic() + known.pause_seconds

    # a daemon that dies

    async def _watch_daemon(self) -> None:
        while True:
            why = await self._daemon_ended()
            now = time.monotonic()
            self._restarted_at = [at for at in self._restarted_at if now - at < RESTART_WINDOW_SECONDS]
            logger.error("the p2p daemon %s: starting another one", why)
            is_replaced = False
            try:
                is_replaced = len(self._restarted_at) < MAX_RESTARTS and await self._replace_daemon()
            finally:  # whatever comes out of hivemind: the session must know
                self._failure = None if is_replaced else why
            if not is_replaced:
                return
            self._restarted_at.append(now)

    async def _daemon_ended(self) -> str:
        """Waits until it has, and says how."""
        num_missed = 0
        child = self.p2p._child
        while True:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    return f"has ended with code {await child.wait()}"
            except TimeoutError:
                pass
            try:
                async with asyncio.timeout(PING_TIMEOUT_SECONDS):
                    await self.p2p._client.identify()
                num_missed = 0
            except _TRANSPORT_ERRORS:
                num_missed += 1  # we may have been stopped ourselves: one alone says nothing
            if num_missed >= 2 and child.returncode is None:
                return f"has not answered for {2 * PING_TIMEOUT_SECONDS:.0f} s"

    async def _replace_daemon(self) -> bool:
        old = self.p2p
        old.fail_pending_calls()
        old._terminate()
        for pause_seconds, host_maddrs in zip(RESTART_PAUSES_SECONDS, self._where_to_listen(), strict=True):
            await self._loop.end_children(SHUTDOWN_TIMEOUT_SECONDS / 10)
            await asyncio.sleep(pause_seconds)
            try:
                self._p2p = await self._start_daemon(host_maddrs)
                old.fail_pending_calls()  # those made meanwhile, which nobody will answer
                await self._reconnect()
                return True
            except (NetworkError, *_TRANSPORT_ERRORS) as error:
                logger.error("could not replace the p2p daemon: %s", error)
        return False

    def _where_to_listen(self) -> list[Sequence[str]]:
        """On the same port, so that others find us again; at last on any."""
        given = self._config.host_maddrs
        same = [
            f"{a}/".replace("/tcp/0/", f"/tcp/{self._port}/").rstrip("/") if self._port else a for a in given
        ]
        return [same] * (len(RESTART_PAUSES_SECONDS) - 1) + [given]

    async def _reconnect(self) -> None:
        """Handlers, connections and DHT node of the old daemon, in the new one."""
        await self._add_handlers()
        present = self.p2p._client.control.handlers
        for name, handler in list(self._guard.stream_handlers.items()):
            if name not in present:
                await self.p2p.add_binary_stream_handler(name, handler)
        known = [a for k in reversed(self._known.values()) for a in k.addresses if is_entry_address(a)]
        wanted = dict.fromkeys([*self._reached, *known, *self._config.initial_peers])
        candidates = list(wanted)[:MAX_KNOWN_ADDRESSES_DIALLED]
        results = await asyncio.gather(*(self._dial(address) for address in candidates))
        self._reached = [a for a, why in zip(candidates, results, strict=True) if why is None]
        logger.info("reached %d of %d known addresses again", len(self._reached), len(candidates))
        if self._node is not None and self._validator is not None:
            self._node.is_alive, storage = False, self._node.protocol.storage
            await self.start_dht(self._validator)
            self._node.protocol.storage = storage
        for callback in self._on_restart:
            await callback()

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

    async def _dial(self, address: str, timeout_seconds: float = DIAL_TIMEOUT_SECONDS) -> str | None:
        """Why it does not answer; None when it does."""
        transport, peer_id = _split_address(address)
        if peer_id == self.peer_id:
            return "this is my own identity: two peers cannot share an identity file"
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.p2p._client.connect(PeerID.from_base58(peer_id), [_dialable(transport)])
        except (*_TRANSPORT_ERRORS, ValueError) as error:  # ValueError: another peer made the address up
            return _reason(error, timeout_seconds)
        return None

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:  # one that does not end when cancelled must not keep the daemon alive
            await asyncio.wait(tasks, timeout=SHUTDOWN_TIMEOUT_SECONDS / 4)
        try:
            if self._node is not None:
                await asyncio.wait_for(self._node.shutdown(), SHUTDOWN_TIMEOUT_SECONDS / 4)
        except _TRANSPORT_ERRORS as error:
            logger.debug("the DHT node did not stop in order: %s", error)
        if self._p2p is not None:
            self._p2p._terminate()
        self._failure = "the network is closed"
        await self._loop.end_children(SHUTDOWN_TIMEOUT_SECONDS / 4)
        leftover = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in leftover:
            task.cancel()
        await asyncio.wait(leftover, timeout=2.0) if leftover else None
        self._rpc.end_answers()

    def _disconnect(self, peer_ids: frozenset[str]) -> None:
        """From any thread; when the network is closed there is nobody to disconnect."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._disconnect_now, peer_ids)

    def _disconnect_now(self, peer_ids: frozenset[str]) -> None:
        for peer_id in peer_ids:
            self._known.pop(peer_id, None)
            if self._p2p is not None and peer_id != self.peer_id:
                self._guard.disconnect(self._p2p, peer_id)

    def _refused(self, peer_id: str, name: str, why: bytes) -> None:
        report(self.record, "refusal", name, peer_id, why)

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


def _reachability_options(config: NetworkConfig) -> dict[str, Any]:
    """Of `P2P.create`. A relay serves only where it knows that it is public."""
    options: dict[str, Any] = {"no_listen": not config.listens}
    if config.reachability != "unknown":
        options["force_reachability"] = config.reachability
    if config.reachability == "private":
        options["use_auto_relay"] = True
        remembered = [address for address in config.remembered_peers if is_entry_address(address)]
        options["trusted_relays"] = [*config.initial_peers, *remembered] or None
    return options


def _raise_descriptor_limit() -> None:
    """Many systems give a process 1024, though it may have more when it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MIN_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MIN_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _is_pinged(node: DHTNode, peer_id: str) -> bool:
    """After that each has the other in its routing table."""
    peer = PeerID.from_base58(peer_id)
    if await node.protocol.call_ping(peer) is None:
        return False
    node.blacklist.register_success(peer)  # hivemind's grows twofold with each failure, without a bound
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
    transport, peer_id = _split_address(address)
    if is_entry_point and ("p2p" not in protocols or not transport or "/" in peer_id):
        raise UsageError(
            f"{address!r} does not end in /p2p/PEER_ID: give the whole address that the peer printed"
        )
    if is_entry_point:
        _check_dialable(address)


def _check_dialable(address: str) -> None:
    """A multiaddress may write a peer id as any CID; hivemind and the daemon read base58 only."""
    transport, peer_id = _split_address(address)
    try:
        PeerID.from_base58(peer_id)
        str(_dialable(transport))  # written out, as only that parses the bytes
    except ValueError as error:
        raise UsageError(
            f"{address!r} cannot be dialled: write each peer id as the peer prints it ({error})"
        ) from error


def _split_address(address: str) -> tuple[str, str]:
    """Where a peer is, and its id; the first part names another one where that relays."""
    transport, _, peer_id = address.rpartition("/p2p/")
    return transport, peer_id


def _dialable(transport: str) -> Multiaddr:
    """hivemind writes the id of a relay as a CID, which the daemon does not read: here it is a multihash.

    Raises ValueError where an id is not base58.
    """
    base, _, rest = transport.partition("/p2p/")
    if not rest:
        return Multiaddr(transport)
    relay, _, tail = rest.partition("/")
    raw_id = base58.b58decode(relay)
    p2p_code = b"\xa5\x03"  # 421 as a varint (multiaddr's table of protocols)
    return Multiaddr(
        Multiaddr(base).to_bytes()
        + p2p_code
        + bytes([len(raw_id)])
        + raw_id
        + Multiaddr(f"/{tail}").to_bytes()
    )


def _make_request(method: str, body: object) -> bytes:
    return json.dumps({"method": method, "body": body}, separators=(",", ":")).encode()


def _parse_request(data: bytes) -> tuple[str, Any]:
    request = parse_json(data, max_bytes=MAX_MESSAGE_BYTES)
    if not isinstance(request, dict) or set(request) != {"method", "body"}:
        raise RecordError("a request holds method and body")
    return str(request["method"]), request["body"]


def _unreachable(peer_id: str, error: BaseException, timeout_seconds: float) -> PeerUnreachable:
    if isinstance(error, P2PHandlerError) and NOT_ADMITTED in str(error):
        return PeerRefuses(peer_id, str(error)[str(error).index(NOT_ADMITTED) :][:200])
    return PeerUnreachable(peer_id, _reason(error, timeout_seconds))


def _reason(error: BaseException, timeout_seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_seconds:.0f} s"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if "connection refused" in text:
        return "connection refused"
    return text.splitlines()[0][:200] if text else type(error).__name__
