"""Does a peer that is asked dial who asks, and nobody else?"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.dial_back import MAX_ASKERS, MAX_AT_ONCE, PAUSE_SECONDS, DialBack, DialledBack, ask_dial_back
from coordinator.network import Network, PeerUnreachable
from coordinator.records import RecordError
from tests.fakes import CALL_SECONDS, Clock, addresses, hash_of, network_config

RUN = hash_of("run")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair(tmp_path: Path, clock: Clock) -> Iterator[tuple[Network, Network]]:
    """Who answers, and who asks."""
    with Network(network_config(tmp_path / "a.key")) as answering:
        DialBack(answering, RUN, clock).start()
        entry = tuple(addresses(answering)[:1])
        with Network(network_config(tmp_path / "b.key", initial_peers=entry)) as asking:
            yield answering, asking


def ask(pair: tuple[Network, Network], port: int, run: str = RUN) -> DialledBack:
    answering, asking = pair
    asked = ask_dial_back(asking, answering.peer_id, run, port, timeout_seconds=CALL_SECONDS)
    return asking.run(asked, timeout_seconds=2 * CALL_SECONDS)


def test_the_port_is_dialled_at_the_address_that_the_asker_comes_from(
    pair: tuple[Network, Network], clock: Clock
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert ask(pair, port) == DialledBack("127.0.0.1", port, "open")
        listening.settimeout(CALL_SECONDS)
        dialled, _ = listening.accept()
        with dialled:
            dialled.settimeout(CALL_SECONDS)
            assert dialled.recv(1) == b""  # it carries nothing
    clock.now += PAUSE_SECONDS
    assert ask(pair, port) == DialledBack("127.0.0.1", port, "refused")


def test_what_is_refused(pair: tuple[Network, Network], clock: Clock) -> None:
    for port in (0, -1, 65536, True, 1.5, None, "22"):
        with pytest.raises(PeerUnreachable, match="the port is a number"):
            ask(pair, port)  # type: ignore[arg-type]
    with pytest.raises(PeerUnreachable, match="another run"):
        ask(pair, 9, hash_of("other"))
    ask(pair, 9)
    with pytest.raises(PeerUnreachable, match="asked again"):
        ask(pair, 9)
    clock.now += PAUSE_SECONDS
    ask(pair, 9)


def test_questions_are_bounded_in_number_and_who_asked_is_forgotten(
    pair: tuple[Network, Network], clock: Clock
) -> None:
    answering = DialBack(pair[0], RUN, clock)
    for number in range(2 * MAX_ASKERS):
        answering._bound(f"peer {number}")
    assert len(answering._asked_at) == MAX_ASKERS
    answering._num_dialling = MAX_AT_ONCE
    with pytest.raises(RecordError, match="busy"):
        answering._bound("another")
