"""Is centralized training the same training as a peer's, with one backbone for all heads?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from coordinator.errors import UsageError
from peer.data import TaskData, tokenize
from peer.finetune import Budget, FinetuneConfig, finetune, plan_batches
from peer.model import export_backbone, load_backbone, load_classifier, load_tokenizer
from peer.tasks import Task
from scripts.multitask import MultitaskPlan, multitask, plan_tasks, train_multitask
from tests.tiny_models import make_model_dir, make_texts

CONFIG = FinetuneConfig(
    learning_rate=3e-3, per_device_train_batch_size=4, max_length=16, head_init="fresh", use_cpu=True
)


def make_data(seed: int, labels: tuple[str, ...] = ("bad", "good")) -> TaskData:
    texts, ids = make_texts(30, seed=seed)
    rows = Dataset.from_dict({"text": texts, "label": ids})
    return TaskData(Task(kind="classification", is_pair=False, label_names=labels), rows, rows, rows, ())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, so that equal steps give equal bits whatever was drawn before."""
    directory = make_model_dir(tmp_path_factory.mktemp("model"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def trained(model_dir: Path, data: dict[str, TaskData], config: FinetuneConfig = CONFIG) -> torch.Tensor:
    layout, flat = load_backbone(model_dir)
    return multitask(data, model_dir, layout, flat, config, num_examples=22, probe_examples=12, seed=5)


def test_tasks_share_the_examples_and_keep_the_order_of_a_peer() -> None:
    lengths = {"a": [3] * 6, "b": [3] * 20}
    turns = list(plan_tasks(lengths, 4, 13, seed=1))
    of_a = [batch for name, batch in turns if name == "a"]
    of_b = [batch for name, batch in turns if name == "b"]
    assert sum(map(len, of_a)) == 7  # 13 = 7 + 6
    assert sum(map(len, of_b)) == 6
    assert of_a == list(plan_batches(lengths["a"], 4, 7, 1))
    assert of_b == list(plan_batches(lengths["b"], 4, 6, 2))


def test_tasks_take_turns_by_lot() -> None:
    turns = [name for name, _ in plan_tasks({"a": [3] * 40, "b": [3] * 40}, 4, 80, seed=1)]
    assert turns not in (["a"] * 10 + ["b"] * 10, ["b"] * 10 + ["a"] * 10)
    assert turns != [name for name, _ in plan_tasks({"a": [3] * 40, "b": [3] * 40}, 4, 80, seed=2)]


def test_one_task_alone_is_a_peers_finetuning(model_dir: Path) -> None:
    data = make_data(1)
    ours = trained(model_dir, {"films": data})
    layout, flat = load_backbone(model_dir)
    model = load_classifier(model_dir, data.task, seed=5, backbone=(layout, flat))
    tokenizer = load_tokenizer(model_dir)
    rows = tokenize(data.train, tokenizer, 16, is_pair=False)
    finetune(model, rows, tokenizer, CONFIG, Budget(22), seed=5)
    theirs = export_backbone(model, layout)
    assert torch.linalg.vector_norm(theirs - flat) > 0.1
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_all_heads_train_one_backbone(family: str, tmp_path: Path) -> None:
    directory = make_model_dir(tmp_path / family, family)
    config = FinetuneConfig(
        learning_rate=3e-3, per_device_train_batch_size=4, max_length=16, use_cpu=True, head_init="probe"
    )
    first, second = make_data(1), make_data(2, ("bad", "good", "none"))
    both = trained(directory, {"a": first, "b": second}, config)
    assert torch.equal(both, trained(directory, {"a": first, "b": second}, config))
    # b's steps reach the backbone that a's head exports: other rows of b give another one
    assert not torch.allclose(both, trained(directory, {"a": first, "b": make_data(3)}, config), atol=1e-4)


def test_fewer_examples_than_data_sets_are_refused() -> None:
    with pytest.raises(UsageError, match="1 examples are not one for each of 2"):
        MultitaskPlan(datasets=("a", "b"), finetune={}, num_examples=1, model="packaged")


class StopTestError(Exception):
    pass


def test_what_is_stopped_leaves_no_model(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    texts, labels = make_texts(60, seed=1)
    lines = [f"{text},{('bad', 'good')[label]}" for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "films" / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    plan = MultitaskPlan(
        ("films",), {"use_cpu": True, "max_length": 16}, 40, str(model_dir), probe_examples=12
    )

    def stop(fraction: float) -> None:
        if fraction > 0.5:
            raise StopTestError

    with pytest.raises(StopTestError):
        train_multitask(plan, tmp_path, tmp_path / "out", stop)
    assert not (tmp_path / "out" / "model").exists()
    train_multitask(plan, tmp_path, tmp_path / "out")
    assert not torch.equal(load_backbone(tmp_path / "out" / "model")[1], load_backbone(model_dir)[1])
