"""Does `join` look at the machine before it spends anything, and say what it finds in the right way?"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from coordinator.cli import Parser
from coordinator.errors import NetworkError, StateError
from coordinator.spec import RunSpec
from peer import join, probes
from peer.display import Reporter
from peer.stopping import StopSwitch
from tests.fakes import make_spec
from tests.test_doctor import DEAD, LOOPBACK, serving


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
