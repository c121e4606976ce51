"""Is the Byzantine study what it says: the rule on the deltas of the peers, resumable, and shown?"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.errors import UsageError
from peer.model import load_backbone
from scripts import byzantine
from scripts.byzantine import Cell, Settings, Study, baruch_z, lies
from scripts.local_peers import (
    LocalPeer,
    Sizes,
    load_tasks,
    mean_accuracy,
    paired_difference,
    shuffled_labels,
)
from tests.tiny_models import make_model_dir, make_texts

SIZES = Sizes(
    train_examples=40,
    eval_examples=30,
    round_examples=16,
    probe_examples=20,
    learning_rate=1e-3,
    batch_size=8,
    max_length=16,
)
SETTINGS = Settings(SIZES, num_rounds=2, seed=0, honest=("a", "b"), liars=("c",))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for seed, task in enumerate("abc"):
        (directory / task).mkdir()
        for split, num in (("train", 60), ("validation", 20), ("test", 40)):
            texts, labels = make_texts(num, seed=10 * seed + len(split))
            with (directory / task / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return directory


def make_study(
    encoder: Path, data_dir: Path, out: Path, settings: Settings = SETTINGS
) -> tuple[Study, list[str]]:
    said: list[str] = []
    tasks = load_tasks(data_dir, (*settings.honest, *settings.liars), SIZES, settings.seed)
    return Study(settings, encoder, tasks, out, said.append), said


def test_a_cell_is_the_rule_on_the_deltas_round_by_round(
    encoder: Path, data_dir: Path, tmp_path: Path
) -> None:
    study, _ = make_study(encoder, data_dir, tmp_path)
    cell = Cell("median", "clean")
    study.run([cell])
    study.score([cell])
    base = load_backbone(encoder)
    tasks = load_tasks(data_dir, "abc", SIZES, 0)
    peers = [LocalPeer(name, tasks[name], encoder, base, SIZES, i) for i, name in enumerate("abc")]
    state = base[1]
    for round_ in (1, 2):
        deltas = torch.stack([peer.delta(state, round_) for peer in peers])
        state = state + deltas.median(dim=0).values
    expected = [peer.correct(state) for peer in peers[:2]]
    for rows, same in zip(study.result(cell), expected, strict=True):
        assert rows.tolist() == same.tolist()
    assert len(expected[0]) == 30
    assert not list((tmp_path / "states").iterdir())


def test_a_run_that_was_killed_goes_on_where_it_stopped(
    encoder: Path, data_dir: Path, tmp_path: Path
) -> None:
    cells = [Cell("mean", "six"), Cell("mean", "flipped")]
    study, said = make_study(encoder, data_dir, tmp_path)
    study.run(cells)
    study.score(cells)
    assert sum(line.startswith("round") for line in said) == 3  # both share the first state
    again, said = make_study(encoder, data_dir, tmp_path)
    again.run(cells)
    again.score(cells)
    assert said == []
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines()
    scores = [line for line in lines if json.loads(line)["kind"] == "score"]
    assert len(scores) == 3  # of the base, and of two states
    journal.write_text("\n".join([lines[0], *scores[:2], scores[2][:-20]]))  # killed while it wrote
    third, said = make_study(encoder, data_dir, tmp_path)
    third.run(cells)
    third.score(cells)
    assert sum(line.startswith("scoring") for line in said) == 1
    assert [third.result(c)[0].tolist() for c in cells] == [study.result(c)[0].tolist() for c in cells]


def test_a_journal_of_other_settings_is_refused(encoder: Path, data_dir: Path, tmp_path: Path) -> None:
    make_study(encoder, data_dir, tmp_path)
    with pytest.raises(UsageError, match="other settings"):
        make_study(encoder, data_dir, tmp_path, Settings(SIZES, 3, 0, ("a", "b"), ("c",)))


def test_the_table_is_printed_and_written(
    encoder: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *("--data-dir", str(data_dir), "--out", str(tmp_path), "--model", str(encoder), "--rounds", "1"),
        *("--honest", "a", "b", "--liars", "c", "--rules", "mean, screened", "--conditions", "x100"),
        *("--train-examples", "40", "--eval-examples", "30", "--round-examples", "16", "--batch-size", "8"),
    ]
    assert byzantine.main(flags) == 0
    shown = capsys.readouterr().out
    assert "mean, screened" in shown
    assert "+0.00 (0.00) 1/0" in shown  # the liar is left out: the same state as without it
    assert "1.00 0.00 1/0" in shown  # all of the honest mean, and nothing else
    table = json.loads((tmp_path / "byzantine.json").read_text())
    assert table["rules"]["mean, screened"]["left_out"]["x100"] == [1, 0]
    assert table["rules"]["mean"]["against_mean"]["clean"] == [0.0, 0.0]


def test_labels_with_other_names_are_no_attack_but_shuffled_ones_are(encoder: Path, data_dir: Path) -> None:
    """A private head learns the other names, so what the backbone learns is the same."""
    base, data = load_backbone(encoder), load_tasks(data_dir, "a", SIZES, 0)["a"]
    swapped = data.train.map(lambda row: {"label": 1 - row["label"]})
    renamed = replace(data, train=swapped)
    shuffled = shuffled_labels(data, 0)
    assert sorted(shuffled.train["label"]) == sorted(data.train["label"])
    assert shuffled.train["text"][:] == data.train["text"][:]
    deltas = [LocalPeer("a", d, encoder, base, SIZES, 0).delta(base[1], 1) for d in (data, renamed, shuffled)]
    cosines = [float(torch.cosine_similarity(deltas[0], other, dim=0)) for other in deltas[1:]]
    assert cosines[0] > 0.99
    assert cosines[1] < 0.9


def test_z_is_the_papers() -> None:
    assert baruch_z(50, 24) == pytest.approx(1.75, abs=0.005)  # their example: Phi(z) = 48 / 50
    assert baruch_z(8, 2) == pytest.approx(0.3186, abs=1e-4)  # Phi(z) = 5 / 8


def test_lies_by_hand() -> None:
    honest = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 3.0])]
    own = {"x": torch.tensor([1.0, -2.0])}
    assert lies("clean", ["x"], honest, own, 0)["x"].tolist() == [1.0, -2.0]
    assert lies("flipped", ["x"], honest, own, 0)["x"].tolist() == [-1.0, 2.0]
    assert lies("x100", ["x"], honest, own, 0)["x"].tolist() == [100.0, -200.0]
    both = lies("noise", ["x", "y"], honest, {}, 0)
    assert [float(noise.norm()) for noise in both.values()] == pytest.approx([3.0, 3.0])  # lengths 1, 3, 3.6
    assert not torch.equal(both["x"], both["y"])
    against = lies("against", ["x", "y"], honest, {}, 0)  # the mean is (2, 1), of length sqrt(5)
    assert against["y"].tolist() == pytest.approx([-6.0 / 5**0.5, -3.0 / 5**0.5])
    little = lies("little_1.5", ["x", "y"], honest, {}, 0)  # means 2, 1; variances 2/3, 2
    assert little["x"].tolist() == pytest.approx([2.0 + 1.5 * (2 / 3) ** 0.5, 1.0 + 1.5 * 2.0**0.5])
    assert torch.equal(little["x"], little["y"])


def test_what_is_along_the_mean_and_what_is_not() -> None:
    along, aside = byzantine._along(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]))
    assert (along, aside) == pytest.approx((0.5, 2.0))


def test_differences_are_means_over_tasks_with_the_error_of_paired_rows() -> None:
    one = [np.array([True, True, True, False]), np.array([True, False])]
    other = [np.array([True, False, False, False]), np.array([True, False])]
    points, error = paired_difference(one, other)
    assert points == pytest.approx(25.0)  # (2/4 + 0) / 2
    assert error == pytest.approx(100 * (0.25 / 4 / 4) ** 0.5)  # variance 1/4 of 4 rows, of 2 tasks
    assert mean_accuracy(one) == pytest.approx(62.5)
