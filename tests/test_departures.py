"""Is a peer whose process has ended seen at once, and one that is slow, frozen or cut off never?"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator import departures as departures_module
from coordinator.chain import Chain
from coordinator.departures import NUM_REFUSALS, Departures, is_refused, knock, tcp_endpoint
from coordinator.errors import NetworkError
from coordinator.membership import Member, Membership
from coordinator.records import sign
from tests.fakes import (
    CALL_SECONDS,
    NOW,
    identity,
    make_heartbeat,
    make_spec,
    peer,
    running_networks,
)

CHAIN = Chain(make_spec())
RELAY = f"/ip4/127.0.0.1/tcp/1/p2p/{peer('r')}/p2p-circuit/p2p/{peer('b')}"


class Daemon:
    """In place of the network: who is connected, as the test says."""

    def __init__(self) -> None:
        self.peers: frozenset[str] = frozenset()
        self.is_alive = True

    async def connected(self) -> frozenset[str]:
        if not self.is_alive:
            raise NetworkError("no daemon")
        return self.peers


class Watched:
    """One other member, "b", whose heartbeat names `addresses`."""

    def __init__(self, *addresses: str) -> None:
        self.daemon, self.membership = Daemon(), Membership(CHAIN.spec, peer("a"))
        self.gone: list[str] = []
        self.hear(NOW - 1.0, addresses)
        self.departures = Departures(
            self.daemon,  # type: ignore[arg-type]
            self.membership,
            lambda: (self.live(), True),
            lambda: self.gone.append("b"),
        )

    def hear(self, issued_at: float, addresses: Collection[str] = ()) -> None:
        record = make_heartbeat(CHAIN, addresses=list(addresses), issued_at=issued_at)
        self.membership.observe(sign(record, identity("b")).to_bytes(), now=NOW)

    def live(self) -> list[Member]:
        return self.membership.live(NOW)

    def look(self, num_times: int) -> None:
        async def look() -> None:
            for _ in range(num_times):
                await self.departures._look(self.live())

        asyncio.run(look())


@pytest.fixture
def closed() -> str:
    """An address at which nobody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer('b')}"


@pytest.fixture
def frozen() -> Iterator[str]:
    """The address of a process that is stopped: its kernel takes connections, and nobody serves them."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"


@pytest.fixture
def unreachable() -> str:
    """What a cut line looks like: 240.0.0.0/4 is reserved, so there is no way, or no answer."""
    return "/ip4/240.0.0.1/tcp/4001"


def test_who_is_not_connected_and_refuses_is_forgotten_after_the_second_refusal(closed: str) -> None:
    watched = Watched(closed)
    watched.look(NUM_REFUSALS - 1)
    assert [member.peer_id for member in watched.live()] == [peer("b")]
    assert watched.gone == []
    watched.look(1)
    assert watched.live() == []
    assert watched.gone == ["b"]


def test_a_later_heartbeat_brings_it_back_and_the_old_one_does_not(closed: str) -> None:
    watched = Watched(closed)
    watched.look(NUM_REFUSALS)
    watched.hear(NOW - 1.0, [closed])
    assert watched.live() == []
    watched.hear(NOW, [closed])
    assert [member.peer_id for member in watched.live()] == [peer("b")]


def test_its_vote_counts_until_the_lease(closed: str) -> None:
    watched = Watched(closed)
    watched.look(NUM_REFUSALS)
    silent = watched.membership.absent([peer("b")], tip=CHAIN.tip, now=NOW, listened_seconds=0.0)
    assert silent == frozenset()


def test_who_is_connected_is_not_dialled(closed: str) -> None:
    watched = Watched(closed)
    watched.daemon.peers = frozenset({peer("b")})
    watched.look(2 * NUM_REFUSALS)
    assert len(watched.live()) == 1


def test_refusals_count_in_a_row_only(closed: str) -> None:
    """A daemon that is replaced in place refuses for a moment, and is connected again."""
    watched = Watched(closed)
    for _ in range(3):
        watched.daemon.peers = frozenset()
        watched.look(NUM_REFUSALS - 1)
        watched.daemon.peers = frozenset({peer("b")})
        watched.look(1)
    assert len(watched.live()) == 1


def test_slow_frozen_cut_off_relayed_or_unlisted_is_not_gone(
    closed: str, frozen: str, unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures_module, "DIAL_SECONDS", 0.2)
    monkeypatch.setattr(departures_module, "QUIET_SECONDS", 0.0)  # dialled at every look
    for addresses in ([frozen], [closed, frozen], [closed, unreachable], [RELAY], [closed, RELAY], []):
        watched = Watched(*addresses)
        watched.look(2 * NUM_REFUSALS)
        assert len(watched.live()) == 1, addresses


def test_who_does_not_refuse_is_dialled_less_often(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def answer(addresses: object) -> bool:
        asked.append(addresses)
        return False

    monkeypatch.setattr(departures_module, "is_refused", answer)
    Watched(frozen).look(5)
    assert len(asked) == 1


def test_without_an_own_daemon_nobody_is_gone(closed: str) -> None:
    watched = Watched(closed)
    watched.daemon.is_alive = False
    watched.look(2 * NUM_REFUSALS)
    assert len(watched.live()) == 1


def test_refusal_needs_every_address(closed: str, frozen: str) -> None:
    assert asyncio.run(is_refused([closed]))
    assert asyncio.run(is_refused([closed, closed]))
    assert not asyncio.run(is_refused([closed, frozen]))
    assert not asyncio.run(is_refused([]))


def test_only_plain_addresses_are_dialled() -> None:
    assert tcp_endpoint("/ip4/1.2.3.4/tcp/5") == ("1.2.3.4", 5)
    assert tcp_endpoint(f"/ip6/::1/tcp/5/p2p/{peer('b')}") == ("::1", 5)
    for address in (RELAY, "/dns4/example.org/tcp/5", "/ip4/example.org/tcp/5", "/ip4/1.2.3.4/udp/5/quic"):
        assert tcp_endpoint(address) is None
    for address in ("", "/", "/ip4", "/ip4/1.2.3.4/tcp/-1", "/ip4/1.2.3.4/tcp/x", "/ip4/1.2.3.4/tcp/999999"):
        assert tcp_endpoint(address) is None
    for zone in ("eth0", "z" * 70):
        assert tcp_endpoint(f"/ip6/fe80::1%{zone}/tcp/5") is None


def test_a_made_up_address_does_not_end_the_looking(closed: str) -> None:
    watched = Watched(f"/ip6/fe80::1%{'z' * 70}/tcp/1", closed)
    watched.look(2 * NUM_REFUSALS)
    assert len(watched.live()) == 1  # an address that cannot be dialled refuses nothing


def test_a_host_that_is_none_is_silent() -> None:
    assert asyncio.run(knock(("z" * 70, 1), CALL_SECONDS)) == "silent"


def test_the_daemon_knows_who_is_connected(tmp_path: Path) -> None:
    with running_networks(2, tmp_path) as (one, other):
        assert one.run(one.connected(), timeout_seconds=CALL_SECONDS) == {other.peer_id}
