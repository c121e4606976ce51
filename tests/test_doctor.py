"""Does the doctor find in a real, small swarm what is wrong, and leave nothing behind?"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from transformers import AutoConfig

from coordinator.admission import CREDENTIAL_NAME, admission_of
from coordinator.agreement import Agreement
from coordinator.board import BoardValidator
from coordinator.chain import Chain
from coordinator.credentials import make_invite
from coordinator.errors import DataError
from coordinator.identity import load_identity
from coordinator.network import Network
from coordinator.spec import RunSpec
from peer import probes, swarm_probes
from peer.checkup import Batch, Check
from peer.doctor import Lines, Worker, examine, main, parse
from peer.genesis import State, make_run, serve_run
from peer.join import add_join_arguments, make_config, make_manners
from peer.state import Checkpoint, CheckpointStore
from scripts.swarm_processes import LocalSwarm
from tests.fakes import CALL_SECONDS, addresses, network_config, peer
from tests.tiny_models import FAMILIES, make_model_dir, make_texts

LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
DEAD = f"/ip4/127.0.0.1/tcp/1/p2p/{peer('nobody')}"
START_SECONDS = 90.0  # importing torch and transformers on a loaded machine
SHIFTED = """
import runpy, sys, time
real_time, shift_seconds = time.time, float(sys.argv[1])
time.time = lambda: real_time() + shift_seconds
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Swarm:
    address: str
    pretrained: Path
    data: Path
    spec: RunSpec
    state: State
    base: Path


@contextmanager
def serving(
    directory: Path, *, shift_seconds: float = 0.0, organizer_key: Path | None = None
) -> Iterator[Swarm]:
    """What `coordinator.start` runs, in this process; its heartbeats by a clock of its own.

    With `organizer_key` the run is private.
    """

    class Shifted(Network):
        @staticmethod
        def now() -> float:
            return Network.now() + shift_seconds

    pretrained = make_model_dir(directory / "pretrained")
    options = {
        "run_name": "test",
        "created_at": time.time(),
        "num_rounds": 3,
        "round_examples": 64,
        "lease_seconds": 5.0,
        "organizer": None if organizer_key is None else load_identity(organizer_key).peer_id,
    }
    spec, state = make_run(str(pretrained), None, options, directory / "base")
    identity = load_identity(directory / "key")
    admission = admission_of(spec, None, identity, directory, organizer_key)
    with Shifted(network_config(directory / "key", admission=admission)) as network:
        agreement = Agreement(network, identity, Chain(spec), serves_only=True)
        serve_run(network, spec, directory / "base", {state.state_hash: state}.get)
        network.run(
            network.start_dht(BoardValidator(spec.digest, admission=admission)), timeout_seconds=CALL_SECONDS
        )
        network.run(agreement.start(), timeout_seconds=CALL_SECONDS)
        data = write_data(directory / "data.jsonl")
        yield Swarm(addresses(network)[0], pretrained, data, spec, state, directory / "base")
        network.run(agreement.leave(), timeout_seconds=CALL_SECONDS)


def write_data(path: Path) -> Path:
    """600 different texts."""
    rows = [{"text": f"{t} {i}", "label": y} for i, (t, y) in enumerate(zip(*make_texts(600), strict=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with serving(tmp_path_factory.mktemp("swarm")) as found:
        yield found


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SPEED_SECONDS", 0.2)


def examined(output_dir: Path, *flags: str) -> dict[str, Check]:
    """By name; the last of several entry points. In JSON lines there is the same."""
    stream = io.StringIO()
    lines = Lines(stream)
    before, folders, there = children(), own_folders(), contents(output_dir)
    training = ["--batch-size", "8", "--max-length", "32", "--output-dir", str(output_dir)]
    examine(parse([*flags, *LOOPBACK, *training]), lines)
    assert children() <= before
    assert own_folders() <= folders
    assert contents(output_dir) == there
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        c.to_json() for c in lines.checks
    ]
    assert "cold-doctor-" not in stream.getvalue()
    return {check.name: check for check in lines.checks}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


def own_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("cold-doctor-*"))


def failures(checks: dict[str, Check]) -> set[str]:
    return {check.name for check in checks.values() if check.status == "failure"}


def test_a_good_machine(swarm: Swarm, tmp_path: Path) -> None:
    checks = examined(tmp_path / "out", "--initial-peers", swarm.address, "--data", str(swarm.data))
    names = "python packages data columns duplicates classes p2p"
    assert " ".join(checks) == (
        f"{names} entry point run reachable device memory disk output model length speed traffic round clock"
    )
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(checks, "ok")
    digest = checks["run"].figures["digest"]
    assert checks["run"].message == f"test {digest[:8]}, round 0/3; 0 train, quorum 2"
    assert checks["classes"].message.startswith("'0', '1'; the smallest has ")
    assert checks["data"].figures["num_train"] == 480
    assert checks["speed"].figures["examples_per_second"] > 0
    assert checks["clock"].figures["num_peers"] == 1
    assert checks["round"].figures["seconds"] > 0


def test_a_dead_entry_point_is_named_and_the_rest_is_looked_at(swarm: Swarm, tmp_path: Path) -> None:
    checks = examined(tmp_path / "out", "--initial-peers", DEAD, "--data", str(swarm.data))
    assert failures(checks) == {"entry point"}
    assert checks["entry point"].message == f"127.0.0.1:1 …{peer('nobody')[-8:]}: connection refused"
    assert "data" in checks


def test_entry_points_that_are_silent_or_in_another_run_are_told_apart(
    swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_peer_id: str, _body: object) -> bytes:
        await asyncio.sleep(3600.0)
        return b""

    monkeypatch.setattr(swarm_probes, "ASK_SECONDS", 2.0)
    lines = Lines(io.StringIO())
    frozen = Network(network_config(tmp_path / "frozen.key"))
    frozen.on_call("spec", never)
    with serving(tmp_path / "other") as other, frozen:  # of the same model, but begun apart
        flags = ["--initial-peers", addresses(frozen)[0], swarm.address, other.address]
        flags += ["--run", swarm.spec.digest, "--data", no_text(tmp_path), *LOOPBACK]
        examine(parse(flags), lines)
    silent, well, elsewhere = [check for check in lines.checks if check.name == "entry point"]
    assert (silent.status, well.status, elsewhere.status) == ("warning", "ok", "warning")
    assert silent.message.endswith(": connected, but silent")
    assert well.message.endswith(" answers")
    assert elsewhere.message.endswith(f": in another run, {other.spec.digest[:8]}")
    assert failures({check.name: check for check in lines.checks}) == {"data"}


def test_a_bad_file_and_too_little_disk_beside_a_dead_entry_point(
    swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\na good film,1\na bad film\n")
    monkeypatch.setattr(probes, "free_disk_bytes", lambda _: 1000)
    checks = examined(tmp_path / "out", "--initial-peers", DEAD, swarm.address, "--data", str(bad))
    assert failures(checks) == {"data", "disk"}
    assert checks["data"].message.startswith(f"{bad}, line 3")
    assert checks["disk"].message.startswith("1.0 kB free, ")
    assert "speed" not in checks


@pytest.mark.parametrize(
    ("shift_seconds", "status", "said"),
    [(20.0, "failure", "behind 1 peer"), (-4.0, "warning", "ahead of 1 peer")],
)
def test_a_peer_whose_clock_differs(tmp_path: Path, shift_seconds: float, status: str, said: str) -> None:
    with serving(tmp_path, shift_seconds=shift_seconds) as swarm:
        bad = tmp_path / "bad.csv"  # so that nothing is finetuned
        bad.write_text("text\n")
        checks = examined(tmp_path / "out", "--initial-peers", swarm.address, "--data", str(bad))
    assert checks["clock"].status == status
    assert said in checks["clock"].message


def test_a_run_that_begins_here(swarm: Swarm, tmp_path: Path) -> None:
    flags = ["--model", str(swarm.pretrained), "--data", str(swarm.data), "--max-upload-mbps", "1"]
    checks = examined(tmp_path / "out", *flags)
    assert failures(checks) == set()
    assert {"model", "speed", "traffic", "round", "disk"} <= checks.keys()
    assert checks["traffic"].figures["upload_bytes_per_second"] == 125_000
    assert checks["traffic"].message.endswith("at 1 Mbit/s up")


def test_a_model_that_only_the_peers_have(tmp_path: Path) -> None:
    with serving(tmp_path) as swarm:
        swarm.pretrained.rename(tmp_path / "away")
        checks = examined(tmp_path / "out", "--initial-peers", swarm.address, "--data", str(swarm.data))
    assert failures(checks) == set()
    assert checks["model"].figures["source"] == "peers"
    assert "speed" in checks


# ---- a run that is resumed


def keep(swarm: Swarm, output_dir: Path, *known_peers: str) -> Path:
    """What a peer of this run leaves in its output directory."""
    layout = swarm.state.manifest.layout
    with CheckpointStore(output_dir) as store:
        store.save(Checkpoint(run_digest=swarm.spec.digest, round=2, layout=layout, flat=swarm.state.flat))
    (output_dir / "run.toml").write_text(swarm.spec.to_toml())
    (output_dir / "known_peers.json").write_text(json.dumps(known_peers))
    shutil.copytree(swarm.base, output_dir / "base")
    load_identity(output_dir / "identity.key")
    return output_dir


def test_resuming_looks_at_the_peers_met_before_and_at_what_is_kept(swarm: Swarm, tmp_path: Path) -> None:
    out = keep(swarm, tmp_path / "out", DEAD, swarm.address)
    checks = examined(out, "--data", str(swarm.data))  # no --initial-peers
    assert failures(checks) == set()
    assert checks["resume"].message == f"test {swarm.spec.digest[:8]}, from round 2"
    assert checks["entry point"].message == "1 of 2 addresses of peers met before answer"
    assert (checks["model"].status, checks["model"].figures["source"]) == ("ok", "kept")
    assert {"run", "reachable", "speed", "traffic", "round", "clock"} <= checks.keys()


def test_resuming_where_nobody_answers_is_a_warning_and_nothing_is_said_to_come_from_peers(
    swarm: Swarm, tmp_path: Path
) -> None:
    out = keep(swarm, tmp_path / "out", DEAD)
    checks = examined(out, "--data", str(swarm.data))
    assert failures(checks) == set()
    assert checks["entry point"].status == "warning"
    assert "go on alone" in checks["entry point"].fix
    assert checks["run"].message.startswith(f"test {swarm.spec.digest[:8]}, round 2/3")
    assert checks["model"].figures["source"] == "kept"
    assert "speed" in checks
    assert "clock" not in checks


def test_resuming_without_the_files_of_the_model_and_without_peers(tmp_path: Path) -> None:
    with serving(tmp_path / "swarm") as swarm:
        out = keep(swarm, tmp_path / "out")
        swarm.pretrained.rename(tmp_path / "away")
    shutil.rmtree(out / "base")
    checks = examined(out, "--data", str(swarm.data))
    assert checks["entry point"].message == "no address of another peer is known"
    assert (checks["model"].status, checks["model"].figures["source"]) == ("warning", "nowhere")
    assert "speed" not in checks


def test_another_run_than_the_one_kept_is_told(swarm: Swarm, tmp_path: Path) -> None:
    out = keep(swarm, tmp_path / "out", swarm.address)
    checks = examined(out, "--data", str(swarm.data), "--run", "0" * 64)
    assert failures(checks) == {"resume", "run"}
    assert f"holds the run {swarm.spec.digest}, not 000" in checks["resume"].message
    assert checks["resume"].fix == "choose another --output-dir"


def test_a_directory_without_a_checkpoint_cannot_be_resumed(swarm: Swarm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.toml").write_text(swarm.spec.to_toml())
    checks = examined(out, "--data", str(swarm.data))
    assert failures(checks) == {"resume"}
    assert checks["resume"].message == f"{out} holds no checkpoint to resume"


# ---- a private run


@pytest.fixture(scope="module")
def organizer_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("organizer") / "organizer.key"


@pytest.fixture(scope="module")
def private_swarm(tmp_path_factory: pytest.TempPathFactory, organizer_key: Path) -> Iterator[Swarm]:
    with serving(tmp_path_factory.mktemp("private"), organizer_key=organizer_key) as found:
        yield found


def let_in(swarm: Swarm, output_dir: Path, organizer_key: Path) -> None:
    """What is left of an invite after a first `join`."""
    made = make_invite(load_identity(organizer_key), swarm.spec.digest, (), expires_at=2e9)
    admission_of(None, made, load_identity(output_dir / "identity.key"), output_dir)


def no_text(directory: Path) -> str:
    """Data of which nothing can be finetuned, which saves time."""
    (directory / "bad.csv").write_text("text\n")
    return str(directory / "bad.csv")


def test_a_member_is_looked_at_by_its_kept_credential(
    private_swarm: Swarm, organizer_key: Path, tmp_path: Path
) -> None:
    out = keep(private_swarm, tmp_path / "out")
    let_in(private_swarm, out, organizer_key)
    flags = ["--data", no_text(tmp_path), "--organizer-key", str(tmp_path / "none.key")]
    checks = examined(out, "--initial-peers", private_swarm.address, *flags)
    assert failures(checks) == {"data"}
    assert {"run", "clock", "traffic"} <= checks.keys()
    (out / CREDENTIAL_NAME).unlink()
    checks = examined(out, "--initial-peers", private_swarm.address, *flags)
    assert failures(checks) == {"data", "p2p"}
    assert (
        checks["p2p"].message
        == "the run test is private: join with --invite STRING, which its organizer makes"
    )


def test_the_organizers_own_peer_is_looked_at_by_its_key(
    private_swarm: Swarm, organizer_key: Path, tmp_path: Path
) -> None:
    out = keep(private_swarm, tmp_path / "out", private_swarm.address)
    checks = examined(out, "--data", no_text(tmp_path), "--organizer-key", str(organizer_key))
    assert failures(checks) == {"data"}
    assert checks["run"].status == "ok"


def test_the_flags_are_those_of_join() -> None:
    join, doctor = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_join_arguments(join)
    add_join_arguments(doctor, needs_output_dir=False)
    assert join._option_string_actions.keys() == doctor._option_string_actions.keys()
    assert parse(["--data", "x", "--initial_peers", DEAD]).output_dir is None


def test_nothing_to_look_at_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "x.csv"]) == 2
    assert "give --initial-peers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--schedule", "99"], "--schedule '99': give a window"),
        (["--nice", "77"], "--nice 77: give a number from 0"),
        (["--pause-when-busy", "0"], "--pause-when-busy 0: give a percentage"),
        (["--max-upload-mbps", "0.5"], "--max-upload-mbps 0.5: give at least 1"),
        (["--private", "--initial-peers", DEAD], "--private begins a run"),
    ],
)
def test_flags_that_join_refuses_are_refused_here(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", "x.csv", "--model", "m", *flags]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_looking_at_nice_changes_no_priority() -> None:
    before = os.nice(0)
    make_manners(parse(["--data", "x.csv", "--nice", "19"]))
    assert os.nice(0) == before


def test_the_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "exit codes:" in said
    assert "warnings: it works, read them" in said


def test_lines_are_aligned_and_no_markup_is_read_from_them() -> None:
    out = io.StringIO()
    lines = Lines(None, Console(file=out, width=80))
    lines.add(Check("data", "ok", "[red]fine[/red]"))
    lines.add(Check("entry point", "failure", "it is gone", "ask for another"))
    lines.summary()
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "ok       data         [red]fine[/red]",
        "failure  entry point  it is gone",
        "                      → ask for another",
        "",
        "it will not work yet: 1 failure",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_of_the_flags_and_of_the_config_of_any_family(family: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path / family, family)
    flags = ["--data", "x.csv", "--output-dir", "out", "--batch-size", "7", "--max-length"]
    batch = probes.batch_of(make_config(parse([*flags, "20"])), model_dir)
    config = AutoConfig.from_pretrained(model_dir)
    shape = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    assert batch == Batch(7, 20, *shape)
    longer = probes.batch_of(make_config(parse([*flags, "100000"])), model_dir)
    assert longer.num_tokens == config.max_position_embeddings  # no text is longer
    assert probes.batch_of(make_config(parse([*flags, "20"])), tmp_path / "none") == Batch(7, 20)


# ---- deadlines


def test_a_probe_that_hangs_is_left_and_the_next_one_runs() -> None:
    worker, ended = Worker(), threading.Event()
    with pytest.raises(TimeoutError):
        worker.run(lambda: ended.wait(60.0), 0.05)
    assert worker.run(lambda: 3, 5.0) == 3
    ended.set()
    worker.end()
    assert worker.is_ended()


def test_what_a_probe_raises_arrives() -> None:
    def fail() -> None:
        raise DataError("no such file")

    with pytest.raises(DataError, match="no such file"):
        Worker().run(fail, 5.0)


# ---- as a person runs it


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("shift_seconds", "statuses", "said"),
    [
        (0.0, {"ok"}, "within"),
        (-4.0, {"warning", "failure"}, "behind 1 peer"),
        (60.0, {"failure"}, "heartbeats are not seen"),
    ],
)
def test_processes_with_clocks_that_differ(
    tmp_path: Path, shift_seconds: float, statuses: set[str], said: str
) -> None:
    model, data = make_model_dir(tmp_path / "pretrained"), write_data(tmp_path / "data.jsonl")
    with LocalSwarm(tmp_path / "logs") as processes:
        flags = ["--model", str(model), "--output-dir", str(tmp_path / "starter"), *LOOPBACK]
        starter = processes.start("starter", "coordinator.start", flags)
        started = processes.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        command = [sys.executable, "-c", SHIFTED, str(shift_seconds), "peer.doctor", "--data", str(data)]
        found = subprocess.run(
            [*command, "--json", "--initial-peers", *started["initial_peers"], *LOOPBACK],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    checks = {check["check"]: check for check in map(json.loads, found.stdout.splitlines())}
    assert checks["clock"]["status"] in statuses, found.stderr
    assert said in checks["clock"]["message"]
    ranks = ("ok", "warning", "failure")
    assert found.returncode == max(ranks.index(check["status"]) for check in checks.values())


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_stops_when_told_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    model, data = make_model_dir(tmp_path / "pretrained"), write_data(tmp_path / "data.jsonl")
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "peer.doctor",
            "--model",
            str(model),
            "--data",
            str(data),
            "--json",
            *LOOPBACK,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["check"] != "p2p":  # from here on there is a daemon
        pass
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(60) == exit_code
    _, left = psutil.wait_procs(started, timeout=10.0)
    assert left == []
    assert list((tmp_path / "tmp").iterdir()) == []
