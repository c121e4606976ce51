"""May this peer use the machine now? Told by signal, by a daily schedule, or by what others do there.

`Manners.reason` is asked between rounds and after every training step. A peer that rests says so to the
swarm, gives up its vote in the round, and holds nobody up: the others go on without it.
"""

from __future__ import annotations

import datetime as dt
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import psutil

from coordinator.errors import UsageError

SAMPLE_SECONDS = 2.0  # between two looks at the processors
BUSY_SECONDS = 10.0  # others must be busy for so long before this peer rests ...
QUIET_SECONDS = 30.0  # ... and leave the machine alone for so long before it goes on
_WINDOW = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")


@dataclass(frozen=True)
class Schedule:
    """A window of every day, in local time; it may go over midnight."""

    start: dt.time
    end: dt.time  # not included

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Of "22:00-07:00". Raises UsageError."""
        match = _WINDOW.fullmatch(text.strip())
        try:
            if match is None:
                raise ValueError
            hours = [int(part) for part in match.groups()]
            start, end = dt.time(hours[0], hours[1]), dt.time(hours[2], hours[3])
        except ValueError:
            raise UsageError(
                f"--schedule {text[:40]!r}: give a window of the day as HH:MM-HH:MM, such as 22:00-07:00"
            ) from None
        if start == end:
            raise UsageError(f"--schedule {text[:40]!r}: the window is empty; leave the flag out for all day")
        return cls(start, end)

    def is_open(self, now: dt.time) -> bool:
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


class BusyWatch:
    """Whether others use the machine, with hysteresis: a short burst neither stops nor starts this peer."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: part of the machine, 0 to 1, that others may use."""
        self.is_busy = False
        self._threshold = threshold
        self._since: float | None = None  # when what others do first spoke against `is_busy`

    def update(self, share: float, now: float) -> None:
        """`share` of the machine that others used up to `now`, in seconds of any clock."""
        if (share > self._threshold) == self.is_busy:
            self._since = None
            return
        self._since = now if self._since is None else self._since
        if now - self._since >= (QUIET_SECONDS if self.is_busy else BUSY_SECONDS):
            self.is_busy, self._since = not self.is_busy, None


@dataclass(frozen=True)
class Usage:
    """Processor seconds since some instant."""

    at: float  # by time.monotonic()
    busy: float  # of all processes, on all processors
    own: float  # of this process and its children


def others_share(before: Usage, after: Usage, num_processors: int) -> float:
    """Part of all processors, 0 to 1, that processes other than ours used between two looks."""
    available = (after.at - before.at) * num_processors
    if available <= 0:
        return 0.0
    used = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, used / available))


def measure_usage() -> Usage:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice, too
    return Usage(time.monotonic(), sum(times) - guest - idle, _own_seconds(psutil.Process()))


def _own_seconds(process: psutil.Process) -> float:
    seconds = 0.0
    for member in (process, *process.children(recursive=True)):
        try:
            times = member.cpu_times()
        except psutil.Error:  # it has ended meanwhile; its parent counts it from now on
            continue
        seconds += times.user + times.system
        if member.pid == process.pid:
            seconds += times.children_user + times.children_system
    return seconds


class Manners:
    """Whether to rest, and why. SIGUSR1 says rest, SIGUSR2 says go on; the rest is looked at when asked."""

    def __init__(
        self,
        schedule: Schedule | None = None,
        busy_threshold: float | None = None,
        *,
        gpu_share: Callable[[], float] = lambda: 0.0,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now().astimezone(),
        clock: Callable[[], float] = time.monotonic,
        measure: Callable[[], Usage] = measure_usage,
    ) -> None:
        """`busy_threshold`: see BusyWatch; None: whatever others do. `gpu_share`: see GpuWatch."""
        self._schedule, self._now = schedule, now
        self._gpu_share, self._clock, self._measure = gpu_share, clock, measure
        self._busy = None if busy_threshold is None else BusyWatch(busy_threshold)
        self._last: Usage | None = None
        self._is_told = False  # a plain flag: see StopSwitch

    def reason(self) -> str | None:
        """Why to rest now; None: go on."""
        if self._is_told:
            return "told to pause (SIGUSR2 lets it go on)"
        if self._schedule is not None and not self._schedule.is_open(self._now().time()):
            return f"outside of its hours ({self._schedule})"
        if self._busy is not None:
            self._look()
            if self._busy.is_busy:
                return "others use this machine"
        return None

    @contextmanager
    def listening(self) -> Iterator[Manners]:
        """While the block runs, SIGUSR1 and SIGUSR2 are heard; without it SIGUSR1 ends a process."""
        if not hasattr(signal, "SIGUSR1"):  # Windows
            yield self
            return
        previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGUSR1, signal.SIGUSR2)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._is_told = number == signal.SIGUSR1

    def _look(self) -> None:
        if self._busy is None:
            return
        if self._last is not None and self._clock() - self._last.at < SAMPLE_SECONDS:
            return
        usage, last = self._measure(), self._last
        self._last = usage
        if last is not None:
            share = others_share(last, usage, psutil.cpu_count() or 1)
            self._busy.update(max(share, self._gpu_share()), usage.at)
