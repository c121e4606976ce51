"""Are the processes of a local swarm followed, and surely ended?"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.errors import SwarmError
from scripts.swarm_processes import Event, LocalSwarm, sigterm_as_exit

TIMEOUT_SECONDS = 30.0

# A stand-in for a peer: tells its events and its child, ends when told in argv[1].
CHILD = """
import json, os, signal, subprocess, sys, time

def main(arguments):
    what = arguments[0]
    grandchild = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL)
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("not json")
    print(json.dumps({"event": "ready", "pid": grandchild.pid}), flush=True)
    print("a line of the log", file=sys.stderr, flush=True)
    if what == "fail":
        grandchild.kill()
        return 7
    if what == "end":
        grandchild.kill()
        print(json.dumps({"event": "stopped", "threads": os.environ["OMP_NUM_THREADS"]}))
        return 0
    while True:
        time.sleep(1000)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
FORKED = ("json",)


@pytest.fixture(autouse=True)
def child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swarm_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))  # which forked processes get


@pytest.mark.parametrize(("preload", "num_threads"), [((), 3), (FORKED, 1)])
def test_events_are_followed_and_other_output_goes_to_the_log(
    tmp_path: Path, preload: tuple[str, ...], num_threads: int
) -> None:
    seen: list[tuple[str, str]] = []

    def see(name: str, event: Event) -> None:
        seen.append((name, event["event"]))

    with LocalSwarm(tmp_path / "logs", see, preload=preload) as swarm:
        process = swarm.start("one", "swarm_child", ["end"], num_threads=num_threads)
        swarm.wait_until_ended([process], timeout_seconds=TIMEOUT_SECONDS)
        assert process.exit_code == 0
        assert process.of_kind("stopped") == [{"event": "stopped", "threads": str(num_threads)}]
    assert seen == [("one", "ready"), ("one", "stopped")]
    log = process.log_file.read_text()
    assert "not an event: not json" in log
    assert "a line of the log" in log


@pytest.mark.parametrize("preload", [(), FORKED])
def test_nothing_is_left_after_the_block_not_even_in_other_sessions(
    tmp_path: Path, preload: tuple[str, ...]
) -> None:
    with LocalSwarm(tmp_path, descendants_seconds=0.1, preload=preload) as swarm:
        processes = [swarm.start(str(i), "swarm_child", ["wait"]) for i in range(2)]
        events = [swarm.wait_for(p, "ready", timeout_seconds=TIMEOUT_SECONDS) for p in processes]
        started = [*(p.process.pid for p in processes), *(event["pid"] for event in events)]
        assert all(map(psutil.pid_exists, started))
    assert not any(map(_is_running, started))
    assert [p.exit_code for p in processes] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize("preload", [(), FORKED])
def test_a_killed_process_does_not_end_the_others(tmp_path: Path, preload: tuple[str, ...]) -> None:
    with LocalSwarm(tmp_path, descendants_seconds=0.1, preload=preload) as swarm:
        first, second = (swarm.start(name, "swarm_child", ["wait"]) for name in ("a", "b"))
        for process in (first, second):
            swarm.wait_for(process, "ready", timeout_seconds=TIMEOUT_SECONDS)
        swarm.kill(first)
        assert first.exit_code == -signal.SIGKILL
        assert second.exit_code is None


@pytest.mark.parametrize("preload", [(), FORKED])
def test_one_that_ignores_sigterm_is_killed(tmp_path: Path, preload: tuple[str, ...]) -> None:
    with LocalSwarm(tmp_path, descendants_seconds=0.1, preload=preload) as swarm:
        process = swarm.start("one", "swarm_child", ["stubborn"])
        swarm.wait_for(process, "ready", timeout_seconds=TIMEOUT_SECONDS)
        assert swarm.terminate(process, timeout_seconds=0.2) == -signal.SIGKILL


@pytest.mark.parametrize("preload", [(), FORKED])
def test_a_failure_is_told_with_the_end_of_the_log(tmp_path: Path, preload: tuple[str, ...]) -> None:
    with LocalSwarm(tmp_path, descendants_seconds=0.1, preload=preload) as swarm:
        process = swarm.start("one", "swarm_child", ["fail"])
        with pytest.raises(SwarmError, match=r"(?s)one ended without the event 'joined'.*a line of the log"):
            swarm.wait_for(process, "joined", timeout_seconds=TIMEOUT_SECONDS)
        with pytest.raises(SwarmError, match="one ended with exit code 7"):
            swarm.wait_until_ended([process], timeout_seconds=TIMEOUT_SECONDS)


def test_an_event_that_does_not_come_in_time_is_an_error(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path, descendants_seconds=0.1) as swarm:
        process = swarm.start("one", "swarm_child", ["wait"])
        ready = swarm.wait_for(process, "ready", timeout_seconds=TIMEOUT_SECONDS)
        with pytest.raises(SwarmError, match="still running after 0 s without the event 'joined'"):
            swarm.wait_for(process, "joined", timeout_seconds=0.01)
        with pytest.raises(SwarmError, match="still running after 0 s without the event 'ready'"):
            swarm.wait_for(process, "ready", timeout_seconds=0.01, where=lambda event: event != ready)


def test_sigterm_leaves_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), sigterm_as_exit():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("preload", [(), FORKED])
def test_the_others_end_when_the_one_that_started_them_is_killed(
    tmp_path: Path, preload: tuple[str, ...]
) -> None:
    starter = f"""
import pathlib, time
from scripts.swarm_processes import LocalSwarm
swarm = LocalSwarm(pathlib.Path({str(tmp_path)!r}), preload={preload!r})
process = swarm.start("one", "swarm_child", ["wait"])
swarm.wait_for(process, "ready", timeout_seconds={TIMEOUT_SECONDS})
print(process.process.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        grandchildren = child.children()
        process.kill()
    gone, left = psutil.wait_procs([child], timeout=TIMEOUT_SECONDS)
    for grandchild in grandchildren:
        grandchild.kill()
    assert (gone, left) == ([child], [])


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
