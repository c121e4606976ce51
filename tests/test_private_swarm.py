"""Do real processes with invites commit a round, while one without is refused and a revoked one leaves?"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.admission import OWN_SECONDS
from coordinator.credentials import parse_invite
from coordinator.errors import AccessError
from coordinator.identity import load_identity
from coordinator.invite import main as invite_main
from coordinator.network import Network
from coordinator.spec import RunSpec
from peer.config import PeerConfig
from peer.data import DataConfig, load_task_data
from peer.display import Reporter
from peer.finetune import FinetuneConfig
from peer.genesis import State, make_run
from peer.ledger import read_chain
from peer.ledger_file import LEDGER_NAME
from peer.manners import Manners
from peer.session import Session
from peer.state import CheckpointStore
from peer.stopping import StopSwitch
from scripts.swarm_processes import LocalSwarm
from tests.test_swarm import LOOPBACK, START_SECONDS, committed, start_peer, write_task
from tests.tiny_models import make_model_dir

pytestmark = pytest.mark.timeout(300)


def test_a_peer_whose_credential_ends_leaves_before_its_next_round(tmp_path: Path) -> None:
    """A session in this process; with the first commit its clock jumps to shortly before the end."""
    config, spec, state = private_run(tmp_path)
    out, data = config.output_dir, config.data

    class Hourglass(Reporter):
        def committed(self, *args: Any, **kwargs: Any) -> None:
            super().committed(*args, **kwargs)
            assert session._admission is not None
            session._admission._now = lambda: Network.now() + OWN_SECONDS - 5.0

    lines = io.StringIO()
    with StopSwitch(120.0).listening() as stop, CheckpointStore(out) as store:
        session = Session(config, load_task_data(data), store, Hourglass(True, stream=lines), stop, Manners())
        with pytest.raises(AccessError, match=r"it ends at .* the checkpoint is kept"):
            session.run(spec, state)
    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [event["round"] for event in events if event["event"] == "committed"] == [1]
    assert parse_invite(next(e["invite"] for e in events if e["event"] == "started")).run == spec.digest
    with CheckpointStore(out) as store:
        kept = store.load()
    assert kept is not None
    assert kept.round == 1


@pytest.mark.slow
def test_two_with_invites_commit_while_an_outsider_is_refused_and_a_revoked_one_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ["--organizer-key", str(tmp_path / "organizer.key")]
    run_flags = ["--rounds", "500", "--min-peers", "2", "--round-examples", "16", "--lease-seconds", "10"]
    model = ["--model", str(make_model_dir(tmp_path / "pretrained")), "--run-name", "test"]
    with LocalSwarm(tmp_path / "logs") as swarm:
        starter = swarm.start(
            "starter",
            "coordinator.start",
            [*model, "--output-dir", str(tmp_path / "starter"), *LOOPBACK, "--private", *key, *run_flags],
        )
        started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        entry = ["--initial-peers", *started["initial_peers"]]

        outsider = start_peer(
            swarm,
            "outsider",
            tmp_path,
            write_task(tmp_path / "outsider.jsonl", seed=3),
            ["--run", started["spec_digest"], *entry],
        )
        holder = start_peer(  # of the string that the starter printed
            swarm,
            "holder",
            tmp_path,
            write_task(tmp_path / "holder.jsonl", seed=1),
            ["--invite", started["invite"]],
        )
        named_key = str(tmp_path / "named" / "identity.key")
        assert invite_main(["peer-id", "--identity-path", named_key]) == 0
        named_id = capsys.readouterr().out.strip()
        arguments = ["--output-dir", str(tmp_path / "starter"), *key]
        assert invite_main([*arguments, "--for-peer", named_id]) == 0
        (tmp_path / "invite.txt").write_text(capsys.readouterr().out)
        named = start_peer(
            swarm,
            "named",
            tmp_path,
            write_task(tmp_path / "named.jsonl", seed=2),
            ["--invite", f"@{tmp_path / 'invite.txt'}"],
        )
        for process in (holder, named):
            swarm.wait_for(process, "committed", timeout_seconds=2 * START_SECONDS)
        assert committed(holder)[1] == committed(named)[1]

        assert outsider.process.wait(START_SECONDS) == AccessError.exit_code == 7
        assert not outsider.of_kind("joined")
        assert not outsider.of_kind("committed")
        assert "ask the organizer of the run for an invite" in outsider.last_log_lines()
        assert "Traceback" not in outsider.log_file.read_text()
        assert "has shown no credential" in starter.log_file.read_text()

        watching = ["--once", "--json", "--max-seconds", "60"]
        watch = swarm.start("watch", "coordinator.monitor", ["--invite", started["invite"], *watching])
        assert watch.process.wait(START_SECONDS) == 0
        stranger = swarm.start("stranger", "coordinator.monitor", [*entry, *watching])
        assert stranger.process.wait(START_SECONDS) == 7
        assert "ask the organizer of the run for an invite" in stranger.log_file.read_text()

        assert invite_main(["revoke", named_id, *arguments]) == 0
        assert "told to" in capsys.readouterr().out
        assert named.process.wait(START_SECONDS) == 7
        assert "the organizer has revoked it" in named.last_log_lines()
        assert "Traceback" not in named.log_file.read_text()
        assert (tmp_path / "named" / "checkpoints").is_dir()  # the work is kept
        assert holder.exit_code is None  # the others go on
        assert starter.exit_code is None
        assert named_id in (tmp_path / "holder" / "revocations.json").read_text()
        lines = read_chain(tmp_path / "starter" / LEDGER_NAME).lines  # the starter goes on writing it
        assert [line["kind"] for line in lines].count("start") == 2
        assert "revocations" in {line.get("name") for line in lines if line["kind"] == "call"}


def test_a_peer_that_rests_is_told_as_well_when_its_credential_has_ended(tmp_path: Path) -> None:
    """Else it would rest, and say so to a run that does not hear it any more, for as long as it likes."""

    class Resting(Reporter):
        def paused(self, *args: Any, **kwargs: Any) -> None:
            super().paused(*args, **kwargs)
            assert session._admission is not None
            session._admission._now = lambda: Network.now() + OWN_SECONDS + 5.0

    manners, lines = Manners(), io.StringIO()
    manners._is_told = True
    config, spec, state = private_run(tmp_path)
    with StopSwitch(60.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        data = load_task_data(config.data)
        session = Session(config, data, store, Resting(True, stream=lines), stop, manners)
        with pytest.raises(AccessError, match="it ends at"):
            session.run(spec, state)


@pytest.mark.slow
def test_a_peer_that_rests_does_so_though_nobody_has_the_better_chain_any_more(tmp_path: Path) -> None:
    """Its holder has left: there is nothing to catch up with, and resting must not become a busy loop."""

    class Counting(Manners):
        num_asked = 0

        def reason(self) -> str | None:
            self.num_asked += 1
            session._agreement.is_overtaken = True
            assert self.num_asked < 200
            return "told to pause"

    config, spec, state = private_run(tmp_path)
    with StopSwitch(20.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        data = load_task_data(config.data)
        manners = Counting()
        session = Session(config, data, store, Reporter(True, stream=io.StringIO()), stop, manners)
        assert session.run(spec, state) == "the time limit is reached"
    assert manners.num_asked > 0


def private_run(directory: Path, **changes: Any) -> tuple[PeerConfig, RunSpec, State]:
    """Of one peer, the organizer's own; `changes` of the spec."""
    out, key = directory / "mine", directory / "organizer.key"
    options = {
        "run_name": "test",
        "created_at": Network.now(),
        "num_rounds": 100,
        "min_peers": 1,
        "round_examples": 16,
        "lease_seconds": 10.0,
        "organizer": load_identity(key).peer_id,
        **changes,
    }
    model = make_model_dir(directory / "pretrained")
    spec, state = make_run(str(model), None, options, out / "base")
    config = PeerConfig(
        output_dir=out,
        data=DataConfig(data=str(write_task(directory / "data.jsonl", seed=1)), max_eval_examples=32),
        finetune=FinetuneConfig(per_device_train_batch_size=8, max_length=16, use_cpu=True),
        host_maddrs=LOOPBACK[1:],
        organizer_key=key,
        eval_examples=32,
        num_threads=1,
    )
    return config, spec, state
