"""Does a peer rest when it should, only then, and without holding up the others?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path

import psutil
import pytest

from coordinator.errors import UsageError
from peer.manners import (
    BUSY_SECONDS,
    QUIET_SECONDS,
    BusyWatch,
    Manners,
    Schedule,
    Usage,
    measure_usage,
    others_share,
)
from scripts.swarm_processes import LocalSwarm
from tests.test_swarm import committed, start_peer, start_run, write_task


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("9:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
        ("00:00-23:59", ["00:00", "23:58"], ["23:59"]),
    ],
)
def test_windows_of_the_day(window: str, inside: list[str], outside: list[str]) -> None:
    schedule = Schedule.parse(window)
    assert all(schedule.is_open(time_of_day.fromisoformat(text)) for text in inside)
    assert not any(schedule.is_open(time_of_day.fromisoformat(text)) for text in outside)


@pytest.mark.parametrize("text", ["", "22:00", "22-07", "24:00-07:00", "22:00-07:60", "7:00-7:00", "a:b-c:d"])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--schedule"):
        Schedule.parse(text)


def test_outside_of_its_hours_it_rests_and_says_which_they_are() -> None:
    now = datetime(2026, 1, 1, 21, 59, tzinfo=UTC)
    manners = Manners(Schedule.parse("22:00-07:00"), now=lambda: now)
    assert manners.reason() == "outside of its hours (22:00-07:00)"
    now += timedelta(minutes=1)
    assert manners.reason() is None


def test_others_share_by_hand() -> None:
    """4 processors for 10 s are 40 s; 30 were used, 10 of them by us: others used half."""
    assert others_share(Usage(5.0, 100.0, 20.0), Usage(15.0, 130.0, 30.0), 4) == pytest.approx(0.5)
    assert others_share(Usage(5.0, 100.0, 20.0), Usage(15.0, 105.0, 30.0), 4) == 0.0  # rounding of the system
    assert others_share(Usage(5.0, 100.0, 20.0), Usage(5.0, 105.0, 20.0), 4) == 0.0


def test_a_burst_changes_nothing_what_lasts_does() -> None:
    watch = BusyWatch(0.5)
    for share, now in [(0.9, 0.0), (0.9, BUSY_SECONDS - 1), (0.4, BUSY_SECONDS), (0.9, BUSY_SECONDS + 1)]:
        watch.update(share, now)
        assert not watch.is_busy
    watch.update(0.9, 2 * BUSY_SECONDS + 1)
    assert watch.is_busy
    start = 3 * BUSY_SECONDS
    for share, now in [(0.1, start), (0.6, start + QUIET_SECONDS - 1), (0.1, start + QUIET_SECONDS)]:
        watch.update(share, now)
        assert watch.is_busy
    watch.update(0.5, start + 2 * QUIET_SECONDS)  # at the threshold is not above it
    assert not watch.is_busy


def test_what_a_child_computes_is_ours() -> None:
    before = measure_usage()
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)
    after = measure_usage()
    assert after.own - before.own > 0.1
    assert after.busy >= before.busy
    assert after.at > before.at


class MachineOfFour:
    """Four processors and a clock of its own; `others` and `gpu` are what others use from now on."""

    def __init__(self) -> None:
        self.now = self.busy = self.others = self.gpu = 0.0

    def measure(self) -> Usage:
        return Usage(self.now, self.busy, own=0.0)

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds
        self.busy += 4 * seconds * self.others


@pytest.mark.parametrize("what", ["others", "gpu"])
def test_it_rests_while_others_use_processors_or_gpu(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    machine = MachineOfFour()
    manners = Manners(
        None, 0.5, gpu_share=lambda: machine.gpu, clock=lambda: machine.now, measure=machine.measure
    )
    reasons = []
    for share, seconds in [(0.0, 4.0), (0.6, BUSY_SECONDS + 4.0), (0.4, QUIET_SECONDS + 4.0)]:
        setattr(machine, what, share)
        for _ in range(round(seconds / 2)):
            machine.pass_seconds(2.0)
            reasons.append(manners.reason())
    # It looks every two seconds; a load is seen at its first look, and must last from there.
    rests = "others use this machine"
    assert reasons == [None] * 2 + [None] * 5 + [rests] * 2 + [rests] * 15 + [None] * 2


def test_between_two_looks_it_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked after every step, and a measurement reads all children of the process."""
    measured: list[float] = []
    machine = MachineOfFour()

    def measure() -> Usage:
        measured.append(machine.now)
        return machine.measure()

    manners = Manners(None, 0.5, clock=lambda: machine.now, measure=measure)
    for _ in range(9):
        manners.reason()
        machine.pass_seconds(0.5)
    assert measured == [0.0, 2.0, 4.0]


def test_signals_pause_and_resume() -> None:
    manners = Manners()
    with manners.listening():
        assert manners.reason() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert manners.reason() == "told to pause (SIGUSR2 lets it go on)"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert manners.reason() is None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_paused_peers_hold_nobody_up_and_go_on_with_the_swarms_state(tmp_path: Path) -> None:
    """One is paused by signal and let go on, one is outside of its hours all the time."""
    soon = datetime.now().astimezone() + timedelta(hours=2)
    hours = f"{soon:%H:%M}-{soon + timedelta(hours=1):%H:%M}"
    flags = ("--rounds", "14", "--round-seconds", "4", "--min-peers", "2", "--lease-seconds", "10")
    tasks = {name: write_task(tmp_path / f"{name}.jsonl", seed=i) for i, name in enumerate("abcd")}
    with LocalSwarm(tmp_path / "logs") as swarm:
        _, entry = start_run(swarm, tmp_path, *flags)
        peers = {name: start_peer(swarm, name, tmp_path, tasks[name], entry) for name in "abc"}
        resting = start_peer(swarm, "d", tmp_path, tasks["d"], [*entry, "--schedule", hours])
        swarm.wait_for(peers["c"], "committed", timeout_seconds=120.0)
        peers["c"].process.send_signal(signal.SIGUSR1)
        paused = swarm.wait_for(peers["c"], "paused", timeout_seconds=60.0)
        swarm.wait_for(
            peers["a"],
            "committed",
            timeout_seconds=120.0,
            where=lambda event: event["round"] > paused["round"],
        )
        swarm.wait_for(
            peers["c"], "caught_up", timeout_seconds=60.0, where=lambda e: e["round"] >= paused["round"]
        )
        watched = swarm.start("monitor", "coordinator.monitor", [*entry, "--once"])
        seen = swarm.wait_for(watched, "overview", timeout_seconds=60.0)
        peer_id = peers["c"].of_kind("joined")[0]["peer_id"]
        (told,) = (peer for peer in seen["peers"] if peer["peer_id"] == peer_id)
        assert (told["status"], told["phase"]) == ("live", "paused")
        missed = [(line["what"], line["reason"]) for line in seen["dropped"] if line["peer_id"] == peer_id]
        assert missed[0] == ("absent", "paused")  # the newest; when it began it may have been late, too
        assert peers["c"].process.poll() is None
        assert max(committed(peers["c"])) <= paused["round"]
        peers["c"].process.send_signal(signal.SIGUSR2)
        swarm.wait_for(peers["c"], "resumed", timeout_seconds=60.0)
        swarm.wait_until_ended([*peers.values(), resting], timeout_seconds=250.0)
    assert set(committed(peers["a"])) == set(range(1, 15))
    after = {number for number in committed(peers["c"]) if number > paused["round"] + 1}
    assert after, "took no part after its pause"
    assert not resting.of_kind("finetuned")
    assert hours in resting.of_kind("paused")[0]["reason"]
    assert resting.of_kind("caught_up")[-1]["state_hash"] == committed(peers["a"])[14]
