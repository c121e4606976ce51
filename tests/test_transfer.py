"""Does a download end, and right, when a donor lies, dies or stalls?"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from coordinator import transfer
from coordinator.errors import NetworkError
from coordinator.network import Network
from coordinator.transfer import Piece, fetch_blob, serve_blobs
from tests.fakes import CALL_SECONDS, hash_of, new_directory, peer, running_networks

RUN = hash_of("run")
SIZE = 3 * 300_000 + 1234  # four pieces; each but the last is two parts of a stream
DATA = random.Random(0).randbytes(SIZE)
PIECES = [
    Piece(start, len(piece), hashlib.sha256(piece).hexdigest())
    for start, piece in ((start, DATA[start : start + 300_000]) for start in range(0, SIZE, 300_000))
]
StreamHandler = Callable[[str, Any], AsyncIterator[bytes]]


@pytest.fixture(scope="module")
def networks() -> Iterator[list[Network]]:
    with running_networks(3, new_directory()) as started:
        yield started


def make_honest(network: Network) -> None:
    serve_blobs(network, RUN, {"key": memoryview(DATA)}.get)


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of 300 kB may take 0.7 s, unless a donor was measured."""
    monkeypatch.setattr(transfer, "DEADLINE_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "UNMEASURED_BYTES_PER_SECOND", 3_000_000.0)


def fetch(
    network: Network, donors: list[Network], pieces: Sequence[Piece] = PIECES, **options: Any
) -> bytearray:
    peer_ids = [donor.peer_id for donor in donors]
    return network.run(
        fetch_blob(network, RUN, "key", pieces, peer_ids, **options), timeout_seconds=3 * CALL_SECONDS
    )


def test_from_one_donor_with_progress(networks: list[Network]) -> None:
    me, donor, _ = networks
    make_honest(donor)
    seen: list[int] = []
    assert fetch(me, [donor], on_progress=seen.append) == DATA
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert seen[-1] == SIZE


def test_from_two_donors(networks: list[Network]) -> None:
    me, *donors = networks
    for donor in donors:
        make_honest(donor)
    assert fetch(me, donors) == DATA


async def wrong_piece(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    yield bytes(body["stop"] - body["start"])


async def too_short(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    yield DATA[body["start"] : body["stop"] - 1]


async def endless(_peer_id: str, _body: Any) -> AsyncIterator[bytes]:
    while True:
        yield bytes(200_000)


async def dies(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    yield DATA[body["start"] : body["start"] + 1000]
    raise ConnectionResetError("died")


async def stalls(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    yield DATA[body["start"] : body["start"] + 1000]
    await asyncio.Event().wait()


async def drips(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
    """Never silent for long, and never done."""
    for offset in range(body["start"], body["stop"]):
        yield DATA[offset : offset + 1]
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("bad", [wrong_piece, too_short, endless, dies, stalls, drips])
@pytest.mark.parametrize("bad_is_first", [True, False])
def test_a_bad_donor_is_left_and_the_other_gives_its_pieces(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch, bad: StreamHandler, bad_is_first: bool
) -> None:
    make_impatient(monkeypatch)
    me, liar, honest = networks
    liar.on_stream("blob", bad)
    make_honest(honest)
    donors = [liar, honest] if bad_is_first else [honest, liar]
    assert fetch(me, donors) == DATA
    with pytest.raises(NetworkError, match="none of 1 peers gave the remaining 4 pieces"):
        fetch(me, [liar])


def test_more_donors_than_are_asked_at_once(networks: list[Network], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_DONORS", 1)
    me, liar, honest = networks
    liar.on_stream("blob", wrong_piece)
    make_honest(honest)
    assert fetch(me, [liar, liar, honest]) == DATA


def test_nobody_to_ask(networks: list[Network], monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)
    with pytest.raises(NetworkError, match="none of 0 peers"):
        fetch(networks[0], [])
    gone = networks[0].run(_fails(networks[0]), timeout_seconds=CALL_SECONDS)
    assert "none of 1 peers" in gone


async def _fails(network: Network) -> str:
    try:
        await fetch_blob(network, RUN, "key", PIECES, [peer("nobody")])
    except NetworkError as error:
        return str(error)
    return ""


def test_an_error_of_the_caller_ends_all_of_it(networks: list[Network]) -> None:
    me, *donors = networks
    for donor in donors:
        make_honest(donor)
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        raise KeyError("told to stop")

    with pytest.raises(KeyError):
        fetch(me, donors, on_progress=stop)
    assert fetch(me, donors) == DATA  # nothing of the first still runs, or holds a piece
    assert len(seen) <= 2


@pytest.mark.parametrize(
    ("own", "best", "expected"),
    [
        (1e6, 9e6, 6.0),  # 4 x 1 s + 2 s
        (None, 1e6, 6.0),
        (None, None, 34.0),  # 1 Mbit/s: 8 s a piece
        (1e3, None, 34.0),  # a stall, no rate
        (1e12, 1e3, 2.0 + 4e-6),
    ],
)
def test_deadlines_by_hand(own: float | None, best: float | None, expected: float) -> None:
    assert transfer.deadline_seconds(1_000_000, own, best, 100.0) == pytest.approx(expected)
    assert transfer.deadline_seconds(10**9, own, best, 100.0) <= 100.0


class Donor:
    """Honest, and counts what it was asked for; may wait before each piece, or die in the middle of one."""

    def __init__(
        self,
        network: Network,
        *,
        wait_seconds: float = 0.0,
        num_waits: int = 1000,
        dies_at: int | None = None,
    ) -> None:
        self.starts: list[int] = []
        self._wait_seconds, self._num_waits, self._dies_at = wait_seconds, num_waits, dies_at
        network.on_stream("blob", self.give)

    async def give(self, _peer_id: str, body: Any) -> AsyncIterator[bytes]:
        self.starts.append(body["start"])
        if len(self.starts) <= self._num_waits:
            await asyncio.sleep(self._wait_seconds)
        if len(self.starts) == self._dies_at:
            yield DATA[body["start"] : body["start"] + 1000]
            raise ConnectionResetError("died")
        yield DATA[body["start"] : body["stop"]]


def test_a_donor_that_dies_in_a_piece_costs_that_piece_only(networks: list[Network]) -> None:
    me, first, second = networks
    dying, other = Donor(first, dies_at=2), Donor(second, wait_seconds=0.05)
    assert fetch(me, [first, second]) == DATA
    twice = set(dying.starts) & set(other.starts)
    assert twice == {dying.starts[1]}
    assert len(dying.starts) + len(other.starts) == len(PIECES) + 1


def test_an_idle_donor_fetches_the_piece_that_another_has_for_too_long(networks: list[Network]) -> None:
    """The slow one is far from its deadline of several seconds: nobody leaves it, nobody waits for it."""
    me, first, second = networks
    stuck, quick = Donor(first, wait_seconds=5.0), Donor(second, wait_seconds=0.02)
    started = time.monotonic()
    assert fetch(me, [first, second], on_progress=lambda _: None) == DATA
    assert time.monotonic() - started < 4.0
    assert len(stuck.starts) == 1
    assert sorted(quick.starts) == [piece.start for piece in PIECES]


def test_a_donor_left_for_slowness_is_asked_again_when_nobody_else_is_left(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_impatient(monkeypatch)
    me, first, second = networks
    slow, dying = Donor(first, wait_seconds=2.0, num_waits=1), Donor(second, dies_at=2)
    assert fetch(me, [second, first], PIECES[:3]) == DATA[:900_000]
    assert len(dying.starts) == 2
    assert len(slow.starts) == 3  # left in its first piece, which took 2 s; then it gave both missing ones


def test_a_liar_is_not_asked_again(networks: list[Network]) -> None:
    me, liar, _ = networks
    asked = 0

    async def lie(_peer_id: str, body: Any) -> AsyncIterator[bytes]:
        nonlocal asked
        asked += 1
        yield bytes(body["stop"] - body["start"])

    liar.on_stream("blob", lie)
    with pytest.raises(NetworkError, match="the remaining 4 pieces"):
        fetch(me, [liar])
    assert asked == 1


def test_a_peer_gets_a_few_streams_at_one_time_and_another_is_not_kept_waiting(
    networks: list[Network],
) -> None:
    donor, greedy, modest = networks
    num_opened = 0

    large = memoryview(bytes(transfer.MAX_RANGE_BYTES))  # more than what the daemons take before it is read
    gate = asyncio.Event()

    def open_blob(key: str) -> memoryview:
        nonlocal num_opened
        num_opened += key == "large"
        return large if key == "large" else memoryview(DATA)

    serve_blobs(donor, RUN, open_blob)
    body = {"run": RUN, "key": "large", "start": 0, "stop": len(large)}

    async def hold() -> None:
        """Takes the first part and no more."""
        async for _ in greedy.stream(donor.peer_id, "blob", body, timeout_seconds=CALL_SECONDS):
            await gate.wait()

    held = [greedy.submit(hold()) for _ in range(20)]
    try:
        time.sleep(1.0)
        assert num_opened == transfer.MAX_STREAMS_PER_PEER
        assert fetch(modest, [donor]) == DATA
    finally:
        for future in held:
            future.cancel()


@pytest.mark.parametrize(
    "body",
    [
        None,
        {"run": hash_of("other"), "key": "key", "start": 0, "stop": 1},
        {"run": RUN, "key": "nothing", "start": 0, "stop": 1},
        {"run": RUN, "key": "key", "start": 0, "stop": SIZE + 1},
        {"run": RUN, "key": "key", "start": -1, "stop": 1},
        {"run": RUN, "key": "key", "start": 2, "stop": 1},
        {"run": RUN, "key": "key", "start": True, "stop": 1},
        {"run": RUN, "key": ["key"], "start": 0, "stop": 1},
        {"run": RUN, "key": "k" * 300, "start": 0, "stop": 1},
        {"run": RUN, "key": "key", "start": 0, "stop": 10**12},
    ],
)
def test_a_donor_refuses_what_makes_no_sense(networks: list[Network], body: object) -> None:
    me, donor, _ = networks
    make_honest(donor)

    async def ask() -> bytes:
        parts = [p async for p in me.stream(donor.peer_id, "blob", body, timeout_seconds=CALL_SECONDS)]
        return b"".join(parts)

    with pytest.raises(NetworkError):
        me.run(ask(), timeout_seconds=CALL_SECONDS)
