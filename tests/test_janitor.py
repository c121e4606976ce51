"""Is nothing left of a peer that is killed: no daemon, no socket, no shared memory?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.janitor import _PREFIX, Janitor, remove_stale
from scripts.swarm_processes import LocalSwarm
from tests.test_swarm import START_SECONDS, start_run

WAIT_SECONDS = 10.0
STARTER = """
import sys, time
from pathlib import Path
from tests.fakes import network_config
from coordinator.network import Network
with Network(network_config(Path(sys.argv[1]))):
    print("started", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that nobody else uses, with a short name: sockets lie in it."""
    folder = Path("/tmp") / f"jt-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    folder.rmdir()  # and empty it is


def wait_until(condition: Callable[[], bool]) -> bool:
    ends_at = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < ends_at:
        time.sleep(0.05)
    return condition()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def hivemind_sockets() -> set[Path]:
    return set(Path("/tmp").glob("hivemind-*"))


def check_nothing_is_left(children: list[psutil.Process], folder: Path) -> None:
    assert wait_until(lambda: not any(map(is_running, children))), [c for c in children if is_running(c)]
    assert wait_until(lambda: not list(folder.iterdir())), list(folder.iterdir())


@pytest.mark.parametrize("is_daemon_frozen", [False, True])
def test_sigkill_of_a_network_leaves_nothing(temporary: Path, tmp_path: Path, is_daemon_frozen: bool) -> None:
    sockets, shared = hivemind_sockets(), set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", STARTER, str(tmp_path / "key")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert sorted(child.name() for child in children) == ["p2pd", "sh"]
        assert len(list(temporary.glob("*/*.sock"))) == 2
        if is_daemon_frozen:
            next(child for child in children if child.name() == "p2pd").suspend()
        process.kill()
        process.wait()
    check_nothing_is_left(children, temporary)
    assert hivemind_sockets() <= sockets
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_sigkill_of_a_real_peer_leaves_nothing(temporary: Path, tmp_path: Path) -> None:
    sockets, shared = hivemind_sockets(), set(os.listdir("/dev/shm"))
    with LocalSwarm(tmp_path / "logs") as swarm:
        starter, _ = start_run(swarm, tmp_path, "--rounds", "1", "--round-examples", "48")
        children = psutil.Process(starter.process.pid).children(recursive=True)
        assert {child.name() for child in children} == {"p2pd", "sh"}
        os.kill(starter.process.pid, signal.SIGKILL)
        starter.process.wait(START_SECONDS)
        check_nothing_is_left(children, temporary)
    assert hivemind_sockets() <= sockets
    assert set(os.listdir("/dev/shm")) <= shared


def test_a_folder_whose_janitor_was_killed_too_is_removed_by_the_next_start(temporary: Path) -> None:
    stale, living, foreign = temporary / f"{_PREFIX}stale", Janitor(), temporary / "foreign"
    stale.mkdir()
    (stale / "lock").touch()
    (stale / "p2pd-x.sock").touch()
    being_made = temporary / f"{_PREFIX}being-made"  # no lock as yet
    being_made.mkdir()
    foreign.mkdir()
    tempfile_folder = living.start()
    try:
        remove_stale(temporary)
        assert {p.name for p in temporary.iterdir()} >= {being_made.name, "foreign"}
        assert tempfile_folder.is_dir()
        assert not stale.exists()
    finally:
        living.close(WAIT_SECONDS)
        being_made.rmdir()
        foreign.rmdir()
    assert not tempfile_folder.exists()
    living.close(WAIT_SECONDS)


def test_the_folder_is_closed_to_others_and_short_enough_for_a_socket(temporary: Path) -> None:
    janitor = Janitor()
    folder = janitor.start()
    try:
        assert folder.stat().st_mode & 0o077 == 0
        assert len(os.fsencode(folder / "p2pclient-0123456789a.sock")) < 104
    finally:
        janitor.close(WAIT_SECONDS)


def test_a_janitor_that_was_killed_is_no_group_to_join() -> None:
    janitor = Janitor()
    janitor.start()
    try:
        group = janitor.process_group
        assert os.getpgid(group) == group
        os.kill(group, signal.SIGKILL)
        assert wait_until(lambda: janitor.process_group == 0)
    finally:
        janitor.close(WAIT_SECONDS)
