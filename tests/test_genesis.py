"""Is a state that lies on disk hashed once, whoever asks for it, and never where the network's calls wait?"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.errors import ModelError, UsageError
from coordinator.network import Network, PeerUnreachable
from coordinator.spec import validate_spec
from peer import genesis, state
from peer.genesis import MAX_STATES_ON_DISK, State, StatesOnDisk, get_state, has_files, make_run, serve_run
from peer.layout import TensorLayout, make_manifest
from peer.model import load_classifier, load_tokenizer, resolve_model, save_task_model
from peer.state import Checkpoint, CheckpointStore
from peer.tasks import Task
from tests.fakes import CALL_SECONDS, make_spec, running_networks
from tests.tiny_models import make_model_dir

LAYOUT = TensorLayout(names=("weight",), shapes=((400_000,),))  # two chunks
SPEC = make_spec(num_parameters=LAYOUT.num_values)


def a_state(number: int) -> State:
    return State.of(LAYOUT, torch.full((LAYOUT.num_values,), float(number)))


class _Hashing:
    """Counts, and notes the threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_hashed, self.threads = 0, set[str]()

        def counted(layout: TensorLayout, flat: torch.Tensor) -> object:
            self.num_hashed += 1
            self.threads.add(threading.current_thread().name)
            return make_manifest(layout, flat)

        monkeypatch.setattr(genesis, "make_manifest", counted)


def test_a_state_on_disk_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = a_state(1), a_state(2)
    hashing, on_disk = _Hashing(monkeypatch), StatesOnDisk()
    found = [on_disk.state(first.state_hash, LAYOUT, first.flat) for _ in range(3)]
    assert [state and state.manifest for state in found] == [first.manifest] * 3
    assert hashing.num_hashed == 1
    assert on_disk.state(other.state_hash, LAYOUT, first.flat) is None  # the file is not what it should be
    assert on_disk.state(other.state_hash, LAYOUT, first.flat) is None
    assert hashing.num_hashed == 2
    for number in range(3, 3 + MAX_STATES_ON_DISK):
        more = torch.full((LAYOUT.num_values,), float(number))
        on_disk.state(make_manifest(LAYOUT, more).state_hash, LAYOUT, more)
    assert len(on_disk._manifests) == MAX_STATES_ON_DISK


def test_what_a_checkpoint_holds_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the whole chain, for every call of a stranger."""
    with CheckpointStore(tmp_path) as store:
        store.save(Checkpoint(SPEC.digest, 1, LAYOUT, a_state(1).flat))
        store.save(Checkpoint(SPEC.digest, 2, LAYOUT, a_state(2).flat))
        reads: list[Path] = []
        read = state._read_metadata

        def counted(path: Path) -> dict[str, Any]:
            reads.append(path)
            return read(path)

        monkeypatch.setattr(state, "_read_metadata", counted)
        for _ in range(3):
            assert store.map_state(a_state(1).state_hash) is not None
            assert store.map_state(a_state(9).state_hash) is None
        assert len(reads) == 2
        store.save(Checkpoint(SPEC.digest, 3, LAYOUT, a_state(3).flat))
        assert store.map_state(a_state(1).state_hash) is None
        assert store.map_state(a_state(3).state_hash) is not None
        assert len(store._state_hashes) == 2


def test_pieces_of_an_older_state_wait_for_no_hashing_in_the_networks_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = a_state(1)
    on_disk, asked = StatesOnDisk(), 0

    def find_state(state_hash: str) -> State | None:
        nonlocal asked
        asked += 1
        return on_disk.state(state_hash, LAYOUT, older.flat) if state_hash == older.state_hash else None

    with running_networks(2, tmp_path) as [donor, newcomer]:
        serve_run(donor, SPEC, tmp_path, find_state)
        hashing = _Hashing(monkeypatch)
        got = get_state(newcomer, SPEC, older.state_hash, [donor.peer_id], lambda *_: None)
        assert torch.equal(got.flat, older.flat)
        assert (asked, hashing.num_hashed) == (1 + LAYOUT.num_chunks, 1)
        assert not any("network" in name for name in hashing.threads)
        with pytest.raises(PeerUnreachable, match="not held here"):
            newcomer.run(ask_manifest(newcomer, donor, "?"), timeout_seconds=CALL_SECONDS)


async def ask_manifest(asking: Network, donor: Network, state_hash: str) -> bytes:
    return await asking.call(donor.peer_id, "manifest", {"state": state_hash}, timeout_seconds=CALL_SECONDS)


def test_a_run_shares_no_label_names_of_its_base_model(tmp_path: Path) -> None:
    labels = Task(kind="classification", is_pair=False, label_names=("grim", "happy"))
    bert_dir = make_model_dir(tmp_path / "bert")
    own, base = tmp_path / "own", tmp_path / "base"
    save_task_model(load_classifier(bert_dir, labels, seed=0), load_tokenizer(bert_dir), own)
    options: dict[str, Any] = {"run_name": "t", "created_at": 1.0, "num_rounds": 1, "round_examples": 8}
    spec, _ = make_run(str(own), None, options, base)
    assert not any(b"grim" in file.read_bytes() for file in base.iterdir())
    assert has_files(spec, base)
    assert has_files(spec, own)  # so that whoever has the model needs no download
    as_it_was = {
        name: {"sha256": hashlib.sha256((own / name).read_bytes()).hexdigest(), "size_bytes": 1}
        for name in spec.files
    }
    earlier = validate_spec({**spec.model_dump(mode="json"), "files": as_it_was}, source="a test")
    assert has_files(earlier, own)  # a run that an earlier version began
    assert not has_files(earlier, base)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    own = make_model_dir(tmp_path / "bert")
    with pytest.raises(UsageError, match="--revision main is of a model on the hub; give its id"):
        make_run(str(own), "main", {}, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_directory_is_no_hub_id_for_those_who_do_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_dir(tmp_path / "mine" / "model")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"run_name": "t", "created_at": 1.0, "num_rounds": 1, "round_examples": 8}
    spec, _ = make_run("mine/model", None, options, tmp_path / "base")
    assert spec.model == "./mine/model"
    assert resolve_model(spec.model, None) == Path("mine/model")
    monkeypatch.chdir(tmp_path / "base")  # another machine
    with pytest.raises(ModelError, match="no model directory"):  # and the hub is not asked for it
        resolve_model(spec.model, None)
