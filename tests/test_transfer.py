"""Does a download end, and right, when a donor lies, dies or stalls?"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
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


def fetch(network: Network, donors: list[Network], **options: Any) -> bytearray:
    peer_ids = [donor.peer_id for donor in donors]
    return network.run(
        fetch_blob(network, RUN, "key", PIECES, peer_ids, **options), timeout_seconds=3 * CALL_SECONDS
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
    monkeypatch.setattr(transfer, "STALL_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(transfer, "SLOWEST_BYTES_PER_SECOND", 600_000)
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
    monkeypatch.setattr(transfer, "STALL_TIMEOUT_SECONDS", 3.0)
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
