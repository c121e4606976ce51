"""Does a peer that is stopped while it waits for the others keep the model that it has made alone?"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coordinator.admission import OWN_SECONDS
from coordinator.agreement import Agreement
from coordinator.errors import AccessError, NetworkError, StateError
from coordinator.network import Network
from coordinator.spec import RunSpec
from peer import session as session_module
from peer.data import load_task_data, tokenize
from peer.display import ProgressBar, Reporter
from peer.evaluate import evaluate_classifier
from peer.layout import make_manifest
from peer.learner import Evaluation, Learner
from peer.manners import Manners
from peer.model import load_backbone, load_saved_classifier, load_tokenizer
from peer.session import Session
from peer.state import CheckpointStore, Conviction, kept_convictions, kept_model
from peer.stopping import StopSwitch
from tests.fakes import hash_of, peer
from tests.test_private_swarm import private_run

OWN_SCORE = 2.0  # above what any base has
pytestmark = pytest.mark.timeout(120)


class WaitingReporter(Reporter):
    """Tells when the own backbone is scored, and the session begins to wait for the others."""

    def __init__(self, on_waiting: Callable[[], None] = lambda: None) -> None:
        super().__init__(json_lines=True, stream=io.StringIO())
        self._on_waiting = on_waiting

    @contextmanager
    def progress(self, description: str, total: float | None) -> Iterator[ProgressBar]:
        with super().progress(description, total) as bar:
            if description.endswith("averaging with the others"):
                self._on_waiting()
            yield bar


class NotingReporter(WaitingReporter):
    def __init__(self, on_waiting: Callable[[], None]) -> None:
        super().__init__(on_waiting)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def _others_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_own = Learner.evaluate_own

    async def fuse(self: Agreement, reduce: object) -> None:
        await asyncio.Event().wait()

    def better_than_the_base(self: Learner, **options: Any) -> Evaluation:
        return replace(evaluate_own(self, **options), classifier=OWN_SCORE)

    monkeypatch.setattr(Agreement, "fuse", fuse)
    monkeypatch.setattr(Learner, "evaluate_own", better_than_the_base)


def run_until(
    directory: Path,
    on_waiting: Callable[[Session], None],
    before: Callable[[RunSpec], None] = lambda _: None,
) -> tuple[Session, str]:
    """A real session, and why it ended; `on_waiting` is called once it waits for the others."""
    config, spec, state = private_run(directory)
    before(spec)
    with StopSwitch(100.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        reporter = WaitingReporter(lambda: on_waiting(session))
        session = Session(config, load_task_data(config.data), store, reporter, stop, Manners())
        try:
            return session, session.run(spec, state)
        except (AccessError, NetworkError) as error:
            return session, f"{type(error).__name__}: {error}"


def told_to_stop(session: Session) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def let_in_no_longer(session: Session) -> None:
    assert session._admission is not None
    session._admission._now = lambda: Network.now() + OWN_SECONDS + 5.0


def without_a_daemon(session: Session) -> None:
    session._network.is_daemon_alive = lambda: False  # type: ignore[method-assign]


@pytest.mark.usefixtures("_others_never_come")
@pytest.mark.parametrize(
    ("on_waiting", "reason"),
    [
        (told_to_stop, "terminated"),
        (let_in_no_longer, "AccessError: "),
        (without_a_daemon, "NetworkError: the p2p daemon has died"),
    ],
)
def test_it_keeps_its_own_model_whatever_ends_the_waiting(
    tmp_path: Path, on_waiting: Callable[[Session], None], reason: str
) -> None:
    session, why = run_until(tmp_path, on_waiting)
    assert why.startswith(reason)
    kept = json.loads((tmp_path / "mine" / "task_model" / "kept.json").read_text())
    assert kept["what"] == "your own finetuned backbone with its head"
    assert (kept["round"], kept["score"]) == (1, OWN_SCORE)
    written = load_file(tmp_path / "mine" / "task_model" / "model.safetensors")
    own = session._learner.model.state_dict()
    assert {name for name in written if not torch.equal(written[name], own[name])} == set()
    assert not torch.equal(session._learner.export_backbone(), session._state.backbone)  # it was finetuned


@pytest.mark.usefixtures("_others_never_come")
def test_a_model_that_cannot_be_kept_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(target: Path, write: object) -> None:
        raise StateError(f"cannot write {target}: No space left on device")

    def told_to_stop_on_a_full_disk(session: Session) -> None:
        monkeypatch.setattr(session_module, "replace_directory", full)
        told_to_stop(session)

    _, why = run_until(tmp_path, told_to_stop_on_a_full_disk)
    assert why == "terminated"
    assert "your own classifier of this round is not kept: cannot write" in caplog.text
    kept = json.loads((tmp_path / "mine" / "task_model" / "kept.json").read_text())
    assert kept["what"] == "the backbone that the run began with and a head fitted to it"


@pytest.mark.usefixtures("_others_never_come")
def test_who_was_convicted_before_a_restart_stays_out(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "excluded.jsonl"

    def remember(spec: RunSpec) -> None:
        liar = Conviction(
            run=spec.digest, peer=peer("liar"), round=3, why="two statements do not go together"
        )
        of_another_run = liar.model_copy(update={"run": hash_of("another run"), "peer": peer("b")})
        lines = [liar.model_dump_json(), of_another_run.model_dump_json(), "[]", '{"round": 1e999}']
        file.write_text("\n".join([*lines, '{"peer": "torn']))

    session, why = run_until(tmp_path, told_to_stop, remember)
    assert why == "terminated"
    assert session._agreement.membership.banned == {peer("liar")}
    assert peer("liar") in session._audit._guilty
    assert not session._wants_rollback()  # nobody could be shown why
    assert [known.peer for known in kept_convictions(file.parent, session.spec.digest)] == [peer("liar")]
    assert "torn" not in file.read_text()  # else the next line would be lost with it


def test_a_commit_that_comes_while_it_is_told_to_stop_is_kept_with_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone in a run of one: the network's thread commits while this one still scores its own backbone."""
    evaluate_own, sessions = Learner.evaluate_own, list[Session]()

    def stopped_after_the_commit(self: Learner, **options: Any) -> Evaluation:
        until = time.monotonic() + 60.0
        while sessions[0]._agreement.chain.round < 1 and time.monotonic() < until:
            time.sleep(0.02)
        told_to_stop(sessions[0])
        return evaluate_own(self, **options)

    monkeypatch.setattr(Learner, "evaluate_own", stopped_after_the_commit)
    config, spec, state = private_run(tmp_path, compression="int8")
    with StopSwitch(100.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        session = Session(config, load_task_data(config.data), store, WaitingReporter(), stop, Manners())
        sessions.append(session)
        assert session.run(spec, state) == "terminated"
        kept = store.load()
    assert kept is not None
    assert kept.round == 1
    committed = kept.commits[-1]["commit"]
    assert make_manifest(kept.layout, kept.flat).state_hash == committed["state_hash"] != state.state_hash
    assert kept.residuals  # of the round that counts, not of the one before
    assert kept.residual is not None
    _, fused = load_backbone(config.output_dir / "model")
    assert torch.equal(fused, kept.flat[: fused.numel()])

    def resumed(self: Learner, **options: Any) -> Evaluation:
        told_to_stop(session)
        return evaluate_own(self, **options)

    monkeypatch.setattr(Learner, "evaluate_own", resumed)
    with StopSwitch(100.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        session = Session(config, load_task_data(config.data), store, WaitingReporter(), stop, Manners())
        assert session.run() == "terminated"
        assert session._agreement.chain.round >= 1
        assert session._agreement.chain.state_hash == session._state.state_hash


@pytest.mark.usefixtures("_others_never_come")
def test_other_labels_begin_with_another_head_and_another_measure(tmp_path: Path) -> None:
    """The same number of classes: nothing would fail, and the old head would mean something else."""
    first, why = run_until(tmp_path, told_to_stop)
    assert why == "terminated"
    file = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    config = replace(first._config, output_dir=tmp_path / "mine")
    for renamed in (False, True):
        for row in rows:
            row["label"] = f"new {row['label']}" if renamed else row["label"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with StopSwitch(100.0).listening() as stop, CheckpointStore(config.output_dir) as store:
            notes = NotingReporter(lambda: os.kill(os.getpid(), signal.SIGTERM))
            session = Session(config, load_task_data(config.data), store, notes, stop, Manners())
            assert session._best_task_score == (None if renamed else OWN_SCORE)
            assert session.run() == "terminated"
        told = "\n".join(notes.notes)
        assert ("your labels are others than before" in told) is renamed
        assert ("chosen on other held-out examples or labels" in told) is renamed
    labels = json.loads((config.output_dir / "task_model" / "config.json").read_text())["id2label"]
    assert all(name.startswith("new ") for name in labels.values())


def test_at_the_end_the_own_classifier_is_scored_on_the_test_examples(tmp_path: Path) -> None:
    config, spec, state = private_run(tmp_path, num_rounds=1)
    data, stream = load_task_data(config.data), io.StringIO()
    with StopSwitch(100.0).listening() as stop, CheckpointStore(config.output_dir) as store:
        session = Session(config, data, store, Reporter(True, stream=stream), stop, Manners())
        assert session.run(spec, state) == "all rounds are committed"
    events = {event["event"]: event for event in map(json.loads, stream.getvalue().splitlines())}
    tested = events["tested"]
    assert (tested["metric_name"], tested["num_examples"]) == ("accuracy", len(data.test))
    saved = load_saved_classifier(config.output_dir / "task_model")
    tokenizer = load_tokenizer(config.output_dir / "task_model")
    rows = tokenize(data.test, tokenizer, 16, is_pair=data.task.is_pair)
    assert tested["score"] == evaluate_classifier(data.task, saved, rows, tokenizer)
    card = (config.output_dir / "task_model" / "README.md").read_text()
    assert f"on {len(data.test)} test examples, by which nothing was chosen, is {tested['score']:.4f}" in card
    kept = kept_model(config.output_dir / "task_model")
    assert kept is not None
    assert kept.test_score == tested["score"]
