"""Can a peer be dialled from outside? Another one tries, and says what came of it.

    dial_back   who asks -> a peer of the run    {"run", "port"}
                the answer                       {"host", "knocked": "open" | "refused" | "silent"}

A peer cannot find out for itself: its own second process does not come through its router and its firewall,
and a router may let nobody out and in again. libp2p has the same question (AutoNAT), but p2pd does not tell
what it found. Here one TCP connection is made, without a byte on it: to the port that is named, at the IP
address from which the asker is connected and at no other, so that nobody can be made to dial a third one.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from coordinator.departures import Knocked, knock
from coordinator.errors import NetworkError
from coordinator.network import Network
from coordinator.records import RecordError, parse_json

METHOD = "dial_back"
DIAL_SECONDS = 5.0
PAUSE_SECONDS = 2.0  # between two questions of one peer
MAX_AT_ONCE = 4
MAX_ASKERS = 1024  # remembered for their pause


@dataclass(frozen=True)
class DialledBack:
    """What a peer says of its try to dial this one."""

    host: str  # at which it sees this peer
    port: int
    knocked: Knocked


class DialBack:
    """Answers who asks; in the network's thread."""

    def __init__(self, network: Network, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._network, self._run, self._clock = network, run, clock
        self._asked_at: OrderedDict[str, float] = OrderedDict()  # by peer
        self._num_dialling = 0

    def start(self) -> None:
        self._network.on_call(METHOD, self._on_dial_back)

    async def _on_dial_back(self, peer_id: str, body: Any) -> bytes:
        port = body.get("port") if isinstance(body, dict) else None
        if type(port) is not int or not 0 < port < 65536:
            raise RecordError("the port is a number from 1 to 65535")
        if body.get("run") != self._run:
            raise RecordError("of another run")
        self._bound(peer_id)
        self._num_dialling += 1
        try:
            hosts = await self._network.remote_hosts(peer_id)
            if not hosts:
                raise RecordError("you are connected through a relay only: there is no address to dial")
            return json.dumps(
                {"host": hosts[0], "knocked": await knock((hosts[0], port), DIAL_SECONDS)}
            ).encode()
        except NetworkError as error:
            raise RecordError(str(error)) from error
        finally:
            self._num_dialling -= 1

    def _bound(self, peer_id: str) -> None:
        """Raises RecordError."""
        now = self._clock()
        if now - self._asked_at.pop(peer_id, -PAUSE_SECONDS) < PAUSE_SECONDS:
            self._asked_at[peer_id] = now
            raise RecordError(f"asked again within {PAUSE_SECONDS:.0f} s")
        self._asked_at[peer_id] = now
        if len(self._asked_at) > MAX_ASKERS:
            self._asked_at.popitem(last=False)
        if self._num_dialling >= MAX_AT_ONCE:
            raise RecordError("busy dialling others: ask again later")


async def ask_dial_back(
    network: Network, peer_id: str, run: str, port: int, *, timeout_seconds: float
) -> DialledBack:
    """Raises PeerUnreachable, and RecordError for an answer that is none."""
    body = {"run": run, "port": port}
    reply = parse_json(await network.call(peer_id, METHOD, body, timeout_seconds=timeout_seconds))
    if not isinstance(reply, dict) or reply.get("knocked") not in get_args(Knocked):
        raise RecordError("not an answer to a question to dial back")
    return DialledBack(str(reply.get("host"))[:64], port, reply["knocked"])
