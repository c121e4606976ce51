"""Is a benchmark fair: the same rows for every model, choices on validation rows, finetuning as by peers?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from coordinator.errors import UsageError
from peer.benchmark import (
    Benchmark,
    BenchmarkConfig,
    BenchmarkTexts,
    EncodedTask,
    Encoder,
    Score,
    answers,
    cost,
    cut_texts,
    encode,
    few_shot,
    finetune_score,
    headline_metric,
    label_ids,
    load_texts,
    probe,
    stratified_draw,
)
from peer.data import TaskData
from peer.evaluate import evaluate_classifier, extract_features, fit_probe, init_head
from peer.finetune import Budget, finetune
from peer.model import load_classifier, load_tokenizer
from peer.tasks import Task, score
from tests.tiny_models import make_model_dir, make_texts

CONFIG = BenchmarkConfig(
    train_examples=40,
    validation_examples=30,
    test_examples=50,
    finetune_examples=48,
    few_shot_examples=12,
    few_shot_draws=2,
    few_shot_epochs=2,
    learning_rates=(1e-4, 3e-3),
    batch_size=8,
    max_length=16,
    probe_cs=(0.01, 1.0),
    use_cpu=True,
)
BINARY = Task(kind="classification", is_pair=False, label_names=("bad", "good"))


def rows(num_rows: int, seed: int) -> Dataset:
    texts, labels = make_texts(num_rows, seed=seed)
    return Dataset.from_dict({"text": texts, "label": labels})


def make_data(name: str = "films") -> BenchmarkTexts:
    return cut_texts(name, TaskData(BINARY, rows(80, 1), rows(40, 2), rows(60, 3), ()), CONFIG)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(make_model_dir(tmp_path_factory.mktemp("model"), "roberta"))


@pytest.fixture(scope="module")
def data(encoder: Encoder) -> EncodedTask:
    return encode(make_data(), load_tokenizer(encoder.model_dir), CONFIG)


# ---- rows ---------------------------------------------------------------------------------


def test_a_draw_is_in_proportion_and_has_every_label() -> None:
    labels = np.array([0] * 60 + [1] * 38 + [2] * 2)
    drawn = stratified_draw(labels, 20, np.random.default_rng(0))
    assert np.bincount(labels[drawn]).tolist() in ([12, 7, 1], [11, 8, 1], [12, 6, 2])
    assert len(set(drawn.tolist())) == 20
    few = stratified_draw(labels, 3, np.random.default_rng(1))
    assert labels[few].tolist() == [0, 1, 2]
    assert stratified_draw(labels, 500, np.random.default_rng(2)).tolist() == list(range(100))


def test_more_labels_than_examples_leaves_some_out() -> None:
    labels = np.repeat(np.arange(10), 4)
    drawn = labels[stratified_draw(labels, 7, np.random.default_rng(0))]
    assert len(set(drawn.tolist())) == 7


def test_rows_are_the_same_again_and_differ_by_draw_data_set_and_seed() -> None:
    texts, again = make_data(), make_data()
    assert texts.digest == again.digest
    sizes = [len(s) for s in (texts.data.train, texts.data.validation, texts.data.test, *texts.few_shot)]
    assert sizes == [40, 30, 50, 12, 12]
    first, second = (draw["text"][:] for draw in texts.few_shot)
    assert first != second
    assert make_data("books").few_shot[0]["text"][:] != first
    other = cut_texts(
        "films", TaskData(BINARY, rows(80, 1), rows(40, 2), rows(60, 3), ()), replace(CONFIG, seed=1)
    )
    assert other.digest != texts.digest
    larger = replace(CONFIG, train_examples=60, few_shot_draws=3)
    more = cut_texts("films", TaskData(BINARY, rows(80, 1), rows(40, 2), rows(60, 3), ()), larger)
    assert [draw["text"][:] for draw in more.few_shot[:2]] == [first, second]


def test_files_are_read_and_cut(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    for split, num in (("train", 80), ("validation", 40), ("test", 60)):
        texts, labels = make_texts(num, seed=num)
        lines = ["text,label", *(f"{text},{label}" for text, label in zip(texts, labels, strict=True))]
        (folder / f"{split}.csv").write_text("\n".join(lines))
    read = load_texts(tmp_path, "films", CONFIG)
    assert (len(read.data.train), len(read.data.validation), len(read.data.test)) == (40, 30, 50)
    assert read.digest == load_texts(tmp_path, "films", CONFIG).digest


# ---- scores -------------------------------------------------------------------------------


def test_the_probe_has_the_penalty_that_validation_likes_best(encoder: Encoder, data: EncodedTask) -> None:
    model = load_classifier(encoder.model_dir, BINARY, seed=0)
    tokenizer = load_tokenizer(encoder.model_dir)
    train, validation, test = (
        extract_features(model, s, tokenizer) for s in (data.train, data.validation, data.test)
    )
    fits = {c: fit_probe(BINARY, train.pooled, train.labels, seed=0, c=c) for c in CONFIG.probe_cs}
    on_validation = {
        c: score(BINARY, fit.predict(validation.pooled), validation.labels) for c, fit in fits.items()
    }
    result = probe(encoder, data, CONFIG)
    assert result.chosen == max(on_validation, key=lambda c: on_validation[c])
    assert result.validation_score == pytest.approx(max(on_validation.values()))
    assert result.accuracy == pytest.approx(
        score(BINARY, fits[result.chosen].predict(test.pooled), test.labels)
    )
    assert result.correct.mean() == pytest.approx(result.accuracy)
    assert (result.dataset, result.method, result.draw) == ("films", "probe", 0)


def test_finetuning_is_that_of_a_peer_with_the_learning_rate_that_validation_likes_best(
    encoder: Encoder, data: EncodedTask
) -> None:
    tokenizer = load_tokenizer(encoder.model_dir)
    expected: dict[float, tuple[float, float]] = {}
    for learning_rate in CONFIG.learning_rates:
        model = load_classifier(encoder.model_dir, BINARY, seed=0)
        init_head(model, BINARY, data.train, tokenizer, 0)
        settings = CONFIG.finetune_config(learning_rate)
        finetune(model, data.train, tokenizer, settings, Budget(48), seed=0)
        validation, test = (
            evaluate_classifier(BINARY, model, split, tokenizer) for split in (data.validation, data.test)
        )
        expected[learning_rate] = (validation, test)
    result = finetune_score(encoder, data, CONFIG)
    assert (result.validation_score, result.accuracy) == pytest.approx(expected[result.chosen])
    assert result.validation_score == pytest.approx(max(validation for validation, _ in expected.values()))


def test_few_shot_has_one_score_for_each_draw(encoder: Encoder, data: EncodedTask) -> None:
    first, second = few_shot(encoder, data, CONFIG)
    assert (first.draw, second.draw) == (0, 1)
    assert np.array_equal(first.labels, second.labels)
    both = answers([first, second])
    assert both.value == pytest.approx((first.accuracy + second.accuracy) / 2)


def test_methods_do_not_change_what_the_next_one_sees(encoder: Encoder, data: EncodedTask) -> None:
    """They share one model and its features; alone, each gives the same."""
    config = replace(CONFIG, learning_rates=(3e-3,))
    benchmark = Benchmark(encoder, data, config)
    trained, probed, again = benchmark.finetune(), benchmark.probe(), benchmark.finetune()
    assert probed.predictions.tolist() == probe(encoder, data, config).predictions.tolist()
    assert trained.predictions.tolist() == again.predictions.tolist()
    assert trained.predictions.tolist() != probed.predictions.tolist()


def test_the_flat_backbone_is_what_counts(encoder: Encoder, data: EncodedTask) -> None:
    """Not the weights in the directory, which has only config and tokenizer for most models of a swarm."""
    blank = Encoder(encoder.model_dir, encoder.layout, torch.zeros_like(encoder.flat))
    assert blank.state_hash != encoder.state_hash
    result = probe(blank, data, CONFIG)
    assert len(set(result.predictions.tolist())) == 1  # nothing to tell rows apart by


@pytest.mark.parametrize("method", ["probe", "few_shot", "finetune"])
def test_what_is_done_adds_up_to_the_cost(encoder: Encoder, data: EncodedTask, method: str) -> None:
    done: list[float] = []
    config = replace(CONFIG, finetune_examples=16, few_shot_epochs=1)
    benchmark = Benchmark(encoder, data, config, done.append)
    {"probe": benchmark.probe, "few_shot": benchmark.few_shot, "finetune": benchmark.finetune}[method]()
    assert sum(done) == pytest.approx(cost(method, data, config))  # type: ignore[arg-type]
    assert cost(method, make_data(), config) == cost(method, data, config)  # type: ignore[arg-type]


def test_the_headline_is_what_the_data_set_is_known_by() -> None:
    labels, predictions = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    made = {n: Score(n, "probe", 0, labels, predictions, 0.1, 0.5) for n in ("cola", "tweet_hate", "sst2")}
    assert {name: headline_metric(name) for name in made} == {
        "cola": "matthews",
        "tweet_hate": "macro_f1",
        "sst2": "accuracy",
    }
    assert made["cola"].headline == made["cola"].matthews == pytest.approx(0.25)
    assert made["tweet_hate"].headline == made["tweet_hate"].macro_f1 == pytest.approx(0.625)
    assert made["sst2"].headline == made["sst2"].accuracy == pytest.approx(4 / 6)


def test_a_diverged_model_is_right_nowhere() -> None:
    assert label_ids(np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])).tolist() == [1, -1, -1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test_examples": 0}, "--test-examples 0"),
        ({"learning_rates": ()}, "--learning-rates"),
        ({"probe_cs": (0.1, -1.0)}, "--probe-cs"),
        ({"seed": -1}, "--seed -1"),
        ({"learning_rates": (1e-4, 1e-4)}, "twice"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_packaged_encoder_beats_chance_on_real_data(data_dir: Path, encoder_dir: Path) -> None:
    config = BenchmarkConfig(
        train_examples=300, validation_examples=100, test_examples=200, few_shot_draws=1, few_shot_epochs=4,
        learning_rates=(1e-4,), max_length=48,
    )  # fmt: skip
    encoder = Encoder.load(encoder_dir)
    task = encode(load_texts(data_dir, "sst2", config), load_tokenizer(encoder_dir), config)
    benchmark = Benchmark(encoder, task, config)
    assert benchmark.probe().accuracy > 0.65  # chance: 0.5, standard error 0.035
    assert benchmark.few_shot()[0].accuracy > 0.6
