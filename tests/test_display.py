"""Do scripts read exactly the documented lines, and people calm ones that no other peer can tamper with?"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from coordinator.chain import Chain
from coordinator.errors import UsageError
from peer.display import (
    Accuracy,
    Reporter,
    clean,
    clean_lines,
    format_score,
    format_seconds,
    format_size,
    log_dropped,
    setup_logging,
)
from tests.fakes import extend, make_spec, peer

ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWA"
DIGEST = "ab" * 32
HOSTILE = "[bold red]x[/] \x1b[2J\r\n\u202e:smile: " + "y" * 500
REPOSITORY = Path(__file__).parent.parent


class Human:
    """A reporter for people on a console of 80 columns, and what it printed."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.stream = io.StringIO()
        console = Console(file=self.stream, width=80, force_terminal=terminal, color_system=None)
        self.reporter = Reporter(json_lines=False, console=console)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def tell_everything(reporter: Reporter, text: str = "max_seconds") -> None:
    reporter.started([ADDRESS], DIGEST)
    reporter.joined("12D3KooWA", [ADDRESS], round=2)
    reporter.caught_up(round=2, state_hash=DIGEST, seconds=0.5, size_bytes=90_800_000)
    reporter.round_started(round=3)
    reporter.finetuned(round=3, num_examples=512, seconds=60.25)
    reporter.fused(round=3, num_peers=4, seconds=1.5, bytes_sent=100, bytes_received=200)
    reporter.committed(3, DIGEST, 4, Accuracy(base=0.25, own=0.5, fused=None))
    reporter.voted(3, rejects=True, p_value=0.001)
    reporter.verdict(3, True, num_rejections=3, num_votes=4, num_members=5)
    reporter.rolled_back(4, DIGEST, "worse", {"12D3KooWB": "deviant"})
    reporter.alone(round=4)
    reporter.tested("accuracy", 0.75, 120)
    reporter.note(text)
    reporter.warning(text)
    reporter.table(text, ["peer", "accuracy"], [[text, 0.5], ["b", None]])
    with reporter.progress(text, total=1.0) as bar:
        bar.update(0.5)
    reporter.stopped(round=4, reason=text)


# --- JSON lines


def test_the_events_are_as_documented() -> None:
    stream = io.StringIO()
    tell_everything(Reporter(json_lines=True, stream=stream))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"event": "started", "initial_peers": [ADDRESS], "spec_digest": DIGEST},
        {"event": "joined", "peer_id": "12D3KooWA", "initial_peers": [ADDRESS], "round": 2},
        {"event": "caught_up", "round": 2, "state_hash": DIGEST, "seconds": 0.5, "size_bytes": 90_800_000},
        {"event": "round_started", "round": 3},
        {"event": "finetuned", "round": 3, "num_examples": 512, "seconds": 60.25},
        {
            "event": "fused",
            "round": 3,
            "num_peers": 4,
            "seconds": 1.5,
            "bytes_sent": 100,
            "bytes_received": 200,
        },
        {
            "event": "committed",
            "round": 3,
            "state_hash": DIGEST,
            "num_peers": 4,
            "accuracy": {"base": 0.25, "own": 0.5, "fused": None},
        },
        {"event": "voted", "round": 3, "rejects": True, "p_value": 0.001},
        {
            "event": "verdict",
            "round": 3,
            "rejected": True,
            "num_rejections": 3,
            "num_votes": 4,
            "num_members": 5,
        },
        {
            "event": "rolled_back",
            "round": 4,
            "state_hash": DIGEST,
            "reason": "worse",
            "left_out": {"12D3KooWB": "deviant"},
        },
        {"event": "alone", "round": 4},
        {"event": "tested", "metric_name": "accuracy", "score": 0.75, "num_examples": 120},
        {"event": "stopped", "round": 4, "reason": "max_seconds"},
    ]


def test_the_docstring_names_every_event_and_key() -> None:
    import peer.display

    stream = io.StringIO()
    tell_everything(Reporter(json_lines=True, stream=stream))
    for line in stream.getvalue().splitlines():
        event = json.loads(line)
        assert f'"event": "{event.pop("event")}"' in (peer.display.__doc__ or "")
        for key in event:
            assert f'"{key}"' in (peer.display.__doc__ or "")


def test_json_lines_stay_lines_and_ascii_whatever_others_say(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO):
        tell_everything(Reporter(json_lines=True, stream=stream), HOSTILE)
    lines = stream.getvalue().splitlines()
    assert json.loads(lines[-1])["reason"] == HOSTILE  # exact, for scripts
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue() + caplog.text
    assert len(lines) == 13


def test_what_is_not_a_number_is_null() -> None:
    stream = io.StringIO()
    reporter = Reporter(json_lines=True, stream=stream)
    reporter.finetuned(1, 0, float("inf"))
    reporter.committed(1, DIGEST, 2, Accuracy(base=float("nan")))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["seconds"] is None
    assert second["accuracy"] == {"base": None, "own": None, "fused": None}


def test_each_line_is_out_when_the_method_returns() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as reader, os.fdopen(write_end, "w") as writer:
        Reporter(json_lines=True, stream=writer).alone(1)
        assert json.loads(reader.readline()) == {"event": "alone", "round": 1}


@pytest.mark.parametrize("json_lines", [True, False])
def test_a_reader_that_goes_away_is_logged_once(json_lines: bool, caplog: pytest.LogCaptureFixture) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as writer:
        console = Reporter(json_lines=False)._console
        console.file = writer
        reporter = Reporter(json_lines, stream=writer, console=console)
        for round in range(3):
            reporter.committed(round, DIGEST, 2, Accuracy())
            reporter.stopped(round, "rounds")
    assert caplog.text.count("nobody reads standard output") == 1


def test_a_full_disk_behind_a_redirection_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w") as full, open("/dev/full", "w") as another:
        for reporter in (
            Reporter(json_lines=True, stream=full),
            Reporter(json_lines=False, console=Console(file=another)),
        ):
            reporter.stopped(1, "rounds")
            reporter.stopped(2, "rounds")
    assert caplog.text.count("No space left on device") == 2


PROCESS = """
import logging, os, subprocess, sys
from peer.display import Reporter, claim_stdout, setup_logging
setup_logging("info", None)
reporter = Reporter(json_lines={json_lines}, stream=claim_stdout() if {json_lines} else None)
if {json_lines}:
    print("printed by a library")
    os.write(1, b"written by C code\\n")
    subprocess.run(["echo", "said by a child process"], check=True)
for round in range({num_rounds}):
    reporter.stopped(round, "x" * 100)
reporter.note("a note")
logging.getLogger("coordinator.network").warning("a warning")
sys.exit(5)
"""


def run_process(json_lines: bool, num_rounds: int, stdout: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(json_lines=json_lines, num_rounds=num_rounds)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def test_standard_output_holds_json_lines_and_nothing_else() -> None:
    with run_process(json_lines=True, num_rounds=2, stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert [json.loads(line)["round"] for line in out.splitlines()] == [0, 1]
    for text in ("printed by a library", "written by C code", "said by a child", "a note", "a warning"):
        assert text in err
    assert process.returncode == 5


@pytest.mark.parametrize("json_lines", [True, False])
def test_a_closed_pipe_neither_ends_the_process_nor_shows_a_traceback(json_lines: bool) -> None:
    read_end, write_end = os.pipe()
    with run_process(json_lines, num_rounds=3, stdout=write_end) as process:
        os.close(write_end)
        os.close(read_end)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert "a warning" in err  # it went on to the end
    assert process.returncode == 5


# --- for people


def test_one_line_for_a_round() -> None:
    human = Human()
    human.reporter.round_started(3)
    human.reporter.finetuned(3, 512, 60.0)
    human.reporter.fused(3, 4, 1.5, bytes_sent=45_000_000, bytes_received=45_800_000)
    human.reporter.committed(3, DIGEST, 4, Accuracy(base=0.271, own=0.302, fused=0.34))
    assert human.lines == ["round 3  4 peers  accuracy base 27.1 own 30.2 fused 34.0  0.0 s  90.8 MB"]


def test_failed_attempts_count_in_the_megabytes() -> None:
    human = Human()
    for _ in range(2):
        human.reporter.fused(1, 4, 1.5, bytes_sent=1_000_000, bytes_received=500_000)
    human.reporter.committed(1, DIGEST, 1, Accuracy())
    assert human.lines == ["round 1  1 peer   accuracy base - own - fused -  3.0 MB"]


def test_pearson_is_named_and_no_percentage() -> None:
    human = Human()
    human.reporter.committed(1, DIGEST, 2, Accuracy(0.8123, -0.5, float("nan")), metric_name="pearson")
    assert "pearson base 0.812 own -0.500 fused -" in human.lines[0]


def test_what_belongs_to_another_round_is_not_shown() -> None:
    human = Human()
    human.reporter.fused(1, 4, 1.5, bytes_sent=1_000_000, bytes_received=0)
    human.reporter.committed(2, DIGEST, 4, Accuracy())
    assert human.lines[0].endswith("0 B")


def test_the_widest_round_fits_80_columns() -> None:
    human = Human()
    human.reporter.round_started(999)
    human.reporter.fused(999, 128, 1.5, bytes_sent=10**11, bytes_received=10**11)
    human.reporter.committed(999, DIGEST, 128, Accuracy(1.0, 1.0, 1.0))
    assert len(human.lines) == 1
    assert len(human.lines[0]) <= 80


def test_the_join_command_can_be_copied_whole() -> None:
    human = Human()
    human.reporter.started([ADDRESS, "/dns4/it's/tcp/1"], DIGEST)
    assert human.lines[-1] == (
        f"  python -m peer.join --initial-peers {ADDRESS} '/dns4/it'\"'\"'s/tcp/1' --run {DIGEST}"
        " --data FILE --output-dir DIR"
    )


def test_alone_is_told_once_for_a_round() -> None:
    human = Human()
    for round in (1, 1, 1, 2):
        human.reporter.alone(round)
    assert [line.split("  ")[0] for line in human.lines] == ["round 1", "round 2"]


def test_alone_says_what_was_trained() -> None:
    human = Human()
    human.reporter.finetuned(1, 512, 60.0)
    human.reporter.alone(1)
    assert "finetuned on 512 examples in 60 s" in human.lines[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_that_others_say_acts_on_the_terminal(
    terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    human = Human(terminal=terminal)
    reporter = human.reporter
    reporter.started([HOSTILE], HOSTILE)
    reporter.joined(HOSTILE, [HOSTILE], 1)
    reporter.caught_up(1, HOSTILE, 1.0, 1)
    reporter.committed(1, HOSTILE, 2, Accuracy(), metric_name=HOSTILE)
    reporter.note(HOSTILE)
    reporter.warning(HOSTILE)
    reporter.table(HOSTILE, [HOSTILE], [[HOSTILE]])
    reporter.stopped(1, HOSTILE)
    text = human.stream.getvalue()
    assert "[bold red]x[/]" in text  # shown, not obeyed
    assert ":smile:" in text
    assert not any(c in text + caplog.text for c in ("\x1b[2J", "\r", "\u202e"))
    assert "…" in text


def test_a_hostile_description_of_progress_is_shown_as_it_is() -> None:
    human = Human(terminal=True)
    with human.reporter.progress("[red]x[/red] \x1b[2J", total=2) as bar:
        bar.update(1)
    text = human.stream.getvalue()
    assert "[red]x[/red]" in text
    assert "\x1b[2J" not in text


def test_progress_is_silent_when_nobody_watches() -> None:
    human = Human(terminal=False)
    with human.reporter.progress("finetuning", total=None) as bar:
        bar.update(0.5)
    assert human.stream.getvalue() == ""


def test_progress_nests_and_ends_with_an_error() -> None:
    human = Human(terminal=True)

    def fail_in_an_inner_bar() -> None:
        with (
            human.reporter.progress("round", 1.0) as outer,
            human.reporter.progress("evaluating", None) as inner,
        ):
            outer.update(0.5)
            inner.update(7)
            human.reporter.note("in between")
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_an_inner_bar()
    assert human.reporter._progress is None
    assert human.stream.getvalue().count("\x1b[?25l") == human.stream.getvalue().count("\x1b[?25h") == 1
    assert any("in between" in line for line in human.lines)


def test_a_table_fits_80_columns_and_aligns_numbers_to_the_right() -> None:
    human = Human()
    human.reporter.table(
        "head-only accuracy", ["peer", "base", "fused"], [["sst2", "9.5", None], ["qqp", 61, "70.0"]]
    )
    assert [line.rstrip() for line in human.lines] == [
        "head-only accuracy",
        "peer  base  fused",
        "sst2   9.5      -",
        "qqp     61   70.0",
    ]


def test_an_empty_table() -> None:
    human = Human()
    human.reporter.table("peers", ["peer"], [])
    assert [line.strip() for line in human.lines] == ["peers", "peer"]


# --- words and numbers


def test_clean_cuts_and_replaces() -> None:
    assert clean("a\x1b[1m\nb\u2028é 漢") == "a?[1m?b?é 漢"
    assert clean("x" * 300) == "x" * 199 + "…"
    assert clean("x" * 200) == "x" * 200
    assert clean(None) == "None"
    assert clean_lines("a\nb\x07") == "a\nb?"


@pytest.mark.parametrize(
    ("metric", "score", "shown"),
    [
        ("accuracy", 0.7134, "71.3"),
        ("accuracy", 0.0, "0.0"),
        ("accuracy", 1.0, "100.0"),
        ("pearson", 0.7134, "0.713"),
        ("pearson", -1.0, "-1.000"),
        ("accuracy", None, "-"),
        ("pearson", float("nan"), "-"),
    ],
)
def test_scores(metric: str, score: float | None, shown: str) -> None:
    assert format_score(metric, score) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (7.24, "7.2 s"),
        (61.6, "62 s"),
        (119.4, "119 s"),
        (120, "2 min 0 s"),
        (3599, "59 min 59 s"),
        (11520, "3 h 12 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (10**12, "1000.0 GB"),
    ],
)
def test_sizes(size_bytes: int, shown: str) -> None:
    assert format_size(size_bytes) == shown


# --- the log


def test_the_log_goes_to_standard_error_and_to_the_file(
    root_logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("INFO", tmp_path / "logs" / "peer.log")
    logging.getLogger("coordinator.network").info("from %s", "us\x1b[2J")
    logging.getLogger("coordinator.network").debug("too fine")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "INFO: from us?[2J\n"
    written = (tmp_path / "logs" / "peer.log").read_text()
    assert written.endswith("INFO coordinator.network: from us?[2J\n")
    assert written[:2] == "20"  # a date


def test_other_libraries_are_heard_from_warning_on(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("debug", None)
    for name in ("filelock._api", "httpx", "asyncio"):
        logging.getLogger(name).info("noise of %s", name)
        logging.getLogger(name).warning("trouble of %s", name)
    err = capsys.readouterr().err
    assert "noise" not in err
    assert err.count("trouble") == 3


def test_setting_up_twice_does_not_double_the_log(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("info", None)
    setup_logging("info", None)
    logging.getLogger("peer.session").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_traceback_keeps_its_lines(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", None)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("peer.session").exception("failed")
    assert "Traceback (most recent call last):\n" in capsys.readouterr().err


def test_a_wrong_level_or_file_is_told(root_logger: logging.Logger, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--log-level loud: not one of debug, info, warning, error"):
        setup_logging("loud", None)
    with pytest.raises(UsageError, match=r"--log-file .* cannot be written: Is a directory"):
        setup_logging("info", tmp_path)


def test_whose_contribution_a_round_lacks_is_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    commit = extend(Chain(make_spec()), "abc").commits[0].commit
    absent = commit.contributors[0].model_copy(update={"factor": 0.0, "reason": "another\x1b[2J group"})
    partly = commit.contributors[1].model_copy(update={"missing": ((0, 2), (5, 6))})
    log_dropped(commit.model_copy(update={"contributors": [absent, partly, commit.contributors[2]]}))
    assert [record.getMessage() for record in caplog.records] == [
        f"round 1: {peer('a')[-8:]} is screened out: another?[2J group",
        f"round 1: {peer('b')[-8:]} is in part: 3 parts missing: it stopped sending",
    ]
