"""One contributor's round without a network: does the head begin where it should, what is the delta?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from peer.data import DataConfig, TaskData, load_task_data
from peer.evaluate import evaluate_classifier
from peer.finetune import Budget, FinetuneConfig
from peer.gate import rejects
from peer.learner import Learner
from peer.model import load_backbone
from tests.tiny_models import make_model_dir, make_texts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    texts, labels = make_texts(120)
    rows = [json.dumps({"text": t, "label": label}) for t, label in zip(texts, labels, strict=True)]
    path = tmp_path_factory.mktemp("data") / "task.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return load_task_data(DataConfig(data=str(path)))


def make_learner(model_dir: Path, data: TaskData, head_init: str = "probe") -> Learner:
    config = FinetuneConfig(
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_length=16,
        head_init=head_init,  # type: ignore[arg-type]
        bf16=False,
        use_cpu=True,
    )
    layout, flat = load_backbone(model_dir)
    return Learner(data, model_dir, layout, flat, config, eval_examples=64, seed=3)


def test_a_probed_head_is_the_classifier_that_is_scored(model_dir: Path, data: TaskData) -> None:
    learner = make_learner(model_dir, data)
    evaluation = learner.evaluate_base(1)
    accuracy = evaluate_classifier(
        learner.task, learner.model, learner._held_out, learner.tokenizer, bf16=False
    )
    assert evaluation.classifier == pytest.approx(accuracy)
    assert 0.0 <= evaluation.head_only <= 1.0


def test_a_fresh_head_is_drawn_anew_each_round_and_a_kept_one_stays(model_dir: Path, data: TaskData) -> None:
    fresh, kept = make_learner(model_dir, data, "fresh"), make_learner(model_dir, data, "keep")
    heads = []
    for round_ in (1, 2, 1):
        fresh.evaluate_base(round_)
        heads.append(fresh.head_state())
    assert all(torch.equal(heads[0][name], heads[2][name]) for name in heads[0])
    assert any(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    before = kept.head_state()
    kept.evaluate_base(1)
    assert all(torch.equal(before[name], kept.head_state()[name]) for name in before)


def test_a_round_moves_the_backbone_and_can_be_made_again_bit_for_bit(
    model_dir: Path, data: TaskData
) -> None:
    base = load_backbone(model_dir)[1]
    deltas = []
    for _ in range(2):
        learner = make_learner(model_dir, data)
        assert torch.equal(learner.export_backbone(), base)
        learner.evaluate_base(1)
        result = learner.finetune(Budget(40, None), round_=1)
        assert result.num_examples == 40
        deltas.append(learner.export_backbone() - base)
    assert torch.equal(deltas[0], deltas[1])
    assert deltas[0].abs().max() > 0
    learner.load_backbone(base)
    assert torch.equal(learner.export_backbone(), base)


def test_another_round_draws_other_batches(model_dir: Path, data: TaskData) -> None:
    states = []
    for round_ in (1, 2):
        learner = make_learner(model_dir, data, "keep")
        learner.finetune(Budget(40, None), round_=round_)
        states.append(learner.export_backbone())
    assert not torch.equal(states[0], states[1])


def test_it_stops_when_told_and_counts_what_was_done(model_dir: Path, data: TaskData) -> None:
    learner = make_learner(model_dir, data)
    answers = iter([False, True, True, True, True])
    result = learner.finetune(Budget(80, None), round_=1, should_stop=lambda: next(answers))
    assert 0 < result.num_examples < 80
    assert result.stop_reason == "stopped"


def test_what_is_scored_row_by_row_has_the_score_as_its_mean(model_dir: Path, data: TaskData) -> None:
    learner = make_learner(model_dir, data)
    base = learner.evaluate_base(1)
    assert base.errors.shape == (learner.num_held_out,)
    assert set(base.errors) <= {0.0, 1.0}
    assert 1.0 - base.errors.mean() == pytest.approx(base.head_only)


@pytest.mark.parametrize("head_init", ["probe", "keep", "fresh"])
def test_a_fitted_head_is_kept_with_the_model_and_not_in_it(
    model_dir: Path, data: TaskData, tmp_path: Path, head_init: str
) -> None:
    """Whatever head the round begins with, what is saved has the fitted one, and the score it promises."""
    learner = make_learner(model_dir, data, head_init)
    base = learner.evaluate_base(1)
    head = learner.head_state()
    learner.save_task_model(tmp_path, base.probe)
    assert all(torch.equal(tensor, head[name]) for name, tensor in learner.head_state().items())
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    accuracy = evaluate_classifier(learner.task, saved, learner._held_out, learner.tokenizer, bf16=False)
    assert base.fitted == pytest.approx(accuracy)
    assert learner.evaluate_own().fitted is None


def test_a_backbone_without_finite_features_is_right_about_nothing(model_dir: Path, data: TaskData) -> None:
    learner = make_learner(model_dir, data)
    learner.load_backbone(torch.full_like(learner.export_backbone(), torch.nan))
    ruined = learner.evaluate_base(2)
    assert (ruined.head_only, ruined.classifier, ruined.fitted) == (0.0, 0.0, None)
    assert ruined.errors.mean() == 1.0
    assert rejects("classification", np.zeros(learner.num_held_out), ruined.errors, 0.01)
