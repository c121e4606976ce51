"""Which run does an entry point open: a new one, that of a spec file, or the one that it has begun?"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import SpecError, UsageError
from peer.display import Reporter
from peer.genesis import has_files
from peer.model import load_classifier, load_tokenizer, save_task_model
from peer.serving import EntryPoint
from peer.stopping import StopSwitch
from peer.tasks import Task
from tests.fakes import peer
from tests.tiny_models import make_model_dir

STARTER = peer("starter")
TASK = Task(kind="classification", is_pair=False, label_names=("grim", "happy"))


def entry_point(directory: Path, values: dict[str, Any], **explicit: Any) -> EntryPoint:
    return EntryPoint(
        directory,
        {"run_name": "t", "created_at": 1.0, "num_rounds": 1, "round_examples": 8, **values},
        explicit=explicit,
        source="a test",
        identity_path=directory / "identity.key",
        host_maddrs=(),
        announce_maddrs=(),
        reachability="private",
        organizer_key=directory / "organizer.key",
        reporter=Reporter(json_lines=True, stream=io.StringIO()),
        stop=StopSwitch(60.0),
    )


def test_a_run_that_was_begun_from_a_relative_path_is_served_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_dir(tmp_path / "mine" / "model")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    spec, _ = entry_point(out, {"model": "mine/model"})._open_run(STARTER)
    again, _ = entry_point(out, {"model": "mine/model"}, model="mine/model")._open_run(STARTER)
    assert again == spec
    with pytest.raises(UsageError, match="with another model"):
        entry_point(out, {"model": "mine/other"}, model="mine/other")._open_run(STARTER)


def test_a_spec_file_with_the_hashes_of_its_model_is_served_as_it_is(tmp_path: Path) -> None:
    """Also one that an earlier version wrote, which shared a config with its label names."""
    bert = make_model_dir(tmp_path / "bert")
    save_task_model(load_classifier(bert, TASK, seed=0), load_tokenizer(bert), tmp_path / "own")
    first, out = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    out.mkdir()
    spec, _ = entry_point(first, {"model": str(tmp_path / "own")})._open_run(STARTER)
    written = spec.model_dump(mode="json")
    config = (tmp_path / "own" / "config.json").read_bytes()
    written["files"]["config.json"] = {
        "sha256": hashlib.sha256(config).hexdigest(),
        "size_bytes": len(config),
    }
    served, _ = entry_point(out, written)._open_run(STARTER)
    assert served.model_dump(mode="json") == written
    assert has_files(served, out / "base")
    assert (out / "base" / "config.json").read_bytes() == config
    written["files"]["config.json"]["sha256"] = "0" * 64
    third = tmp_path / "third"
    third.mkdir()
    with pytest.raises(SpecError, match="is not the one whose hashes the spec file holds"):
        entry_point(third, written)._open_run(STARTER)
