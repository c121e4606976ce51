"""How a chain of commits comes from another peer, page by page, each verified; and how mine is handed out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from coordinator.chain import Chain, is_better
from coordinator.errors import NetworkError
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.pace import Pace
from coordinator.records import MAX_MESSAGE_BYTES, RecordError, SignedCommit, parse_json, parse_record

logger = logging.getLogger(__name__)

MAX_CHAIN_REPLY_COMMITS = 50
MAX_CHAIN_REPLY_BYTES = MAX_MESSAGE_BYTES - 4096  # with room for brackets and commas


class ChainExchange:
    def __init__(
        self, network: Network, membership: Membership, pace: Pace, own_chain: Callable[[], Chain]
    ) -> None:
        self._network, self._membership, self._pace = network, membership, pace
        self._own_chain = own_chain
        self._rejected_tips: set[str] = set()
        network.on_call("chain", self._on_chain)

    def known_tips(self) -> set[str]:
        """Commits that need no looking at: the own ones, and the tips of chains that lost."""
        return {signed.commit.hash for signed in self._own_chain().commits} | self._rejected_tips

    async def best_claimed(self) -> Chain | None:
        """The best chain among those that live peers claim, verified, if it is better than the own one."""
        best: Chain | None = None
        known = self.known_tips()
        claims = {
            m.record.commit: m.peer_id
            for m in self._membership.live(self._network.now())
            if m.record.round > 0 and m.record.commit not in known
        }
        for tip, peer_id in claims.items():
            try:
                chain = await self._fetch(peer_id)
            except (NetworkError, RecordError) as error:
                logger.warning("no chain from %s: %s", peer_id[-8:], error)
                self._membership.forget(peer_id)
                continue
            if not is_better(chain, self._own_chain()):
                self._rejected_tips.add(chain.tip)
                if chain.tip != tip:  # not what it claims; another peer may hold the chain of that tip
                    self._membership.forget(peer_id)
            elif best is None or is_better(chain, best):
                best = chain
        return best

    async def _on_chain(self, _peer_id: str, body: Any) -> bytes:
        chain = self._own_chain()
        if not isinstance(body, dict) or body.get("run") != chain.spec.digest:
            raise RecordError("of another run")
        after = body.get("after")
        if type(after) is not int or after < 0:
            raise RecordError("after is a round")
        replies: list[str] = []
        size = 0
        for signed in chain.commits[after : after + MAX_CHAIN_REPLY_COMMITS]:
            text = signed.canonical().decode()
            size += len(text) + 1
            if replies and size > MAX_CHAIN_REPLY_BYTES:
                break
            replies.append(text)
        return f"[{','.join(replies)}]".encode()

    async def _fetch(self, peer_id: str) -> Chain:
        """What `peer_id` says happened, verified from my own chain on, or from the start where it differs.

        Page by page, so that the first commit that does not fit ends it. Raises NetworkError, RecordError.
        """
        chain = self._own_chain()
        page = await self._fetch_commits(peer_id, chain.round)
        if not page or page[0].commit.previous != chain.tip:
            chain = Chain(chain.spec)
            page = await self._fetch_commits(peer_id, 0)
        while page:
            for signed in page:
                chain = chain.extended(signed)
            page = await self._fetch_commits(peer_id, chain.round)
        return chain

    async def _fetch_commits(self, peer_id: str, after: int) -> list[SignedCommit]:
        """The next ones after round `after`; none at the end of the chain."""
        spec = self._own_chain().spec
        if after >= spec.num_rounds:
            return []
        limit = self._pace.call_seconds(peer_id, size_bytes=MAX_CHAIN_REPLY_BYTES)
        body = {"run": spec.digest, "after": after}
        reply = await self._network.call(peer_id, "chain", body, timeout_seconds=limit)
        page = parse_json(reply)
        if not isinstance(page, list):
            raise RecordError("a chain is a list of commits")
        return [parse_record(entry, SignedCommit) for entry in page]
