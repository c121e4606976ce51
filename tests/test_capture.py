"""Is everything in the ledger that real peers give to the p2p daemon, and nothing private among it?"""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.credentials import parse_invite
from coordinator.errors import EXIT_TERMINATED, AccessError
from coordinator.identity import load_identity
from peer.ledger import main, read_chain
from scripts.swarm_processes import LocalSwarm, SwarmProcess
from tests.capture import Capture, compare, occurs, read_capture, record_values
from tests.tiny_models import make_model_dir, make_texts

LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
START_SECONDS = 90.0
WINDOW_BYTES = 16  # four float32 of a head: none of these may occur anywhere
pytestmark = pytest.mark.timeout(300)


def secret_text(name: str, index: int, text: str) -> str:
    return f"{text} patient {name} {index}"


def write_task(path: Path, *, seed: int) -> Path:
    """64 examples; texts and label names that occur nowhere else."""
    texts, labels = make_texts(64, seed=seed)
    rows = [
        {"text": secret_text(path.stem, i, text), "label": f"diagnosis-{path.stem}-{label}"}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


class CapturedSwarm:
    """Real processes, each with a tap at its sockets. `entry`: how the next ones come in."""

    def __init__(self, swarm: LocalSwarm, directory: Path) -> None:
        self._swarm, self._directory = swarm, directory
        self.entry: list[str] = []

    def begin(self, *flags: str) -> SwarmProcess:
        model = make_model_dir(self._directory / "pretrained")
        given = ["--model", str(model), "--run-name", "test", *LOOPBACK, *flags]
        starter = self._start("starter", "coordinator.start", given)
        started = self._swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        self.entry = ["--run", started["spec_digest"], "--initial-peers", *started["initial_peers"]]
        if "--private" in flags:
            self.entry = ["--invite", started["invite"]]
        return starter

    def join(self, name: str, *flags: str, seed: int) -> SwarmProcess:
        data = write_task(self._directory / f"{name}.jsonl", seed=seed)
        training = [
            "--batch-size",
            "8",
            "--learning-rate",
            "1e-3",
            "--max-length",
            "16",
            "--linger-seconds",
            "20",
        ]
        return self._start(
            name, "peer.join", ["--data", str(data), *training, *LOOPBACK, *self.entry, *flags]
        )

    def _start(self, name: str, module: str, flags: Sequence[str]) -> SwarmProcess:
        output = ["--output-dir", str(self._directory / name)]
        file = str(self._directory / f"{name}.capture")
        return self._swarm.start(name, "tests.capture", [file, "--", module, *flags, *output])

    def run(self, name: str, module: str, flags: Sequence[str]) -> str:
        """A command that ends by itself; what it printed."""
        file = str(self._directory / f"{name}.capture")
        command = [sys.executable, "-m", "tests.capture", file, "--", module, *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ledger_lines(directory: Path) -> tuple[Mapping[str, Any], ...]:
    return read_chain(directory / "ledger.jsonl").lines


def head_windows(directory: Path) -> set[bytes]:
    """Every four values, one after another, of each head that was there when a delta left."""
    windows = set()
    for path in sorted(directory.glob("*.safetensors")):
        for tensor in load_file(path).values():
            data = tensor.astype("<f4").tobytes()
            windows |= {data[i : i + WINDOW_BYTES] for i in range(0, len(data) - WINDOW_BYTES + 1, 4)}
    return {window for window in windows if len(set(np.frombuffer(window, "<f4"))) > 1}  # not all zero


def check_private(tmp_path: Path, name: str, captures: Mapping[str, Capture]) -> None:
    """Nothing of this peer's data and head is in what any process sent."""
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    secrets = {row["text"].encode() for row in rows} | {row["label"].encode() for row in rows}
    secrets |= {f"patient {name}".encode(), f"diagnosis-{name}".encode()}
    secrets |= {
        base64.b64encode(secret)[:-4] for secret in secrets
    }  # less the last ones: they depend on the end
    windows = head_windows(tmp_path / f"{name}.heads")
    assert len(secrets) > 100
    assert len(windows) > 20
    for who, capture in captures.items():
        assert not [secret for secret in secrets if occurs(secret, capture)], f"{who} sent data of {name}"
        sent = b"".join(capture.all_bytes)
        assert not [window for window in windows if window in sent], f"{who} sent of the head of {name}"


def check_ledger(
    tmp_path: Path, name: str, capture: Capture, *, organizer: str = "", revoked_at: float = math.inf
) -> None:
    """`organizer`: of a private run; members keep the list that it has signed in the DHT.

    From `revoked_at` on the door keeps back calls to and of the one put out, which were reported already:
    there, and of calls alone, the ledger may hold more than what left, as `coordinator.outgoing` says.
    """
    lines = ledger_lines(tmp_path / name)
    peer_id = load_identity(tmp_path / name / "identity.key").peer_id
    problems = compare(capture.messages, lines)
    kept_back = [
        f"line {line['n']} "
        for line in lines
        if line["kind"] == "call" and line["time"] + line.get("seconds", 0.0) >= revoked_at
    ]
    assert [problem for problem in problems if not problem.startswith(tuple(kept_back))] == []
    own = {message.payload for message in capture.messages if message.kind == "record"}
    authors = {json.loads(payload)["peer_id"] for payload in own}
    assert {peer_id} <= authors <= {peer_id, organizer}
    signed_by_me = {value for value in record_values(capture) if json.loads(value)["peer_id"] == peer_id}
    assert signed_by_me <= own  # the rest is of others, passed on by the DHT
    assert {line["kind"] for line in lines} >= {"start", "layout", "record", "call", "reply", "end"}
    tensors = {line["kind"]: line["tensors"] for line in lines if "values" in line}
    layout = next(line for line in lines if line["kind"] == "layout")
    assert all(line["num"] > 0 for line in tensors.values())
    assert not [n for n, _ in layout["tensors"] if "classifier" in n or "pooler" in n]


def scores_told(capture: Capture) -> list[Mapping[str, Any]]:
    """In the heartbeats that went to the DHT."""
    heartbeats = [
        json.loads(json.loads(m.payload)["payload"]) for m in capture.messages if m.kind == "record"
    ]
    return [h["about"]["scores"] for h in heartbeats if h["about"] and h["about"]["scores"]]


def check_that_the_checks_see(tmp_path: Path, name: str, capture: Capture) -> None:
    """What is sent is found, and a message more, less or other than in the ledger as well."""
    lines = ledger_lines(tmp_path / name)
    part = next(message for message in capture.messages if message.kind == "delta part")
    assert occurs(part.payload, capture)
    *rest, last = capture.messages
    assert len(compare(rest, lines)) == 1
    assert len(compare([*rest, last, last], lines)) == 1
    assert compare([*rest, replace(last, payload=last.payload + b" ")], lines)
    assert compare(capture.messages, [line for line in lines if line["kind"] != "delta part"])


def test_a_round_of_three_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LocalSwarm(tmp_path / "logs") as swarm:
        captured = CapturedSwarm(swarm, tmp_path)
        starter = captured.begin("--rounds", "1", "--round-examples", "16", "--min-peers", "2")
        peers = [captured.join("a", "--share-metrics", seed=0), captured.join("b", seed=1)]
        swarm.wait_until_ended([*peers, starter], timeout_seconds=200.0)
    captures = {name: read_capture(tmp_path / f"{name}.capture") for name in ("starter", "a", "b")}
    assert {(s["round"], s["metric"]) for s in scores_told(captures["a"])} == {(1, "accuracy")}
    assert scores_told(captures["b"]) == []  # its person did not agree
    for name, capture in captures.items():
        check_ledger(tmp_path, name, capture)
    for name in "ab":
        check_private(tmp_path, name, captures)
    check_that_the_checks_see(tmp_path, "a", captures["a"])
    capsys.readouterr()
    assert main([str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "heads, labels, texts: none (the head is: bert.pooler" in told
    assert "delta parts are of" in told


@pytest.mark.slow
def test_a_private_round_and_a_revocation(tmp_path: Path) -> None:
    """Credentials at the door, and the list of the revoked, told from a directory of the organizer's own."""
    key, office = str(tmp_path / "organizer.key"), tmp_path / "office"
    flags = ["--rounds", "500", "--round-examples", "16", "--min-peers", "2", "--lease-seconds", "10"]
    with LocalSwarm(tmp_path / "logs") as swarm:
        captured = CapturedSwarm(swarm, tmp_path)
        starter = captured.begin("--private", "--organizer-key", key, *flags)
        invite = parse_invite(captured.entry[1])
        peers = {name: captured.join(name, seed=i) for i, name in enumerate("ab")}
        for peer in peers.values():
            swarm.wait_for(peer, "committed", timeout_seconds=2 * START_SECONDS)
        revoked = load_identity(tmp_path / "b" / "identity.key").peer_id
        office.mkdir()
        shutil.copy(tmp_path / "starter" / "run.toml", office)
        printed = captured.run(
            "office",
            "coordinator.invite",
            [
                *("revoke", revoked, "--output-dir", str(office), "--organizer-key", key),
                *("--initial-peers", *invite.entry_points),
            ],
        )
        assert "told to" in printed
        assert peers["b"].process.wait(START_SECONDS) == AccessError.exit_code
        for process in (peers["a"], starter):
            assert swarm.terminate(process) == EXIT_TERMINATED
    names = ("starter", "a", "b", "office")
    captures = {name: read_capture(tmp_path / f"{name}.capture") for name in names}
    lines = ledger_lines(office)
    revoked_at = next(line["time"] for line in lines if line.get("name") == "revocations")
    for name in ("starter", "a", "b"):
        check_ledger(tmp_path, name, captures[name], organizer=invite.organizer, revoked_at=revoked_at)
    assert compare(captures["office"].messages, lines) == []
    calls = {line["name"] for line in lines if line["kind"] == "call"}
    assert {"present", "spec", "revocations"} <= calls
    shown = {
        (name, message.kind)
        for name, capture in captures.items()
        for message in capture.messages
        if message.name == "present"
    }
    assert {("a", "call"), ("starter", "reply"), ("office", "call")} <= shown
    told = [m for m in captures["office"].messages if m.name == "revocations"]
    assert told
    assert all(revoked.encode() in message.payload for message in told)
    secrets = {invite.secret.encode(), Path(key).read_bytes()[4:36]}
    assert not [s for s in secrets for c in captures.values() if occurs(s, c)]
    rest = [message for message in captures["a"].messages if message.name != "present"]
    assert compare(rest, ledger_lines(tmp_path / "a"))  # the checks see what the door is told


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["fp32", "int8"])
def test_rounds_with_audits_a_kill_a_return_and_a_newcomer(tmp_path: Path, compression: str) -> None:
    flags = ["--rounds", "7", "--round-seconds", "4", "--min-peers", "2", "--lease-seconds", "5"]
    with LocalSwarm(tmp_path / "logs") as swarm:
        captured = CapturedSwarm(swarm, tmp_path)
        starter = captured.begin(*flags, "--compression", compression)
        shutil.rmtree(tmp_path / "pretrained")  # from here on, everything comes from peers
        peers = {name: captured.join(name, seed=i) for i, name in enumerate("abc")}
        swarm.wait_for(peers["a"], "round_started", timeout_seconds=START_SECONDS)
        peers["d"] = captured.join("d", seed=3)
        swarm.wait_for(peers["c"], "committed", timeout_seconds=START_SECONDS)
        swarm.kill(peers["c"])
        swarm.wait_until_ended([peers[name] for name in "abd"] + [starter], timeout_seconds=200.0)
    names = ("starter", "a", "b", "d")
    captures = {name: read_capture(tmp_path / f"{name}.capture") for name in (*names, "c")}
    for name in names:
        check_ledger(tmp_path, name, captures[name])
    for name in "abcd":
        check_private(tmp_path, name, captures)
    kinds = {message.kind for capture in captures.values() for message in capture.messages}
    assert kinds >= {"delta part", "result part", "state chunk", "audit part", "statement", "model file"}
    lines = ledger_lines(tmp_path / "c")  # its chain holds, though it was killed
    assert [line["kind"] for line in lines].count("start") == 2  # the look before joining, and the session
    assert [line["kind"] for line in lines].count("end") == 1
    missing = compare(captures["c"].messages, lines)  # only what was still open when it was killed
    assert not [problem for problem in missing if not problem.startswith("not in the ledger")]
