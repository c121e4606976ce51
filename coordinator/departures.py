"""Who is gone without a word? Whoever has no connection any more, and whose machine refuses a new one.

However a process ends, its kernel closes its connections at once and refuses new ones. A peer that is slow,
frozen or cut off shows neither: its sockets stay open, and packets that are lost are silence, not refusal. So
nobody is shut out for being slow; and a majority is counted as before, with the lease (`Membership.absent`):
whoever is forgotten here is only not waited for, until a heartbeat of a later instant brings it back.

Not seen here, and left to the lease: a machine without power or behind a cut line (nothing refuses), a peer
that takes no connections or is reached through a relay (nothing can be refused).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Literal

from coordinator.errors import NetworkError
from coordinator.membership import Member, Membership
from coordinator.network import Network

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # between two looks while I wait for others: one call to the own daemon, 1 ms
QUIET_SECONDS = 2.0  # between two looks while I am busy myself; and at one who is there but not connected
NUM_REFUSALS = 2  # in a row; a daemon that is replaced in place refuses for an instant as well
DIAL_SECONDS = 1.0  # a refusal takes one round trip; what takes longer is none
MAX_DIALLED = 8  # addresses of one peer

# Whose departure matters, and whether I wait for them.
Waiting = Callable[[], tuple[Collection[Member], bool]]
Knocked = Literal["open", "refused", "silent"]


class Departures:
    """Looks whether those that this peer may have to wait for are still there, and forgets who is not."""

    def __init__(
        self, network: Network, membership: Membership, waiting: Waiting, on_gone: Callable[[], None]
    ) -> None:
        self._network, self._membership = network, membership
        self._waiting, self._on_gone = waiting, on_gone
        self._refusals: dict[str, int] = {}  # in a row, by peer
        self._next_dial: dict[str, float] = {}  # of who is not connected and did not refuse; the loop's clock

    async def keep_looking(self) -> None:
        while True:
            members, is_waiting = self._waiting()
            if members:
                await self._look(members)
            is_urgent = is_waiting or self._refusals
            await asyncio.sleep(LOOK_SECONDS if is_urgent else QUIET_SECONDS)

    async def _look(self, members: Collection[Member]) -> None:
        try:
            connected = await self._network.connected()
        except NetworkError as error:  # my own daemon is being replaced: then I am the one who is gone
            logger.debug("not looked who is gone: %s", error)
            return
        away = [member for member in members if member.peer_id not in connected]
        names = {member.peer_id for member in away}
        self._refusals = {peer: n for peer, n in self._refusals.items() if peer in names}
        self._next_dial = {peer: at for peer, at in self._next_dial.items() if peer in names}
        await asyncio.gather(*(self._dial(member) for member in away))

    async def _dial(self, member: Member) -> None:
        now, peer = asyncio.get_running_loop().time(), member.peer_id
        if now < self._next_dial.get(peer, 0.0):
            return
        if not await is_refused(member.record.addresses):
            self._refusals.pop(peer, None)
            self._next_dial[peer] = now + QUIET_SECONDS
            return
        self._refusals[peer] = self._refusals.get(peer, 0) + 1
        if self._refusals[peer] >= NUM_REFUSALS:
            del self._refusals[peer]
            self._membership.forget(peer)
            logger.info("peer %s is gone: its connection has ended, and its machine refuses", peer[-8:])
            self._on_gone()


async def is_refused(addresses: Sequence[str]) -> bool:
    """Whether every one of a peer's addresses refuses a connection: nobody listens there any more."""
    endpoints = [tcp_endpoint(address) for address in addresses[:MAX_DIALLED]]
    if not endpoints:
        return False
    refusals = await asyncio.gather(*(_refuses(endpoint) for endpoint in endpoints))
    return all(refusals)


def tcp_endpoint(address: str) -> tuple[str, int] | None:
    """Host and port of /ip4/HOST/tcp/PORT[/p2p/ID], or ip6; None for relays, names and everything else."""
    match address.split("/"):
        case ["", "ip4" | "ip6", host, "tcp", port] | ["", "ip4" | "ip6", host, "tcp", port, "p2p", _]:
            return (host, int(port)) if _is_ip(host) and port.isdecimal() and len(port) <= 5 else None
        case _:
            return None


def _is_ip(host: str) -> bool:
    """Else the name would be looked up, which another peer must not be able to make us do.

    An IPv6 address with a zone is looked up as well (fe80::1%eth0), and a zone means nothing elsewhere.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


async def _refuses(endpoint: tuple[str, int] | None) -> bool:
    return endpoint is not None and await knock(endpoint, DIAL_SECONDS) == "refused"


async def knock(endpoint: tuple[str, int], seconds: float) -> Knocked:
    """What comes of a TCP connection to a host and port; it carries nothing and is closed at once."""
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(*endpoint)
    except ConnectionRefusedError:
        return "refused"
    # No way there, silence (TimeoutError is an OSError), no port, or no host (UnicodeError is a ValueError).
    except (OSError, OverflowError, ValueError):
        return "silent"
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return "open"
