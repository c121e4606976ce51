"""How does one watch a run without taking part? The board and the chain, read again and again.

An observer never publishes a record, so no peer counts it, waits for it or calls it; of the DHT it is a
client, which stores nothing for others. Each commit that it is told is verified, as a peer would.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from coordinator.board import Board, BoardValidator
from coordinator.chain import Chain
from coordinator.chain_exchange import ChainExchange
from coordinator.errors import NetworkError
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.overview import Overview, ScoreHistory, make_overview
from coordinator.pace import Pace
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
LOOK_SECONDS = 60.0  # the board takes at most 8, a chain a call for each 50 commits
FIRST_LOOK_SECONDS = 8.0  # until somebody is seen
PAUSE_SECONDS = 0.25


class Observer:
    """Of one run, over a running network. Its methods may be called from any one thread."""

    def __init__(self, network: Network, spec: RunSpec) -> None:
        self._network, self._chain = network, Chain(spec)
        self._membership = Membership(spec, network.peer_id, network.admission)
        self._board = Board(network, spec.digest)
        self._scores = ScoreHistory()
        pace = Pace(spec.lease_seconds)
        self._chains = ChainExchange(network, self._membership, pace, lambda: self._chain)

    @property
    def chain(self) -> Chain:
        return self._chain

    def start(self) -> None:
        """Raises NetworkError."""
        validator = BoardValidator(self._chain.spec.digest, admission=self._network.admission)
        self._network.run(self._network.start_dht(validator), timeout_seconds=START_SECONDS)

    def look(self, check: Callable[[], None] = lambda: None) -> Overview:
        """What is there now; `check` is called while waiting, and may raise.

        A network that does not answer is no error: it is said, beside what was known. Raises NetworkError
        when there is no network any more.
        """
        problem = None
        try:
            self._network.run(self._look(), timeout_seconds=LOOK_SECONDS, check=check)
        except NetworkError as error:
            problem = str(error)
            logger.warning("could not look at the run: %s", error)
        if not self._network.is_daemon_alive():
            raise NetworkError("the p2p daemon has died; start the monitor again")
        heard = self._membership.heard()
        for peer_id, record in heard.items():
            self._scores.add(peer_id, record, last_round=self._chain.round)
        if problem is None and not any(r.expires_at > self._network.now() for r in heard.values()):
            problem = "no peer has been heard of within the lease: it may be that none is left"
        return make_overview(self._chain, heard, self._scores, now=self._network.now(), problem=problem)

    def first_look(self, check: Callable[[], None] = lambda: None) -> Overview:
        """As `look`, but the first heartbeats are waited for, some seconds at most. Raises NetworkError."""
        ends_at = time.monotonic() + FIRST_LOOK_SECONDS
        overview = self.look(check)
        while not overview["peers"] and time.monotonic() < ends_at:
            time.sleep(PAUSE_SECONDS)
            overview = self.look(check)
        return overview

    async def _look(self) -> None:
        await self._board.read_into(self._membership)
        found = await self._chains.best_claimed()
        if found is not None:
            self._chain = found
