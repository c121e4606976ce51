"""How much may one peer ask of us? Token buckets per peer and for all of them: pure, the time is passed in.

Who asks faster than its budget waits; who does not wait either is refused; who is refused too often
is cut off for a while. So a flood costs its sender the connection, and the others a bounded share
of one core (`tests/test_network.py` floods real networks).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_PEERS_REMEMBERED = 4096
COMPLAINT_SECONDS = 60.0  # one line per peer and minute
T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """A budget in tokens: a call costs one, and more for its size and that of the answer."""

    per_second: float
    burst: float  # tokens of a peer that has been quiet
    max_delay_seconds: float  # who would have to wait longer is refused


@dataclass(frozen=True)
class Budget:
    """What one kind of request may cost."""

    per_peer: Rate
    total: Rate
    max_refused: int  # refusals of one peer within a minute; beyond that it is cut off
    cut_off_seconds: float = 30.0  # how long it stays cut off


class Bucket:
    def __init__(self, rate: Rate, now: float) -> None:
        self._rate, self._level, self._at = rate, rate.burst, now

    def delay(self, now: float) -> float | None:
        """Seconds until the next request is due; None: too many are waiting already."""
        rate = self._rate
        self._level = min(rate.burst, self._level + max(0.0, now - self._at) * rate.per_second)
        self._at = max(self._at, now)
        wait = max(0.0, 1.0 - self._level) / rate.per_second
        return wait if wait <= rate.max_delay_seconds else None

    def take(self, tokens: float) -> None:
        """The level may fall below zero: what follows a large request waits for it."""
        self._level -= tokens


@dataclass
class _Account:
    bucket: Bucket
    num_refused: int = 0  # since `window_at`
    window_at: float = 0.0
    complained_at: float = float("-inf")
    num_unlogged: int = 0  # refusals since the last line in the log
    cut_off_until: float = float("-inf")


@dataclass(frozen=True)
class Refusal:
    num_unlogged: int  # refusals that the log should tell now; 0: be silent
    is_cut_off: bool  # whether its connection should be closed


class Limiter:
    """Budgets of one kind of request, for all peers."""

    def __init__(self, budget: Budget, now: float) -> None:
        self._budget = budget
        self._total = Bucket(budget.total, now)
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def admit(self, peer_id: str, now: float, tokens: float = 1.0) -> float | Refusal:
        """Seconds to wait before the request is served, or why it is not."""
        account = self._account(peer_id, now)
        if now >= account.cut_off_until:
            own, total = account.bucket.delay(now), self._total.delay(now)
            if own is not None and total is not None:
                account.bucket.take(tokens)
                self._total.take(tokens)
                return max(own, total)
            if own is not None:  # the fault of others: no strike
                return Refusal(self._complaint(account, now), is_cut_off=False)
        return self._refuse(account, now)

    def charge(self, peer_id: str, now: float, tokens: float) -> None:
        """For what a request that was admitted has cost beyond its own size; what follows waits for it."""
        self._account(peer_id, now).bucket.take(tokens)
        self._total.take(tokens)

    def is_overdrawn(self, peer_id: str, now: float) -> bool:
        """Whether what a peer was given since it was admitted is more than it may wait for."""
        return self._account(peer_id, now).bucket.delay(now) is None

    def _refuse(self, account: _Account, now: float) -> Refusal:
        if now >= account.window_at + COMPLAINT_SECONDS:
            account.window_at, account.num_refused = now, 0
        account.num_refused += 1
        if account.num_refused > self._budget.max_refused:
            account.num_refused = 0
            account.cut_off_until = now + self._budget.cut_off_seconds
        return Refusal(self._complaint(account, now), is_cut_off=now < account.cut_off_until)

    @staticmethod
    def _complaint(account: _Account, now: float) -> int:
        account.num_unlogged += 1
        if now < account.complained_at + COMPLAINT_SECONDS:
            return 0
        num_unlogged, account.num_unlogged, account.complained_at = account.num_unlogged, 0, now
        return num_unlogged

    def _account(self, peer_id: str, now: float) -> _Account:
        account = self._accounts.get(peer_id)
        if account is None:
            account = self._accounts[peer_id] = _Account(Bucket(self._budget.per_peer, now))
            if len(self._accounts) > MAX_PEERS_REMEMBERED:
                self._accounts.popitem(last=False)  # whoever has been silent for longest
        self._accounts.move_to_end(peer_id)
        return account


class Recent(Generic[T]):
    """A set of at most so many; what was added first is forgotten first."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._items: dict[T, None] = {}

    def add(self, item: T) -> None:
        self._items[item] = None
        if len(self._items) > self._max_size:
            del self._items[next(iter(self._items))]

    def clear(self) -> None:
        self._items.clear()

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class OpenStreams:
    """How many streams each peer holds open here, and all of them together.

    Once half of the room is taken, a peer gets an eighth of what it could have before: a round needs few, and
    a dozen peers that hold all they may must not leave the others without any.
    """

    def __init__(self, max_per_peer: int, max_total: int) -> None:
        self._max_per_peer, self._max_total = max_per_peer, max_total
        self._open: dict[str, int] = {}
        self.total = 0

    def open(self, peer_id: str) -> bool:
        """False when it has too many; else `close` must follow."""
        is_crowded = 2 * self.total >= self._max_total
        most = max(1, self._max_per_peer // 8) if is_crowded else self._max_per_peer
        if self._open.get(peer_id, 0) >= most or self.total >= self._max_total:
            return False
        self._open[peer_id] = self._open.get(peer_id, 0) + 1
        self.total += 1
        return True

    def close(self, peer_id: str) -> None:
        self.total -= 1
        self._open[peer_id] -= 1
        if not self._open[peer_id]:
            del self._open[peer_id]
