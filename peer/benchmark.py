"""How good is an encoder as a base model: probe, full finetuning and few-shot finetuning on one data set.

Every choice (learning rate, penalty of the probe) is made on validation rows; the test rows are read once,
with what was chosen. Finetuning and the start of the head are those of a real peer (`peer.finetune`,
`peer.evaluate.fit_head`). Two encoders with the same config see the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from coordinator.errors import UsageError
from peer.data import DataConfig, TaskData, load_task_data, tokenize
from peer.evaluate import Features, Probe, extract_features, fit_head, fit_probe, predict, write_probe
from peer.finetune import Budget, FinetuneConfig, finetune
from peer.layout import TensorLayout, make_manifest
from peer.memory import release_freed_memory
from peer.model import (
    export_backbone,
    head_state,
    import_backbone,
    load_backbone,
    load_classifier,
    load_head_state,
    load_tokenizer,
)
from peer.statistics import Answers, Metric, metric_value
from peer.tasks import Task

Array = NDArray[Any]
Method = Literal["probe", "few_shot", "finetune"]
METHODS: tuple[Method, ...] = get_args(Method)
# Where accuracy misleads: cola is 69 % acceptable (GLUE's metric), tweet_hate is TweetEval's macro-F1.
HEADLINE_METRICS: Mapping[str, Metric] = {"cola": "matthews", "tweet_hate": "macro_f1"}
TRAINING_COST = 3.5  # of one finetuning example, in forward passes: 100 against 350 per second on 2 cores


@dataclass(frozen=True)
class BenchmarkConfig:
    train_examples: int = 1000  # for probe and full finetuning, stratified
    validation_examples: int = 200  # rows that choices are made on
    test_examples: int = 1000  # rows of the figures
    finetune_examples: int = 3000  # that one full finetuning uses; three epochs of 1000, say
    few_shot_examples: int = 100  # of each draw; stratified, each label at least once where there is room
    few_shot_draws: int = 3
    few_shot_epochs: int = 10
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)  # all are tried, by method and draw
    batch_size: int = 16
    max_length: int = 128  # tokens
    probe_cs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # all are tried
    seed: int = 0  # of rows, batches, dropout and heads
    use_cpu: bool = False  # even where there is a GPU

    def __post_init__(self) -> None:
        """Raises UsageError."""
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            if name == "seed":
                is_good = value >= 0
            else:
                is_good = name == "use_cpu" or (len(values) > 0 and all(0 < v < float("inf") for v in values))
            if not is_good:
                raise UsageError(f"--{name.replace('_', '-')} {value}: not possible, give a number above 0")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise UsageError(f"learning rates {self.learning_rates}: one is given twice")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    def finetune_config(self, learning_rate: float) -> FinetuneConfig:
        return FinetuneConfig(
            learning_rate=learning_rate,
            per_device_train_batch_size=self.batch_size,
            max_length=self.max_length,
            use_cpu=self.device.type == "cpu",
        )


@dataclass(frozen=True, eq=False)
class Encoder:
    model_dir: Path  # config and tokenizer
    layout: TensorLayout
    flat: torch.Tensor  # (num_values,) float32, the backbone

    @classmethod
    def load(cls, model_dir: Path) -> Encoder:
        """Raises ModelError."""
        return cls(model_dir, *load_backbone(model_dir))

    @cached_property
    def state_hash(self) -> str:
        return make_manifest(self.layout, self.flat).state_hash


@dataclass(frozen=True)
class BenchmarkTexts:
    """The rows of one data set that all models are measured on, as text."""

    name: str
    data: TaskData  # train, validation and test, cut to the config's sizes
    few_shot: tuple[Dataset, ...]  # the training rows of each draw, from all of the training split

    @cached_property
    def digest(self) -> str:
        """sha256, hex, of every text and label: two results compare only if it is the same."""
        digest = hashlib.sha256(repr(self.data.task).encode())
        for split in (self.data.train, self.data.validation, self.data.test, *self.few_shot):
            rows = {name: list(split[name]) for name in sorted(split.column_names)}
            digest.update(json.dumps(rows, sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class EncodedTask:
    """The same, tokenized: used by all models with this tokenizer."""

    name: str
    task: Task
    train: Dataset  # columns of `peer.data.tokenize`, here and below
    validation: Dataset
    test: Dataset
    few_shot: tuple[Dataset, ...]


@dataclass(frozen=True, eq=False)
class Score:
    """One method on one data set. All metrics follow from labels and predictions."""

    dataset: str
    method: Method
    draw: int  # 0 unless few_shot
    labels: Array  # (n,) of the test rows
    predictions: Array  # (n,) label ids; -1 where the model gave no finite number
    chosen: float  # learning rate, or C of the probe
    validation_score: float  # headline metric with it on the validation rows

    @property
    def correct(self) -> Array:
        """(n,) bool."""
        right: Array = self.labels == self.predictions
        return right

    @property
    def accuracy(self) -> float:
        return metric_value("accuracy", self.labels, self.predictions)

    @property
    def macro_f1(self) -> float:
        return metric_value("macro_f1", self.labels, self.predictions)

    @property
    def matthews(self) -> float:
        return metric_value("matthews", self.labels, self.predictions)

    @property
    def headline(self) -> float:
        """Value of `headline_metric(dataset)`."""
        return metric_value(headline_metric(self.dataset), self.labels, self.predictions)


def headline_metric(dataset: str) -> Metric:
    return HEADLINE_METRICS.get(dataset, "accuracy")


def answers(scores: Sequence[Score]) -> Answers:
    """All draws of one method on one data set, for `peer.statistics`."""
    return Answers(
        labels=scores[0].labels,
        predictions=np.stack([score.predictions for score in scores]),
        metric=headline_metric(scores[0].dataset),
    )


def probe(encoder: Encoder, data: EncodedTask, config: BenchmarkConfig) -> Score:
    """ColD-Frozen (Don-Yehiya et al. 2023, section 5): a linear head on mean-pooled features."""
    return Benchmark(encoder, data, config).probe()


def finetune_score(encoder: Encoder, data: EncodedTask, config: BenchmarkConfig) -> Score:
    """All weights finetuned, on all training rows."""
    return Benchmark(encoder, data, config).finetune()


def few_shot(encoder: Encoder, data: EncodedTask, config: BenchmarkConfig) -> list[Score]:
    """All weights finetuned on few examples; one score for each draw of them."""
    return Benchmark(encoder, data, config).few_shot()


class Benchmark:
    """One encoder on one data set; features are kept, as several fits use them. Not thread-safe."""

    def __init__(
        self,
        encoder: Encoder,
        data: EncodedTask,
        config: BenchmarkConfig,
        on_cost: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`on_cost` gets what was done since the last call, in forward passes (see `cost`)."""
        self._encoder, self._data, self._config, self._on_cost = encoder, data, config, on_cost
        self._tokenizer = load_tokenizer(encoder.model_dir)
        backbone = (encoder.layout, encoder.flat)
        self._model = load_classifier(encoder.model_dir, data.task, seed=config.seed, backbone=backbone)
        nn.Module.to(self._model, config.device)  # (transformers' own `to` is not typed)
        self._first_head = head_state(self._model)

    def run(self, method: Method) -> list[Score]:
        """One score; of few_shot, one for each draw."""
        if method == "few_shot":
            return self.few_shot()
        return [self.probe() if method == "probe" else self.finetune()]

    def probe(self) -> Score:
        train, task, seed = self._train_features, self._data.task, self._config.seed
        validation = self._features(self._data.validation)
        fits = [fit_probe(task, train.pooled, train.labels, seed=seed, c=c) for c in self._config.probe_cs]
        values = [self._value(validation.labels, fit.predict(validation.pooled)) for fit in fits]
        best = int(np.argmax(values))  # the first of equals, so the stronger penalty
        test = self._features(self._data.test)
        predictions = label_ids(fits[best].predict(test.pooled))
        return self._score("probe", 0, predictions, self._config.probe_cs[best], values[best])

    def finetune(self) -> Score:
        budget = Budget(self._config.finetune_examples)
        return self._tuned("finetune", 0, self._data.train, budget)

    def few_shot(self) -> list[Score]:
        scores = []
        for draw, train in enumerate(self._data.few_shot):
            budget = Budget(self._config.few_shot_epochs * len(train))
            scores.append(self._tuned("few_shot", draw, train, budget))
        return scores

    @cached_property
    def _train_features(self) -> Features:
        return self._features(self._data.train)

    def _features(self, dataset: Dataset) -> Features:
        self._reset()
        return extract_features(
            self._model, dataset, self._tokenizer, on_progress=self._progress(len(dataset))
        )

    def _reset(self) -> None:
        import_backbone(self._model, self._encoder.layout, self._encoder.flat)
        load_head_state(self._model, self._first_head)

    def _tuned(self, method: Method, draw: int, train: Dataset, budget: Budget) -> Score:
        """Finetune with each learning rate; the test rows see the one that validation rows like best."""
        self._reset()
        head = fit_head(
            self._model,
            self._data.task,
            train,
            self._tokenizer,
            self._config.seed,
            on_progress=self._progress(len(train)),
        )
        best: _Trained | None = None
        for learning_rate in self._config.learning_rates:
            self._train(train, head, learning_rate, budget, seed=self._config.seed + 1_000 * draw)
            logits = self._logits(self._data.validation)
            value = self._value(np.asarray(self._data.validation["labels"]), logits)
            if best is None or value > best.validation_score:
                backbone = export_backbone(self._model, self._encoder.layout)
                best = _Trained(learning_rate, value, backbone, head_state(self._model))
        assert best is not None  # the config has at least one learning rate
        import_backbone(self._model, self._encoder.layout, best.flat)
        load_head_state(self._model, best.head)
        predictions = label_ids(self._logits(self._data.test))
        return self._score(method, draw, predictions, best.learning_rate, best.validation_score)

    def _train(self, train: Dataset, head: Probe, learning_rate: float, budget: Budget, seed: int) -> None:
        self._reset()
        write_probe(self._model, head)
        finetune(
            self._model,
            train,
            self._tokenizer,
            self._config.finetune_config(learning_rate),
            budget,
            seed=seed,
            on_progress=self._progress(TRAINING_COST * (budget.num_examples or 0)),
        )
        release_freed_memory()

    def _logits(self, dataset: Dataset) -> Array:
        return predict(self._model, dataset, self._tokenizer, on_progress=self._progress(len(dataset)))

    def _value(self, labels: Array, logits: Array) -> float:
        return metric_value(headline_metric(self._data.name), labels, label_ids(logits))

    def _score(
        self, method: Method, draw: int, predictions: Array, chosen: float, validation_score: float
    ) -> Score:
        labels = np.asarray(self._data.test["labels"])
        return Score(self._data.name, method, draw, labels, predictions, chosen, validation_score)

    def _progress(self, total_cost: float) -> Callable[[float], None]:
        """For a part of the work: gets the fraction of it that is done."""
        done = 0.0

        def update(fraction: float) -> None:
            nonlocal done
            self._on_cost((fraction - done) * total_cost)
            done = fraction

        return update


# ---- rows ---------------------------------------------------------------------------------


def load_texts(data_dir: Path, name: str, config: BenchmarkConfig) -> BenchmarkTexts:
    """The rows of `data_dir/name`; the same for the same files and config. Raises DataError."""
    num_held_out = max(config.validation_examples, config.test_examples)
    data = load_task_data(
        DataConfig(
            data=str(data_dir / name),
            task="classification",
            max_eval_examples=num_held_out,
            seed=config.seed,
        )
    )
    return cut_texts(name, data, config)


def cut_texts(name: str, data: TaskData, config: BenchmarkConfig) -> BenchmarkTexts:
    """Stratified samples; of few_shot from all training rows, seeded by data set and draw."""
    sizes = (config.train_examples, config.validation_examples, config.test_examples)
    train, validation, test = (
        _sample(split, size, _generator(config.seed, name, 0, part))
        for part, (split, size) in enumerate(
            zip((data.train, data.validation, data.test), sizes, strict=True)
        )
    )
    draws = tuple(
        _sample(data.train, config.few_shot_examples, _generator(config.seed, name, 1, draw))
        for draw in range(config.few_shot_draws)
    )
    return BenchmarkTexts(name, replace(data, train=train, validation=validation, test=test), draws)


def encode(texts: BenchmarkTexts, tokenizer: PreTrainedTokenizerBase, config: BenchmarkConfig) -> EncodedTask:
    data, length = texts.data, config.max_length
    train, validation, test, *few = (
        tokenize(split, tokenizer, length, is_pair=data.task.is_pair)
        for split in (data.train, data.validation, data.test, *texts.few_shot)
    )
    return EncodedTask(texts.name, data.task, train, validation, test, tuple(few))


def stratified_draw(labels: Array, num_rows: int, rng: np.random.Generator) -> Array:
    """Sorted indices of `num_rows` rows (all, if there are fewer), in proportion to the labels (n,).

    One row of each label comes first; where `num_rows` is less than the number of labels, some go without.
    """
    order = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        order[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)  # evenly from 0 to 1
        order[rows[0]] -= 1.0
    return np.sort(np.argsort(order, kind="stable")[:num_rows])


def cost(method: Method, data: BenchmarkTexts | EncodedTask, config: BenchmarkConfig) -> float:
    """About how long a method takes, in forward passes of one row."""
    splits = data.data if isinstance(data, BenchmarkTexts) else data
    train, validation, test = (len(split) for split in (splits.train, splits.validation, splits.test))
    if method == "probe":
        return train + validation + test
    if method == "finetune":
        tried = TRAINING_COST * config.finetune_examples + validation
        return train + len(config.learning_rates) * tried + test
    return sum(
        len(few)
        + len(config.learning_rates) * (TRAINING_COST * config.few_shot_epochs * len(few) + validation)
        + test
        for few in data.few_shot
    )


def label_ids(logits: Array) -> Array:
    """(n,) from (n, num_labels); -1 where a value is not finite, so a diverged model is right nowhere."""
    ids: Array = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
    return ids


# ---- helpers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    learning_rate: float
    validation_score: float
    flat: torch.Tensor  # (num_values,) the finetuned backbone
    head: dict[str, torch.Tensor]


def _sample(split: Dataset, num_rows: int, rng: np.random.Generator) -> Dataset:
    if num_rows >= len(split):
        return split
    return split.select(stratified_draw(np.asarray(split["label"]), num_rows, rng))


def _generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])
