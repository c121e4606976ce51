"""Does a peer stop when told: by signal, by time limit, at any instant, with the right exit code?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from peer.stopping import StopRequested, StopSwitch


@pytest.fixture
def listening() -> Iterator[StopSwitch]:
    with StopSwitch().listening() as switch:
        yield switch


def test_nothing_happens_before_it_is_told() -> None:
    switch = StopSwitch()
    switch.check()
    switch.wait(0.0)
    assert not switch.is_set
    assert (switch.reason, switch.exit_code) == (None, 0)


@pytest.mark.parametrize(
    ("number", "reason", "exit_code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_signals(listening: StopSwitch, number: signal.Signals, reason: str, exit_code: int) -> None:
    os.kill(os.getpid(), number)
    with pytest.raises(StopRequested, match=reason):
        listening.check()
    assert listening.is_set
    assert (listening.reason, listening.exit_code) == (reason, exit_code)


def test_only_the_first_reason_counts(listening: StopSwitch) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert (listening.reason, listening.exit_code) == ("terminated", 143)


def test_the_time_limit_ends_with_zero() -> None:
    switch = StopSwitch(max_seconds=0.01)
    with pytest.raises(StopRequested, match="time limit"):
        switch.wait(60.0)
    assert (switch.reason, switch.exit_code) == ("the time limit is reached", 0)


def test_a_signal_ends_a_wait(listening: StopSwitch) -> None:
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(StopRequested):
        listening.wait(60.0)
    timer.join()
    assert time.monotonic() - started < 30.0


def test_many_signals_at_any_instant_of_a_wait_lock_nothing_up(listening: StopSwitch) -> None:
    """A handler that took a lock, such as an Event's, would stop here for good, sooner or later."""
    hits: list[int] = []

    def on_alarm(number: int, frame: FrameType | None) -> None:
        hits.append(number)
        listening._on_signal(signal.SIGINT, frame)

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        ends_at = time.monotonic() + 0.3
        while time.monotonic() < ends_at:
            listening._is_set = False
            try:
                listening.wait(0.0005)
            except StopRequested:
                continue
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    assert len(hits) > 10


def test_checking_passes_progress_on_until_told(listening: StopSwitch) -> None:
    seen: list[float] = []
    progress = listening.checking(seen.append)
    progress(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
        progress(0.6)
    assert seen == [0.5]


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopSwitch().listening():
        raise KeyError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
