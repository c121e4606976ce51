"""Are features, probe and head the same thing in every family, and is the probe right?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from coordinator.errors import DataError
from peer.evaluate import (
    LOGISTIC_C,
    Features,
    autocast,
    bf16_supported,
    cross_entropy,
    evaluate_classifier,
    extract_features,
    fit_head,
    fit_probe,
    head_only_score,
    init_head,
    mean_over_tokens,
    predict,
)
from peer.model import export_backbone, load_classifier, load_tokenizer
from peer.tasks import Task, score
from tests.tiny_models import FAMILIES, HIDDEN_SIZE, make_dataset, make_model_dir

BINARY = Task(kind="classification", is_pair=False, label_names=("bad", "good"))
THREE = Task(kind="classification", is_pair=False, label_names=("a", "b", "c"))
REGRESSION = Task(kind="regression", is_pair=False, label_names=())


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model_dir(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [BINARY, REGRESSION], ids=["binary", "regression"])
def test_after_init_head_the_classifier_predicts_what_the_probe_does(
    family: str, task: Task, model_dirs: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(model_dirs[family])
    model = load_classifier(model_dirs[family], task, seed=0)
    before = export_backbone(model)
    is_regression = task.kind == "regression"
    train = make_dataset(tokenizer, 60, seed=1, is_regression=is_regression)
    test = make_dataset(tokenizer, 30, seed=2, is_regression=is_regression)
    probe = init_head(model, task, train, tokenizer, 0, bf16=False)
    features = extract_features(model, test, tokenizer, bf16=False)
    logits = predict(model, test, tokenizer, bf16=False)
    np.testing.assert_allclose(logits, probe.predict(features.head_input), atol=1e-4)
    accuracy = evaluate_classifier(task, model, test, tokenizer, bf16=False)
    assert accuracy == pytest.approx(score(task, logits, features.labels))
    assert torch.equal(export_backbone(model), before)


def test_a_head_to_start_from_is_not_surer_of_itself_in_training_than_chance(
    model_dirs: dict[str, Path],
) -> None:
    """Features that vary little around a large mean, as those of the first token do after some rounds."""
    tokenizer = load_tokenizer(model_dirs["bert"])
    model: Any = load_classifier(model_dirs["bert"], BINARY, seed=0)
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(0.02)
        model.bert.pooler.dense.bias.fill_(1.0)
    train = make_dataset(tokenizer, 120, seed=1)
    in_training = extract_features(model, train, tokenizer, bf16=False, dropout_seed=7)
    calm = extract_features(model, train, tokenizer, bf16=False)
    assert calm.head_input.std(axis=0).mean() < 0.05 * calm.head_input.mean()
    of_calm = fit_probe(BINARY, calm.head_input, calm.labels, seed=0)
    head = fit_head(model, BINARY, train, tokenizer, 0, bf16=False)
    losses = [
        cross_entropy(probe.predict(in_training.head_input), in_training.labels) for probe in (of_calm, head)
    ]
    assert losses[0] > 2 * math.log(2)
    assert losses[1] < 1.05 * math.log(2)


def test_features_with_dropout_are_drawn_from_their_seed_alone(model_dirs: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(model_dirs["bert"])
    model = load_classifier(model_dirs["bert"], BINARY, seed=0)
    dataset = make_dataset(tokenizer, 20, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = (
        extract_features(model, dataset, tokenizer, bf16=False, dropout_seed=seed).head_input
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


def test_cross_entropy_by_hand() -> None:
    """Probabilities 3/4 and 1/2 of the right label."""
    logits = np.array([[math.log(3), 0.0], [5.0, 5.0]])
    assert cross_entropy(logits, np.array([0, 1])) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_do_not_depend_on_the_batch_and_keep_the_order(
    family: str, model_dirs: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(model_dirs[family])
    model = load_classifier(model_dirs[family], BINARY, seed=0)
    dataset = make_dataset(tokenizer, 20, seed=3)
    together = extract_features(model, dataset, tokenizer, batch_size=8, bf16=False)
    alone = extract_features(model, dataset, tokenizer, batch_size=1, bf16=False)
    assert together.pooled.shape == together.head_input.shape == (20, HIDDEN_SIZE)
    np.testing.assert_allclose(together.pooled, alone.pooled, atol=1e-5)
    np.testing.assert_allclose(together.head_input, alone.head_input, atol=1e-5)
    assert together.labels.tolist() == dataset["labels"][:]
    ids = torch.tensor([dataset[7]["input_ids"]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    np.testing.assert_allclose(together.pooled[7], hidden[0].mean(dim=0), atol=1e-5)


def test_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    assert mean_over_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


def test_probe_is_the_logistic_regression_on_scaled_features() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(90, 5)) * [1, 10, 0.1, 1, 1] + [0, 5, 0, 0, -3]
    labels = (features[:, 1] > 5).astype(np.int64) + (features[:, 0] > 0.5)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=LOGISTIC_C, max_iter=300).fit(scaler.transform(features), labels)
    logits = fit_probe(THREE, features, labels, seed=0).predict(features)
    np.testing.assert_allclose(
        _softmax(logits), reference.predict_proba(scaler.transform(features)), atol=1e-6
    )


def test_binary_probe_has_two_opposite_rows() -> None:
    features = np.array([[-1.0, 0.0], [-2.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    labels = np.array([0, 0, 1, 1])
    probe = fit_probe(BINARY, features, labels, seed=0)
    np.testing.assert_allclose(probe.weight[0], -probe.weight[1])
    assert probe.predict(features).argmax(axis=1).tolist() == [0, 0, 1, 1]


def test_a_label_without_examples_is_never_predicted() -> None:
    features = np.array([[-1.0], [-2.0], [1.0], [2.0]])
    probe = fit_probe(THREE, features, np.array([0, 0, 2, 2]), seed=0)
    assert probe.predict(features).argmax(axis=1).tolist() == [0, 0, 2, 2]
    only = fit_probe(THREE, features, np.array([1, 1, 1, 1]), seed=0)
    assert only.predict(features).argmax(axis=1).tolist() == [1, 1, 1, 1]


def test_constant_features_do_no_harm() -> None:
    features = np.array([[-1.0, 7.0], [-2.0, 7.0], [1.0, 7.0], [2.0, 7.0]])
    probe = fit_probe(BINARY, features, np.array([0, 0, 1, 1]), seed=0)
    assert np.isfinite(probe.weight).all()
    assert probe.predict(features).argmax(axis=1).tolist() == [0, 0, 1, 1]


def test_ridge_finds_a_line() -> None:
    features = np.arange(20.0).reshape(-1, 1)
    targets = (3.0 * features[:, 0] + 1.0).astype(np.float32)
    predictions = fit_probe(REGRESSION, features, targets, seed=0).predict(features)
    assert predictions.shape == (20, 1)
    assert np.corrcoef(predictions[:, 0], targets)[0, 1] > 0.999
    assert abs(predictions[:, 0] - targets).max() < 4.0


def test_probe_is_deterministic() -> None:
    features = np.random.default_rng(0).normal(size=(50, 8))
    labels = np.arange(50) % 3
    first, second = (fit_probe(THREE, features, labels, seed=0) for _ in range(2))
    assert first.weight.tobytes() == second.weight.tobytes()


def test_probe_takes_one_thread_and_gives_back_the_others() -> None:
    """More threads wait for one another; and with the order of sums they may change the last bits."""
    features = np.random.default_rng(0).normal(size=(600, 300))
    labels = np.arange(600) % 3
    probes = []
    for num_threads in (1, 2):
        with threadpool_limits(limits=num_threads, user_api="blas"):
            before = threadpool_info()
            probes.append(fit_probe(THREE, features, labels, seed=0))
            assert threadpool_info() == before
    assert probes[0].weight.tobytes() == probes[1].weight.tobytes()


def test_head_only_score_uses_pooled_features() -> None:
    labels = np.array([0, 0, 1, 1])
    informative, useless = np.array([[-1.0], [-2.0], [1.0], [2.0]]), np.zeros((4, 1))
    assert (
        head_only_score(
            BINARY, Features(informative, useless, labels), Features(informative, useless, labels)
        )
        == 1.0
    )
    assert (
        head_only_score(
            BINARY, Features(useless, informative, labels), Features(useless, informative, labels)
        )
        == 0.5
    )


def test_progress_ends_at_one_and_the_mode_stays(model_dirs: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(model_dirs["bert"])
    model = load_classifier(model_dirs["bert"], BINARY, seed=0).train()
    seen: list[float] = []
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    extract_features(model, make_dataset(tokenizer, 10), tokenizer, batch_size=4, on_progress=seen.append)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.rand(1), expected)  # dropout of a later training does not depend on it


def test_nothing_to_evaluate_is_told(model_dirs: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(model_dirs["bert"])
    model = load_classifier(model_dirs["bert"], BINARY, seed=0)
    with pytest.raises(DataError, match="empty"):
        predict(model, make_dataset(tokenizer, 4).select([]), tokenizer)


def test_autocast_follows_the_setting() -> None:
    cpu = torch.device("cpu")
    for bf16, expected in ((True, True), (False, False), (None, bf16_supported(cpu))):
        with autocast(cpu, bf16):
            assert torch.is_autocast_enabled("cpu") == expected


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return result


def test_many_labels_and_few_rows_are_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    """150 labels and 200 rows, as of clinc150: scikit-learn asks whether that is a regression."""
    labels = np.arange(40) % 30
    task = Task(kind="classification", is_pair=False, label_names=tuple(f"intent {i}" for i in range(30)))
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    assert fit_probe(task, features, labels, seed=0).weight.shape == (30, 4)
    assert not [str(w.message) for w in recwarn if "unique classes" in str(w.message)]
