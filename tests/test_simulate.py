"""Does the command simulate, print, go on, and refuse what cannot be?"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from coordinator.errors import UsageError
from scripts import simulate
from scripts.simulate import Plan, read_rounds
from tests.tiny_models import make_model_dir, make_texts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate("abc"):
        (root / name).mkdir()
        for split, num_rows in (("train", 48), ("validation", 12), ("test", 12)):
            texts, labels = make_texts(num_rows, seed=10 * seed + len(split))
            with (root / name / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                writer.writerows((t, f"label {n}") for t, n in zip(texts, labels, strict=True))
    return root


def flags_of(model_dir: Path, data_dir: Path, out: Path, *more: str) -> list[str]:
    return [
        *(
            "--model",
            str(model_dir),
            "--data-dir",
            str(data_dir),
            "--out",
            str(out),
            "--datasets",
            "a",
            "b",
            "c",
        ),
        *("--rounds", "3", "--round-examples", "16", "--eval-examples", "8", "--learning-rate", "1e-3"),
        *("--per-device-train-batch-size", "8", "--max-length", "16", "--use-cpu", *more),
    ]


def test_the_command_runs_and_the_same_command_gives_the_same_bits(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate.main(flags_of(model_dir, data_dir, tmp_path / "one", "--keep-every", "2")) == 0
    printed = capsys.readouterr().out
    assert "round 3: 3 contributors" in printed
    rounds = read_rounds(tmp_path / "one")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert {c["name"] for c in rounds[0]["contributors"]} == {"a", "b", "c"}
    assert all(c["num_examples"] == 16 and 0 <= c["base_head_only"] <= 1 for c in rounds[0]["contributors"])
    assert [p.name for p in (tmp_path / "one" / "models").iterdir()] == ["round-0002"]
    fused = AutoModel.from_pretrained(tmp_path / "one" / "model").state_dict()
    base = AutoModel.from_pretrained(model_dir).state_dict()
    changed = [name for name in base if not torch.equal(base[name], fused[name])]
    assert len(changed) > len(base) / 2
    assert simulate.main(flags_of(model_dir, data_dir, tmp_path / "two", "--keep-every", "2")) == 0
    assert [x["state_hash"] for x in read_rounds(tmp_path / "two")] == [x["state_hash"] for x in rounds]
    # A finished run is left alone.
    assert simulate.main(flags_of(model_dir, data_dir, tmp_path / "two", "--keep-every", "2")) == 0
    assert read_rounds(tmp_path / "two")[-1]["tick"] == 3


def test_a_run_that_was_stopped_goes_on(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    plan = Plan(
        datasets=("a", "b"),
        run={"num_rounds": 3, "round_examples": 16},
        finetune={"learning_rate": 1e-3, "max_length": 16, "use_cpu": True},
        model=str(model_dir),
        eval_examples=8,
        split=2,
        harm={"b.2": "flipped"},
    )
    assert plan.contributors() == ("a.1", "a.2", "b.1", "b.2")
    assert simulate.simulate(plan, data_dir, tmp_path / "whole")
    seen: list[int] = []
    stop = tmp_path / "stopped"
    is_done = simulate.simulate(
        plan, data_dir, stop, should_stop=lambda: len(seen) == 1, on_round=lambda o: seen.append(o.round)
    )
    assert not is_done
    assert seen == [1]
    with (stop / "rounds.jsonl").open("a") as file:  # a crash between the line and the checkpoint
        file.write(json.dumps({"tick": 2, "round": 2}) + "\n")
    assert simulate.simulate(plan, data_dir, stop)
    hashes = [[x["state_hash"] for x in read_rounds(d)] for d in (tmp_path / "whole", stop)]
    assert hashes[0] == hashes[1]
    with pytest.raises(UsageError, match="other settings"):
        simulate.simulate(Plan(("a",), plan.run, plan.finetune, str(model_dir)), data_dir, stop)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--harm", "d=noise"], 2, "--harm d: no such contributor; there are a, b, c"),
        (["--harm", "a=loud"], 2, "--harm a=loud: choose one of none, noise"),
        (["--straggler", "a=11"], 2, "speed of a must be above 0 and at most 10, not 11.0"),
        (["--churn", "1.5"], 2, "churn"),
        (["--drop", "1"], 2, "drop must be from 0 up to 1, not 1.0"),
        (["--trim", "-0.1"], 2, "trim must be from 0 up to 1, not -0.1"),
        (["--datasets", "a", "z"], 3, "z"),
        (["--min-peers", "9", "--max-peers", "3"], 2, "min_peers"),
        (
            ["--churn", "0.9", "--min-peers", "3", "--round-examples", "1", "--rounds", "1"],
            2,
            "lower --churn",
        ),
        (["--revision", "main"], 2, "--revision main is of a model on the hub"),
    ],
)
def test_what_is_refused(
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    assert simulate.main(flags_of(model_dir, data_dir, tmp_path / "out", *flags)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
