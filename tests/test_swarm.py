"""Do real processes on loopback form a swarm, agree bit for bit, and survive what happens to volunteers?"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, pipeline

from coordinator.spec import load_spec
from peer.data import DataConfig, load_task_data
from peer.finetune import FinetuneConfig
from peer.genesis import load_first_state
from peer.state import Checkpoint, CheckpointStore
from scripts.local_peers import identity_of
from scripts.simulation import Contributor, SimulatedSwarm
from scripts.swarm_processes import LocalSwarm, SwarmProcess
from tests.tiny_models import make_model_dir, make_texts

LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
START_SECONDS = 90.0  # importing torch and transformers on a loaded machine
pytestmark = pytest.mark.timeout(300)


def write_task(path: Path, *, seed: int, kind: str = "single") -> Path:
    """100 examples; label names that must stay private."""
    texts, labels = make_texts(100, seed=seed)
    rows = []
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        row: dict[str, Any] = {"text": text, "label": f"private-{kind}-{label}"}
        if kind == "pair":
            row["text_pair"] = texts[index - 1]
        if kind == "regression":
            row["label"] = label + index / 100
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def start_run(swarm: LocalSwarm, tmp_path: Path, *flags: str) -> tuple[SwarmProcess, list[str]]:
    model = make_model_dir(tmp_path / "pretrained")
    starter = swarm.start(
        "starter",
        "coordinator.start",
        [
            "--model",
            str(model),
            "--run-name",
            "test",
            "--output-dir",
            str(tmp_path / "starter"),
            *LOOPBACK,
            *flags,
        ],
    )
    started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
    return starter, ["--run", started["spec_digest"], "--initial-peers", *started["initial_peers"]]


def start_peer(
    swarm: LocalSwarm, name: str, tmp_path: Path, data: Path, flags: Sequence[str]
) -> SwarmProcess:
    output = ["--data", str(data), "--output-dir", str(tmp_path / name), *LOOPBACK]
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
    return swarm.start(name, "peer.join", [*output, *training, *flags])


def committed(process: SwarmProcess) -> dict[int, str]:
    return {event["round"]: event["state_hash"] for event in process.of_kind("committed")}


def rounds_file(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def write_identity(name: str, path: Path) -> None:
    """The key that the simulation gives to a peer of this name, in libp2p's form."""
    key = identity_of(name, seed=0).private_key
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_bytes(b"\x08\x01\x12\x40" + key.private_bytes_raw() + key.public_key().public_bytes_raw())


def check_against_simulation(tmp_path: Path, names: Sequence[str]) -> None:
    """Round 2 once more, in one process, from what round 1 left: the same backbone.

    Round 1 is no measure: whoever joins first trains on, alone, until the others are there.
    Not the same bits: the all-reduce may have another order, and threads add up differently.
    """
    spec = load_spec(tmp_path / names[0] / "run.toml")
    model_dir = tmp_path / "pretrained"
    first = load_first_state(spec, model_dir)
    assert first is not None
    contributors = [
        Contributor(
            name,
            load_task_data(DataConfig(data=str(tmp_path / f"{name}.jsonl"), max_eval_examples=256)),
            seed=0,
        )
        for name in names
    ]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        with CheckpointStore(tmp_path / name) as store:
            second, before = store.checkpoints()
        assert (second.round, before.round) == (2, 1)
        tensors |= {f"head/{name}/{key}": tensor for key, tensor in before.head.items()}
    metadata = {"run": spec.digest, "tick": "1", "commits": json.dumps(before.commits)}
    save_file({"state": before.flat, **tensors}, tmp_path / "round1", metadata)
    config = FinetuneConfig(learning_rate=1e-3, per_device_train_batch_size=8, max_length=16)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of the swarm
    try:
        swarm = SimulatedSwarm(spec, model_dir, first, contributors, config, eval_examples=256, seed=0)
        swarm.load(tmp_path / "round1")
        outcome = swarm.step()
    finally:
        torch.set_num_threads(num_threads)
    assert outcome is not None
    assert outcome.committed
    assert outcome.round == 2
    way = float((second.flat - before.flat).norm())
    apart = float((second.flat - swarm.state.flat).norm())
    assert way > 1e-2
    assert apart < 0.02 * way


@pytest.mark.slow  # each kind of task alone: test_data.py, test_learner.py
def test_three_peers_with_three_kinds_of_task(tmp_path: Path) -> None:
    kinds = ("single", "pair", "regression")
    with LocalSwarm(tmp_path / "logs") as swarm:
        starter, entry = start_run(
            swarm, tmp_path, "--rounds", "2", "--round-examples", "48", "--min-peers", "3"
        )
        for kind in kinds:
            write_identity(kind, tmp_path / kind / "identity.key")
        peers = [
            start_peer(
                swarm, kind, tmp_path, write_task(tmp_path / f"{kind}.jsonl", seed=i, kind=kind), entry
            )
            for i, kind in enumerate(kinds)
        ]
        swarm.wait_until_ended([*peers, starter], timeout_seconds=200.0)

    hashes = [committed(peer) for peer in peers]
    assert set(hashes[0]) == {1, 2}
    assert hashes[0] == hashes[1] == hashes[2]
    for kind, peer in zip(kinds, peers, strict=True):
        assert [event["num_peers"] for event in peer.of_kind("fused")] == [3, 3]
        rounds = rounds_file(tmp_path / kind)
        assert rounds[0]["num_examples"] >= 48  # more while the others are still on their way
        assert rounds[1]["num_examples"] == 48
        assert {entry["metric"] for entry in rounds} == {"pearson" if kind == "regression" else "accuracy"}
        assert set(rounds[0]["accuracy"]) == {"base", "own", "fused"}
        assert peer.of_kind("stopped")[0]["round"] == 2
        assert last_checkpoint(tmp_path / kind).commits[0]["witness"]  # the starter's word, which may go now
    assert json.loads((tmp_path / "starter" / "witness.json").read_text())["commit"]
    check_models(tmp_path, "pair", "single")
    check_against_simulation(tmp_path, kinds)


def check_models(tmp_path: Path, *names: str) -> None:
    backbones = []
    for name in names:
        AutoTokenizer.from_pretrained(tmp_path / name / "model")
        model = AutoModel.from_pretrained(tmp_path / name / "model")
        backbones.append(
            {key: value for key, value in model.state_dict().items() if not key.startswith("pooler")}
        )
        assert "private" not in (tmp_path / name / "model" / "config.json").read_text()
        assert "test" in (tmp_path / name / "model" / "README.md").read_text()
    assert all(torch.equal(backbones[0][key], backbones[1][key]) for key in backbones[0])
    classify = pipeline("text-classification", model=str(tmp_path / names[-1] / "task_model"))
    assert classify("a good film")[0]["label"].startswith("private-")


def test_the_starter_goes_a_peer_is_killed_and_comes_back_and_a_newcomer_enters(tmp_path: Path) -> None:
    tasks = {name: write_task(tmp_path / f"{name}.jsonl", seed=i) for i, name in enumerate("abcd")}
    # The run lasts until the late ones have taken part: on a busy machine they need a minute to start.
    flags = ("--rounds", "1000", "--round-seconds", "4", "--min-peers", "2", "--lease-seconds", "5")
    with LocalSwarm(tmp_path / "logs") as swarm:
        starter, entry = start_run(swarm, tmp_path, *flags)
        shutil.rmtree(tmp_path / "pretrained")  # from here on, everything comes from peers
        peers = {name: start_peer(swarm, name, tmp_path, tasks[name], entry) for name in "abc"}
        swarm.wait_for(peers["a"], "committed", timeout_seconds=START_SECONDS)
        swarm.kill(starter)
        killed = peers["c"]
        swarm.wait_for(killed, "round_started", timeout_seconds=60.0, where=lambda event: event["round"] == 2)
        swarm.kill(killed)
        address = peers["b"].of_kind("joined")[0]["initial_peers"]
        peers["c again"] = start_peer(
            swarm, "c", tmp_path, tasks["c"], entry
        )  # the starter's address is dead
        peers["d"] = start_peer(swarm, "d", tmp_path, tasks["d"], ["--initial-peers", *address])
        for name in ("c again", "d"):
            swarm.wait_for(peers[name], "committed", timeout_seconds=2 * START_SECONDS)
        survivors = [peers[name] for name in ("a", "b", "c again", "d")]
        for peer in survivors:
            peer.process.send_signal(signal.SIGTERM)
        assert [peer.process.wait(60.0) for peer in survivors] == [143] * 4

    hashes = {name: committed(peer) for name, peer in peers.items()}
    assert set(hashes["a"]) == set(range(1, max(hashes["a"]) + 1)), "the others did not go on"
    of_all = set().union(*(one.items() for one in hashes.values()))
    assert len(of_all) == len({round_ for round_, _ in of_all}), "two peers hold different states of a round"
    for name in ("c again", "d"):
        assert peers[name].of_kind("joined")[0]["round"] >= 1
        first = peers[name].of_kind("round_started")[0]["round"]
        assert first >= 2, "trained from the pretrained weights"
    assert peers["d"].of_kind("caught_up"), "the newcomer did not download the swarm's state"
    assert {final_state(tmp_path / name) for name in "abcd"} <= of_all


def final_state(directory: Path) -> tuple[int, str]:
    checkpoint = last_checkpoint(directory)
    return checkpoint.round, checkpoint.commits[-1]["commit"]["state_hash"]


def last_checkpoint(directory: Path) -> Checkpoint:
    with CheckpointStore(directory) as store:
        checkpoint = store.load()
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    ("event_name", "number", "exit_code"),
    [
        pytest.param("joined", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("round_started", signal.SIGINT, 130, marks=pytest.mark.slow),
        ("finetuned", signal.SIGTERM, 143),
    ],
)
def test_it_stops_when_told_and_leaves_no_process(
    tmp_path: Path, event_name: str, number: signal.Signals, exit_code: int
) -> None:
    with LocalSwarm(tmp_path / "logs") as swarm:
        model = make_model_dir(tmp_path / "pretrained")
        data = write_task(tmp_path / "data.jsonl", seed=0)
        flags = [
            "--model",
            str(model),
            "--round-examples",
            "400",
        ]  # alone: it trains until it is told to stop
        peer = start_peer(swarm, "peer", tmp_path, data, flags)
        swarm.wait_for(peer, event_name, timeout_seconds=START_SECONDS)
        children = psutil.Process(peer.process.pid).children(recursive=True)
        assert any("p2pd" in child.name() for child in children)
        peer.process.send_signal(number)
        assert peer.process.wait(30.0) == exit_code
        gone, left = psutil.wait_procs(children, timeout=5.0)
        assert gone
        assert not left
    assert peer.of_kind("stopped")[0]["reason"] in ("interrupted", "terminated")
    with CheckpointStore(tmp_path / "peer") as store:
        assert store.load() is not None


def test_a_swarm_of_one_resumes_after_sigkill(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "pretrained")
    data = write_task(tmp_path / "data.jsonl", seed=0)
    flags = ["--model", str(model), "--min-peers", "1", "--rounds", "4", "--round-seconds", "2"]
    with LocalSwarm(tmp_path / "logs") as swarm:
        peer = start_peer(swarm, "one", tmp_path, data, flags)
        swarm.wait_for(peer, "committed", timeout_seconds=START_SECONDS)
        swarm.kill(peer)
        before = committed(peer)
        again = start_peer(swarm, "one", tmp_path, data, flags)
        joined = swarm.wait_for(again, "joined", timeout_seconds=START_SECONDS)
        assert joined["round"] >= max(before)
        swarm.wait_until_ended([again], timeout_seconds=120.0)
    assert max(committed(again)) == 4
    assert last_checkpoint(tmp_path / "one").commits[0]["witness"]  # who begins a run may train in it
    assert [entry["round"] for entry in rounds_file(tmp_path / "one")] == [1, 2, 3, 4]


@pytest.mark.slow  # the decision is tested in test_rounds.py, the call in test_agreement.py
def test_a_lone_peer_says_so_and_commits_when_company_comes(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "pretrained")
    tasks = [write_task(tmp_path / f"{i}.jsonl", seed=i) for i in range(2)]
    with LocalSwarm(tmp_path / "logs") as swarm:
        flags = ["--model", str(model), "--rounds", "1", "--round-examples", "32"]
        first = start_peer(swarm, "first", tmp_path, tasks[0], flags)
        started = swarm.wait_for(first, "started", timeout_seconds=START_SECONDS)
        swarm.wait_for(first, "alone", timeout_seconds=60.0)
        assert not first.of_kind("committed")
        second = start_peer(
            swarm, "second", tmp_path, tasks[1], ["--initial-peers", *started["initial_peers"]]
        )
        swarm.wait_until_ended([first, second], timeout_seconds=120.0)
    assert committed(first) == committed(second) != {}
    assert first.of_kind("finetuned")[-1]["num_examples"] > 32
