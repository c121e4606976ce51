"""Do peers reach each other, is every wait bounded, and is nothing left when it ends?"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hivemind
import psutil
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

from coordinator import guard
from coordinator import network as network_module
from coordinator.errors import NetworkError, UsageError
from coordinator.guard import (
    CALLS,
    MAX_CALL_BYTES,
    MAX_STREAM_MESSAGE_BYTES,
    MAX_STREAMS_PER_PEER,
    TOKEN_BYTES,
)
from coordinator.network import Network, PeerUnreachable, is_entry_address
from coordinator.records import RecordError
from tests.fakes import CALL_SECONDS, addresses, network_config, new_directory, peer, running_networks

NOBODY = peer("nobody")
# Ids of relays as CIDs: multiaddresses by their grammar, which neither hivemind nor the daemon can dial.
RELAY_IN_HEX = "f01721220" + 32 * "ab"
RELAY_IN_BASE32 = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"


async def echo(peer_id: str, body: Any) -> bytes:
    return json.dumps([peer_id, body]).encode()


async def refuse(_peer_id: str, _body: Any) -> bytes:
    raise RecordError("no, because of the moon")


async def stall(_peer_id: str, _body: Any) -> bytes:
    await asyncio.Event().wait()
    return b""


async def count(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    for number in range(body):
        yield bytes([number])


async def count_and_stall(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.Event().wait()


def add_handlers(network: Network) -> None:
    for handler in (echo, refuse, stall):
        network.on_call(handler.__name__, handler)
    network.on_stream("count", count)
    network.on_stream("count_and_stall", count_and_stall)


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Network]]:
    with running_networks(2, new_directory(), add_handlers) as networks:
        yield networks


def call(
    network: Network, peer_id: str, method: str, body: object = None, seconds: float = CALL_SECONDS
) -> bytes:
    return network.run(
        network.call(peer_id, method, body, timeout_seconds=seconds), timeout_seconds=2 * CALL_SECONDS
    )


def read_stream(network: Network, peer_id: str, method: str, body: object, seconds: float) -> list[bytes]:
    async def read() -> list[bytes]:
        return [part async for part in network.stream(peer_id, method, body, timeout_seconds=seconds)]

    return network.run(read(), timeout_seconds=2 * CALL_SECONDS)


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


def test_a_call_comes_with_the_authenticated_sender(pair: list[Network]) -> None:
    first, second = pair
    assert json.loads(call(second, first.peer_id, "echo", {"a": [1]})) == [second.peer_id, {"a": [1]}]
    assert json.loads(call(first, second.peer_id, "echo", "ü")) == [first.peer_id, "ü"]
    assert second.entry_points == [first.peer_id]


def test_a_refusal_carries_its_reason(pair: list[Network]) -> None:
    with pytest.raises(PeerUnreachable, match="because of the moon") as caught:
        call(pair[1], pair[0].peer_id, "refuse")
    assert caught.value.peer_id == pair[0].peer_id


def test_an_unknown_method_is_an_error_of_the_call_only(pair: list[Network]) -> None:
    with pytest.raises(PeerUnreachable):
        call(pair[1], pair[0].peer_id, "shell")
    with pytest.raises(PeerUnreachable):
        read_stream(pair[1], pair[0].peer_id, "shell", None, CALL_SECONDS)
    assert call(pair[1], pair[0].peer_id, "echo")


def test_a_call_that_is_not_answered_ends(pair: list[Network]) -> None:
    started = time.monotonic()
    with pytest.raises(PeerUnreachable, match="no answer within 0 s"):
        call(pair[1], pair[0].peer_id, "stall", seconds=0.3)
    assert time.monotonic() - started < 10.0


def test_a_peer_that_does_not_exist(pair: list[Network]) -> None:
    with pytest.raises(PeerUnreachable) as caught:
        call(pair[1], NOBODY, "echo", seconds=5.0)
    assert caught.value.peer_id == NOBODY


def test_streams(pair: list[Network]) -> None:
    assert read_stream(pair[1], pair[0].peer_id, "count", 3, CALL_SECONDS) == [b"\0", b"\1", b"\2"]
    assert read_stream(pair[1], pair[0].peer_id, "count", 0, CALL_SECONDS) == []
    with pytest.raises(PeerUnreachable, match="no answer within"):
        read_stream(pair[1], pair[0].peer_id, "count_and_stall", None, 0.3)


def test_a_reply_that_is_too_large_is_refused(pair: list[Network]) -> None:
    async def huge(_peer_id: str, _body: Any) -> bytes:
        return bytes(1_500_000)

    pair[0].on_call("huge", huge)
    with pytest.raises(PeerUnreachable, match="1500000 bytes"):
        call(pair[1], pair[0].peer_id, "huge")


def test_bytes_that_are_no_message_are_an_error_of_that_peer(pair: list[Network]) -> None:
    """A peer that speaks the transport, but not the protocol: its answer is no BytesValue."""
    first, second = pair

    async def replace_handler() -> None:
        async def garbage(_request: bytes, _remote_id: object) -> bytes:
            return b"\xff\xff\xff"

        await first.p2p._client.remove_unary_handler("cold-fusion-1::_PeerRpc.rpc_call")
        await first.p2p._client.add_unary_handler("cold-fusion-1::_PeerRpc.rpc_call", garbage)

    first.run(replace_handler(), timeout_seconds=CALL_SECONDS)
    with pytest.raises(PeerUnreachable):
        call(second, first.peer_id, "echo")


def test_run_ends_when_time_is_up_and_cancels(pair: list[Network]) -> None:
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(NetworkError, match="no answer within"):
        pair[0].run(endless(), timeout_seconds=0.05)
    assert ended.wait(CALL_SECONDS)


def test_run_can_be_ended_by_its_check(pair: list[Network]) -> None:
    ended = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair[0].run(endless(), timeout_seconds=600.0, check=check)
    assert ended.wait(CALL_SECONDS)


def test_run_passes_errors_on(pair: list[Network]) -> None:
    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(RecordError):
        pair[0].run(fail(RecordError("x")), timeout_seconds=CALL_SECONDS)
    with pytest.raises(NetworkError, match="timed out"):
        pair[0].run(fail(TimeoutError("slow")), timeout_seconds=CALL_SECONDS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"initial_peers": ("garbage",)}, "'garbage' is not a multiaddress"),
        ({"initial_peers": ("/ip4/127.0.0.1/tcp/4001",)}, "does not end in /p2p/PEER_ID"),
        ({"initial_peers": (f"/ip4/999.0.0.1/tcp/1/p2p/{NOBODY}",)}, "is not a multiaddress"),
        ({"initial_peers": ("/ip4/127.0.0.1/tcp/1/p2p/abc",)}, "is not a multiaddress"),
        ({"host_maddrs": ("127.0.0.1:4001",)}, "is not a multiaddress"),
        ({"announce_maddrs": ("/ip4/127.0.0.1/tcp/0",)}, "announce an address with its port"),
    ],
)
def test_a_wrong_address_is_told_before_anything_is_started(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    before = children()
    with pytest.raises(UsageError, match=reason), Network(network_config(tmp_path / "key", **changes)):
        pass
    assert children() <= before


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}", True),
        (f"/dns4/example.org/tcp/1/p2p/{NOBODY}", True),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{peer('relay')}/p2p-circuit/p2p/{NOBODY}", True),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{peer('relay')}/p2p-circuit", False),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{RELAY_IN_HEX}/p2p-circuit/p2p/{NOBODY}", False),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{RELAY_IN_BASE32}/p2p-circuit/p2p/{NOBODY}", False),
        (f"/p2p/{peer('relay')}/p2p-circuit/p2p/{NOBODY}", False),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{RELAY_IN_HEX}", False),
        (f"/p2p/{NOBODY}", False),
        ("/ip4/127.0.0.1/tcp/1", False),
        ("", False),
        ("\x1b[31m", False),
        (f"/ip4/256.0.0.1/tcp/1/p2p/{NOBODY}", False),
    ],
)
def test_addresses_from_other_peers_can_be_tried(address: str, expected: bool) -> None:
    assert is_entry_address(address) is expected


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_made_up_address_costs_nothing_but_itself(
    pair: list[Network], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    """Of a heartbeat, also where the check has missed it: a lost peer is reached at its other address."""
    bad = f"/ip4/127.0.0.1/tcp/1/p2p/{RELAY_IN_HEX}/p2p-circuit/p2p/{pair[0].peer_id}"
    if not is_checked:
        monkeypatch.setattr(network_module, "is_entry_address", lambda _: True)
    with Network(network_config(tmp_path / "k")) as lost:
        lost.remember(pair[0].peer_id, [bad, addresses(pair[0])[0]])
        lost.run(lost._reach(pair[0].peer_id), timeout_seconds=CALL_SECONDS)
        assert pair[0].peer_id in lost.run(lost.connected(), timeout_seconds=CALL_SECONDS)


def test_made_up_addresses_of_peers_met_earlier_do_not_keep_a_peer_from_starting(
    pair: list[Network], tmp_path: Path
) -> None:
    bad = f"/ip4/127.0.0.1/tcp/1/p2p/{RELAY_IN_HEX}/p2p-circuit/p2p/{pair[1].peer_id}"
    config = network_config(
        tmp_path / "k", remembered_peers=(bad, addresses(pair[1])[0]), reachability="private"
    )
    with Network(config) as network:
        assert network.entry_points == [pair[1].peer_id]


def test_dead_entry_points_are_named_and_no_process_is_left(tmp_path: Path) -> None:
    dead = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}" for port in (1, 2)]
    before = children()
    with (
        pytest.raises(NetworkError) as caught,
        Network(network_config(tmp_path / "k", initial_peers=tuple(dead))),
    ):
        pass
    assert all(address in str(caught.value) for address in dead)
    assert children() <= before


def test_one_entry_point_that_answers_is_enough(pair: list[Network], tmp_path: Path) -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"
    entry = (dead, addresses(pair[1])[0])
    with Network(network_config(tmp_path / "k", initial_peers=entry)) as network:
        assert network.entry_points == [pair[1].peer_id]


def test_two_peers_cannot_share_an_identity(pair: list[Network], tmp_path: Path) -> None:
    own = pair[0]._config.identity
    config = network_config(tmp_path / "unused", identity=own, initial_peers=(addresses(pair[0])[0],))
    with pytest.raises(NetworkError, match="cannot share an identity"), Network(config):
        pass


def test_a_daemon_that_does_not_start_in_time(tmp_path: Path) -> None:
    before = children()
    config = network_config(tmp_path / "k", startup_timeout_seconds=0.01)
    with pytest.raises(NetworkError), Network(config):
        pass
    assert children() <= before


def test_a_task_that_takes_its_cancelling_lightly_does_not_keep_the_network_from_stopping(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled: list[int] = []

    async def stubborn() -> None:
        for number in (1, 2):
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                cancelled.append(number)

    with running_networks(1, tmp_path) as networks:
        networks[0].run(started(networks[0], stubborn()), timeout_seconds=CALL_SECONDS)
    assert cancelled == [1, 2]  # at first, and with all that is left when the daemon is gone
    assert "did not stop in order" not in caplog.text


async def started(network: Network, work: Coroutine[Any, Any, None]) -> None:
    network.create_task(work)
    await asyncio.sleep(0.1)


def test_close_leaves_no_process_and_can_be_repeated(tmp_path: Path) -> None:
    before = children()
    network = Network(network_config(tmp_path / "k"))
    with network:
        assert network.is_daemon_alive()
        assert len(children() - before) == 2  # the daemon and the shell that cleans up after it
    assert not network.is_daemon_alive()
    assert children() <= before
    network.close()


def daemon_of(before: set[int]) -> int:
    [pid] = [pid for pid in children() - before if psutil.Process(pid).name() == "p2pd"]
    return pid


def test_the_daemon_survives_ctrl_c_in_the_terminal_and_a_frozen_one_is_killed(tmp_path: Path) -> None:
    before = children()
    with Network(network_config(tmp_path / "k")) as network:
        pid = daemon_of(before)
        assert os.getpgid(pid) != os.getpgid(0)  # what a terminal signals is our process group
        os.kill(pid, signal.SIGSTOP)
    assert children() <= before
    assert not network.is_daemon_alive()


class Restarts:
    """Counts them."""

    def __init__(self, network: Network) -> None:
        self.seen = threading.Event()
        network.on_restart(self._restarted)

    async def _restarted(self) -> None:
        self.seen.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_that_dies_or_freezes_is_replaced_and_all_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(network_module, "PING_SECONDS", 0.3)
    monkeypatch.setattr(network_module, "PING_TIMEOUT_SECONDS", 1.0)
    with running_networks(1, tmp_path / "first", add_handlers) as [first]:
        before = children()
        config = network_config(tmp_path / "second", initial_peers=(addresses(first)[0],))
        second = Network(config)
        add_handlers(second)
        restarts = Restarts(second)
        with second:
            for network in (first, second):
                network.run(network.start_dht(TakesAll()), timeout_seconds=CALL_SECONDS)
            address, pid = addresses(second)[0], daemon_of(before)
            second.run(second.p2p.add_binary_stream_handler("raw", say_hello), timeout_seconds=CALL_SECONDS)
            pending = second.submit(second.call(first.peer_id, "stall", None, timeout_seconds=60.0))
            time.sleep(0.5)
            killed_at = time.monotonic()
            os.kill(pid, number)
            with pytest.raises(PeerUnreachable, match="daemon is gone"):
                pending.result(CALL_SECONDS)
            if number == signal.SIGKILL:
                assert time.monotonic() - killed_at < 2.0  # noticed
            assert restarts.seen.wait(CALL_SECONDS)
            assert daemon_of(before) != pid
            assert addresses(second)[0] == address
            assert json.loads(call(second, first.peer_id, "echo", 1)) == [second.peer_id, 1]
            assert json.loads(call(first, second.peer_id, "echo", 2)) == [first.peer_id, 2]
            assert read_raw(first, second.peer_id, "raw") == b"hello"
            until = Network.now() + 60.0
            for storing, reading in ((first, second), (second, first)):
                key = storing.peer_id[-8:]
                assert storing.run(
                    storing.dht_store(key, "a", b"b", expires_at=until), timeout_seconds=CALL_SECONDS
                )
                assert reading.run(reading.dht_get(key), timeout_seconds=CALL_SECONDS) == {"a": b"b"}
            assert second.is_daemon_alive()


def test_calls_that_are_cancelled_as_their_answers_come_end_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hivemind's only reader of answers died of an answer to a call that nobody waited for any more."""
    monkeypatch.setattr(guard, "CALLS", replace(CALLS, per_peer=replace(CALLS.per_peer, burst=1000)))

    async def echo(_peer_id: str, _body: Any) -> bytes:
        return b"{}"

    async def cancel_and_call(network: Network, peer_id: str, rng: random.Random) -> bytes:
        for _ in range(120):
            calls = [
                asyncio.ensure_future(network.call(peer_id, "echo", None, timeout_seconds=3.0))
                for _ in range(4)
            ]
            await asyncio.sleep(rng.random() * 0.004)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0.01)
        return await network.call(peer_id, "echo", None, timeout_seconds=CALL_SECONDS)

    with running_networks(2, tmp_path) as [first, second]:
        first.on_call("echo", echo)
        future = second.submit(cancel_and_call(second, first.peer_id, random.Random(0)))
        assert future.result(3 * CALL_SECONDS) == b"{}"


def test_a_call_whose_connection_breaks_can_be_made_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    asked: list[str] = []
    is_asked = threading.Event()

    async def stall_once(peer_id: str, _body: Any) -> bytes:
        asked.append(peer_id)
        is_asked.set()
        if len(asked) == 1:
            await asyncio.Event().wait()
        return b"at last"

    async def count_refusals(peer_id: str, _body: Any) -> bytes:
        asked.append(peer_id)
        raise RecordError("no")

    with running_networks(1, tmp_path / "first") as [first]:
        first.on_call("stall_once", stall_once)
        first.on_call("count_refusals", count_refusals)
        before = children()
        config = network_config(tmp_path / "second", initial_peers=(addresses(first)[0],))
        with Network(config) as second:
            ask = second.call(first.peer_id, "stall_once", None, timeout_seconds=60.0, num_attempts=20)
            future = second.submit(ask)
            assert is_asked.wait(CALL_SECONDS)
            os.kill(daemon_of(before), signal.SIGKILL)
            assert future.result(2 * CALL_SECONDS) == b"at last"
            assert len(asked) == 2
            ask = second.call(
                first.peer_id, "count_refusals", None, timeout_seconds=CALL_SECONDS, num_attempts=20
            )
            with pytest.raises(PeerUnreachable, match="no"):
                second.run(ask, timeout_seconds=CALL_SECONDS)
            assert len(asked) == 3


def test_a_daemon_that_cannot_be_replaced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "RESTART_PAUSES_SECONDS", (0.0, 0.1))
    before = children()
    with Network(network_config(tmp_path / "k")) as network:
        (tmp_path / "k").unlink()
        pid = daemon_of(before)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerUnreachable):
            call(network, NOBODY, "echo", seconds=3.0)
        ends_at = time.monotonic() + CALL_SECONDS
        while network.is_daemon_alive() and time.monotonic() < ends_at:
            time.sleep(0.05)
        assert not network.is_daemon_alive()
        with pytest.raises(NetworkError):
            addresses(network)
    assert children() <= before


def test_a_daemon_that_dies_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "MAX_RESTARTS", 1)
    before = children()
    network = Network(network_config(tmp_path / "k"))
    restarts = Restarts(network)
    with network:
        os.kill(daemon_of(before), signal.SIGKILL)
        assert restarts.seen.wait(CALL_SECONDS)
        assert network.is_daemon_alive()
        os.kill(daemon_of(before), signal.SIGKILL)
        ends_at = time.monotonic() + CALL_SECONDS
        while network.is_daemon_alive() and time.monotonic() < ends_at:
            time.sleep(0.05)
        assert not network.is_daemon_alive()


# hostile: the attacker's networks run in this process, so what is asserted are counts, not times


class TakesAll(RecordValidatorBase):
    def validate(self, record: DHTRecord) -> bool:
        return True


async def say_hello(_info: object, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    await writer.drain()


def read_raw(network: Network, peer_id: str, name: str, sent: bytes = b"") -> bytes:
    """What comes back on a raw stream of the daemon until its end."""

    async def read() -> bytes:
        _, reader, writer = await network.p2p.call_binary_stream_handler(PeerID.from_base58(peer_id), name)
        writer.write(sent)
        try:
            return await reader.read()
        finally:
            writer.close()

    return network.run(read(), timeout_seconds=CALL_SECONDS)


@pytest.fixture
def attacked(tmp_path: Path) -> Iterator[list[Network]]:
    """victim, attacker, honest"""
    with running_networks(3, tmp_path, add_handlers) as networks:
        yield networks


async def flood(attacker: Network, victim: str, method: str, num_calls: int) -> list[str]:
    async def one() -> str:
        try:
            await attacker.call(victim, method, None, timeout_seconds=CALL_SECONDS)
        except PeerUnreachable as error:
            return str(error)
        return ""

    return await asyncio.gather(*(one() for _ in range(num_calls)))


def test_a_flood_of_calls_is_refused_and_its_sender_cut_off_while_others_are_served(
    attacked: list[Network], caplog: pytest.LogCaptureFixture
) -> None:
    victim, attacker, honest = attacked
    served: list[str] = []

    async def heartbeat(peer_id: str, _body: Any) -> bytes:
        served.append(peer_id)
        return b"{}"

    victim.on_call("heartbeat", heartbeat)
    future = attacker.submit(flood(attacker, victim.peer_id, "heartbeat", 10_000))
    num_honest, started = 0, time.monotonic()
    while not future.done():
        assert call(honest, victim.peer_id, "heartbeat") == b"{}"
        num_honest += 1
        time.sleep(0.01)
    answers = future.result()
    num_served = served.count(attacker.peer_id)
    rate = CALLS.per_peer
    budget = rate.burst + rate.per_second * (time.monotonic() - started + rate.max_delay_seconds)
    assert answers.count("") <= num_served <= budget
    assert num_served < 2000
    assert served.count(honest.peer_id) == num_honest >= 3
    assert victim._guard.num_disconnects >= 1
    assert (
        len([r for r in caplog.records if attacker.peer_id[-8:] in r.message and "refused" in r.message]) == 1
    )
    assert not any(honest.peer_id[-8:] in record.message for record in caplog.records)
    assert victim.p2p._client.control._handler_tasks == {}  # nothing is kept of what was refused or cancelled


ANSWER_BYTES = 256 * 1024  # a page of a chain


def test_small_calls_for_large_answers_are_in_the_budget(attacked: list[Network]) -> None:
    """At 100 calls a second one peer had 58 MB a second of a chain, and most of the network's thread."""
    victim, attacker, honest = attacked
    num_served = 0

    async def page(_peer_id: str, _body: Any) -> bytes:
        nonlocal num_served
        num_served += 1
        return bytes(ANSWER_BYTES)

    victim.on_call("page", page)
    started = time.monotonic()
    future = attacker.submit(flood(attacker, victim.peer_id, "page", 1000))
    while not future.done():
        assert call(honest, victim.peer_id, "echo")
    answers = future.result()
    rate, tokens = CALLS.per_peer, 1 + ANSWER_BYTES // TOKEN_BYTES
    budget = rate.burst + rate.per_second * (time.monotonic() - started + rate.max_delay_seconds)
    assert answers.count("") <= num_served <= budget / tokens + 1
    assert answers.count("") < 100  # the others were refused, and then it was cut off
    assert victim.num_refused >= CALLS.max_refused


def test_who_asks_for_one_page_after_another_is_served(attacked: list[Network]) -> None:
    """16 MB of a chain: after 10 it waits, 1 MB a second, and is not refused; nor is what it says then."""
    victim, _, honest = attacked

    async def page(_peer_id: str, _body: Any) -> bytes:
        return bytes(ANSWER_BYTES)

    async def pages() -> int:
        return sum(
            [
                len(await honest.call(victim.peer_id, "page", None, timeout_seconds=CALL_SECONDS))
                for _ in range(64)
            ]
        )

    victim.on_call("page", page)
    started = time.monotonic()
    future = honest.submit(pages())
    while not future.done():
        assert call(honest, victim.peer_id, "echo", seconds=2.0)
        time.sleep(0.1)
    assert future.result() == 64 * ANSWER_BYTES
    assert time.monotonic() - started < 15.0
    assert victim.num_refused == 0


def test_a_busy_honest_peer_waits_and_is_not_refused(attacked: list[Network]) -> None:
    victim, _, honest = attacked
    for _ in range(int(CALLS.per_peer.burst) + 50):
        call(honest, victim.peer_id, "echo")
    assert victim.num_refused == 0


def test_a_flood_of_streams_is_bounded_and_others_get_theirs(attacked: list[Network]) -> None:
    victim, attacker, honest = attacked
    victim_id = PeerID.from_base58(victim.peer_id)
    victim.run(victim.p2p.add_binary_stream_handler("open", wait_for_end), timeout_seconds=CALL_SECONDS)
    most_open = 0

    async def open_many() -> None:
        nonlocal most_open
        writers = []
        for _ in range(MAX_STREAMS_PER_PEER + 100):
            writers.append((await attacker.p2p.call_binary_stream_handler(victim_id, "open"))[2])
            most_open = max(most_open, victim._guard.open_streams.total)
        await asyncio.sleep(0.5)
        most_open = max(most_open, victim._guard.open_streams.total)

    attacker.run(open_many(), timeout_seconds=3 * CALL_SECONDS)
    assert most_open == MAX_STREAMS_PER_PEER
    assert read_stream(honest, victim.peer_id, "count", 3, CALL_SECONDS) == [b"\0", b"\1", b"\2"]


async def wait_for_end(_info: object, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


RPC_STREAM = "cold-fusion-1::_PeerRpc.rpc_stream"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" + (2**62).to_bytes(8, "big") + b"x",  # announces more bytes than there are in the world
        b"\x00" + (MAX_STREAM_MESSAGE_BYTES + 1).to_bytes(8, "big") + b"x",
        b"\x00" + (5).to_bytes(8, "big") + b"\xff" * 5,
        b"\x07",
        b"garbage" * 1000,
    ],
)
def test_garbage_on_a_stream_ends_that_stream_only(attacked: list[Network], sent: bytes) -> None:
    victim, attacker, _ = attacked
    assert len(read_raw(attacker, victim.peer_id, RPC_STREAM, sent)) < 1000
    assert json.loads(call(attacker, victim.peer_id, "echo", 1)) == [attacker.peer_id, 1]


def test_a_reply_on_a_stream_that_announces_too_much_is_the_peers_fault(attacked: list[Network]) -> None:
    victim, liar, _ = attacked

    async def announce(_info: object, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00" + (2**40).to_bytes(8, "big"))
        await writer.drain()
        await asyncio.sleep(1.0)

    async def replace_handler() -> None:
        await liar.p2p.remove_binary_stream_handler(RPC_STREAM)
        await liar.p2p.add_binary_stream_handler(RPC_STREAM, announce)

    liar.run(replace_handler(), timeout_seconds=CALL_SECONDS)
    with pytest.raises(PeerUnreachable, match="bytes where at most"):
        read_stream(victim, liar.peer_id, "count", 1, CALL_SECONDS)


def test_a_request_that_is_too_large_is_refused_before_it_is_parsed(attacked: list[Network]) -> None:
    victim, attacker, _ = attacked
    with pytest.raises(PeerUnreachable, match="a request of"):
        call(attacker, victim.peer_id, "echo", "x" * MAX_CALL_BYTES)


def test_what_is_replaced_in_hivemind_is_still_what_it_was() -> None:
    """On a new version: read these four again, then write down their hashes."""
    sources = {
        P2P.receive_protobuf: "receive_raw_data",
        ControlClient._read_from_persistent_conn: "self._handle_persistent_request(call_id, resp.",
        DictionaryDHTValue.unpackb: "new_dict.store(key, value, expiration_time)",
        DHTNode._call_find_with_blacklist: "self.protocol.call_find(",
        P2P.create: "self = cls()",
    }
    for function, expected in sources.items():
        assert expected in inspect.getsource(function), function
    assert P2P.receive_raw_data is guard._receive_raw_data
    assert DictionaryDHTValue.store is guard._store_bounded
    assert inspect.signature(guard._store_any) == inspect.signature(TimedStorage.store)
    parameters = list(inspect.signature(P2P.add_binary_stream_handler).parameters)
    assert parameters == ["self", "name", "handler", "balanced"]
    assert hivemind.__version__ == "1.1.12"


def test_a_dht_value_is_bounded_and_an_old_entry_does_not_shorten_the_newer_one() -> None:
    later = Network.now() + 1000.0
    value = DictionaryDHTValue()
    assert value.store("a", b"new", later)
    assert not value.store("a", b"old", later - 999.5)
    time.sleep(0.6)  # hivemind's own clock; the old one would have expired by now, and the newer one with it
    assert value.get("a").value == b"new"
    for number in range(guard.MAX_DHT_ENTRIES + 10):
        value.store(str(number), b"x", later)
    assert len(value) == guard.MAX_DHT_ENTRIES
    assert value.store("a", b"newer", later + 1.0)
    large = DictionaryDHTValue()
    for number in range(guard.MAX_DHT_ENTRIES):
        large.store(str(number), bytes(10_000), later)
    assert len(large) == guard.MAX_DHT_VALUE_BYTES // 10_000


def test_no_answer_of_the_dht_lives_for_ever_or_is_empty(attacked: list[Network]) -> None:
    """A node that answers with nothing, valid for ever, must not end the search of the others."""
    victim, liar, honest = attacked
    for network in attacked:
        network.run(network.start_dht(TakesAll()), timeout_seconds=CALL_SECONDS)
    assert honest.run(
        honest.dht_store("key", "a", b"b", expires_at=Network.now() + 60.0), timeout_seconds=CALL_SECONDS
    )
    node = liar._node
    assert node is not None
    empty = DictionaryDHTValue()
    node.protocol.storage.data.clear()
    node.protocol.storage.get = lambda _key: ValueWithExpiration(empty, float("inf"))
    found = asyncio.run_coroutine_threadsafe(
        victim._node.protocol.call_find(PeerID.from_base58(liar.peer_id), [DHTID.generate(source="key")]),  # type: ignore[union-attr]
        victim._loop,
    ).result(CALL_SECONDS)
    assert [value for value, _ in found.values()] == [None]
    assert victim.run(victim.dht_get("key"), timeout_seconds=CALL_SECONDS) == {"a": b"b"}
