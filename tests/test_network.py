"""Do peers reach each other, is every wait bounded, and is nothing left when it ends?"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.errors import NetworkError, UsageError
from coordinator.network import Network, PeerUnreachable, is_entry_address
from coordinator.records import RecordError
from tests.fakes import CALL_SECONDS, addresses, network_config, new_directory, peer, running_networks

NOBODY = peer("nobody")


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
        ("/ip4/127.0.0.1/tcp/1", False),
        ("", False),
        ("\x1b[31m", False),
        (f"/ip4/256.0.0.1/tcp/1/p2p/{NOBODY}", False),
    ],
)
def test_addresses_from_other_peers_can_be_tried(address: str, expected: bool) -> None:
    assert is_entry_address(address) is expected


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


def test_close_leaves_no_process_and_can_be_repeated(tmp_path: Path) -> None:
    before = children()
    network = Network(network_config(tmp_path / "k"))
    with network:
        assert network.is_daemon_alive()
        assert len(children() - before) == 1
    assert not network.is_daemon_alive()
    assert children() <= before
    network.close()


def test_the_daemon_survives_ctrl_c_in_the_terminal_and_a_frozen_one_is_killed(tmp_path: Path) -> None:
    before = children()
    with Network(network_config(tmp_path / "k")) as network:
        [pid] = children() - before
        assert os.getpgid(pid) != os.getpgid(0)  # what a terminal signals is our process group
        os.kill(pid, signal.SIGSTOP)
    assert children() <= before
    assert not network.is_daemon_alive()


def test_a_killed_daemon_is_noticed_and_calls_end(tmp_path: Path) -> None:
    before = children()
    with Network(network_config(tmp_path / "k")) as network:
        [pid] = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerUnreachable):
            call(network, NOBODY, "echo", seconds=3.0)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=CALL_SECONDS)
        with pytest.raises(NetworkError):
            addresses(network)
