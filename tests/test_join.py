"""Does `join` look at the machine before it spends anything, and say what it finds in the right way?"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.cli import Parser
from coordinator.errors import NetworkError, StateError, UsageError
from coordinator.spec import RunSpec
from peer import join, probes
from peer.display import Reporter
from peer.stopping import StopSwitch
from scripts.swarm_processes import LocalSwarm
from tests.fakes import make_spec
from tests.test_doctor import DEAD, LOOPBACK, keep, let_in, serving
from tests.test_swarm import START_SECONDS, start_peer, write_task
from tests.tiny_models import make_model_dir

# Run as a process of its own: a library reads the number of its threads once.
COUNT_THREADS = """
import json, os, sys
from peer import join
assert not {"numpy", "torch", "tokenizers", "pyarrow"} & set(sys.modules), "before --threads is known"
join.limit_threads(int(sys.argv[1]))
import numpy, torch
from threadpoolctl import threadpool_info
from tokenizers import Tokenizer, models
tokenizer, before = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), set(os.listdir("/proc/self/task"))
tokenizer.encode_batch(["a"] * 1000)
print(json.dumps({
    "torch": torch.get_num_threads(),
    "blas": max(pool["num_threads"] for pool in threadpool_info()),
    "tokenizers": len(set(os.listdir("/proc/self/task")) - before),
}))
"""


def check(output_dir: Path, spec: RunSpec | None, *flags: str, stop: StopSwitch | None = None) -> None:
    parser = Parser()
    join.add_join_arguments(parser)
    given = ["--data", "x.csv", "--output-dir", str(output_dir), *LOOPBACK, *flags]
    config = join.make_config(parser.parse(given))
    join._check_quickly(config, spec, Reporter(json_lines=True), stop or StopSwitch())


def test_too_little_disk_ends_it_with_the_code_of_the_output_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path, make_spec())
    monkeypatch.setattr(probes, "free_disk_bytes", lambda _: 10)
    with pytest.raises(StateError, match="10 B free, 436 B needed; free 426 B"):
        check(tmp_path, make_spec())


def test_a_warning_is_told_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probes, "free_disk_bytes", lambda _: 500)
    with caplog.at_level(logging.WARNING):
        check(tmp_path, make_spec())
    assert "disk: 500 B free, 436 B needed: little room is left" in caplog.text


def test_a_clock_that_is_wrong_ends_it_before_anything_is_downloaded(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "swarm", shift_seconds=20.0) as swarm,
        pytest.raises(NetworkError, match=r"behind 1 peer; at most 10 s"),
    ):
        check(tmp_path / "out", None, "--initial-peers", swarm.address)


def test_the_clock_of_a_member_of_a_private_run_is_looked_at_as_well(tmp_path: Path) -> None:
    key = tmp_path / "organizer.key"
    with serving(tmp_path / "swarm", shift_seconds=20.0, organizer_key=key) as swarm:
        out = keep(swarm, tmp_path / "out")
        let_in(swarm, out, key)
        with pytest.raises(NetworkError, match=r"behind 1 peer; at most 10 s"):
            check(out, None, "--initial-peers", swarm.address)


def test_a_clock_ahead_by_more_than_a_lease_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It sees no heartbeat at all; without a word it would be alone in a swarm that is well."""
    with serving(tmp_path / "swarm", shift_seconds=-60.0) as swarm, caplog.at_level(logging.WARNING):
        check(tmp_path / "out", None, "--initial-peers", swarm.address)
    assert "clock: peers answer, but their heartbeats are not seen; your clock may be ahead" in caplog.text


def test_where_nobody_answers_the_session_says_so_not_this(tmp_path: Path) -> None:
    check(tmp_path, None, "--initial-peers", DEAD)


def test_told_to_stop_it_leaves_the_rest_to_the_session(tmp_path: Path) -> None:
    stop = StopSwitch(max_seconds=1e-6)
    check(tmp_path, None, "--initial-peers", DEAD, stop=stop)
    assert stop.is_set


# ---- how much of the machine it takes ------------------------------------------------------------


def test_rounds_are_the_runs_for_who_begins_it_and_else_of_this_peer(tmp_path: Path) -> None:
    def num_rounds(output_dir: Path, *flags: str) -> int | None:
        given = ["--data", "x.csv", "--output-dir", str(output_dir), *flags]
        return join.make_config(join._parse(given)).num_rounds

    assert num_rounds(tmp_path, "--model", "x", "--rounds", "3") is None
    assert num_rounds(tmp_path, "--initial-peers", DEAD, "--rounds", "3") == 3
    (tmp_path / "run.toml").write_text(make_spec().to_toml())
    assert num_rounds(tmp_path, "--rounds", "3") == 3
    assert num_rounds(tmp_path) is None


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_of_all_libraries_are_as_many_as_given(num_threads: int) -> None:
    """Also of the tokenizer, which torch does not know, and whatever the environment says."""
    given = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", COUNT_THREADS, str(num_threads)]
    found = json.loads(subprocess.run(command, env=given, check=True, capture_output=True, text=True).stdout)
    assert found["tokenizers"] == num_threads
    assert max(found["torch"], found["blas"]) <= num_threads  # they take no more than there are processors


def test_without_the_flag_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    join.limit_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("nice", [-1, 20])
def test_a_priority_that_is_none_is_refused(nice: int) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with pytest.raises(UsageError, match=f"--nice {nice}: give a number from 0"):
        join.lower_priority(nice)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_peer_and_its_daemon_have_the_priority_that_was_given(tmp_path: Path) -> None:
    """All threads of them: a pool that numpy started before would go on as others do."""
    expected = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)
    flags = ["--model", str(make_model_dir(tmp_path / "model")), "--nice", "1", "--threads", "2"]
    with LocalSwarm(tmp_path / "logs") as swarm:
        peer = start_peer(swarm, "peer", tmp_path, write_task(tmp_path / "data.jsonl", seed=0), flags)
        swarm.wait_for(peer, "round_started", timeout_seconds=START_SECONDS)
        process = psutil.Process(peer.process.pid)
        family = {p.pid: p.name() for p in (process, *process.children(recursive=True))}
        priorities = {
            (name, thread): os.getpriority(os.PRIO_PROCESS, int(thread))
            for pid, name in family.items()
            for thread in os.listdir(f"/proc/{pid}/task")
        }
    assert any("p2pd" in name for name in family.values())
    assert {key: nice for key, nice in priorities.items() if nice != expected} == {}
