"""When must this process stop? Signals and a time limit, asked for wherever something takes long."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from coordinator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

POLL_SECONDS = 0.05
_TIME_IS_UP = "the time limit is reached", 0
_SIGNALS = {signal.SIGINT: ("interrupted", EXIT_INTERRUPTED), signal.SIGTERM: ("terminated", EXIT_TERMINATED)}
_listening: list[StopSwitch] = []


class StopRequested(Exception):
    """Raised by `StopSwitch.check`; unwinds to where the checkpoint is known to be good."""


@contextmanager
def ends_at_once() -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and the time limit of who listens end the process then and there.

    For what cannot be asked to stop and is safe to be killed, such as a download of the hub's library:
    it waits for its threads, and so does Python's orderly end. Does nothing in other threads than the main.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = min((switch.seconds_left for switch in _listening), default=math.inf)
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), _end, _TIME_IS_UP)
    timer.daemon = True
    timer.start()
    previous = {number: signal.signal(number, _on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    _end(*_SIGNALS[signal.Signals(number)])


def _end(reason: str, exit_code: int) -> None:
    os.write(2, f"\n{reason}\n".encode())  # not print: the signal may come in the middle of another one
    os._exit(exit_code)


class StopSwitch:
    """Set by Ctrl-C, SIGTERM, or the end of the time limit. Only the first reason counts."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self._ends_at = None if max_seconds is None else time.monotonic() + max_seconds
        # A plain flag: the handler of a signal runs between any two steps of the main thread, and an
        # Event, whose lock that thread may hold at that instant, would lock it out for good.
        self._is_set = False
        self.reason: str | None = None
        self.exit_code = 0

    @property
    def is_set(self) -> bool:
        if not self._is_set and self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._set(*_TIME_IS_UP)
        return self._is_set

    @property
    def seconds_left(self) -> float:
        """Of the time limit."""
        return math.inf if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    def check(self) -> None:
        if self.is_set:
            raise StopRequested(self.reason)

    def checking(self, on_progress: Callable[[float], None]) -> Callable[[float], None]:
        """`on_progress`, but it raises StopRequested when it is time to stop."""

        def progress(fraction: float) -> None:
            self.check()
            on_progress(fraction)

        return progress

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond a signal or the time limit. Raises StopRequested."""
        ends_at = time.monotonic() + seconds
        while not self.is_set and (left := ends_at - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        self.check()

    @contextmanager
    def listening(self) -> Iterator[StopSwitch]:
        """While the block runs, SIGINT and SIGTERM set the switch instead of ending the process.

        A second signal of the same kind while the first is being served changes nothing: the
        write in progress is finished, and all waits look at the switch.
        """
        previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        _listening.append(self)
        try:
            yield self
        finally:
            _listening.remove(self)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._set(*_SIGNALS[signal.Signals(number)])

    def _set(self, reason: str, exit_code: int) -> None:
        if self.reason is None:
            self.reason, self.exit_code = reason, exit_code
        self._is_set = True
