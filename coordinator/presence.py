"""How the others learn where I stand: the own heartbeat, on the board and by calls; and calls in general.

The deadline of a call follows from the earlier ones to the same peer (`pace.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

from coordinator.admission import Admission
from coordinator.board import Board
from coordinator.errors import NetworkError
from coordinator.identity import Identity
from coordinator.membership import Membership
from coordinator.network import Network, PeerUnreachable
from coordinator.pace import Pace
from coordinator.records import PeerRecord, sign
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

TELLING_SECONDS = 2.0  # at most so long a peer that does not answer holds up who tells all others something


class Presence:
    def __init__(
        self,
        network: Network,
        identity: Identity,
        spec: RunSpec,
        membership: Membership,
        pace: Pace,
        heartbeat: Callable[[], PeerRecord],
    ) -> None:
        """`heartbeat` makes the own record of this moment."""
        self._network, self._identity, self._membership = network, identity, membership
        self._board = Board(network, spec.digest)
        self._lease_seconds = spec.lease_seconds
        self._pace, self._heartbeat = pace, heartbeat

    async def read_board(self) -> None:
        try:
            await self._board.read_into(self._membership)
        except NetworkError as error:
            logger.warning("could not read the board: %s", error)

    async def keep_spreading_revocations(self, admission: Admission) -> None:
        """By way of the DHT, for who was away when they were told."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            try:
                await self._board.publish_revocations(admission)
                await self._board.read_revocations(admission)
            except NetworkError as error:
                logger.info("the revocations could not be looked at: %s", error)

    async def publish(self) -> None:
        record = self._heartbeat()
        try:
            await self._board.publish(sign(record, self._identity), expires_at=record.expires_at)
        except NetworkError as error:
            logger.warning("could not publish the heartbeat: %s", error)

    async def keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 6)
            await self.publish()

    async def tell_everybody(self) -> None:
        await self.tell_all("heartbeat", sign(self._heartbeat(), self._identity).to_json())

    async def tell_all(self, method: str, body: object) -> None:
        """To all who are here. Those who are slow to answer hold nobody up: their calls end by themselves."""
        live = self._membership.live(self._network.now())
        calls = [self._network.create_task(self.tell(member.peer_id, method, body)) for member in live]
        if calls:
            await asyncio.wait(calls, timeout=TELLING_SECONDS)

    async def tell(self, peer_id: str, method: str, body: object) -> None:
        """Whether it arrives or not."""
        try:
            await self.call(peer_id, method, body)
        except PeerUnreachable as error:
            logger.info("%s not delivered: %s", method, error)

    async def call(self, peer_id: str, method: str, body: object) -> bytes:
        """Raises PeerUnreachable."""
        limit = self._pace.call_seconds(peer_id, size_bytes=len(json.dumps(body)))
        started = time.monotonic()
        try:
            reply = await self._network.call(peer_id, method, body, timeout_seconds=limit)
        except PeerUnreachable:
            if time.monotonic() - started >= limit:
                self._pace.timed_out(peer_id)
            raise
        self._pace.measured(peer_id, time.monotonic() - started)
        return reply
