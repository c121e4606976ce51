"""Does the demo measure what it says, on a small scale and without a swarm?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from coordinator.errors import ModelError, UsageError
from scripts import demo
from scripts.demo import MARKER, Results, SwarmView, embedded_encoder, fresh_folder, print_results


def _console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100, highlight=False), text


def test_an_encoder_with_other_weights_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_encoder"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "ENCODER_PACKAGE", "other_encoder")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        embedded_encoder()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match=r"has sha256 \w{64}, expected 53aa51"):
        embedded_encoder()


def test_a_missing_encoder_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ENCODER_PACKAGE", "no_such_encoder")
    with pytest.raises(ModelError, match="make install"):
        embedded_encoder()


def test_the_encoder_of_the_demo_is_the_known_one(encoder_dir: Path) -> None:
    assert (encoder_dir / "config.json").is_file()
    assert (encoder_dir / "tokenizer.json").is_file()


def test_only_a_folder_of_a_demo_is_made_anew(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not delete")
    with pytest.raises(UsageError, match="name a new folder"):
        fresh_folder(mine)
    assert (mine / "thesis.txt").exists()
    earlier = fresh_folder(tmp_path / "earlier")
    (earlier / "peers").mkdir()
    assert [path.name for path in fresh_folder(earlier).iterdir()] == [MARKER]


def test_without_a_terminal_the_swarm_is_told_in_lines() -> None:
    console, text = _console()
    with SwarmView(console, ["a", "b"], num_rounds=2) as view:
        view.on_event("starter", {"event": "started"})
        view.on_event("a", {"event": "joined"})
        view.on_event("a", {"event": "round_started", "round": 1})
        view.on_event("a", {"event": "fused", "round": 1, "bytes_sent": 2_000_000})
        scores = {"base": 0.5, "own": None, "fused": 0.625}
        view.on_event("a", {"event": "committed", "round": 1, "num_peers": 2, "accuracy": scores})
    lines = [line.split("s  ", 1)[1] for line in text.getvalue().splitlines()]
    assert lines == [
        "starter: started",
        "a: joined",
        "a: round 1 averaged over 2 peers; accuracy base 50.0, own -, fused 62.5",
    ]
    console.print(view)
    assert "50.0" in text.getvalue()


def test_results_are_printed_as_they_are_also_where_the_fused_model_lost() -> None:
    console, text = _console()
    results = Results(
        config={"num_rounds": 4, "round_examples": 320, "few_examples": 100, "num_draws": 2},
        own_tasks={
            "torch": {"base": 0.5, "alone": 0.75, "fused": 0.25},
            "stdlib": {"base": 0.25, "alone": 0.25, "fused": 0.5},
        },
        unseen_tasks={"pandas": {"base": 0.125, "fused": 0.25, "few_base": None, "few_fused": 0.875}},
        state_hashes={"torch": "a", "stdlib": "b"},
        model="out/model",
    )
    print_results(results, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines()]
    assert ["torch", "50.0", "75.0", "25.0"] in rows
    assert ["mean", "37.5", "50.0", "37.5"] in rows
    assert ["pandas", "12.5", "25.0", "-", "87.5"] in rows
    assert "DIFFERENT" in text.getvalue()
    assert "out/model" in text.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("encoder_dir")
def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    flags = ["--peers", "3", "--rounds", "1", "--round-examples", "32", "--few-examples-seen", "16"]
    assert demo.main([*flags, "--out", str(out)]) == 0
    results = json.loads((out / "demo.json").read_text())
    assert list(results["own_tasks"]) == ["torch", "transformers", "numpy_scipy"]
    assert list(results["unseen_tasks"]) == ["pandas", "scikit_learn"]
    scores = [score for task in results["own_tasks"].values() for score in task.values()]
    assert len(scores) == 9
    assert all(0.2 < score < 0.95 for score in scores)
    assert len(set(results["state_hashes"].values())) == 1
    assert Path(results["model"], "model.safetensors").is_file()
    assert psutil.Process().children(recursive=True) == []
